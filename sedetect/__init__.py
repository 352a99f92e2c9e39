"""Find the super experts of Mixture-of-Experts models, measured by the kernels that compute them.

with sedetect.profile(model) as prof:
    model(input_ids=input_ids)
print(sedetect.rank(prof.stats).headline)
"""

from sedetect import ops
from sedetect.errors import SedetectError
from sedetect.pipeline import ModelProfile, profile_model
from sedetect.place import BankId
from sedetect.profiler import Profile, profile
from sedetect.ranking import Ranking, SuperExpert, rank
from sedetect.stats import BankStats, ModelStats, merge_all
from sedetect.version import __version__

__all__ = [
    "BankId",
    "BankStats",
    "ModelProfile",
    "ModelStats",
    "Profile",
    "Ranking",
    "SedetectError",
    "SuperExpert",
    "__version__",
    "merge_all",
    "ops",
    "profile",
    "profile_model",
    "rank",
]
