"""profile: a context manager in which a model's own forward measures its experts."""

import uuid
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import transformers
from torch import nn

from sedetect.adapters.registry import serve_quantized
from sedetect.adapters.stacked import Adapter
from sedetect.errors import Argument, SedetectError
from sedetect.models import compiled
from sedetect.models.attach import attach, is_attached
from sedetect.models.banks import Bank, check_eval, find_banks, layers_per_stack
from sedetect.models.identity import digest_notes, model_digest, model_dtype, model_name
from sedetect.models.measure import Measurement, Measuring, measure
from sedetect.models.modalities import placeholders
from sedetect.models.row_context import Batch, check_padded
from sedetect.models.tracking import TrackedModel
from sedetect.models.wrappers import checkpoint_name, unwrap
from sedetect.ops.choose import check_backend, missing_fast_path
from sedetect.profiling.served import Engine, ServedProfile
from sedetect.stats.bank import BankStats
from sedetect.stats.model import BankInfo, Header, ModelStats, Source
from sedetect.stats.note import Note, sorted_notes
from sedetect.version import __version__


class Profile:
    """One profile of one model; made by sedetect.profile.

    banks and digest: where they are known already. Only these banks are measured.
    Inside the with block every forward of the model is measured, in torch.no_grad(). stats may be read there and later.
    """

    def __init__(
        self,
        model: nn.Module,
        source: str | None,
        info: dict[str, Any] | None,
        prefix: int | None,
        measuring: Measuring,
        banks: list[Bank] | None = None,
        digest: str | None = None,
        pad: int | None = None,
    ):
        check_backend(measuring.backend)
        self._model = unwrap(model)
        check_eval(self._model)
        empty = next((name for name, weight in self._model.named_parameters() if weight.is_meta), None)
        if banks is None and empty and not any(hasattr(module, "_hf_hook") for module in self._model.modules()):
            raise SedetectError(f"{checkpoint_name(empty)}: on the meta device, without values; load the weights first")
        self._source = source or f"profile-{uuid.uuid4().hex[:12]}"
        self._info = info or {}
        self._banks = find_banks(self._model) if banks is None else banks
        self._modalities = modalities_of(self._model) if measuring.modalities else ()
        self._tracked = TrackedModel(self._model, prefix, pad, self._modalities)
        rows_of, parts = self._tracked.rows_of, len(self._modalities)
        self._measured = [Measurement(bank, rows_of, measuring, modalities=parts) for bank in self._banks]
        self._backend = measuring.backend
        parallel = next((bank for bank in self._banks if bank.here is not None), None)
        if parallel is not None and measuring.coactivation:
            raise SedetectError(
                f"{parallel.path}: coactivation of experts on different ranks cannot be counted; leave it out, or load "
                "the model on one device"
            )
        self._digest = model_digest(self._model) if digest is None else digest
        self._notes: set[Note] = set()  # of the model as it is attached
        self._attached = False
        self._failure: SedetectError | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        for bank in self._banks:
            if is_attached(bank):
                raise SedetectError(
                    f"{bank.path}: sedetect is attached already; leave the other context of this model first"
                )
        with ExitStack() as stack:
            restore, served = serve_quantized(self._model)
            stack.callback(restore)
            if served:
                text = f"{served} FP8 linears computed with dequantized weights: no kernel here"
                self._notes.add(Note("dequantized", text, count=served))
            stack.enter_context(compiled.attached(self._measured))
            calls = [(one.bank, measure(one)) for one in self._measured]
            stack.callback(attach(self._model, calls, computes=True))
            stack.enter_context(self._tracked)
            stack.enter_context(torch.no_grad())
            self._exit, self._attached = stack.pop_all(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failure, self._attached = self._failed(), False
        self._exit.close()
        if kind is None:
            self._join_ranks()

    def _failed(self) -> SedetectError | None:
        """Faults of a bank in this profile that make its statistics wrong."""
        if not self._attached:
            return self._failure
        adapters = (one.bank.module for one in self._measured if isinstance(one.bank.module, Adapter))
        return next((adapter.failure for adapter in adapters if adapter.failure is not None), None)

    def _join_ranks(self) -> None:
        """Give every rank of an expert-parallel model the statistics of all experts; all ranks come here together."""
        shared = [one for one in self._measured if one.here is not None]
        if not shared:
            return
        group = shared[0].bank.group
        parts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, [[one.whole(), *one.whole_parts()] for one in shared], group=group)
        for one, ranks in zip(shared, zip(*parts, strict=True), strict=True):
            (one.state, *one.parts), one.here = [reduce(BankStats.merge, of) for of in zip(*ranks, strict=True)], None

    def batch(
        self,
        *,
        sequence_ids: torch.Tensor | list | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Describe the rows of the next forward where its arguments do not.

        Args:
            sequence_ids: (B,) one per row of the batch, or (B, L) one per token for packed sequences; int64, at least
                0, unique within the profile's source.
            positions: (B, L) position of each token in its sequence.
            mask: (B, L) nonzero where a token counts.
        """
        for name, given in {"sequence_ids": sequence_ids, "positions": positions, "mask": mask}.items():
            check_padded(f"prof.batch: {name}", given)
        ids = None if sequence_ids is None else torch.as_tensor(sequence_ids)
        if ids is not None:
            if ids.is_floating_point() or ids.dim() not in (1, 2):
                raise SedetectError(
                    f"prof.batch: sequence_ids of shape {tuple(ids.shape)} and {ids.dtype}; give integers"
                )
            if ids.device.type == "cpu" and (
                bool((ids < 0).any()) or (ids.dim() == 1 and len(ids.unique()) < len(ids))
            ):
                raise SedetectError(
                    f"prof.batch: sequence_ids {ids.tolist()} are negative or not unique; give one each"
                )
            ids = ids.to(torch.int64)
        positions, mask = (None if x is None else torch.atleast_2d(torch.as_tensor(x)) for x in (positions, mask))
        self._tracked.tracker.pending = Batch(ids, positions, mask)

    @property
    def stats(self) -> ModelStats:
        """The statistics so far, on the CPU. Synchronizes with the device.

        Raises SedetectError where a block of remote code used its experts otherwise than its router says.
        """
        if (failure := self._failed()) is not None:
            raise failure
        tracker, banks, described = self._tracked.tracker, {}, {}
        notes = self._notes.union(digest_notes(self._model, self._digest))
        dtype: Any = self._model.dtype  # of every PreTrainedModel
        for one in self._measured:
            bank = one.bank
            if not one.served:
                notes.add(Note("never_ran", f"{bank.name} never ran: this profile is not complete", bank.id))
            elif (
                self._backend is None
                and not {"cpu", "cuda"} & one.served
                and one.state is not None
                and (why := missing_fast_path(one.state.counts.device, dtype))
            ):
                notes.add(Note("slow", why))
            if one.here is not None:
                ranks = dist.get_world_size(bank.group)
                text = f"experts of other ranks are not in it: leave the profile on all {ranks} first"
                notes.add(Note("other_ranks", text))
            notes.update(Note("fallback", why, bank.id) for why in one.fallbacks)
            banks[bank.id] = one.whole()
            described[str(bank.id)] = BankInfo(bank.name, one.top_k, sorted(one.served))
        tokens, sequences = tracker.totals()
        header = Header(
            model=model_name(self._model),
            digest=self._digest,
            dtype=model_dtype(self._model),
            layers=layers_per_stack(self._model, self._banks),
            banks=described,
            sources={self._source: Source(tracker.ranges(), self._info)},
            tokens=tokens,
            sequences=sequences,
            window=self._info.get("window"),
            versions={"sedetect": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            notes=sorted_notes(notes | tracker.notes),
        )
        return ModelStats(banks, header)

    @property
    def modalities(self) -> dict[str, ModelStats]:
        """The statistics of each modality's tokens alone, if requested; a modality that did not occur is left out.

        First tokens are those of its spans: of an image, say. Rows that are not mapped are in none of them.
        """
        whole, parts = self.stats, [one.whole_parts() for one in self._measured]
        found = {}
        for number, modality in enumerate(self._modalities):
            tokens, spans = self._tracked.tracker.modality_totals(modality)
            if not tokens:
                continue
            sources = {
                name: replace(one, info=one.info | {"modality": modality}) for name, one in whole.header.sources.items()
            }
            notes = (
                [] if modality == "text" else [Note("spans", f"first tokens are those of spans of {modality} tokens")]
            )
            header = replace(
                whole.header,
                tokens=tokens,
                sequences=spans,
                sources=sources,
                notes=sorted_notes([*whole.header.notes, *notes]),
            )
            banks = {one.bank.id: states[number] for one, states in zip(self._measured, parts)}
            found[modality] = ModelStats(banks, header)
        return found


class SourcesProfile(Profile):
    """A profile that is attached once and measures one source after another, each with statistics of its own.

    begin() a source, run its forwards, take() its statistics. The block may be entered again.
    """

    def __init__(
        self,
        model: nn.Module,
        banks: list[Bank],
        digest: str | None = None,
        *,
        prefix: int | None = None,
        measuring: Measuring = Measuring(),
    ):
        super().__init__(model, None, None, prefix, measuring, banks, digest)

    def begin(self, source: str, info: dict[str, Any], digest: str | None = None) -> None:
        """digest: the model's by now, where its weights change between sources."""
        self._source, self._info, self._digest = source, info, digest or self._digest
        self._tracked.restart()
        for one in self._measured:
            one.clear()
            one.prepare_where_the_weights_are()

    def take(self) -> ModelStats:
        """The statistics of the source; all ranks of an expert-parallel model come here together."""
        self._join_ranks()
        return self.stats


def modalities_of(model: nn.Module) -> tuple[str, ...]:
    """The modalities that a model's tokens are of. Raises SedetectError for a model of text alone."""
    found = placeholders(getattr(model, "config", None))
    if not found:
        raise SedetectError(
            f"{type(model).__name__}: its tokens are of text alone (no image, video or audio token in its config); "
            "leave out ",
            Argument("modalities"),
        )
    return ("text", *found)


def profile(
    model: nn.Module | Engine,
    *,
    source: str | None = None,
    info: dict[str, Any] | None = None,
    prefix: int | None = None,
    pad_token_id: int | None = None,
    backend: str | None = None,
    channels: bool = False,
    coactivation: bool = False,
    first_rows: bool = False,
    modalities: bool = False,
) -> Profile | ServedProfile:
    """Measure every expert of a model while it runs.

        with sedetect.profile(model) as prof:
            for input_ids, attention_mask in batches:
                model(input_ids=input_ids, attention_mask=attention_mask)
        prof.stats.save("stats.safetensors")

    Args:
        model: a Hugging Face MoE model in eval mode, or a module around one (PEFT, DDP, torch.compile, your own). It is
            restored on exit, also after an exception; copies of it taken inside the block are plain models. Or a
            vllm.LLM that was started with worker_extension_cls="sedetect.engines.vllm.Worker" (docs/serving.md).
        source: name of the text the sequences come from; sequence ids given by prof.batch are unique within it. A
            random name by default, with a running count as ids.
        info: facts on the source to save, as JSON values.
        prefix: token id that the tokenizer puts before every text, if it does; the profile notes sequences without it.
        pad_token_id: token id of padding that no attention mask hides (lm_eval gives none): a run of it at one end of
            the sequences of a batch does not count. Where the id is also the beginning (or the end) of a sequence, the
            one beside the text does.
        backend: "cpu", "cuda", "triton" or "torch"; the fastest that serves each call by default.
        channels: keep the per-channel maxima and squares (BankStats.channel_max, in_channel_max, in_channel_sq).
        coactivation: count the tokens routed to each pair of experts (BankStats.coactivation).
        first_rows: keep what the published tool reads of each routed expert (BankStats.published_max).
        modalities: also keep the statistics of text, image, video and audio tokens apart (Profile.modalities).
    Raises:
        SedetectError: for a model in training mode, without experts, or with experts that cannot be measured.
    """
    measuring = Measuring(backend, channels, coactivation, first_rows, modalities)
    if not isinstance(model, nn.Module) and hasattr(model, "collective_rpc"):
        if pad_token_id is not None:
            raise SedetectError("pad_token_id: an engine knows which rows are padding; leave it out")
        if modalities:
            raise SedetectError("modalities: an engine's tokens cannot be told apart; leave it out")
        return ServedProfile(model, source, info, prefix, measuring)
    return Profile(cast(nn.Module, model), source, info, prefix, measuring, pad=pad_token_id)
