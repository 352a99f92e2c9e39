"""Serving engines whose own experts are measured. One module per engine, imported only when it is asked for.

Engines and training do not know each other.
"""
