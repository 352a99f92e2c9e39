"""A live model: its banks, how they are attached and measured, which row is which token, loading and identity.

Only this package and adapters depend on the internals of transformers. Nothing here decides what to run.
"""
