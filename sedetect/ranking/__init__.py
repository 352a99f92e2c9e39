"""Conclusions from statistics: the rule and its verdicts, saliencies, stability, comparison, coverage.

Everything here is computed from statistics alone; no model is loaded and nothing is printed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
