"""Conformance: does a profile of this architecture tell the truth? One check per family, against plain loops.

In float32 the experts' inputs are those of the eager model; in bfloat16, where routing may turn on a rounding, those
that they have while profiled.
"""

import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sedetect
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.attach import SubstitutedDown
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId, Place
from support import loops
from support.families import FALLBACKS, FAMILIES, MODELS, VOCAB, Family, discover, tiny_model
from support.models import snapshot

BATCH, LENGTH = 2, 12
KINDS = {"R": "routed", "V": "routed_vision", "S": "shared", "T": "shared_1", "D": "dense"}
DOWN = re.compile(r"\.(down_proj|w2|wo|fc2|output_linear)$")
TABLE_BEGINS, TABLE_ENDS = "<!-- written by tests/conformance.py --docs -->", "<!-- end -->"
RTOL = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass
class Seen:
    """What plain loops say of one expert."""

    rows: int = 0
    first_rows: int = 0
    gate_sum: float = 0.0
    norm_sum: float = 0.0
    gate_norm_sum: float = 0.0
    in_max: float = 0.0
    out_max: float = 0.0
    channel: int = -1
    position: int = -1
    token: int = -1
    # (position, token id) -> largest |y| of each channel, of all rows that are there
    outputs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    places: Counter[tuple[int, int]] = field(default_factory=Counter, repr=False)  # how many rows each has

    def add(self, y: torch.Tensor, h: torch.Tensor, gate: float, position: int, token: int) -> None:
        y, h = y.float(), h.float()
        norm, peak = float(y.norm()), float(y.abs().max())
        self.rows += 1
        self.first_rows += position == 0
        self.gate_sum += gate
        self.norm_sum += norm
        self.gate_norm_sum += gate * norm
        self.in_max = max(self.in_max, float(h.abs().max()))
        if peak > self.out_max:
            self.out_max, self.channel, self.position, self.token = peak, int(y.abs().argmax()), position, token
        self.places[position, token] += 1
        before = self.outputs.get((position, token))
        self.outputs[position, token] = y.abs() if before is None else torch.maximum(before, y.abs())

    def without_places(self) -> "Seen":
        """The same, of a stack whose rows are not mapped."""
        outputs = {(-1, -1): torch.stack([*self.outputs.values()]).amax(0)} if self.outputs else {}
        return replace(self, first_rows=0, position=-1, token=-1, outputs=outputs)

    def check_place(self, what: str, channel: int, position: int, token: int, dtype: torch.dtype) -> None:
        """The place of the largest |y|. In 16 bits nearly equal ones may change places: one as large within RTOL."""
        there = self.outputs.get((position, token))
        if dtype == torch.float32:
            right = (channel, position, token) == (self.channel, self.position, self.token)
        else:
            right = there is not None and float(there[channel]) >= (1 - RTOL[dtype]) * self.out_max
        holds = "no row" if there is None else f"|y| = {float(there[channel])}"
        assert right, f"{what}: {(channel, position, token)}, which holds {holds}, expected {self}"


@dataclass
class Reference:
    """The eager model's own answer, and Seen by module path and expert."""

    output: torch.Tensor
    seen: dict[str, dict[int, Seen]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Seen)))


def inputs_of(family: Family, model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    given = family.inputs(ids) if family.inputs else {"input_ids": ids}
    given = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    floats = {name for name, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {name: x.to(model.dtype) if name in floats else x for name, x in given.items()}


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs, use_cache=False)
    return output[0]


@torch.no_grad()
def reference(
    name: str, model: nn.Module, inputs: dict[str, torch.Tensor], ids: torch.Tensor, backend: str | None
) -> Reference:
    """Loop over what the model's experts modules and down projections are given: run eagerly, or while profiled."""
    calls, exact = [], model.dtype == torch.float32
    with eagerly(model) if exact else sedetect.profile(model, backend=backend), hooks() as add:
        for path, module in model.named_modules():
            interface = type(module).__name__ in discover().get(name.partition(":")[0], ())
            if interface or type(module).__name__ in loops.LOOPS:
                path += ".output_linear" if type(module).__name__ == "JetMoeMoE" else ""
                add(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, path=path: calls.append((path, m, [*args, *kwargs.values()])),
                        with_kwargs=True,
                    )
                )
            elif DOWN.search(path) and isinstance(module, (nn.Linear, SubstitutedDown)):
                add(module.register_forward_pre_hook(lambda m, args, path=path: calls.append((path, m, args))))
        result = Reference(run(model, inputs))
    for path, module, args in calls:
        if isinstance(module, (nn.Linear, SubstitutedDown)):
            linear_rows(result.seen[path], module, *args, tokens_of(path, inputs, ids))
        elif not hasattr(module, "is_transposed"):
            rows = args[0][..., 0].numel() // (
                len(module.down_proj) if type(module).__name__ == "Llama4TextExperts" else 1
            )
            for row, expert, gate, h, y in loops.LOOPS[type(module).__name__](module, *args):
                result.seen[path][expert].add(y, h, gate, *place_of(row, rows, ids))
        else:
            experts_rows(result.seen[path], module, *args, tokens_of(path, inputs, ids), group_of(path, inputs))
    return result


def tokens_of(path: str, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Those of the rows of a module: of a vision tower (images, patches), where the images are of one size."""
    if ".vision_tower." not in path or "image_grid_thw" not in inputs:
        return ids
    return torch.full((len(inputs["image_grid_thw"]), int(inputs["image_grid_thw"][0].prod())), VOCAB - 1)


def group_of(path: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The numbers of the tokens that reach a module, where the model has experts of their own for images."""
    types = inputs.get("moe_mm_token_type_ids")
    return None if types is None else ((types != 0) == (".vision_moe." in path)).flatten().nonzero().flatten()


@contextmanager
def eagerly(model: nn.Module):
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def hooks():
    handles = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def place_of(row: int, rows: int, ids: torch.Tensor) -> tuple[int, int]:
    """(position, token id) of a row; unknown where the rows are not those of ids."""
    return (row % ids.shape[1], int(ids.flatten()[row])) if rows == ids.numel() else (-1, -1)


def linear_rows(seen: dict[int, Seen], module: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> None:
    x = x.reshape(-1, x.shape[-1])
    y = F.linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())
    for row in range(len(y)):
        seen[0].add(y[row], x[row], 1.0, *place_of(row, len(y), ids))


def experts_rows(
    seen: dict[int, Seen],
    module: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    ids: torch.Tensor,
    group: torch.Tensor | None,
) -> None:
    """One token and one expert at a time, with the module's own gate and weights."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = range(len(x)) if group is None else group.tolist()
    tokens = len(x) if group is None else ids.numel()
    for row, (number, experts, weights) in enumerate(zip(rows, index.tolist(), gates.tolist(), strict=True)):
        for expert, gate in zip(experts, weights):
            if gate == 0:
                continue
            matrices = getattr(module, up)[expert], module.down_proj[expert]
            wide, narrow = (m.T for m in matrices) if module.is_transposed else matrices
            z = wide @ x[row] + (getattr(module, f"{up}_bias")[expert] if module.has_bias else 0)
            h = (module._apply_gate if module.has_gate else module.act_fn)(z[None])[0]
            y = narrow @ h + (module.down_proj_bias[expert] if module.has_bias else 0)
            seen[expert].add(y, h, gate, *place_of(number, tokens, ids))


def expected_banks(family: Family) -> list[BankId]:
    stacks = family.layers if isinstance(family.layers, dict) else {"decoder": family.layers}
    return sorted(
        BankId(stack, layer, KINDS[kind])
        for stack, words in stacks.items()
        for layer, word in enumerate(words.split())
        for kind in word.strip("-")
    )


def check_statistics(stats: ModelStats, expected: Reference, dtype: torch.dtype) -> None:
    for bank, state in stats.banks.items():
        seen = expected.seen[stats.header.banks[str(bank)].module]
        assert seen, f"{bank}: {stats.header.banks[str(bank)].module} never ran in the eager model"
        peak = state.peak()
        in_max = state.in_max[:, 0, 0].clamp(min=0).to(torch.int32).view(torch.float32)
        for expert in range(state.num_experts):
            one = seen[expert]
            if bank.stack != "decoder":
                one = replace(one, first_rows=0) if bank.stack == "vision" else one.without_places()
            where = f"{bank} expert {expert}"
            assert int(state.rows[expert]) == one.rows, f"{where}: {int(state.rows[expert])} rows, not {one.rows}"
            assert int(state.first_rows[expert]) == one.first_rows, f"{where}: {one.first_rows} first rows"
            for name in ("gate_sum", "norm_sum", "gate_norm_sum", "out_max"):
                close(f"{where} {name}", float(getattr(state, name)[expert]), getattr(one, name), dtype)
            close(f"{where} in_max", float(in_max[expert]), one.in_max, dtype)
            if one.rows:
                found = peak[expert].tolist()
                one.check_place(where, found[2], found[5], found[6], dtype)


def close(what: str, mine: float, reference: float, dtype: torch.dtype) -> None:
    assert abs(mine - reference) <= RTOL[dtype] * max(abs(reference), 1e-6), f"{what}: {mine}, expected {reference}"


@dataclass
class Result:
    """One line of the table."""

    name: str
    architecture: str = ""
    banks: str = ""
    backends: str = ""
    result: str = "ok"

    def __str__(self) -> str:
        return f"{self.name:<24} {self.architecture:<46} {self.banks:<28} {self.backends:<8} {self.result}"


def documented(page: str, results: list[Result], processor_of: Callable[[str], str]) -> str:
    """A page with its table of architectures written from the results of a run; processor_of: what reads its images."""
    rows = [f"| {one.name} | {one.architecture} | {_banks_of(one)} | {processor_of(one.name)} |" for one in results]
    heads = ("family", "class", "banks of the layers of a small model", "processor of images")
    table = "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])
    before, after = page.split(TABLE_BEGINS)[0], page.split(TABLE_ENDS)[1]
    return f"{before}{TABLE_BEGINS}\n{table}\n{TABLE_ENDS}{after}"


def _banks_of(one: Result) -> str:
    return one.result.removeprefix("ok, ") if one.banks == "-" else one.banks


def check(name: str, device: str = "cpu", backend: str | None = None, dtype: torch.dtype = torch.float32) -> Result:
    """Raise AssertionError, or SedetectError, where the profile of this family's tiny model is not right."""
    family = FAMILIES[name]
    model = tiny_model(name, family).to(device, dtype)
    kept = set(model._keep_in_fp32_modules_strict or ()) - set(family.not_in_float32)
    for path, parameter in model.named_parameters():  # as from_pretrained does
        parameter.data = parameter.data.float() if any(part in path for part in kept) else parameter.data
    inputs = inputs_of(family, model)
    if family.refused is not None:
        check_refused(family, model)
        return Result(name, type(model).__name__, "-", "-", f"ok, refused: {family.refused}")
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is None:
        ids = torch.full((BATCH, LENGTH), -1)  # inputs_embeds: no token is known
    words = family.layers if isinstance(family.layers, str) else "; ".join(f"{k} {v}" for k, v in family.layers.items())
    result = Result(name, type(model).__name__, words)

    before = snapshot(model)
    expected = reference(name, model, inputs, ids, backend)
    stats = profile(model, inputs, backend)
    assert snapshot(model) == before, "something stayed behind"
    assert list(stats.banks) == expected_banks(family), f"banks {[str(b) for b in stats.banks]}"
    if dtype == torch.float32:
        close_outputs(stats.output, expected.output)
    check_statistics(stats, expected, dtype)
    check_rows(family, stats, ids)
    result.backends = check_backends(family, stats, model.device, backend)
    check_planted(name, model, inputs, ids, stats, backend)
    return result


def check_backends(family: Family, stats: ModelStats, device: torch.device, backend: str | None) -> str:
    """Every bank is served by the backend asked for, or says why not and is known to; nothing else is noted."""
    wanted = {backend} if backend else {"cpu"} if device.type == "cpu" else {"cuda", "triton"}
    said = [*map(str, stats.header.notes)]
    unsaid = [known for known in family.notes if not any(re.search(known, note) for note in said)]
    assert not unsaid, f"no note says {unsaid}: {said}"
    notes = [note for note in stats.header.notes if not any(re.search(known, str(note)) for known in family.notes)]
    excused = [note for note in notes if any(re.search(why, str(note)) for why in FALLBACKS.get(backend, ()))]
    for bank in stats.banks:
        served = stats.header.banks[str(bank)].backends
        known = any(note.bank == bank for note in excused)
        assert set(served) <= wanted or known, f"{bank} is served by {served}, not {backend or wanted}"
    unknown = [note for note in notes if note not in excused]
    assert not unknown, f"notes {[str(note) for note in unknown]}"
    return ", ".join(sorted({b for described in stats.header.banks.values() for b in described.backends}))


def check_refused(family: Family, model: nn.Module) -> None:
    """Raises before any forward, naming the class and why."""
    try:
        sedetect.profile(model)
    except SedetectError as error:
        assert family.refused in str(error), str(error)
    else:
        raise AssertionError(f"was not refused: {family.refused}")


def profile(model: nn.Module, inputs: dict[str, torch.Tensor], backend: str | None) -> ModelStats:
    with sedetect.profile(model, backend=backend) as prof:
        output = run(model, inputs)
    stats = prof.stats
    stats.output = output
    return stats


def close_outputs(mine: torch.Tensor, own: torch.Tensor) -> None:
    assert own.isfinite().all(), "the eager model's output is not finite"
    error = float((mine.double() - own.double()).abs().max() / own.double().square().mean().sqrt())
    assert error <= RTOL[torch.float32], f"worst output off by {error:.1e} of their RMS"


def check_rows(family: Family, stats: ModelStats, ids: torch.Tensor) -> None:
    """Rows of a layer's routed banks add up to tokens x top_k; to less in all where some slots are no expert's."""
    routed = defaultdict(int)
    for bank, state in stats.banks.items():
        if bank.routed:
            assert (state.out_max > 0).sum() >= 2, f"{bank}: this tiny model routes everything to one expert"
            if bank.stack == "decoder":
                routed[bank.layer] += int(state.rows.sum())
    slots = ids.numel() * family.top_k
    if family.skips:
        assert sum(routed.values()) < slots * len(routed), f"rows {dict(routed)} of {slots} slots each: none skipped"
    else:
        expected = {layer: slots * family.passes.get(layer, 1) for layer in routed}
        assert routed == expected, f"rows {dict(routed)}, expected {expected}"


def check_planted(name, model, inputs, ids, stats, backend) -> None:
    """An expert whose down_proj is scaled up is in the paper's set, with its layer, number, channel and token.

    Ablated inside a profile it has no rows, and the others of its layer have theirs.
    """
    bank = next(b for b, s in stats.banks.items() if b.kind == "routed" and int(s.rows.sum()))
    expert = int(stats.banks[bank].rows.argmax())
    path = stats.header.banks[str(bank)].module
    plant(model, path, expert)
    expected = reference(name, model, inputs, ids, backend).seen[path][expert]
    found = sedetect.rank(profile(model, inputs, backend)).super_experts
    here = [e for e in found if e.place == Place(*bank, expert)]
    assert here, f"planted {Place(*bank, expert)}, found {[str(e) for e in found]}"
    one = here[0]
    close(f"planted {one}", one.value, expected.out_max, model.dtype)
    with sedetect.profile(model, backend=backend) as prof, ablate(model, [Place(*bank, expert)]):
        run(model, inputs)
    without = prof.stats.banks[bank]
    assert int(without.rows[expert]) == 0, f"{one}: {int(without.rows[expert])} rows when ablated"
    assert int(without.rows.sum()) == int(stats.banks[bank].rows.sum() - stats.banks[bank].rows[expert])
    expected.check_place(f"planted {one}", one.channel, one.position, one.token_id, model.dtype)


@torch.no_grad()
def plant(model: nn.Module, path: str, expert: int) -> None:
    module = model.get_submodule(path)
    stored = None if hasattr(module, "down_proj") else loops.DOWN[type(module).__name__]
    down = module.down_proj[expert] if stored is None else stored(module, expert)
    down *= 1000


def attempt(name: str, device: str, backend: str | None, dtype: str) -> Result:
    """The line of a family, whatever becomes of it."""
    try:
        return check(name, device, backend, getattr(torch, dtype))
    except Exception as error:
        foreseen = isinstance(error, AssertionError) and str(error)
        return Result(name, result=f"{type(error).__name__}: {error}" + ("" if foreseen else f" ({raised_at(error)})"))


def raised_at(error: Exception) -> str:
    """File and line of the innermost frame outside torch, whose own says little."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(torch.__file__).parent not in Path(frame.filename).parents]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def available() -> list[str]:
    """The families that the installed transformers has."""
    return [name for name in FAMILIES if (MODELS / name.partition(":")[0]).is_dir()]
