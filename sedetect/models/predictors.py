"""The multi-token prediction (MTP) head of a checkpoint, which transformers does not load with the model.

It is what transformers makes of it (MtpModel), whose definition this is: for the token at position p, with h the hidden
state that the model gives its lm_head at position p - 1,

    y = decoder layer(eh_proj([enorm(embedding of the token), hnorm(h)]))
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from sedetect.checkpoints.files import source_name
from sedetect.checkpoints.options import Loading
from sedetect.errors import SedetectError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_predictor(model: "PreTrainedModel", source: Any) -> None:
    """Raise SedetectError for a model, with weights or without, that has no such head, several, or a quantized one."""
    name, config = source_name(source), model.config.get_text_config()
    heads = getattr(config, "num_mtp_layers", None)
    if not heads:
        raise SedetectError(
            f"{name}: its config has no multi-token prediction head known to transformers (num_mtp_layers); profile "
            f"it without"
        )
    if heads > 1:
        raise SedetectError(
            f"{name}: has {heads} heads that predict further tokens; those of a model with one are measured"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise SedetectError(
            f"{name}: its head that predicts a further token is stored quantized, which cannot be measured; give an "
            f"unquantized checkpoint"
        )


def load_predictor(model: "PreTrainedModel", source: Any, loading: Loading) -> "PreTrainedModel":
    """The MtpModel of a loaded model, in eval mode, with the weights that its checkpoint has for it.

    Raises SedetectError for weights that are missing, or in a form that transformers does not know.
    """
    from transformers.modeling_layers import MtpModel

    name = source_name(source)
    try:
        with _found_in(model, name, loading):
            head = MtpModel.from_pretrained(model, device_map={"": model.device})
    except Exception as error:  # of whatever form its weights have that transformers does not know
        raise SedetectError(
            f"{name}: its head that predicts a further token cannot be loaded ({shorten(error)}); profile it without"
        ) from error
    return head.eval()


@contextmanager
def _found_in(model: "PreTrainedModel", name: str, loading: Loading) -> Iterator[None]:
    """Where MtpModel looks for weights: in this revision, and in the layers after the last, whatever their number."""
    layers, own = model.config.get_text_config().num_hidden_layers, model._keys_to_ignore_on_load_unexpected
    named = model.config._name_or_path
    if not Path(name).is_dir():
        file = cached_file(name, "config.json", revision=loading.revision)
        model.config._name_or_path = str(Path(file or "").parent)
    model._keys_to_ignore_on_load_unexpected = [*(own or ()), rf"\blayers\.{layers}\.", r"^mtp\."]
    try:
        yield
    finally:
        model.config._name_or_path, model._keys_to_ignore_on_load_unexpected = named, own


def predict(head: "PreTrainedModel", ids: torch.Tensor, hidden: torch.Tensor) -> None:
    """One forward of a head over ids (B, L), with the hidden states (B, L, H) that the model gave its lm_head."""
    ids = ids.to(hidden.device)
    positions = torch.arange(1, ids.shape[1], device=ids.device).expand(len(ids), -1)
    mask = torch.ones_like(ids[:, 1:])
    head(
        input_ids=ids[:, 1:],
        last_hidden_states=hidden[:, :-1],
        attention_mask=mask,
        position_ids=positions,
        mtp_cache=None,
    )
