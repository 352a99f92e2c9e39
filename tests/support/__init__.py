"""What tests share: models, checkpoints, references that compute by plain loops, and assertions. No tests.

interpreter stands apart: it must be imported before triton, and conftest.py does so first.
"""
