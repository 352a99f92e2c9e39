"""Measurements: the statistics of banks and models, the places of experts, and the residual stream.

Values that merge and are saved. Nothing here runs a model or interprets results.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
