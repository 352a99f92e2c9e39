"""A model whose forwards are followed, so that whoever computes its experts can ask which row is which token."""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from sedetect.adapters.forwards import replace_method
from sedetect.errors import SedetectError
from sedetect.kernels.rows import Rows
from sedetect.models.banks import Bank
from sedetect.models.patches import TOWERS
from sedetect.models.row_context import UNMAPPED_CALL, RowTracker
from sedetect.models.wrappers import unwrap
from sedetect.stats.note import Note


class TrackedModel:
    """Context manager: one wrapper around the top-level forward, and one around generate(), put back on exit.

    Forwards in several threads run one after another, and without gradients, which torch switches off by thread.
    """

    def __init__(
        self, model: nn.Module, prefix: int | None = None, pad: int | None = None, modalities: tuple[str, ...] = ()
    ):
        self._model, self._prefix, self._pad, self._modalities = unwrap(model), prefix, pad, modalities
        self._lock, self._thread = threading.RLock(), 0  # the thread whose forward is under way
        self.restart()
        self._rows: dict[torch.device, Rows] | None = None
        self._undo: list[Callable[[], None]] = []

    def restart(self) -> None:
        """Follow from here on as if nothing had run."""
        self.tracker = RowTracker(self._model, prefix=self._prefix, pad=self._pad, modalities=self._modalities)

    def __enter__(self) -> "TrackedModel":
        self._wrap("forward", self._forward)
        if hasattr(self._model, "generate"):
            self._wrap("generate", self._generate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def rows_of(self, bank: Bank, tokens: int, device: torch.device) -> Rows:
        """The rows (T = tokens) of a bank's call in the forward under way, on device; unmapped ones where unknown."""
        if self._rows is None:
            self.tracker.notes.add(UNMAPPED_CALL)
            return Rows.unmapped(tokens, device)
        if not torch.compiler.is_compiling() and threading.get_ident() != self._thread:
            raise SedetectError(
                f"{bank.path}: ran in a thread of its own during a forward of another; call the whole model in each "
                "thread, or its layers in one alone"
            )
        patches = self.tracker.patches.get(tokens) if bank.id.stack in TOWERS else None
        if patches is not None:
            return patches.to(device)
        if bank.id.stack != "decoder":
            self.tracker.notes.add(Note("unmapped", f"rows not mapped: those of the {bank.id.stack} stack"))
            return Rows.unmapped(tokens, device)
        rows = next(iter(self._rows.values()))
        regrouped = len(rows.counted) != tokens
        if regrouped and (self.tracker.grouped is None or not bank.id.routed):
            text = f"{bank.id} ({bank.name}): rows not mapped, the module regroups its tokens"
            self.tracker.notes.add(Note("regrouped", text))
            return Rows.unmapped(tokens, device)
        if device not in self._rows:
            self._rows[device] = rows.to(device)
        return self._of_group(bank, tokens, device) if regrouped else self._rows[device]

    def _of_group(self, bank: Bank, tokens: int, device: torch.device) -> Rows:
        """The rows that the model gives this bank: of the tokens of images and video, or of the others, in order."""
        assert self._rows is not None and self.tracker.grouped is not None  # rows_of
        others = self.tracker.grouped.to(device, non_blocking=device.type == "cuda") != bank.id.kind.endswith("_vision")
        return self._rows[device].take(others.to(torch.int8).argsort(stable=True)[:tokens])

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace a method of the model by wrapper(original, ...)."""
        original = getattr(self._model, name)
        wrapped = functools.wraps(original)(functools.partial(wrapper, original))
        self._undo.append(replace_method(self._model, name, wrapped))

    @torch.compiler.disable(recursive=False)
    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lock, torch.no_grad():
            rows = self.tracker.begin(args, kwargs)
            self._rows, self._thread = None if rows is None else {rows.counted.device: rows}, threading.get_ident()
            try:
                output = original(*args, **kwargs)
            except BaseException:
                text = "a forward failed before its end: its first layers counted rows, later ones did not"
                self.tracker.notes.add(Note("failed", text))
                raise
            finally:
                self._rows = None
            self.tracker.end(output)
            return output

    @torch.compiler.disable(recursive=False)
    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache_implementation") == "paged":  # continuous batching, whose forwards run in another thread
            return original(*args, **kwargs)
        with self._lock, self.tracker.generating(args, kwargs):
            return original(*args, **kwargs)
