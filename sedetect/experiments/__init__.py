"""Experiments on a running model: ablation with controls, the residual stream, traces, super weights.

Everything here runs forwards to measure effects; profiling measures the experts themselves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
