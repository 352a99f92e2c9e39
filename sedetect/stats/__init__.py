"""What was measured: the statistics of a bank and of a model, where an expert is, what the residual stream showed.

Values that merge and are saved. Nothing here runs a model or judges what it finds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
