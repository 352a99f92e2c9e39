"""Experts outside transformers' experts interface: stacked, in lists of modules, quantized.

An architecture that is not covered gets its class here. Adapters compute by sedetect.ops and do not depend on
profiling.
"""
