"""Find the super experts of Mixture-of-Experts models, measured by the kernels that compute them.

with sedetect.profile(model) as prof:
    model(input_ids=input_ids)
print(sedetect.rank(prof.stats).headline)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
