"""Live training runs, and series of checkpoints.

Training and engines do not know each other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
