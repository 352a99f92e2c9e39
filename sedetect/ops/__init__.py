"""The kernel layer for other tooling: expert computations that update a BankStats while they run.

One contract (contract), four backends that keep it (reference, cpu, triton, cuda), and the choice between them. Nothing
here knows a model: tensors in, tensors out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
