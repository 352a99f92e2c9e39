"""ExpertMonitor: a profile of a fixed small text at regular steps of a training run."""

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from sedetect.calibration.records import Document
from sedetect.calibration.windows import Text
from sedetect.errors import Argument, SedetectError
from sedetect.models.banks import Bank, find_banks
from sedetect.models.identity import model_id
from sedetect.models.wrappers import is_sharded, unwrap
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats
from sedetect.training.series import Series, State
from sedetect.training.states import StateMeter, fixed_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL = Text(tokens=4096, seq_len=512)


class ExpertMonitor(TrainerCallback):
    """Follow the experts of a model while it trains.

        trainer.add_callback(ExpertMonitor("run/experts", log=trainer.log))

    or, in your own loop,

        monitor = ExpertMonitor("run/experts", tokenizer=tokenizer)
        for step, batch in enumerate(batches):
            monitor.step(model, step)
            ...
        monitor.measure(model, step + 1)

    Before the first step, every `every` steps and after the last one, the experts' statistics, the attention sinks, the
    largest activation of the residual stream and the loss are measured on the same text and kept in the folder
    (sedetect.training.series), which `sedetect timeline` reads. Training is not affected: modes, random state,
    gradients and compiled graphs are restored. Where every rank has the whole model, the first one measures.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None = None,
        text: Text = SMALL,
        every: int = 100,
        log: Callable[[dict[str, float]], object] | None = None,
    ):
        """
        Args:
            folder: of the series. One that holds a series is continued where the run is resumed, and refused otherwise.
            tokenizer: the Trainer's by default.
            texts, text: as profile_model takes them; 8 windows of 512 tokens of the embedded corpus by default.
            every: steps between two states.
            log: is given the scalars of every state: trainer.log, wandb.log, ...
        Raises:
            SedetectError: for every below 1; from the first state on, for what StateMeter and profile refuse.
        """
        if every < 1:
            raise SedetectError(Argument("every"), f" {every}: must be at least 1")
        self.series = Series(folder)
        self._tokenizer, self._texts, self._text, self._every, self._log = tokenizer, texts, text, every, log
        self._meter: StateMeter | None = None
        self._banks: list[Bank] = []

    def step(self, model: nn.Module, step: int) -> State | None:
        """Measure if this step is due; the first call begins the series at its step."""
        if self._meter is None:
            return self.measure(model, step)
        return self._measure(model, step, checked=False) if step % self._every == 0 else None

    def measure(self, model: nn.Module, step: int) -> State | None:
        """Measure now, as the state of this step, with the weights' checksum; None on a rank that does not measure."""
        return self._measure(model, step, checked=True)

    def _measure(self, model: nn.Module, step: int, checked: bool) -> State | None:
        whole = unwrap(model)
        if self._meter is None:
            self._meter = self._begin(whole, step)
        if self._meter.model is not whole:
            raise SedetectError(f"{self.series.path}: follows another model; give each model its own monitor")
        first = not dist.is_initialized() or dist.get_rank() == 0
        together = is_sharded(model) or any(bank.here is not None for bank in self._banks)
        if not (first or together):
            return None
        state, stats = self._meter.measure(step, checked=checked)
        if first:
            try:
                self.series.append(state, stats)
            except SedetectError as error:  # must not end a training run
                warnings.warn(f"step {step} is not in the series: {error}", stacklevel=2)
            if self._log is not None:
                self._log(scalars(state, stats))
        return state

    def _begin(self, model: Any, step: int) -> StateMeter:
        if any(p.numel() == 0 and hasattr(p, "ds_id") for p in model.parameters()):
            raise SedetectError(
                f"{type(model).__name__}: DeepSpeed ZeRO-3 keeps its weights elsewhere; use ZeRO-2, or fully_shard"
            )
        if self._tokenizer is None:
            raise SedetectError("ExpertMonitor: no tokenizer; give ", Argument("tokenizer"), " or the Trainer one")
        self._banks = find_banks(model)
        fixed = fixed_text(model, self._tokenizer, self._texts, self._text)
        meter = StateMeter(model, self._banks, fixed)
        if dist.is_initialized() and dist.get_rank() != 0:
            return meter
        self.series.check(fixed.windows.source, model_id(model))
        if step == 0 and self.series.states():
            raise SedetectError(f"{self.series.path}: holds a series already; give a new folder, or resume its run")
        self.series.cut(step)
        return meter

    # Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokenizer = self._tokenizer or kwargs.get("processing_class")
        self.measure(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # on_train_end's
            return
        due = control.should_log  # of the step's own loss, which trainer.log takes for done
        self.step(kwargs["model"], state.global_step)
        control.should_log = due

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(kwargs["model"], state.global_step)


def scalars(state: State, stats: ModelStats) -> dict[str, float]:
    """The scalars of a state to log, by name."""
    ranking = rank(stats)
    values = {
        "experts/loss": state.loss,
        "experts/sink_mean": state.sink_mean,
        "experts/best_head": state.best_head,
        "experts/residual_max": state.residual_max,
        "experts/largest": ranking.maximum,
        "experts/candidates": float(len(ranking.found)),
    }
    return {name: value for name, value in values.items() if value is not None}
