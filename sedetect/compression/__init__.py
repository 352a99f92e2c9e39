"""Applications of a ranking: pruning, merging, budgets, simulated quantization, and protect lists for quantizers.

ranking decides which experts are protected. Nothing here writes quantized weights: quantizers do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
