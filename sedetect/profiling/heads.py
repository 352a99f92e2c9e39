"""A profile of the multi-token prediction head with that of its model: over the same text, in one pass."""

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from sedetect.models.banks import find_banks
from sedetect.models.measure import Measuring
from sedetect.models.predictors import predict
from sedetect.profiling.profiler import SourcesProfile
from sedetect.stats.model import ModelStats
from sedetect.stats.note import Note, sorted_notes
from sedetect.stats.place import PREDICTORS, BankId

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadProfile:
    """Context manager: begin() a source, run() each batch after the model's own forward, join() to its statistics.

    The experts are those of the stack "mtp", in the layer after the model's last.
    """

    def __init__(self, model: "PreTrainedModel", head: "PreTrainedModel", measuring: Measuring):
        self._model, self._head = model, head
        self._layers: int = model.config.get_text_config().num_hidden_layers
        self._profile = SourcesProfile(head, find_banks(head), "", measuring=replace(measuring, modalities=False))
        self._hidden: torch.Tensor | None = None

    def __enter__(self) -> Self:
        self._profile.__enter__()
        self._hook = self._model.get_decoder().register_forward_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._profile.__exit__(kind, error, trace)

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._hidden = output[0]

    def begin(self, source: str, info: dict[str, Any]) -> None:
        self._profile.begin(source, info)

    def run(self, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """The head's forward over ids (B, L), which the model has just read; numbers (B,) of the sequences."""
        assert self._hidden is not None  # the model ran
        self._profile.batch(sequence_ids=numbers)
        predict(self._head, ids, self._hidden)
        self._hidden = None

    def join(self, stats: ModelStats) -> ModelStats:
        """The statistics of the model's source with those of the head."""
        own, header = self._profile.take(), stats.header
        names = {bank: BankId(PREDICTORS, self._layers + bank.layer, bank.kind) for bank in own.banks}
        before = next(one.module for one in header.banks.values()).partition("layers.")[0]
        infos = {
            str(new): replace(
                own.header.banks[str(bank)],
                module=own.header.banks[str(bank)].module.replace(
                    f"layers.{bank.layer}.mtp_block.", f"{before}layers.{new.layer}."
                ),
            )
            for bank, new in names.items()
        }
        text = (
            f"{PREDICTORS}.L{self._layers}: the head that predicts a further token; its rows are of the second token "
            "of a sequence and those after it"
        )
        notes = [
            Note("mtp", text),
            *(replace(note, bank=names[note.bank]) for note in own.header.notes if note.bank is not None),
        ]
        return ModelStats(
            stats.banks | {names[bank]: state for bank, state in own.banks.items()},
            replace(
                header,
                banks=header.banks | infos,
                layers=header.layers | {PREDICTORS: self._layers},
                notes=sorted_notes([*header.notes, *notes]),
            ),
        )
