"""Experts that do not go through transformers' experts interface: modules with stacked or listed weights, quantized ones.

An architecture that is not covered gets its class here. Adapters compute by sedetect.ops and know no profile.
"""
