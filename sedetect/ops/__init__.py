"""The kernel layer, usable by other tools: expert computations that update a BankStats as they run.

One contract (contract), four backends that implement it (reference, cpu, triton, cuda), and the choice between them.
Nothing here depends on a model: tensors in, tensors out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
