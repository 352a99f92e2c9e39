"""A live model: its banks, how they are attached and measured, which row is which token, loading and identity.

The internals of transformers are known here and in adapters, and nowhere else. Nothing here decides what to run.
"""
