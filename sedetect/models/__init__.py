"""A live model: its banks, how they are attached and measured, which row is which token, loading and identity.

One place knows the internals of transformers. Nothing here decides what to run.
"""
