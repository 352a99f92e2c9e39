"""Calibration data: texts, and the token windows cut from them.

Knows tokenizers; of a model, only its vocabulary size and number of positions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
