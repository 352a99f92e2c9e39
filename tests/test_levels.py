"""Levels: a proof beside the statistics decides what is called a super expert, and what is protected."""

import json
import shutil
from dataclasses import replace

import pytest
from support.command import ranked, refused, row, run
from support.models import TINY
from support.synthetic import bank, model

import sedetect
from sedetect import SedetectError
from sedetect.ranking.stability import margins
from sedetect.report.style import LIGHT
from sedetect.results import Results
from sedetect.stats.place import BankId, parse_place
from sedetect.stats.proof import Effect, Feeder, Proof, Verdict
from sedetect.stats.residual import LayerResidual, Residual

EFFECT = Effect(0.15, 0.1, 0.2, 64)


def proof_of(stats, **levels) -> Proof:
    """What a proof found that tried these experts: name -> level."""
    verdicts = [Verdict(name, level, f"why {level}", EFFECT, None, 8, 8) for name, level in levels.items()]
    header = stats.header
    return Proof(
        header.model, header.digest, 512, 8, 0.03, 0.05, 0.07, 0.9, 1250.0, 0.003, verdicts, [], [], 1.0, "sinks: 7 %"
    )


@pytest.fixture
def stats():
    """L0E0 and L1E1 in the set, L3E2 as large in a late layer, 299 others of |y| 1 in each of four layers."""
    banks = {(layer, "routed"): bank([1.0] * 300) for layer in range(4)}
    for layer, expert, value in ((0, 0, 900.0), (1, 1, 800.0), (3, 2, 850.0)):
        banks[layer, "routed"] = bank([value if e == expert else 1.0 for e in range(300)])
    return model(banks, 4)


def levels(ranking) -> dict[str, str | None]:
    return {str(expert): expert.verdict for expert in ranking.judged}


@pytest.mark.parametrize(
    "tried, found, proved, headline",
    [
        ({}, ["L0E0", "L3E2", "L1E1"], [], "3 candidates: L0E0 (|y| 900, 900x its layer's median), L3E2 "),
        (
            {"L0E0": "proved", "L1E1": "refuted", "L3E2": "refuted"},
            ["L0E0"],
            ["L0E0"],
            "1 super expert, proved: L0E0 (|y| 900, 900x its layer's median); 2 refuted: L3E2 (|y| 850, 850x its "
            "layer's median), L1E1 (",
        ),
        (
            {"L0E0": "proved", "L1E1": "proved", "L3E2": "undecided"},
            ["L0E0", "L3E2", "L1E1"],
            ["L0E0", "L1E1"],
            "2 super experts, proved: L0E0 (|y| 900, 900x its layer's median), L1E1 (|y| 800, 800x its layer's median)"
            "; 1 undecided: L3E2 (",
        ),
        (
            {"L0E0": "refuted"},  # what a proof did not try stays a candidate
            ["L3E2", "L1E1"],
            [],
            "2 candidates: L3E2 (|y| 850, 850x its layer's median), L1E1 (|y| 800, 800x its layer's median); 1 refuted",
        ),
        (
            {"L0E0": "refuted", "L1E1": "refuted", "L3E2": "refuted"},
            [],
            [],
            "no super expert; 3 refuted: L0E0 (",
        ),
    ],
)
def test_a_proof_decides(stats, tried, found, proved, headline):
    ranking = sedetect.rank(stats, proof=proof_of(stats, **tried) if tried else None)
    assert levels(ranking) == dict.fromkeys(("L0E0", "L1E1", "L3E2"), "candidate") | tried
    assert ([str(e) for e in ranking.found], [str(e) for e in ranking.proved]) == (found, proved)
    assert ranking.headline.startswith(headline)
    assert {str(e): e.reason for e in ranking.judged if e.reason} == {n: f"why {level}" for n, level in tried.items()}
    assert ranking.criteria["proof"] is bool(tried)
    assert ("a candidate is unproved" in " ".join(ranking.notes)) == ("candidate" in levels(ranking).values())
    assert [str(e) for e in ranking.super_experts] == ["L0E0", "L1E1"], "the published rule is as it was"


def test_a_proof_of_experts_without_any_sign(stats):
    """Named by hand, they stand beside the set with what was found of them."""
    tried = {"L2E7": "proved", "L2E8": "refuted", "L2E9": "undecided"}
    ranking = sedetect.rank(stats, proof=proof_of(stats, **tried))
    assert tried.items() < levels(ranking).items()
    assert {str(e) for e in ranking.found} == {"L0E0", "L1E1", "L3E2", "L2E7", "L2E9"}
    assert [str(e) for e in ranking.proved] == ["L2E7"]
    assert all(str(e) not in tried for e in ranking.super_experts)


def test_a_headline_says_where_there_are_no_sinks(stats):
    header = stats.header
    layer = LayerResidual(1, 900.0, 101, 0, 3, 2, "code", 0.5, None, 4, 0, [0.01, 0.02])
    seen = Residual(header.model, header.digest, {"code": 1}, 512, 1, 50.0, 100.0, [layer] * 4, [], 0)
    assert sedetect.rank(stats, residual=seen).headline.endswith("; no notable attention sinks")
    for level, said in (("refuted", True), ("proved", False)):  # a proof has looked at other text
        found = sedetect.rank(stats, residual=seen, proof=proof_of(stats, L0E0=level))
        assert ("sinks" in found.headline) is said
    sinks = replace(seen, layers=[replace(layer, sinks=[0.01, 0.5])] * 4)
    unknown = replace(seen, layers=[replace(layer, sinks=None)] * 4)
    for one in (sinks, unknown):
        assert "sinks" not in sedetect.rank(stats, residual=one).headline
    flat = model({(layer, "routed"): bank([1.0] * 300) for layer in range(4)}, 4)
    headline = sedetect.rank(flat, residual=replace(sinks, digest=flat.header.digest), layers="data").headline
    assert headline == "no candidate: no layer forms a massive activation that later layers carry"


def test_the_proof_of_another_model_is_refused(stats, tmp_path):
    other = replace(proof_of(stats, L0E0="proved"), model="another", digest="0")
    with pytest.raises(SedetectError, match=r"the proof is that of another \(0\), the statistics are of .*; take the"):
        sedetect.rank(stats, proof=other)
    stats.save(tmp_path / "stats.safetensors")
    other.save(tmp_path / "proof.json")
    for command in (("rank", tmp_path), ("export", tmp_path, "--to", "json"), ("report", tmp_path)):
        assert "proof" in refused(run(*command))


# the commands


@pytest.fixture
def judged(tiny_profile, tmp_path):
    """A folder of tiny-moe's profile and a proof of these levels."""

    def made(**tried):
        folder = shutil.copytree(tiny_profile, tmp_path / "-".join(tried.values()), dirs_exist_ok=True)
        proof_of(Results(folder).stats(), **tried).save(Results(folder).proof_path)
        return folder

    return made


def test_rank_and_report_show_it(judged, tmp_path):
    folder = judged(L1E28="proved", L9E7="refuted")
    code, out, err = run("rank", folder, "-o", tmp_path / "ranking.json")
    assert code == 0 and err == "" and out.startswith("1 super expert, proved: L1E28 (")
    assert (row(out, "L1E28")[-1], row(out, "L9E7")[-1]) == ("proved", "refuted")
    assert "L1E28: proved: why proved; |y| " in out and "L9E7: refuted: why refuted; |y| " in out
    document = ranked(tmp_path / "ranking.json")
    assert [(e["verdict"], e["reason"]) for e in document["super_experts"] + document["others"]] == [
        ("proved", "why proved"), ("refuted", "why refuted"),
    ]  # fmt: skip
    assert sedetect.rank(folder).headline == document["headline"] == out.splitlines()[0]
    code, out, err = run("report", folder)
    assert code == 0 and out.startswith("1 super expert, proved: L1E28 (")
    page = (folder / "report.html").read_text()
    assert 'class="verdict found"' in page and "L9E7: refuted: why refuted" in page


def test_every_level_is_drawn_in_its_color(judged, opened):
    tried = {"L1E28": "proved", "L9E7": "refuted", "L5E3": "undecided"}
    folder = judged(**tried)
    assert run("report", folder).code == 0
    page, events = opened(folder / "report.html")
    assert events == []
    for chart in ("by-layer", "by-expert"):
        drawn = page.locator(f"#chart-{chart} .mark-text.role-mark text")
        fills = {one.text_content(): one.evaluate("text => getComputedStyle(text).fill") for one in drawn.all()}
        assert {fills[name] for name in tried} == {rgb(LIGHT[level]) for level in tried.values()}


def rgb(color: str) -> str:
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:], 16)})"


@pytest.mark.parametrize(
    "tried, protected",
    [
        ({"L1E28": "proved", "L9E7": "refuted"}, "L1E28 (proved)"),
        ({"L1E28": "proved"}, "L1E28 (proved), L9E7 (candidate)"),
        ({"L1E28": "undecided", "L9E7": "refuted"}, "L1E28 (undecided)"),
    ],
)
def test_unproved_ones_are_protected_and_named(judged, tmp_path, tried, protected):
    folder = judged(**tried)
    names = [one.partition(" ")[0] for one in protected.split(", ")]
    code, _, err = run("export", folder, "--to", "json")
    assert code == 0 and f"protected: {protected}, by expert\n" in err
    code, out, _ = run("prune", TINY, "--stats", folder, "--by", "frequency", "-o", tmp_path / "pruned")
    assert code == 0 and f"protected: {protected}; frequency alone would prune L1E28\n" in out
    document = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert document["super_experts"] == names
    assert document["unproved"] == [name for name in names if tried.get(name) != "proved"]
    code, out, _ = run("rank", folder, "--by", "reap", "-o", tmp_path / "reap.json")
    assert code == 0 and "; ".join((names[0] + protected.partition(",")[0].removeprefix(names[0])[:-1], "32 of")) in out
    told = json.loads((tmp_path / "reap.json").read_text())["super_experts"]
    assert [f"{one['name']} ({one['verdict']})" for one in told] == protected.split(", ")


def test_refuted_ones_are_left_out(judged, tmp_path):
    folder = judged(L1E28="refuted", L9E7="refuted")
    said = refused(run("export", folder, "--to", "json", "-o", tmp_path / "list"))
    assert "nothing to protect: no super expert; 2 refuted: L1E28 (" in said
    code, out, _ = run("prune", TINY, "--stats", folder, "--by", "frequency", "-o", tmp_path / "pruned")
    assert code == 0 and "nothing to protect: no super expert; 2 refuted: L1E28 (" in out
    document = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert 28 not in document["kept"]["decoder.1.routed"] and document["super_experts"] == document["unproved"] == []


def test_a_budget_keeps_what_nothing_refutes(judged, tmp_path):
    folder = judged(L1E28="undecided", L9E7="refuted")
    short = ("--tokens", 512, "--seq-len", 128, "--format", "int3", "--ratio", 0.25, "--controls", 1)
    code, out, _ = run("budget", TINY, "--stats", folder, *short, "-o", tmp_path)
    assert code == 0 and out.startswith("1 undecided: L1E28 (") and "\nkept: L1E28 (undecided), which adds" in out
    assert json.loads((tmp_path / "budget.json").read_text())["kept"] == ["L1E28"]


def test_what_experiments_choose_follows(judged):
    from sedetect.experiments.targets import choose_experts
    from sedetect.models.loading import empty_model

    results = Results(judged(L1E28="refuted", L5E3="proved"))
    chosen = choose_experts("candidates", empty_model(TINY), results.stats(), proof=results.proof())
    assert sorted(map(str, chosen)) == ["L5E3", "L9E7"]
    assert parse_place("L5E3").bank == BankId("decoder", 5, "routed")


def test_feeders_are_protected_where_a_chain_was_followed(judged):
    folder = judged(**{"L1E28": "proved", "L9E7": "refuted"})
    assert "did not look for feeders" in refused(run("export", folder, "--to", "json", "--with-feeders"))
    proof = Proof.load(folder)
    fed = {"L1E28": [Feeder("L0E24", 0.0)], "L9E7": [Feeder("L0E5", 0.0), Feeder("L1E28", 0.0)]}
    followed = [replace(one, feeders=fed[one.expert]) for one in proof.verdicts]
    replace(proof, verdicts=followed).save(Results(folder).proof_path)
    document = json.loads(run("export", folder, "--to", "json", "--with-feeders").out)
    assert [(one["name"], one["why"]) for one in document["experts"]] == [("L1E28", "proved"), ("L0E24", "feeder")]
    Results(folder).proof_path.unlink()
    assert "has no proof.json" in refused(run("export", folder, "--to", "json", "--with-feeders"))


def test_feeders_are_kept_and_not_averaged(judged, tmp_path):
    folder = judged(L1E28="proved", L9E7="refuted")
    bank = BankId("decoder", 0, "routed")
    lowest = int(Results(folder).stats().banks[bank].rows.argmin())
    proof = Proof.load(folder)
    followed = [replace(one, feeders=[Feeder(f"L0E{lowest}", 0.0)]) for one in proof.verdicts]
    replace(proof, verdicts=followed).save(Results(folder).proof_path)
    options = ("--stats", folder, "--by", "frequency", "--merge", "nearest")
    assert run("prune", TINY, *options, "-o", tmp_path / "out").code == 0
    document = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert {lowest} <= set(document["kept"][str(bank)]) and {28} <= set(document["kept"]["decoder.1.routed"])
    for name, exempt in ((str(bank), lowest), ("decoder.1.routed", 28)):
        merged = {int(kept): members for kept, members in document["merged"][name].items()}
        assert merged and exempt not in merged and not any(exempt in members for members in merged.values())


def test_margins(stats):
    """How far each is from the thresholds; what was not observed is left out."""
    found = margins(stats)
    assert list(found) == ["L0E0", "L3E2", "L1E1"]
    assert found["L3E2"] == {"set": 850 / 90, "stands out": 17.0, "median": 85.0}
    first = bank([1.0] * 300, {7: 129.0, 8: 1.0})
    (one,) = margins(model({(0, "routed"): first}, 1)).values()
    assert one["first tokens"] == 12.9
