"""What to do with the answer: prune, merge, budget, simulate quantization, and protect lists for quantizers.

Who is protected is ranking's to say. Nothing here quantizes for good: that is what the other tools are for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
