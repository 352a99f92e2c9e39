"""Which model it is: its name, and a digest that is one for all runs of it."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from sedetect.checkpoints.files import weights_digest
from sedetect.stats.model import digest

# Of a config: says nothing of what the model computes, or changes with the release or the options that read it. So does
# quantization_config, which goes where transformers dequantizes; how weights are stored is in their own digest.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "distributed_config",
    "quantization_config",
}  # fmt: skip


def model_name(model: nn.Module) -> str:
    """The hub name, or the last part of a folder's path: files that travel do not tell where it lay."""
    config: Any = model.config
    name: str = config._name_or_path
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def model_digest(model: nn.Module) -> str:
    """What makes two runs runs of one model: a digest of its config and of its checkpoint's weights."""
    config: Any = model.config
    weights = weights_digest(config._name_or_path)
    return digest(json.dumps([_stable(config.to_dict()), weights], sort_keys=True, default=str))


def _stable(config: Any) -> Any:
    """A config's dictionary without what is volatile, sub-configs too."""
    if isinstance(config, dict):
        return {key: _stable(value) for key, value in config.items() if key not in _VOLATILE}
    return config
