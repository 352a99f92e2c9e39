"""Proof: intervals, verdicts from made-up evidence, and the checkpoint whose super expert is known."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from support.checkpoints import put_model
from support.command import refused, row, run
from support.models import TINY, random_model

import sedetect
from sedetect.calibration.windows import Windows, calibration_windows
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.chain import find_feeders
from sedetect.experiments.effects import effect
from sedetect.experiments.evaluation import window_losses
from sedetect.experiments.judgment import ALL, Evidence, all_but, alone, judge
from sedetect.experiments.proof import candidates_of, check_names, prove
from sedetect.experiments.residual_stream import observe_residual
from sedetect.experiments.switching import Below, WindowWatch, switched_off
from sedetect.experiments.triggers import Triggers
from sedetect.models.attach import attach
from sedetect.models.banks import find_banks
from sedetect.models.layers import decoder_layers
from sedetect.models.loading import load_tokenizer, open_model
from sedetect.profiling import pipeline, proving
from sedetect.profiling.proving import Proving
from sedetect.stats.place import Place, parse_place
from sedetect.stats.proof import Proof

A, B, C = (parse_place(name) for name in ("L1E2", "L3E4", "L7E1"))


@pytest.mark.parametrize("draw", ["normal", "student"])
def test_intervals_cover(draw):
    """Of 400 samples without an effect at most so many are called one, at the level and well inside its noise."""
    rng = np.random.default_rng(1)
    for level in (0.05, 0.01):
        missed = 0
        for _ in range(400):
            sample = rng.normal(size=24) if draw == "normal" else rng.standard_t(3, size=24)
            found = effect(0.02 * sample, level)
            missed += not found.low <= 0 <= found.high
        # three standard deviations of a count
        assert missed <= 400 * level + 3 * math.sqrt(400 * level)


def test_an_interval_of_few_documents_is_infinite():
    found = effect(np.array([0.1, 0.2, 0.1]), 0.05)
    assert (found.low, found.high, found.documents) == (-1, math.inf, 3)
    assert found.rise == pytest.approx(math.expm1(0.4 / 3))
    same = effect(np.full(8, 0.1), 0.05)
    assert same.low == same.rise == same.high


def test_an_interval_is_the_inverse_of_the_sign_flip_test():
    """Of few documents all sign flips can be tried: the test refuses what lies outside, and not what lies inside."""
    differences = np.random.default_rng(2).normal(0.03, 0.02, size=10)
    flips = np.array([[1 - 2 * (n >> i & 1) for i in range(10)] for n in range(1024)])

    def p_value(shift):
        rest = differences - shift
        return (np.abs((flips * rest).mean(1)) >= abs(rest.mean()) - 1e-12).mean()

    found = effect(differences, 0.1)
    low, high = math.log1p(found.low), math.log1p(found.high)
    width = high - low
    assert p_value(low - 0.1 * width) < 0.1 < p_value(low + 0.1 * width)
    assert p_value(high + 0.1 * width) < 0.1 < p_value(high - 0.1 * width)


@dataclasses.dataclass(frozen=True)
class Seen:
    """As much of a residual stream as a verdict looks at."""

    sink_mean: float | None
    inner_max: float

    @property
    def has_sinks(self) -> bool | None:
        return None if self.sink_mean is None else self.sink_mean > 0.033


SINKS = Seen(0.07, 1000)


def verdict(changes, fired, place, plain=SINKS, falls=(), controls=((0.0, 0.001),), documents=32):
    """The verdict from (mean, standard deviation) of every run's and control's changes."""
    rng = np.random.default_rng(0)

    def sample(mean, deviation):
        noise = rng.normal(size=documents)
        return mean + deviation * (noise - noise.mean()) / noise.std()

    evidence = Evidence(
        {label: sample(*change) for label, change in changes.items()},
        [sample(*control) for control in controls],
        plain,
        {label: Seen(plain.sink_mean, 10.0) if label in falls else plain for label in changes},
    )
    return judge(place, fired, evidence, smallest=0.03, level=0.05 / len(fired), triggers=9, firsts=9)


def test_proved_and_refuted():
    found = verdict({alone(A): (0.14, 0.05)}, [A], A, falls=[alone(A)])
    assert found.level == "proved" and found.reason.startswith("the model depends on it: +15.")
    assert verdict({alone(A): (0.002, 0.01)}, [A], A, falls=[alone(A)]).level == "refuted"
    assert verdict({alone(A): (-0.01, 0.01)}, [A], A).reason.startswith("the model does not depend on it: -1.0%")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"falls": []}, "sinks and largest activation stay"),
        ({"plain": Seen(0.009, 1000)}, "has no attention sinks"),
        ({"plain": Seen(None, 1000)}, "gives no attention weights"),
        ({"controls": [(0.15, 0.05)]}, "which other experts at the same tokens may cost as well"),
        ({"documents": 4}, "4 documents are too few"),
    ],
)
def test_undecided_though_it_costs_much(how, reason):
    found = verdict({alone(A): (0.14, 0.05)}, [A], A, **({"falls": [alone(A)]} | how))
    assert found.level == "undecided" and reason in found.reason


def test_undecided_says_how_many_documents_would_do():
    found = verdict({alone(A): (0.02, 0.05)}, [A], A)
    needed = int(found.reason.partition("about ")[2].split()[0])
    assert found.level == "undecided" and 100 < needed < 200
    assert verdict({alone(A): (0.02, 0.05)}, [A], A, documents=needed).level == "refuted"


def test_two_that_stand_in_for_each_other_and_a_bystander():
    fired = [A, B, C]
    changes = {ALL: (0.06, 0.01), **{alone(place): (0.004, 0.01) for place in fired}}
    changes |= {all_but(A, fired): (0.005, 0.01), all_but(B, fired): (0.004, 0.01), all_but(C, fired): (0.06, 0.01)}
    found = {place: verdict(changes, fired, place, falls=[ALL, all_but(C, fired)]) for place in fired}
    assert [found[place].level for place in fired] == ["proved", "proved", "refuted"]
    assert (found[A].partners, found[B].partners) == (["L3E4"], ["L1E2"])
    assert found[A].reason.startswith("as a set: ") and "stands in for it; " in found[A].reason


def test_silent_on_the_text():
    found = verdict({alone(A): (0.14, 0.05)}, [A], B)
    assert found.level == "undecided" and "did not fire" in found.reason and found.alone is None


def windows(ids):
    return {"text": Windows(ids, torch.arange(len(ids)), "text", {})}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_switched_off_at_first_tokens_is_the_ablation(name):
    """And layers below that are replayed change nothing, to the bit."""
    model = random_model(name)
    ids = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    banks = {bank.id: bank for bank in find_banks(model)}
    off = {}
    for bank in (one for one in banks.values() if one.id.layer == 2 and one.routed):
        off[bank.id] = torch.full((5, 12, 2), -1)
        off[bank.id][:, 0] = torch.tensor([1, 5])
    names = [f"L2E{e}" for e in (1, 5)]
    with torch.no_grad(), WindowWatch(model, ids) as watch:
        below = Below(decoder_layers(model, list(banks.values())), 2, watch)
        with below.record():
            plain = window_losses(model, ids, 1)
        with switched_off(model, list(banks.values()), watch, off):
            found = window_losses(model, ids, 1)
            with below.replay():
                again = [loss for part in ids.split(2) for loss in window_losses(model, part, 1)]
    with torch.no_grad(), ablate(model, names, tokens="first"):
        wanted = window_losses(model, ids, 1)
    assert found == pytest.approx(wanted, rel=1e-6) and found != plain
    assert again == pytest.approx(found, rel=1e-6)


def test_controls_are_other_experts_at_the_same_tokens():
    model = random_model("qwen3_moe")
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(1))
    places = [Place("decoder", 1, "routed", e) for e in range(2)]
    banks = {bank.id: bank for bank in find_banks(model)}
    heard = []
    with torch.no_grad(), WindowWatch(model, ids) as watch:
        triggers = Triggers({p: banks[p.bank] for p in places}, dict.fromkeys(places, 1e-9), watch, 10)
        spy = lambda module, x, index, gates: heard.append(index) or run(module, x, index, gates)  # noqa: E731
        bank, run = triggers.calls[0]
        undo = attach(model, [(bank, spy)])
        window_losses(model, ids, 1)
        undo()
    index = heard[0].view(4, 10, -1)
    for place in places:
        assert sorted(triggers.tokens[place]) == [
            tuple(at) for at in (index == place.expert).any(-1).nonzero().tolist()
        ]
    for draw in triggers.controls(4, 5, seed=0):
        chosen = draw[bank.id]
        for window, position in (chosen >= 0).any(-1).nonzero().tolist():
            picked = chosen[window, position][chosen[window, position] >= 0].tolist()
            visited = index[window, position].tolist()
            assert set(picked) <= set(visited) - {0, 1}
            assert len(picked) == len({0, 1} & set(visited))


@pytest.fixture(scope="module")
def subject():
    model, tokenizer, _, _ = open_model(TINY, loading=sedetect.Loading(dtype="float32"))
    return model, calibration_windows(model, tokenizer, None, sedetect.Text(tokens=8192, seq_len=256)).domains


@pytest.fixture(scope="module")
def proof(subject):
    values = {parse_place("L1E28"): 1262.0, parse_place("L9E7"): 1087.0, parse_place("L5E3"): 1e6}
    return prove(*subject, values, prefix=1, chain=True, sequences=4)


def test_of_two_outliers_one_is_proved(proof):
    """tests/data/tiny-moe/README.md: +15 % without L1E28 at BOS, +0.3 % without L9E7; L0E24 feeds the first."""
    one, late, silent = proof.verdicts
    assert (one.level, late.level, silent.level) == ("proved", "refuted", "undecided")
    assert 0.05 < one.alone.low < one.alone.rise < one.alone.high < 0.30 and late.alone.high < 0.03
    assert one.triggers == one.firsts == proof.documents == 32
    assert [feeder.expert for feeder in one.feeders] == ["L0E24"] and one.feeders[0].left < 0.1
    assert {feeder.expert for feeder in late.feeders} == {"L0E24", "L1E28"}
    assert proof.sink_mean > 10 * proof.uniform and proof.controls and max(c.effect.high for c in proof.controls) < 0.01
    runs = {run.label: run for run in proof.runs}
    assert list(runs) == ["all", "L1E28 alone", "L9E7 alone", "all, at every token"]
    for label in ("all", "L1E28 alone", "all, at every token"):
        assert runs[label].sink_mean < proof.sink_mean / 2 and runs[label].residual_max < proof.residual_max / 2
    assert runs["L9E7 alone"].residual_max == pytest.approx(proof.residual_max, rel=0.01)
    assert proof.sinks.startswith(f"attention sinks: {proof.sink_mean:.1%} of the attention")


@pytest.mark.parametrize(
    "folder,place,level,length",
    # in short windows both effects are larger, in long ones the sinks of the first are too weak on so little text
    [("formed-moe", "L1E15", "proved", 256), ("gated-moe", "L2E10", "refuted", 512)],
)
def test_models_of_the_study(folder, place, level, length):
    """docs/formation.md: +10.6 % without L1E15; with attention gates +0.7 % without L2E10, 37 x its layer's median."""
    model, tokenizer, _, _ = open_model(TINY.parent / folder, loading=sedetect.Loading(dtype="float32"))
    domains = calibration_windows(model, tokenizer, None, sedetect.Text(tokens=8192, seq_len=length)).domains
    found = prove(model, domains, {parse_place(place): 200.0}, prefix=1)
    (one,) = found.verdicts
    assert one.level == level and one.triggers == one.firsts == 8192 // length
    assert one.alone.low > 0.05 if level == "proved" else 0 < one.alone.rise < one.alone.high < 0.02


def test_read_back(proof, tmp_path):
    proof.save(tmp_path / "proof.json")
    assert Proof.load(tmp_path) == proof
    assert proof.of("L1E28").level == "proved" and proof.of(A) is None


def test_without_its_super_expert_nothing_is_proved(subject):
    model, domains = subject
    with torch.no_grad():
        down = model.model.layers[1].mlp.experts.down_proj
        kept = down[28].clone()
        down[28].zero_()
        try:
            found = prove(model, domains, {parse_place("L9E7"): 100.0, parse_place("L6E3"): 40.0}, prefix=1)
        finally:
            down[28] = kept
    assert all(one.level in ("refuted", "undecided") for one in found.verdicts)


def test_the_chain_to_a_dense_mlp():
    """It can be asked about, and is nobody's feeder."""
    model = random_model("qwen2_moe")  # layer 1 is dense
    found = find_feeders(model, parse_place("L1dense"), [torch.tensor([1, 5, 9])])
    assert all(feeder.expert.startswith("L0") for feeder in found)
    found = find_feeders(model, parse_place("L2E3"), [torch.tensor([1, 5, 9])])
    assert not any("dense" in feeder.expert for feeder in found)


def test_an_expert_of_the_first_layer_has_no_feeder(subject):
    assert find_feeders(subject[0], parse_place("L0E24"), [torch.tensor([0])]) == []


@pytest.mark.parametrize(
    ("how", "told"), [({"smallest": 0.0}, "smallest 0"), ({"level": 1.0}, "level 1"), ({"smallest": math.nan}, "nan")]
)
def test_numbers_out_of_range(subject, how, told):
    with pytest.raises(SedetectError, match=told):
        prove(*subject, {A: 1.0}, prefix=1, **how)


SHORT = ("--tokens", 2048, "--seq-len", 256)


@pytest.mark.slow
def test_profile_proves(tmp_path, monkeypatch):
    """By default settings but for the amount of text; rank and export follow the folder."""
    monkeypatch.setattr(proving, "Proving", partial(Proving, tokens=4096))
    code, out, err = run("profile", TINY, "--prove", "--dtype", "float32", *SHORT, "-o", tmp_path)
    assert code == 0 and err == "" and out.startswith("1 super expert, proved: L1E28 (")
    assert "; 1 refuted: L9E7 (" in out.splitlines()[0]
    table = out.partition("switched off")[0]
    assert [row(table, name)[-4:] for name in ("L1E28", "L9E7")] == [
        ["yes", "yes", "yes", "proved"],
        ["late", "yes", "no", "refuted"],
    ]
    made = Proof.load(tmp_path)
    assert made.documents == 16 and [one.expert for one in made.verdicts] == ["L1E28", "L9E7"]
    for one in made.verdicts:
        assert f"{one.expert}: {one.level}: {one.reason}; |y| " in out
    assert "all, at every token" in out and "attention sinks: " in out and "each domain alone" in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(" "))
    document = json.loads((tmp_path / "super_experts.json").read_text())
    assert document["criteria"]["proof"] and document["headline"] == out.splitlines()[0]
    assert sedetect.rank(tmp_path).headline == document["headline"]
    assert "protected: L1E28 (proved), by expert" in run("export", tmp_path, "--to", "json").err
    assert run("profile", TINY, *SHORT, "-o", tmp_path).code == 0
    assert not (tmp_path / "proof.json").exists(), "of a run that is gone"


def test_a_profile_outlives_its_proof(tmp_path, monkeypatch):
    """What fails is noted, what is stopped is told; the statistics stay. Without a candidate there is no proof."""
    model = put_model(tmp_path / "model")
    text = sedetect.Text(tokens=256, seq_len=16)
    result = pipeline.profile_model(model, text=text, proving=Proving(tokens=256))
    assert result.proof is None and not result.stats.header.notes

    def fail(*args, **options):
        raise SedetectError("the text is over")

    monkeypatch.setattr(pipeline, "prove_profile", fail)
    result = pipeline.profile_model(model, text=text, proving=Proving(tokens=256))
    assert result.proof is None and result.stats.header.tokens == 256
    assert [str(note) for note in result.stats.header.notes] == ["nothing was proved: SedetectError: the text is over"]

    def told(*args, progress, **options):
        progress("L0E0 alone", 0, 3, 1.0)

    monkeypatch.setattr(pipeline, "prove_profile", told)
    asked = []
    options = {"text": text, "proving": Proving(), "stop": lambda: bool(asked)}
    labels = []
    pipeline.profile_model(model, **options, progress=lambda label, *_: labels.append(label))
    assert labels[-1] == "L0E0 alone (about 1 s in all)"
    monkeypatch.setattr(pipeline, "prove_profile", lambda *a, **o: asked.append(1) or told(*a, **o))
    assert pipeline.profile_model(model, **options).interrupted
    with pytest.raises(SedetectError, match="proving: needs the whole model"):
        pipeline.profile_model(model, text=text, proving=Proving(), stream=True)
    with pytest.raises(SedetectError, match="proving: needs the whole text"):
        pipeline.profile_model(model, text=text, proving=Proving(), part=(0, 2))
    with pytest.raises(SedetectError, match="smallest 0: must be above 0"):
        pipeline.profile_model(model, text=text, proving=Proving(smallest=0))


@pytest.fixture(scope="module")
def observed(subject):
    model, domains = subject
    stats = sedetect.profile_model(model, text=sedetect.Text(2048, 256), tokenizer=load_tokenizer(TINY)).stats
    return stats, observe_residual(model, domains, prefix=1, sequences=1)


def test_the_text_of_a_proof_is_not_that_of_the_profile(subject, observed, monkeypatch):
    stats, residual = observed
    taken = []
    monkeypatch.setattr(proving, "prove", lambda model, windows, chosen, **options: taken.append((windows, chosen)))
    proof = Proving("L0E24", tokens=4096)
    proving.prove_profile(
        subject[0], load_tokenizer(TINY), None, sedetect.Text(2048, 256), stats, proof, residual=residual
    )
    ((windows, chosen),) = taken
    assert list(map(str, chosen)) == ["L0E24"] and sum(part.ids.numel() for part in windows.values()) == 4096
    for part in windows.values():
        ((start, end),) = stats.header.sources[part.source].ranges
        assert start < end <= part.numbers.min()


def test_named_experts(subject, observed):
    """Any experts of the statistics, with the values that they have there; else the candidates."""
    model, (stats, residual) = subject[0], observed
    assert list(map(str, candidates_of(stats, residual))) == ["L1E28", "L9E7"]
    named = candidates_of(stats, residual, "L0E24, L9E7")
    values = {f"L{bank.layer}E{e}": float(v) for bank, s in stats.banks.items() for e, v in enumerate(s.out_max)}
    assert {str(place): value for place, value in named.items()} == {n: values[n] for n in ("L0E24", "L9E7")}
    for wrong in ("L10E0", "L1E32", "L1shared"):
        with pytest.raises(SedetectError, match=f"{wrong}: the statistics have no such expert"):
            candidates_of(stats, residual, wrong)
        with pytest.raises(SedetectError, match="has no such expert"):
            check_names(model, wrong)


CUT = ("--tokens", 512, "--seq-len", 32)


def test_the_command(tmp_path):
    """On random weights nothing is proved; the text is none that the statistics saw, or it is refused."""
    model = put_model(tmp_path / "model")
    assert run("profile", model, "-o", tmp_path / "out", *CUT).code == 0
    given = ("prove", model, "--stats", tmp_path / "out", "-o", tmp_path / "out", "--experts", "L1E3,L0E2", "--chain")
    code, out, err = run(*given, *CUT)
    assert code == 0 and err == "" and "proof.json" in out
    proof = Proof.load(tmp_path / "out")
    assert [one.expert for one in proof.verdicts] == ["L1E3", "L0E2"] and proof.documents == 16
    assert all(f"{one.expert}: {one.level}: {one.reason}" in out and one.level != "proved" for one in proof.verdicts)
    assert proof.verdicts[1].feeders == [] and "no upstream expert" in out
    for wrong, told in {
        ("--seq-len", 16): "--seq-len 16: the statistics are of the same text in windows of 32",
        ("--experts", "L1E99"): "L1E99: Qwen3MoeForCausalLM has no such expert",
        ("--smallest", 0): "--smallest 0: must be above 0",
        ("--level", 1): "--level 1: must be above 0 and below 1",
    }.items():
        assert told in refused(run(*given, *CUT, *wrong))
    assert "statistics of another model" in refused(run(*given, *CUT, "--stats", other(tmp_path)))


def other(tmp_path):
    model = put_model(tmp_path / "other", num_hidden_layers=2)
    assert run("profile", model, "-o", tmp_path / "theirs", *CUT).code == 0
    return tmp_path / "theirs"
