"""Serving engines, profiled as they serve. One module per engine, imported only on request.

Engines and training do not know each other.
"""
