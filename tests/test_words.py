"""Sentences and tables say what their numbers say, at the ends too: nothing seen, zeros, all equal, one of everything,
NaN."""

import itertools
import math
import re

import pytest
import torch
from support.command import run
from support.documents import outcome
from support.page import Page
from support.synthetic import ROWS, bank
from support.synthetic import model as bare_model

import sedetect
from sedetect.analysis.common import Analysis, LayerArrays, standing
from sedetect.analysis.outputs import OutputSums, summarize
from sedetect.analysis.tables import layers_table, standings_tables
from sedetect.analysis.weights import analyze_group
from sedetect.compression.budget import Budget, Cost, Row
from sedetect.compression.budget import conclusion as budget_conclusion
from sedetect.experiments.study import Experiment, conclusion
from sedetect.kernels.records import COUNTS
from sedetect.ranking.coverage import coverage, unseen, unseen_note
from sedetect.report import numbers
from sedetect.report.data import datasets
from sedetect.report.evidence import Evidence
from sedetect.report.pictures import pictures_of
from sedetect.report.sections import sections
from sedetect.report.table import Table
from sedetect.report.write import write_report
from sedetect.stats.place import BankId
from sedetect.stats.proof import Effect, Proof, Verdict

LARGE = [900.0, *[1.0 + e / 64 for e in range(31)]]
FEW = [900.0, *[None] * 15, *[1.0 + e / 16 for e in range(16)]]


def model(banks, layers, top_k=4):
    """Statistics with the paths that transformers' models have, and the counts that go with their values."""
    stats = bare_model(banks, layers, top_k)
    for name, state in stats.banks.items():
        state.counts[:, COUNTS.index("nonfinite")] = (~state.out_max.isfinite()).long()
        module = "mlp.experts" if name.routed else "mlp.shared_expert.down_proj"
        stats.header.banks[str(name)].module = f"model.layers.{name.layer}.{module}"
    return stats


def few_rows():
    state = bank(FEW)
    state.counts[:, ROWS] = state.counts[:, ROWS].clamp(max=1)
    return model({(0, "routed"): state, (1, "routed"): bank([2.0] * 32)}, 2)


def without_text():
    stats = model({(0, "routed"): bank([None] * 8)}, 1)
    stats.header.tokens = 0
    return stats


EXTREMES = {
    "nothing seen": lambda: model({(n, "routed"): bank([None] * 8) for n in range(2)}, 2),
    "no text": without_text,
    "zeros": lambda: model({(n, "routed"): bank([0.0] * 8, first={3: 0.0}) for n in range(2)}, 2),
    "all equal": lambda: model({(n, "routed"): bank([0.1] * 3) for n in range(2)}, 2),
    "few rows": few_rows,
    "one layer": lambda: model({(0, "routed"): bank(LARGE, first={0: 900.0, 1: 1.0})}, 1),
    "one expert": lambda: model({(n, "routed"): bank([60.0 + n]) for n in range(3)}, 3, top_k=1),
    "every expert chosen": lambda: model({(n, "routed"): bank(LARGE[:4]) for n in range(2)}, 2, top_k=4),
    "shared alone": lambda: model({(0, "routed"): bank([None] * 4), (0, "shared"): bank([700.0])}, 1),
    "NaN": lambda: model({(0, "routed"): bank([math.nan, *LARGE[1:]]), (1, "routed"): bank(LARGE)}, 2),
    "all NaN": lambda: model({(n, "routed"): bank([math.nan, math.inf]) for n in range(2)}, 2),
}
WRONG = re.compile(r"\b(nan|inf|None)\b|(?<![\w.])-1(?![\w.])")


@pytest.fixture(params=EXTREMES)
def extreme(request):
    stats = EXTREMES[request.param]()
    if request.param != "no text":
        stats.header.tokens, stats.header.sequences = 1000, 10
    return stats


def test_every_command_that_reads_statistics(extreme, tmp_path):
    (tmp_path / "a").mkdir()
    extreme.save(tmp_path / "a" / "stats.safetensors")
    for command in (
        ["rank", tmp_path / "a"],
        *(["rank", tmp_path / "a", "--by", by] for by in ("reap", "max", "frequency")),
        ["stability", tmp_path / "a", tmp_path / "a"],
        ["compare", tmp_path / "a", tmp_path / "a"],
        ["export", tmp_path / "a", "--to", "json"],
        ["report", tmp_path / "a"],
    ):
        result = run(*command)
        assert result.code == 0 or (result.code == 2 and result.err.startswith("sedetect: nothing to protect")), result
        assert not WRONG.search(result.out), (command, result.out)
    page = Page((tmp_path / "a" / "report.html").read_text()).text
    assert not re.search(r"\bnan\b|\bNone\b|-1 ", page)


def test_every_section_of_a_report(extreme, tmp_path):
    evidence = Evidence(extreme, sedetect.rank(extreme))
    shown = sections(evidence, datasets(evidence))
    cells = [c for table in shown.values() if isinstance(table, Table) for c in itertools.chain(*table.rows)]
    assert cells and not [cell for cell in cells if WRONG.search(cell)]
    assert not [fact for fact in shown["facts"] if WRONG.search(f"{fact['value']} {fact['more']}")]
    write_report(evidence, tmp_path / "r.html")


def test_what_was_not_seen_is_no_zero(tmp_path):
    """An expert that saw no row lowers no median and no range, and nothing fell to it."""
    few, many = few_rows(), model({(0, "routed"): bank(LARGE), (1, "routed"): bank([2.0] * 32)}, 2)
    few.header.tokens = many.header.tokens = 1000
    assert sedetect.rank(few).super_experts[0].ratio == pytest.approx(900 / (1 + 8 / 16), rel=0.05)
    paths = [tmp_path / name / "stats.safetensors" for name in ("few", "many")]
    for path, stats in zip(paths, (few, many)):
        path.parent.mkdir()
        stats.save(path)
    (row,) = [line for line in run("rank", paths[0], "--by", "max").out.splitlines() if line.strip().startswith("L0 ")]
    assert " 1.5 " in row and row.count("no\u00a0row") == 3
    assert numbers.headroom(few)[0].out_name == "L0E0"
    unmeasured = model({(0, "routed"): bank([None] * 4)}, 1)
    assert numbers.headroom(unmeasured)[0].out_max is numbers.headroom(unmeasured)[0].out_name is None
    zeros = model({(0, "routed"): bank([0.0] * 4)}, 1)
    assert (numbers.headroom(zeros)[0].out_max, numbers.headroom(zeros)[0].out_name) == (0, None)


def test_parts_in_which_an_expert_saw_no_row():
    seen = model({(0, "routed"): bank(LARGE)}, 1)
    gone = model({(0, "routed"): bank([None, *LARGE[1:]])}, 1)
    (expert,) = [e for e in sedetect.agreement({"a": seen, "b": gone}).experts if e.name == "L0E0"]
    assert (expert.lowest, expert.highest) == (900, 900) and math.isnan(expert.values[1])
    (moved,) = [m for m in sedetect.compare([seen, gone]).moved if m.name == "L0E0"]
    assert moved.ratio is None and moved.channels == (0, None) and math.isnan(moved.values[1])


def test_a_series_that_ends_without_candidates(tmp_path):
    for name, values in {"a": LARGE, "b": [1.0] * 32, "c": [2.0] * 32, "d": [None] * 32}.items():
        model({(0, "routed"): bank(values)}, 1).save(tmp_path / name)
    out = run("compare", *(tmp_path / name for name in "abc")).out
    assert out.startswith("the candidates differ; none is left from b (run 2 of 3) on\n")
    row = next(
        line
        for line in run("compare", tmp_path / "a", tmp_path / "d").out.splitlines()
        if " L0E0" in f" {line.strip()}"[:6]
    )
    assert re.split(r"\s{2,}", row.strip()) == ["L0E0", "900", "-", "-", "900", "900", "0 > -", "1/2"]


def tried(stats, **levels):
    effect = Effect(0.5, 0.4, 0.6, 9)
    verdicts = [Verdict(name, level, "why", effect, None, 9, 0) for name, level in levels.items()]
    digest = stats.header.digest
    return Proof("m", digest, 9, 9, 0.02, 0.05, None, None, 1.0, 0.1, verdicts, [], [], 1.0)


def test_an_expert_that_a_proof_tried_and_the_statistics_did_not_see(tmp_path):
    """It is named and protected, as what it is: a report ranks each domain by the same proof."""
    stats = model({(0, "routed"): bank([None, *LARGE[1:]]), (1, "routed"): bank(LARGE)}, 4)
    proof = tried(stats, L0E0="proved")
    ranking = sedetect.rank(stats, proof=proof)
    (proved,) = ranking.proved
    assert (str(proved), proved.seen, proved.value, proved.ratio, proved.signature) == ("L0E0", False, 0, None, None)
    assert ranking.headline.startswith("1 super expert, proved: L0E0 (no row)")
    assert [(str(e.place), e.channel) for e in sedetect.protect_list(stats, ranking=ranking)][-1] == ("L0E0", -1)
    stats.save(tmp_path / "stats.safetensors")
    (tmp_path / "domains").mkdir()
    stats.save(tmp_path / "domains" / "code.safetensors")
    proof.save(tmp_path / "proof.json")
    out = run("rank", tmp_path).out
    assert "L0E0: proved: why; no row in the statistics" in out and not WRONG.search(out)
    assert run("report", tmp_path).code == 0


def test_first_tokens_of_experts_that_gave_nan():
    """One expert with a NaN does not take the sign of another away."""
    values = {0: 900.0, **dict.fromkeys(range(1, 9), 2.0)}
    for broken in (math.nan, math.inf):
        stats = model({(0, "routed"): bank([3.0] * 32, first=values | {9: broken})}, 1)
        assert sedetect.rank(stats).super_experts[0].signature is True


def test_neighbours_are_experts_that_were_measured():
    stats = model({(0, "routed"): bank([900.0, None, None, 2.0, *[1.0] * 4])}, 1)
    assert [str(e.place) for e in sedetect.protect_list(stats, neighbours=1)] == ["L0E0", "L0E3"]
    assert len(sedetect.protect_list(stats, neighbours=8)) == 6


def test_coverage_of_no_text():
    stats = without_text()
    assert coverage(stats) == "coverage: 8 routed experts saw 0 to 0 rows; no text was profiled"
    assert unseen_note(unseen(stats), "pruned", 0).endswith("; profile text")
    evidence = Evidence(stats, sedetect.rank(stats))
    assert {row[2] for row in sections(evidence, datasets(evidence))["thin"].rows} == {"–"}


def test_kurtosis_of_equal_values():
    """Whose mean is not quite their value."""
    for value, count in ((0.1, 3), (0.3, 7), (1e-8, 11)):
        stats = model({(0, "routed"): bank([value] * count)}, 1)
        assert numbers.layer_rows(stats)[0].kurtosis is None


# analyses


def outputs_of(y, logits=None, experts=None):
    """A layer of experts that gave y (N, T, H), the first of which was chosen."""
    experts = len(y) if experts is None else experts
    sums = OutputSums(len(y), experts, torch.device("cpu"))
    sums.add(y, torch.zeros(y.shape[1], 1, dtype=torch.int64), logits)
    return LayerArrays(experts, [f"L1E{e}" for e in range(experts)] + ["L1shared"] * (len(y) - experts), sums.arrays())


def analysis_of(kind, layer, **settings):
    made = Analysis(kind, "m", "d", "float32", {"domains": {"code": 9}, "texts": [], "against": None} | settings)
    made.layers[BankId("decoder", 1, "routed")] = layer
    return made


RANDOM = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
COLUMNS = ("cosine", "angular", "chosen", "(chance)", "top", "correlation")
SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("y", "logits", "unknown"),
    [
        (torch.zeros(4, 6, 8), SCORES, {*COLUMNS}),
        (RANDOM[:1].expand(4, 6, 8), SCORES, {"chosen", "(chance)", "top", "correlation"}),
        (RANDOM, torch.zeros(6, 4), {"top", "correlation"}),
        (torch.full((4, 6, 8), torch.nan), SCORES, {*COLUMNS}),
        (RANDOM[:1], SCORES[:, :1], {"cosine", "angular", "correlation"}),
    ],
    ids=["zeros", "all equal", "router of zeros", "NaN", "one expert"],
)
def test_what_outputs_cannot_say(y, logits, unknown):
    layer = outputs_of(y, logits)
    table = layers_table(analysis_of("outputs", layer))
    said = dict(zip(table.columns, table.rows[0]))
    assert {name for name, cell in said.items() if cell != "-"} == {"layer", *COLUMNS} - unknown
    (cells,) = standings_tables(analysis_of("outputs", layer), {"L1E0": "candidate"}).values()
    assert not WRONG.search(str(cells.rows))
    for page in (True, False):
        for picture in pictures_of(analysis_of("outputs", layer), {}, page=page):
            assert not any(math.isnan(record["value"]) for record in picture.data[picture.name])


def test_tokens_without_a_largest_output_do_not_count():
    mixed = torch.cat((RANDOM, torch.zeros(4, 5, 8)), 1)
    some, all_ = outputs_of(RANDOM, SCORES), outputs_of(mixed, torch.cat((SCORES, SCORES[:5])))
    for name in ("chosen", "by_chance", "top", "correlation"):
        assert summarize(all_)[name] == summarize(some)[name]
    sums = OutputSums(4, 4, torch.device("cpu"))
    sums.add(mixed, torch.zeros(11, 1, dtype=torch.int64), None)
    assert sums.unranked() == 5 and int(sums.arrays()["ranked"]) == 6


def test_experts_of_zeros_are_like_no_other():
    """One that is dead, and the others are as alike as without it; a shared one likewise."""
    alive = summarize(outputs_of(RANDOM))["cosine"]
    dead = torch.cat((RANDOM, torch.zeros(1, 6, 8)))
    assert summarize(outputs_of(dead))["cosine"] == pytest.approx(alive, rel=1e-6)
    (cells,) = standings_tables(analysis_of("outputs", outputs_of(dead)), {"L1E4": "candidate"}).values()
    assert [row[3] for row in cells.rows if row[0] == "cosine to others"] == ["-"]
    assert math.isnan(summarize(outputs_of(dead, experts=4))["shared"])
    matrices = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(2))
    for router in (torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(5, 8)):
        weights = {name: torch.cat((matrices, torch.zeros(1, 6, 8))) for name in ("gate", "up", "down")}
        pairs = [(0, 1), (0, 4)]
        with_dead = LayerArrays(5, [f"L1E{e}" for e in range(5)], analyze_group([weights], router, pairs))
        weights = dict.fromkeys(weights, matrices)
        without = LayerArrays(4, [f"L1E{e}" for e in range(4)], analyze_group([weights], router[:4], pairs[:1]))
        one, other = (layers_table(analysis_of("weights", layer)) for layer in (with_dead, without))
        assert one.rows == other.rows and one.text == other.text
    assert one.columns[-1] == "down R2" and one.rows[0][-3:] == ["-"] * 3, "gate embeddings of zeros"


def routing_of(load, coactivation=None, weight=None):
    load = torch.tensor(load)
    experts = load.shape[1]
    arrays = {
        "load": load,
        "tokens": torch.full((len(load),), 50),
        "coactivation": torch.zeros(experts, experts).long() if coactivation is None else coactivation,
        "weight": torch.full((experts,), 0.5) if weight is None else torch.tensor(weight),
        "entropy": torch.full((len(load),), torch.nan),
    }
    return LayerArrays(experts, [f"L1E{e}" for e in range(experts)], arrays)


def test_routing_where_all_are_chosen_equally():
    layer = routing_of([[50, 50, 50, 50]], torch.full((4, 4), 50))
    (row,) = layers_table(analysis_of("routing", layer)).rows
    assert row == ["L1", "E0 +3", "100.0%", "4.0", "-", "0%", "E0 E1 +5", "1"]
    layer = routing_of([[40, 30, 20, 10]])
    assert layers_table(analysis_of("routing", layer)).rows[0][1] == "E0"


def test_routing_of_domains_and_experts_that_nothing_reached():
    layer = routing_of([[40, 10], [0, 0]])
    made = analysis_of("routing", layer, domains={"code": 50, "math": 0})
    assert layers_table(made).rows[0][5:7] == ["0%", "-"]
    nothing = analysis_of("routing", routing_of([[0, 0]]))
    drawn = {picture.name: picture.data[picture.name] for picture in pictures_of(nothing, {}, page=False)}
    assert "routing-effective" not in drawn or not drawn["routing-effective"]
    layer = routing_of([[40, 10, 0, 0]], weight=[0.5, 0.3, math.nan, math.nan])
    (cells,) = standings_tables(analysis_of("routing", layer), {"L1E1": "candidate"}).values()
    assert ["mean routing weight", "0.3", "0.4", "2"] in cells.rows
    (cells,) = standings_tables(analysis_of("routing", layer), {"L1E2": "candidate"}).values()
    assert ["mean routing weight", "-", "0.4", "-"] in cells.rows
    assert math.isnan(standing(torch.full((3,), torch.nan), 0).median)


# experiments


def test_runs_that_give_no_numbers():
    """NaN is worse than any change, wherever it stands among the draws."""
    for draws in itertools.permutations([0.1, math.nan, 0.2]):
        same = [outcome("skip", change) for change in draws]
        made = Experiment("m", "d", "bfloat16", {"code": 9}, outcome("none", 0.0), [outcome("skip", 0.5)],
                          {"same layers": same, "anywhere": []}, 8)  # fmt: skip
        assert "nan% for the worst of 3" in conclusion(made) and "perplexity," not in conclusion(made).split(":")[1]
    made.outcomes[0].mean_change = math.nan
    made.controls["same layers"] = [outcome("skip", 0.1)]
    assert "1 of 3 signs of super experts (perplexity)" in conclusion(made)


@pytest.mark.parametrize("bare", [math.inf, math.nan])
def test_budgets_of_models_that_break(bare):
    def cost(change, kept=()):
        return Cost(list(kept), 0.25, {"code": 5 * (1 + change)}, {"code": change}, change)

    rows = [
        Row("int2", cost(bare), cost(bare, ["L0E0"]), [cost(bare)]),
        Row("int3", cost(bare), cost(0.5), [cost(bare)]),
    ]
    made = Budget("m", "bfloat16", "reap", 32, ["L0E0"], cost(0.0), rows, {"code": 9}, [])
    (first, *_) = budget_conclusion(made)
    assert "beats every random choice in 1 of" in first and "buys most at int3" in first and "+50.0% with" in first
