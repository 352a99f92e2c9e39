"""Analyses of the experts' weights, outputs and routing ("A Closer Look into Mixture-of-Experts").

Arrays and tables of numbers; charts of them belong in report.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
