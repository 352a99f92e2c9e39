"""The report: its numbers against straightforward recomputation, and the record of a profile that it draws on."""

import json
import math
import statistics
from datetime import UTC, datetime
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.models import TINY
from support.page import Page
from support.synthetic import synthetic_stats

import sedetect
from sedetect import ModelStats
from sedetect.kernels.records import COLUMN, column, float_bits
from sedetect.models.loading import load_tokenizer
from sedetect.profiling.record import Run
from sedetect.report import numbers, text
from sedetect.report.charts import Charts
from sedetect.report.data import datasets
from sedetect.report.drawing import spaced
from sedetect.report.evidence import Evidence, load_evidence
from sedetect.report.write import write_report
from sedetect.stats.bank import BankStats
from sedetect.stats.place import BankId


@pytest.fixture(scope="module")
def stats(tiny_profile):
    return ModelStats.load(tiny_profile)


@pytest.mark.parametrize(
    "values", [[1, 2, 3, 4, 10], [5, 5, 5, 6], [0.5, 100, 3, 3, 2, 1, 7, 9], [0, 0, 0, 0, 0, 0, 1]]
)
def test_kurtosis(values):
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((x - mean) ** 2 for x in exact) / len(exact)
    wanted = sum((x - mean) ** 4 for x in exact) / len(exact) / variance**2 - 3
    assert numbers.kurtosis(np.array(values, float)) == pytest.approx(float(wanted), rel=1e-12)
    assert numbers.kurtosis(np.array(values, float)) <= numbers.kurtosis_most(len(values)) + 1e-9


def test_kurtosis_at_its_ends():
    assert numbers.kurtosis(np.array([0, 0, 0, 9.0])) == pytest.approx(numbers.kurtosis_most(4))
    assert numbers.kurtosis(np.array([7.0, 7.0])) is None and numbers.kurtosis(np.array([])) is None
    assert numbers.kurtosis_most(1) is None
    large = np.random.default_rng(0).normal(size=200_000)
    assert abs(numbers.kurtosis(large)) < 0.05


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1000), (31, 1000), (7, 12345), (20, 17), (0, 3000), (0, 8192)])
def test_more_tokens_are_the_fewest_that_do(rows, tokens):
    rate = Fraction(rows or 3, tokens)
    more = numbers.more_tokens(rows, tokens)
    assert rows + more * rate >= 32 > rows + (more - 1) * rate


def test_thin_experts():
    stats = synthetic_stats(3, 6)
    wanted = {"L0E2": 0, "L2E5": 31, "L1E0": 1}
    for state in stats.banks.values():
        state.counts[:, 0] = 32
    stats.banks[BankId("decoder", 0, "routed")].counts[2, 0] = 0
    stats.banks[BankId("decoder", 2, "routed")].counts[5, 0] = 31
    stats.banks[BankId("decoder", 1, "routed")].counts[0, 0] = 1
    shared = BankId("decoder", 1, "shared")
    stats.banks[shared] = BankStats.empty(1)  # sees every token or none: not a matter of routing
    thin = numbers.thin_experts(stats)
    assert {one.name: one.rows for one in thin} == wanted and [one.rows for one in thin] == [0, 1, 31]
    assert thin[1].more == 31 * 8192 and thin[0].more == math.ceil(32 * 8192 / 3)


def test_every_expert_has_its_row(stats):
    ranking = sedetect.rank(stats)
    rows = {row.name: row for row in numbers.expert_rows(stats, ranking)}
    assert len(rows) == 320
    for layer in range(10):
        state = stats.banks[BankId("decoder", layer, "routed")]
        for e in range(32):
            row = rows[f"L{layer}E{e}"]
            kept = [r for records in (state.first_outliers, state.outliers) for r in records[e]]
            best = max(kept, key=lambda record: column(record, "value").item())
            seen = state.rows[e].item() > 0
            value = column(best, "value").item() if seen else 0.0
            assert (row.value, row.rows, row.column) == (value, state.rows[e].item(), str(e))
            same = [r for r in kept if column(r, "value").item() == value]
            assert not seen or (row.channel, row.position, row.token_id) in [
                tuple(column(r, name).item() for name in ("channel", "position", "token_id")) for r in same
            ]
            assert row.inside == (layer < 8)
    assert sum(row.inside for row in rows.values()) == ranking.population
    by_place = sorted(rows.values(), key=lambda row: row.place)
    assert [row.place for row in by_place] == list(range(1, 321))
    assert [row.value for row in by_place] == sorted((row.value for row in rows.values()), reverse=True)
    assert {name: row.verdict for name, row in rows.items() if row.verdict != "other"} == {
        "L1E28": "candidate",
        "L9E7": "candidate",
    }


def test_rows_of_layers(stats):
    for row in numbers.layer_rows(stats):
        state = stats.banks[BankId("decoder", row.layer, "routed")]
        seen = [v for v, n in zip(state.out_max.tolist(), state.rows.tolist()) if n]
        assert (row.experts, row.maximum, row.median) == (len(seen), max(seen), statistics.median(seen))
        counts = state.rows.tolist()
        assert (row.rows_min, row.rows_median, row.rows_max) == (min(counts), statistics.median(counts), max(counts))
        assert row.in_max == max(column(state.in_max, "value").flatten().tolist())
        mean, second = statistics.fmean(seen), statistics.pvariance(seen)
        fourth = statistics.fmean((v - mean) ** 4 for v in seen)
        assert row.kurtosis == pytest.approx(fourth / second**2 - 3, rel=1e-9)
    layers = numbers.layer_rows(stats)
    assert max(layers, key=lambda row: row.kurtosis).layer == 1 and layers[1].kurtosis > 0.99 * layers[1].kurtosis_most


def test_headroom_of_extreme_values():
    stats = synthetic_stats(2, 4)
    first = stats.banks[BankId("decoder", 0, "routed")]
    values = torch.tensor([448.0, 449.0, 65505.0, math.inf])
    first.outliers[:, 0, COLUMN["value"]] = float_bits(values)
    first.in_max[:, 0, COLUMN["value"]] = float_bits(torch.tensor([2.0, math.nan, 500.0, 65504.0]))
    first.counts[:, 2:] = torch.tensor([[0, 0, 0], [0, 0, 2], [0, 1, 5], [3, 0, 0]])
    dense = BankStats.empty(1)
    dense.in_max[0, 0, COLUMN["value"]] = float_bits(torch.tensor(70000.0))
    stats.banks[BankId("decoder", 2, "dense")] = dense
    routed, mlp = numbers.headroom(stats)
    assert (routed.kind, routed.experts, routed.out_max, routed.out_name) == ("routed", 8, 65505.0, "L0E2")
    assert (routed.in_max, routed.in_name) == (65504.0, "L0E3")
    assert (routed.nonfinite, routed.over_fp16, routed.over_fp8) == (3, 1, 7)
    assert (routed.out_over_fp8, routed.out_over_fp16) == (4, 2)  # with L1E3 of the other layer, and infinity
    assert (routed.in_over_fp8, routed.in_over_fp16) == (3, 1)  # NaN is not inside
    assert (mlp.kind, mlp.out_max, mlp.in_max, mlp.in_over_fp16) == ("dense", None, 70000.0, 1)


def test_what_the_charts_draw(tiny_profile, stats):
    evidence = load_evidence(tiny_profile)
    data = datasets(evidence)
    ranking = evidence.ranking
    tests = {record["test"]: record["value"] for record in data["thresholds"]}
    values = sorted(v for b, s in stats.banks.items() if b.layer < 8 for v in s.out_max.tolist())
    assert tests["99.5th percentile of the population"] == pytest.approx(float(np.percentile(values, 99.5)))
    assert tests["0.1 of its maximum"] == max(values) / 10 == ranking.threshold
    assert tests["least |y| of what stands out"] == 50
    for record in data["experts"]:
        state = stats.banks[BankId("decoder", int(record["row"][1:]), "routed")]
        e = int(record["column"])
        assert (record["first"], record["rest"]) == (state.first_max[e].item(), state.rest_max[e].item())
    largest = {r["row"]: r["value"] for r in data["layers"] if r["series"] == "largest expert"}
    assert largest == {f"L{b.layer}": s.out_max.max().item() for b, s in stats.banks.items()}
    by_expert = torch.stack([s.out_max for s in stats.banks.values()])
    for series, part in (("all layers", by_expert), ("layers of the rule", by_expert[:8])):
        drawn = [r["value"] for r in sorted(data["columns"], key=lambda r: int(r["column"])) if r["series"] == series]
        assert drawn == part.amax(0).tolist()
    firsts = [r for r in data["kept"] if r["expert"] == "L1E28" and r["tokens"] == "first token"]
    assert len(firsts) == 8 and {r["position"] for r in firsts} == {0} and {r["token"] for r in firsts} == {"'<|bos|>'"}


def test_nonfinite_and_unseen_experts_are_drawn_as_such(tmp_path):
    stats = synthetic_stats(4, 8)
    state = stats.banks[BankId("decoder", 2, "routed")]
    state.outliers[5, 0, COLUMN["value"]] = float_bits(torch.tensor(math.nan))
    for name in ("outliers", "first_outliers"):
        getattr(state, name)[6, :, COLUMN["value"]] = -1
    state.counts[6] = 0
    evidence = Evidence(stats, sedetect.rank(stats))
    found = {r["expert"]: r for r in datasets(evidence)["experts"] if r["state"] != "seen"}
    assert {name: r["state"] for name, r in found.items()} == {"L2E5": "non-finite", "L2E6": "unseen"}
    assert found["L2E5"]["value"] is None and not found["L2E5"]["inside"] and found["L2E6"]["channel"] == "–"
    write_report(evidence, tmp_path / "r.html")  # JSON without NaN
    assert "NaN or infinity" in Page((tmp_path / "r.html").read_text()).text


def test_axes_space_layers_by_their_number():
    """Dense layers between those with experts keep their place; stacks and kinds stand by themselves."""
    assert spaced(["L1", "L4", "encoder.L2 vision", "encoder.L2"]) == [
        "L1", "L2", "L3", "L4", "encoder.L2 vision", "encoder.L2"
    ]  # fmt: skip
    stats = synthetic_stats(3, 4)
    del stats.banks[BankId("decoder", 1, "routed")]
    data = datasets(Evidence(stats, sedetect.rank(stats)))
    charts = {chart.name: str(chart.spec) for chart in Charts(data, page=False).all()}
    assert all("'L0', 'L1', 'L2'" in charts[name] for name in ("by-layer", "coverage", "headroom", "kurtosis"))
    assert "'L1'" not in charts["heatmap"]


def test_words_for_numbers():
    assert [text.number(x) for x in (None, 1256.0, 0.00123456, 12345.6, 2e6, math.inf)] == [
        "–", "1256", "0.001235", "12,346", "2e+06", "∞",
    ]  # fmt: skip
    assert [text.percent(x) for x in (0.10449, -0.0021, -0.0001, 0)] == ["+10.4%", "-0.2%", "+0.0%", "+0.0%"]
    assert text.visible("a\nb\t\u202e\x00é") == "a⏎b\\t\\u202e\\x00é"


# what the profile keeps for it


def test_run_document(tiny_profile, stats):
    document = json.loads((tiny_profile / "run.json").read_text())
    kept = Run.from_dict(document)
    assert json.loads(json.dumps(kept.to_dict())) == document
    assert abs((datetime.now(UTC) - datetime.fromisoformat(kept.date)).total_seconds()) < 3600
    assert kept.digest == stats.header.digest and kept.asked == 2048 and kept.seconds > 0 and kept.device
    tokenizer = load_tokenizer(TINY)
    peaks = {int(column(s.peak(), "token_id")[e]) for s in stats.banks.values() for e in range(32) if s.rows[e] > 0}
    assert peaks <= kept.tokens.keys() and all(kept.tokens[t] == tokenizer.decode([t]) for t in peaks)


def test_contexts_are_where_the_token_stands(tiny_profile, stats):
    kept = Run.from_dict(json.loads((tiny_profile / "run.json").read_text()))
    tokenizer = load_tokenizer(TINY)
    windows = {}
    for domain in sedetect.calibration.texts.DOMAINS:
        texts = {domain: sedetect.calibration.texts.load_texts()[domain]}
        made = sedetect.calibration.windows.make_windows(
            tokenizer, texts, tokens=512, seq_len=128, seed=None, chat_template=False
        )
        for part in made.domains.values():
            windows |= {(part.source, int(n)): ids.tolist() for n, ids in zip(part.numbers, part.ids)}
    sources = sorted(stats.header.sources)
    wanted = set()
    for layer, expert in ((1, 28), (9, 7)):
        for row, _ in stats.banks[BankId("decoder", layer, "routed")].strongest(expert, 3):
            wanted.add((sources[row.source], row.sequence, row.position))
            ids = windows[sources[row.source], row.sequence]
            assert ids[row.position] == row.token_id
    assert {(c.source, c.sequence, c.position) for c in kept.contexts} == wanted
    for context in kept.contexts:
        ids = windows[context.source, context.sequence]
        assert context.before + context.token + context.after in tokenizer.decode(ids)
        assert "\ufffd" not in context.token  # a part of a character is given the whole
        assert tokenizer.decode(ids[: context.position]).rstrip("\ufffd").endswith(context.before)
