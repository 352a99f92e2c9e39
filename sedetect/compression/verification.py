"""Verification: check that a quantized checkpoint still behaves like its original.

    verification = verify("model", "model-w4a16")
    verification.passed, verification.failures

First the files, from their headers: tensors that nothing stands for (a router's bias that was dropped), scales that do
not have the shape that config.json declares (a wrong group size), and how the experts to protect are stored. Then the
base and the quantized model, one after the other on the same text: whether every weight was loaded, or would be
initialized at random; whether each expert resembles its own in the base (their order); perplexity, the KL divergence of
the logits, the routing, the outputs of super experts, massive activations and attention sinks.

A checkpoint fails by its weights (tensors missing, left over, of another shape; an expert that is another one's, or
protected and not stored as it was), by a rise of perplexity above its limit in any domain, by a mean KL divergence
above its limit where there is one, and by massive activations or attention sinks that fall by half or more, where the
base has them.

With a runtime, both models run in it in place of transformers: their losses and most likely tokens are compared, and
the weights that it loaded nothing into are failures. What takes a look inside the model is left out, which a note says.
"""

import gc
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sedetect.analysis.matrices import expert_matrices
from sedetect.calibration.held_out import held_out, refuse_other_windows
from sedetect.calibration.records import Document as Record
from sedetect.calibration.windows import Text, Windows, calibration_windows, check_text, prefix_ids
from sedetect.checkpoints.files import checked_path
from sedetect.checkpoints.memory import too_large
from sedetect.checkpoints.options import Loading
from sedetect.checkpoints.storage import CHANGED, EQUAL, Counterpart
from sedetect.compression.matching import mismatched_experts, sample_experts
from sedetect.compression.protect import ProtectList
from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import Argument, SedetectError, WeightsError
from sedetect.experiments.ablation import resolve
from sedetect.experiments.divergence import Divergence, Outputs, Scores, compare_outputs, compare_scores, record
from sedetect.experiments.residual_stream import observe_residual
from sedetect.files import finite, restored
from sedetect.models.banks import find_banks
from sedetect.models.identity import check_statistics, join_digest, model_digest, model_id, stable_config
from sedetect.models.layers import refuse_without_logits
from sedetect.models.loading import OpenModel, PreparedModel, load_tokenizer, prepare_model
from sedetect.profiling.pipeline import profile_model
from sedetect.ranking.result import Ranking
from sedetect.ranking.rule import rank
from sedetect.ranking.saliencies import found_places
from sedetect.stats.model import ModelStats, opened, same_model
from sedetect.stats.place import BankId, Place, parse_place
from sedetect.stats.proof import read_effect
from sedetect.stats.residual import Residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Runtime = Callable[[Path, dict[str, Windows], int], Scores]  # (checkpoint, text, tokens of its prefix)

INCREASE = 0.05
_DIFFERENCES = 5  # of two configs, named at most
_RUNTIME = Argument("runtime")
_NOT_SEEN = (
    "both models ran in a serving engine: the KL divergence, outputs of super experts, routing, massive activations, "
    "attention sinks and the order of experts were not compared"
)


@dataclass(frozen=True)
class Limits:
    """The acceptable cost of quantization.

    increase  largest relative rise of perplexity, in every domain (0.05 is 5%)
    kl        largest mean KL divergence of the logits, in nats per token; None for any
    """

    increase: float = INCREASE
    kl: float | None = None


@dataclass(frozen=True)
class VerifiedExpert:
    """One compared expert.

    stored        how the quantized checkpoint stores its weights: "equal" to the base's, "equal, rounded to BF16",
                  "changed", "quantized (I32)"; None where nothing tells
    protected     whether it was to stay as in the base
    value, other  its largest |y| in the base and in the quantized model, on the same text; None where that did not run
    """

    expert: str
    stored: str | None
    protected: bool
    value: float | None = None
    other: float | None = None


@dataclass
class Verification(Tabular, Document):
    """What verify found.

    base, quantized          their names; digest, other_digest: as in the header of statistics
    method                   how config.json says that the checkpoint is quantized, None where it does not
    tokens                   of the text, per domain
    domains, overall         divergence of the quantized model from the base
    flips                    per bank of routed experts, the share of the base's choices that differ
    residual_max, sink_mean  of the base and of the quantized model (Residual.inner_max, Residual.sink_mean)
    failures                 a sentence for every check that was not passed
    notes                    further facts that the reader must know
    """

    FORMAT = "sedetect-verification"
    REMEDY = "run `sedetect verify BASE QUANTIZED -o DIR` to make one"

    base: str
    quantized: str
    limits: Limits
    method: str | None = None
    digest: str = ""
    other_digest: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    domains: dict[str, Divergence] = field(default_factory=dict)
    overall: Divergence | None = None
    experts: list[VerifiedExpert] = field(default_factory=list)
    flips: dict[str, float] = field(default_factory=dict)
    residual_max: list[float] = field(default_factory=list)
    sink_mean: list[float | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per domain, and one of all text."""
        every = [*self.domains.items(), *([] if self.overall is None else [("all", self.overall)])]
        return [
            {"text": name, "perplexity": one.perplexity, "quantized": one.other, "rise": one.change.rise}
            | {"low": one.change.low, "high": one.change.high, "kl": one.kl, "agreement": one.agreement}
            for name, one in every
        ]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        name = f"{self.quantized}{f' ({self.method})' if self.method else ''}"
        if not self.passed:
            count = len(self.failures)
            return f"{name} fails {count} {'check' if count == 1 else 'checks'} against {self.base}"
        assert self.overall is not None  # what did not run has failed
        kl = "" if self.overall.kl is None else f"KL {self.overall.kl:.4f} nats per token, "
        return (
            f"{name} passes against {self.base}: perplexity {self.overall.change}, {kl}the same most likely token in "
            f"{self.overall.agreement:.1%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For verification.json: every field, and passed."""
        document: dict[str, Any] = finite(asdict(self))
        return super().to_dict() | document | {"passed": self.passed}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Verification":
        """The inverse of to_dict."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}
        fields["limits"] = Limits(**document["limits"])
        fields["domains"] = {domain: _divergence(one) for domain, one in document["domains"].items()}
        fields["overall"] = None if document["overall"] is None else _divergence(document["overall"])
        fields["experts"] = [VerifiedExpert(**one) for one in document["experts"]]
        fields["residual_max"] = [restored(value) for value in document["residual_max"]]
        return cls(**fields)


def _divergence(document: dict[str, Any]) -> Divergence:
    numbers = {name: restored(document[name]) for name in ("perplexity", "other")}
    if document["kl"] is not None:  # else none was measured, or NaN, which is among the failures
        numbers["kl"] = restored(document["kl"])
    return Divergence(**document | numbers | {"change": read_effect(document["change"])})


def verify(
    base: str | os.PathLike[str],
    quantized: str | os.PathLike[str],
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Record]] | None = None,
    *,
    text: Text = Text(tokens=16384),
    stats: ModelStats | str | os.PathLike[str] | None = None,
    ranking: Ranking | None = None,
    protected: Sequence[Place | str] | ProtectList | Literal["candidates"] = (),
    limits: Limits = Limits(),
    loading: Loading = Loading(),
    runtime: Runtime | None = None,
    sequences: int = 8,
    progress: Callable[[str, int], None] = lambda run, tokens: None,
) -> Verification:
    """Compare a quantized checkpoint with the one that it was made from (module docstring).

    Args:
        base, quantized: checkpoint folders. One model is in memory at a time; the base's logits go to a temporary
            folder.
        texts, text: as profile_model takes them. text.tokens are compared, all of windows that stats did not see.
        stats: statistics of the base, for the experts to look at; ranking is rank(stats) where it is not given.
            Without stats and protected experts, the base is profiled on the same windows.
        protected: experts that must be stored as in the base, which are looked at too; "candidates" for all that the
            statistics find; a protect list of the base (ProtectList.load), by layer with all experts of its layers.
        loading: of both models.
        runtime: what both run in, in place of transformers (sedetect.engines.scoring.VLLM).
        sequences: windows on which massive activations and attention sinks are observed.
        progress: called with the name of the run ("base", "quantized") and the number of tokens, after every batch.
    Raises:
        SedetectError: for bad input, for two models of different shape, and for a base that cannot be loaded. Faults in
        the weights of the quantized checkpoint are listed in the result's failures.
    """
    check_limits(limits)
    if runtime is not None and limits.kl is not None:
        raise SedetectError(Argument("max_kl"), ": a runtime gives no logits; leave it out, or leave out ", _RUNTIME)
    if runtime is not None and protected == "candidates" and stats is None:
        raise SedetectError(
            Argument("protected"), " candidates: in a runtime only statistics name them; give ", Argument("stats")
        )
    check_text(texts, text)
    base, quantized = checked_path(base, "a checkpoint"), checked_path(quantized, "a quantized checkpoint")
    prepared = prepare_model(base, loading=loading)
    refuse_without_logits(prepared.empty, "verification")
    if isinstance(protected, ProtectList):
        unread = join_digest(model_id(prepared.empty), None)  # without the checksum of its weights
        if not same_model(protected.digest, unread):
            raise SedetectError(
                Argument("protected"), f": made for another model ({protected.model}); give a list of the base"
            )
        named: Sequence[Place | str] = protected.places({bank.id: bank.experts for bank in find_banks(prepared.empty)})
    else:
        named = () if protected == "candidates" else protected
    guarded = [parse_place(place) if isinstance(place, str) else place for place in named]
    resolve(prepared.empty, guarded)  # refuse experts that the model does not have
    state = None if stats is None else opened(stats)
    origin = "stats" if stats is state else str(stats)
    if state is not None:
        check_statistics(state.header, prepared.empty, origin)
    domains = _windows(prepared, texts, text, state)

    result = Verification(base.resolve().name, quantized.resolve().name, limits)
    try:
        made = prepare_model(quantized, prepared.tokenizer, loading)
    except WeightsError as error:
        result.failures.append(str(error))
        return result
    _refuse_other_shape(prepared.empty, made.empty, quantized)
    for folder in (base, quantized) if runtime is None else ():
        if (line := too_large(folder, loading.device, loading.dtype)) is not None:
            raise SedetectError(f"{folder}: {line.partition(':')[0]}; use a device with more memory")
    result.tokens = {domain: windows.ids.numel() for domain, windows in domains.items()}
    files = _check_files(base, quantized, result)
    _compare_settings(prepared, made, quantized, result)
    if runtime is not None:
        result.digest, result.other_digest = (join_digest(model_id(one.empty), None) for one in (prepared, made))
        found = [] if state is None else found_places(ranking or rank(state))
        guarded = found if protected == "candidates" else guarded
        sizes = {bank.id: bank.experts for bank in find_banks(prepared.empty)}
        for place in dict.fromkeys([*guarded, *found]):
            stored_as = _stored(files, place, sizes[place.bank])
            result.experts.append(VerifiedExpert(str(place), stored_as, place in guarded))
        _judge_protected(result)
        _run_in(runtime, base, quantized, domains, len(prefix_ids(prepared.tokenizer)), progress, result)
        return result

    with tempfile.TemporaryDirectory(prefix="sedetect-") as temporary:
        loaded = prepared.load()
        if state is None and not guarded:
            state = profile_model(loaded.model, texts, text=text, tokenizer=loaded.tokenizer).stats
        if state is not None:
            check_statistics(state.header, loaded.model, origin)
            ranking = ranking or rank(state)
        found = [] if ranking is None else found_places(ranking)
        guarded = found if protected == "candidates" else guarded
        places = list(dict.fromkeys([*guarded, *found]))
        sizes = {bank.id: bank.experts for bank in loaded.banks}
        stored = {place: _stored(files, place, sizes[place.bank]) for place in places}
        untold = [place for place in places if stored[place] is None]
        prefix = len(prefix_ids(loaded.tokenizer))
        options = {"prefix": prefix, "batch_size": text.batch_size}
        outputs = Outputs(loaded.model, places)
        record(outputs, domains, Path(temporary), progress=partial(progress, "base"), **options)
        first = _Seen.of(loaded, outputs, domains, prefix, sequences, untold)
        del loaded, outputs, prepared
        gc.collect()
        second = None
        try:
            loaded = made.load()
        except WeightsError as error:
            result.failures.append(str(error))
        else:
            outputs = Outputs(loaded.model, places)
            result.domains, result.overall, flips = compare_outputs(
                outputs, domains, Path(temporary), progress=partial(progress, "quantized"), **options
            )
            result.flips = {str(bank): share for bank, share in flips.items()}
            second = _Seen.of(loaded, outputs, domains, prefix, sequences, untold)
    result.digest = first.digest
    if second is not None:
        stored |= {place: _same_matrices(first.matrices.get(place), second.matrices.get(place)) for place in untold}
    for place in places:
        other = None if second is None else second.largest[place]
        result.experts.append(VerifiedExpert(str(place), stored[place], place in guarded, first.largest[place], other))
    _judge_protected(result)
    if second is not None:
        result.other_digest = second.digest
        _judge_weights(result, first, second)
        _judge_text(result)
        _judge_stream(result, first, second)
    return result


def _run_in(
    runtime: Runtime,
    base: Path,
    quantized: Path,
    domains: dict[str, Windows],
    prefix: int,
    progress: Callable[[str, int], None],
    result: Verification,
) -> None:
    """Compare two checkpoints by a runtime's outputs for each. Raises SedetectError if the base does not run."""
    progress("base", 0)
    first = runtime(base, domains, prefix)
    progress("base", sum(result.tokens.values()))
    progress("quantized", 0)
    try:
        second = runtime(quantized, domains, prefix)
    except SedetectError as error:
        result.failures.append(str(error))
        return
    progress("quantized", sum(result.tokens.values()))
    result.domains, result.overall = compare_scores(first, second)
    if left := sorted({*second.unloaded} - {*first.unloaded}):
        result.failures.append(f"weights into which nothing was loaded: {len(left)}, first {left[0]}")
    result.notes.append(_NOT_SEEN)
    _judge_text(result)


def check_limits(limits: Limits) -> None:
    """Raise SedetectError for limits that are out of range."""
    for name, value in (("max_increase", limits.increase), ("max_kl", limits.kl)):
        if value is not None and not 0 <= value < math.inf:
            raise SedetectError(Argument(name), f" {value:g}: must be at least 0")


@dataclass(frozen=True)
class _Seen:
    """The observations of one model.

    notes     of its loading, by code; largest: |y| of the experts looked at; residual: None where it cannot be observed
    samples   of all routed experts (matching.py); matrices: of the experts of which the files do not tell, by name
    """

    digest: str
    notes: dict[str, str]
    largest: dict[Place, float]
    residual: Residual | None
    samples: dict[BankId, torch.Tensor]
    matrices: dict[Place, dict[str, torch.Tensor]]

    @classmethod
    def of(
        cls,
        loaded: OpenModel,
        outputs: Outputs,
        domains: dict[str, Windows],
        prefix: int,
        sequences: int,
        untold: Sequence[Place],
    ) -> "_Seen":
        model, digest = loaded.model, model_digest(loaded.model)
        notes = {note.code: note.text for note in loaded.notes}
        try:
            residual = observe_residual(model, domains, prefix=prefix, sequences=sequences, digest=digest)
        except SedetectError as error:
            residual, notes["residual"] = None, f"the residual stream was not observed: {error}"
        banks, matrices = {bank.id: bank for bank in loaded.banks}, {}
        for place in untold:
            try:
                found = expert_matrices(model, banks[place.bank])
            except SedetectError:
                continue
            matrices[place] = {name: matrix[place.number].clone().cpu() for name, matrix in found.items()}
        return cls(digest, notes, outputs.largest, residual, sample_experts(model), matrices)


def _windows(
    prepared: PreparedModel,
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Record]] | None,
    text: Text,
    state: ModelStats | None,
) -> dict[str, Windows]:
    """The windows to compare on; with given statistics, only windows that these did not see."""
    if state is None:
        return calibration_windows(prepared.empty, prepared.tokenizer, texts, text).domains
    more = replace(text, tokens=text.tokens + state.header.tokens)
    domains = calibration_windows(prepared.empty, prepared.tokenizer, texts, more).domains
    refuse_other_windows(domains, state, text.seq_len)
    return held_out(domains, state, text.tokens)


def _refuse_other_shape(base: "PreTrainedModel", made: "PreTrainedModel", name: Path) -> None:
    """Raise SedetectError if two models differ in class, experts or vocabulary."""
    if type(base) is not type(made):
        raise SedetectError(
            f"{name}: a {type(made).__name__}, and the base is a {type(base).__name__}; give a checkpoint made from it"
        )
    shapes = [
        {bank.id: (bank.experts, bank.hidden, bank.intermediate) for bank in find_banks(one)} for one in (base, made)
    ]
    for bank in sorted(shapes[0].keys() | shapes[1].keys()):
        before, now = (one.get(bank) for one in shapes)
        if before != now:
            raise SedetectError(
                f"{name}: {_shape(now)} in {bank}, and {_shape(before)} in the base; give a checkpoint with the base's "
                "experts (a pruned one is compared by `sedetect compare`)"
            )
    words = [one.config.get_text_config().vocab_size for one in (base, made)]
    if words[0] != words[1]:
        raise SedetectError(
            f"{name}: a vocabulary of {words[1]:,} tokens, and {words[0]:,} in the base; give a checkpoint made from it"
        )


def _shape(shape: tuple[int, int, int] | None) -> str:
    return "no experts" if shape is None else f"{shape[0]} experts of {shape[1]} x {shape[2]}"


def _compare_settings(prepared: PreparedModel, made: PreparedModel, folder: Path, result: Verification) -> None:
    """The tokenizer fails where it differs from the base's; differences of the configs are noted."""
    before, now = stable_config(prepared.empty), stable_config(made.empty)
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    for key in keys[:_DIFFERENCES]:
        result.notes.append(f"config.json: {key} is {before.get(key)} in the base and {now.get(key)} here")
    if len(keys) > _DIFFERENCES:
        result.notes.append(f"config.json: {len(keys) - _DIFFERENCES} more values differ")
    try:
        tokenizer = load_tokenizer(folder)
    except SedetectError:
        result.notes.append("no tokenizer beside the weights; that of the base was used")
        return
    if any(of(tokenizer) != of(prepared.tokenizer) for of in (prefix_ids, lambda one: one.get_vocab())):
        result.failures.append("its tokenizer has another vocabulary, or another prefix, than the base's")


def _check_files(base: Path, quantized: Path, result: Verification) -> Counterpart:
    """The comparison of two checkpoints' headers, without their weights."""
    files = Counterpart(base, quantized)
    result.method = files.method
    missing = files.missing()
    if missing is None:
        result.notes.append("its tensors have other names than the base's, so the files were not compared")
    elif missing:
        result.failures.append(f"tensors of the base without a counterpart: {len(missing)}, first {missing[0]}")
    if wrong := files.wrong_shapes():
        result.failures.append(f"tensors that do not fit the scheme in config.json: {len(wrong)}, first {wrong[0]}")
    return files


def _stored(files: Counterpart, place: Place, experts: int) -> str | None:
    """Counterpart.expert of a place; None for experts outside the decoder, and for one of several shared ones."""
    if place.bank.stack != "decoder" or place.bank.kind not in ("routed", "shared"):
        return None
    if not place.bank.routed and experts > 1:
        return None
    return files.expert(place.layer, place.number if place.bank.routed else None, experts)


def _same_matrices(base: dict[str, torch.Tensor] | None, made: dict[str, torch.Tensor] | None) -> str | None:
    """The storage class of an expert, from its loaded weights."""
    if base is None or made is None:
        return None
    return EQUAL if all(torch.equal(base[name].to(m.dtype), m) for name, m in made.items()) else CHANGED


def _judge_protected(result: Verification) -> None:
    for expert in result.experts:
        if expert.protected and expert.stored is None:
            result.notes.append(f"{expert.expert}: the storage of its weights is unknown")
        elif expert.protected and not str(expert.stored).startswith(EQUAL):
            result.failures.append(f"{expert.expert} must be protected, but its weights are {expert.stored}")


def _judge_weights(result: Verification, first: _Seen, second: _Seen) -> None:
    for code, text in second.notes.items():
        unused = code == "unused_weights" and code not in first.notes
        (result.failures if unused else result.notes).append(text)
    result.failures += mismatched_experts(first.samples, second.samples)


def _judge_text(result: Verification) -> None:
    limits = result.limits
    for domain, one in result.domains.items():
        if not one.change.rise <= limits.increase:  # NaN too
            result.failures.append(
                f"{domain}: perplexity {one.perplexity:.2f} to {one.other:.2f}, {one.change}, which is above the limit "
                f"of {limits.increase:.3g}"
            )
        elif math.isfinite(one.change.high) and one.change.high > limits.increase:
            result.notes.append(f"{domain}: perplexity {one.change}: the interval goes beyond the limit")
    few = [domain for domain, one in result.domains.items() if math.isinf(one.change.high)]
    if few:
        result.notes.append(
            f"too few windows for an interval in {', '.join(few)}; give more tokens, or shorter windows"
        )
    overall = result.overall
    kl = None if overall is None else overall.kl
    if kl is not None and not math.isfinite(kl):
        result.failures.append(f"the KL divergence of the logits is {kl}")
    elif kl is not None and limits.kl is not None and kl > limits.kl:
        result.failures.append(f"a KL divergence of {kl:.4g} nats per token, above the limit of {limits.kl:g}")


def _judge_stream(result: Verification, first: _Seen, second: _Seen) -> None:
    before, now = first.residual, second.residual
    if before is None or now is None:
        return
    result.residual_max = [before.inner_max, now.inner_max]
    result.sink_mean = [before.sink_mean, now.sink_mean]
    if before.forming_layers and now.inner_max <= before.inner_max / 2:
        result.failures.append(f"massive activations fell from {before.inner_max:.4g} to {now.inner_max:.4g}")
    if before.has_sinks and before.sink_mean and now.sink_mean is not None and now.sink_mean <= before.sink_mean / 2:
        result.failures.append(
            f"attention sinks fell from {before.sink_mean:.1%} to {now.sink_mean:.1%} of all attention"
        )
