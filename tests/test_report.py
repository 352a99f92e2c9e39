"""The report: its numbers against straightforward recomputation, its page as text and as a browser shows it."""

import base64
import hashlib
import json
import math
import re
import shutil
import statistics
import sys
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from support.command import run
from support.documents import SAMPLES
from support.models import TINY, random_model
from support.page import Page, payload
from support.synthetic import synthetic_stats

import sedetect
from sedetect import ModelStats
from sedetect.compression.budget import Budget, Cost, Row
from sedetect.compression.frontier import Curve, Frontier, size_at
from sedetect.compression.protect import GRANULARITIES, TOOLS, export, protect_list
from sedetect.compression.verification import Limits, Verification
from sedetect.experiments.study import Experiment
from sedetect.kernels.records import COLUMN, column, float_bits
from sedetect.models.loading import load_tokenizer
from sedetect.profiling.record import Run
from sedetect.ranking.stability import agreement, margins
from sedetect.report import numbers, text
from sedetect.report.answer import answer_section
from sedetect.report.data import datasets
from sedetect.report.evidence import Evidence, load_evidence
from sedetect.report.experiments import ablation_section
from sedetect.report.sections import sections
from sedetect.report.style import DARK, LIGHT
from sedetect.report.write import write_report
from sedetect.results import Results
from sedetect.stats.bank import BankStats
from sedetect.stats.note import Note
from sedetect.stats.place import BankId
from sedetect.stats.proof import Effect, Proof, Verdict

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\u202e\"'&amp;"
EVERY = ["heatmap", "ablation", "tail", "first-rest", "by-layer", "by-expert", "positions", "residual", "sinks",
         "coverage", "headroom", "kurtosis"]  # fmt: skip
OF_A_PROFILE = [name for name in EVERY if name not in ("residual", "sinks", "ablation")]


@pytest.fixture(scope="module")
def full(tiny_profile, tmp_path_factory):
    """The same with everything else that a report shows, and the report with its figures; and what was printed."""
    folder = tmp_path_factory.mktemp("full") / "tiny"
    shutil.copytree(tiny_profile, folder)
    short = ("-o", folder, "--seq-len", 64)
    assert run("analyze", "residual", TINY, *short, "--sequences", 2, "--ablate", "L1E28")[0] == 0
    assert run("analyze", "trace", TINY, *short, "--experts", "L1E28", "--tokens", 512)[0] == 0
    stats = ("--stats", folder, "--experts", "L1E28", "--how", "skip", "--controls", 1, "--sequences", 1)
    assert run("ablate", TINY, *short, *stats, "--tokens", 256)[0] == 0
    code, out, err = run("report", folder, "--figures")
    assert code == 0, err
    return folder, out


@pytest.fixture(scope="module")
def stats(tiny_profile):
    return ModelStats.load(tiny_profile)


@pytest.fixture(scope="module")
def hostile(tiny_profile, tmp_path_factory):
    """A report whose model, tokens, contexts, domains and notes would all be markup."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "domains").mkdir()
    state = ModelStats.load(tiny_profile)
    state.header.model = HOSTILE
    state.header.notes.append(Note("text", HOSTILE))
    for bank in state.header.banks.values():
        bank.module = HOSTILE
    for source in state.header.sources.values():
        source.info |= {"domain": HOSTILE, "corpus": HOSTILE}
    state.save(folder / "stats.safetensors")
    document = json.loads((tiny_profile / "run.json").read_text())
    document |= {"device": HOSTILE, "tokens": dict.fromkeys(document["tokens"], HOSTILE)}
    document["contexts"] = [c | dict.fromkeys(("before", "token", "after"), HOSTILE) for c in document["contexts"]]
    (folder / "run.json").write_text(json.dumps(document))
    assert run("report", folder)[0] == 0
    return folder / "report.html"


# numbers


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


# the page as a file


def test_a_profile_alone_gives_a_page(tiny_profile, tmp_path):
    code, out, _ = run("report", tiny_profile, "-o", tmp_path / "some" / "page.html")
    assert (
        code == 0 and out.startswith("2 candidates: L1E28") and [p.name for p in tmp_path.rglob("*.*")] == ["page.html"]
    )
    page = Page((tmp_path / "some" / "page.html").read_text())
    assert "modality" not in page.text  # of a model of text alone
    assert [i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")] == OF_A_PROFILE
    assert {"experts", "evidence", "details", "run"} <= set(page.ids)
    assert not {"residual", "ablation", "traces"} & set(page.ids)
    order = [page.ids.index(i) for i in ("experts", "chart-heatmap", "evidence", "chart-tail", "details", "run")]
    assert order == sorted(order)
    for shown in (
        "2 candidates: L1E28",
        "L9E7",
        "model.layers.1.mlp.experts",
        "2,048 tokens in 16 sequences",
        "bfloat16",
    ):
        assert shown in page.text


def test_sections_appear_with_their_data(full):
    folder, _ = full
    page = Page((folder / "report.html").read_text())
    assert [i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")] == EVERY
    ablation = json.loads((folder / "ablation.json").read_text())
    for shown in (
        "Massive activations form in L1, written by L1E28",
        ablation["conclusion"][1:],
        f"{ablation['baseline']['perplexity']['english']:.2f}",
        "1 random, same layers: worst",
        "L1E28: skip, first only",
        "cannot choose them",
        "position 0",
    ):
        assert shown in page.text
    changes = [outcome["mean_change"] for outcome in ablation["outcomes"]]
    drawn = payload(page)["data"]["ablation"]
    at = drawn["columns"].index("change")
    assert [row[at] for row in drawn["rows"]][: len(changes)] == changes


@pytest.fixture
def decided(tiny_profile, tmp_path):
    """A profile with what was found of its candidates, and of compression."""
    folder = tmp_path / "decided"
    shutil.copytree(tiny_profile, folder)
    digest = ModelStats.load(folder).header.digest
    replace(SAMPLES[Proof], digest=digest).save(folder / "proof.json")
    replace(SAMPLES[Budget], model="tiny-moe").save(folder / "budget.json")
    replace(SAMPLES[Frontier], digest=digest).save(folder / "frontier.json")
    replace(SAMPLES[Verification], digest=digest).save(folder / "verification.json")
    return folder


def test_proof_compression_and_verification_have_sections(decided):
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    order = ["todo", "experts", "proof", "budget", "frontier", "verification", "evidence", "details", "run"]
    assert [i for i in page.ids if i in order] == order
    for shown in (
        "1,536 tokens in 3 windows",
        "L0E24 (10% left)",
        "control 1",
        "Within 5% of the unchanged perplexity, L1E28 kept: none",
        "int3",
        "+inf%",
        "By expert, protecting L1E0 buys nothing at equal perplexity",
        "m-int4 fails 1 check against m",
        "a failure",
        "50.0%",
    ):
        assert shown in page.text, shown
    assert "–" in page.text[page.text.index("L9E7") :]  # it did not fire in the proof


def measured(sample, *curves):
    """sample with a curve for each (by, protected, seed, changes), of 40 bytes, 30, ..."""
    point = sample.curves[0].points[0]
    made = []
    for by, protected, seed, changes in curves:
        points = [
            replace(point, size=40.0 - 10 * i, change=Effect(change, change - 0.01, change + 0.01, 8))
            for i, change in enumerate(changes)
        ]
        made.append(Curve(by, protected, seed, points))
    return replace(sample, curves=made)


def test_what_the_frontier_draws(decided, opened):
    """A point for each allocation, at its size and change; the table has the sizes at equal perplexity."""
    frontier = measured(
        Results(decided).frontier(),
        ("model", False, None, [0.005, 0.02, 4.0]),
        ("layer", True, None, [-0.01, 0.0]),
        ("expert", False, None, [0.0, 0.01, math.inf]),
        *(("expert", False, seed, [0.1, 0.3]) for seed in (0, 1)),
    )
    frontier.save(decided / "frontier.json")
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    drawn = payload(page)["data"]["frontier"]
    found = [dict(zip(drawn["columns"], row)) for row in drawn["rows"]]
    assert [(r["formats"], r["allocation"], r["seed"], round(1e6 * r["size"]), r["change"]) for r in found] == [
        ("one for all", "chosen", None, 40, 0.005), ("one for all", "chosen", None, 30, 0.02),
        ("one for all", "chosen", None, 20, 4.0), ("by layer", "protected", None, 40, -0.01),
        ("by layer", "protected", None, 30, 0.0), ("by expert", "chosen", None, 40, 0.0),
        ("by expert", "chosen", None, 30, 0.01), ("by expert", "at random", 0, 40, 0.1),
        ("by expert", "at random", 0, 30, 0.3), ("by expert", "at random", 1, 40, 0.1),
        ("by expert", "at random", 1, 30, 0.3),
    ]  # fmt: skip
    made = sections(load_evidence(decided), datasets(load_evidence(decided)))
    assert [row[0] for row in made["frontier"].rows] == [
        "one for all", "by layer, protected", "by expert", "by expert, at random (0)", "by expert, at random (1)"
    ]  # fmt: skip
    sizes = [size_at(frontier, frontier.curve("model"), increase) for increase in (0.01, 0.05)]
    assert made["frontier"].rows[0][1:] == [f"{size / 1e6:.3g}" for size in sizes]
    assert made["frontier"].rows[1][1:] == ["at most 3e-05", "at most 3e-05"]
    points = made["frontier_points"].rows
    assert points[1] == ["one for all", "3e-05", "10.00", "+2.00%", "+1.00% to +3.00%"] and points[7][3] == "+inf%"
    shown, events = opened(decided / "report.html")
    assert shown.locator("#chart-frontier g.mark-symbol.role-mark path").count() == len(found) and events == []


def test_stability_is_that_of_the_command(tiny_profile, tmp_path):
    """The margins, and the candidates of domains and rounds; rounds of another model are refused."""
    folder = tmp_path / "rounds"
    shutil.copytree(tiny_profile, folder)
    Results(folder).rounds.save(dict(zip(("000", "001"), Results(folder).domains.load().values())))
    evidence = load_evidence(folder)
    made = sections(evidence, datasets(evidence))
    wanted = margins(evidence.stats)
    assert [row[0] for row in made["margins"].rows] == list(wanted)
    assert made["margins"].columns == ["expert", *wanted["L1E28"]]
    assert made["margins"].rows[0][1:] == [text.number(x, 3) for x in wanted["L1E28"].values()]
    agreed = agreement(evidence.rounds)
    assert [row[2] for row in made["rounds"].rows] == [", ".join(found) or "none" for found in agreed.found]
    assert run("report", folder).code == 0
    page = Page((folder / "report.html").read_text())
    assert page.ids.index("evidence") < page.ids.index("stability") < page.ids.index("details")
    assert "Each round alone" in page.text and "Each domain alone" in page.text
    other = synthetic_stats(2, 4)
    other.header.digest = "another"
    other.save(folder / "rounds" / "001.safetensors")
    assert "001.safetensors: is of model another" in refused("report", folder)


def test_a_verification_that_could_not_open_its_checkpoint(decided):
    lost = Verification("tiny-moe", "broken", Limits(), failures=["weights are missing"])
    lost.save(decided / "verification.json")
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    assert "broken fails 1 check against tiny-moe" in page.text and "weights are missing" in page.text


@pytest.mark.parametrize("name", ["proof", "budget", "frontier", "verification"])
def test_documents_of_another_model_are_refused(decided, name):
    file = decided / f"{name}.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"model" if name == "budget" else "digest": "another"}))
    assert f"{file}: is of model another" in refused("report", decided)


def test_documents_come_back_as_they_were(full):
    evidence = load_evidence(full[0])
    for name, of in (("ablation", evidence.ablation), ("traces", evidence.traces), ("run", evidence.run)):
        assert json.loads(json.dumps(of.to_dict())) == json.loads((full[0] / f"{name}.json").read_text())
    assert [e.carried for e in evidence.ranking.super_experts] == [True]  # the residual stream is part of the verdict


def test_an_ablation_that_breaks_the_model(full):
    """Infinite perplexity and NaN come back as they were, and the page is drawn without those points."""
    evidence = load_evidence(full[0])
    broken = replace(evidence.ablation.outcomes[0], mean_change=math.inf, residual_max=math.nan)
    broken.perplexity = dict.fromkeys(broken.perplexity, math.inf)
    broken.change = dict.fromkeys(broken.change, math.inf)
    experiment = replace(evidence.ablation, outcomes=[broken, *evidence.ablation.outcomes[1:]])
    document = json.loads(json.dumps(experiment.to_dict(), allow_nan=False))
    back = Experiment.from_dict(document)
    assert back.outcomes[0].mean_change == math.inf and math.isnan(back.outcomes[0].residual_max)
    points = datasets(replace(evidence, ablation=back))["ablation"]
    assert len(points) == len(datasets(evidence)["ablation"]) - 1
    assert "+inf%" in str(ablation_section(back))


def test_figures(full):
    folder, out = full
    assert f"12 charts as PNG, SVG and PDF in {folder / 'figures'}" in out
    magic = {"png": b"\x89PNG\r\n", "svg": b"<svg", "pdf": b"%PDF-"}
    files = {f"{name}.{form}" for name in EVERY for form in magic}
    assert {p.name for p in (folder / "figures").iterdir()} == files
    for file in files:
        assert (folder / "figures" / file).read_bytes().startswith(magic[file.rpartition(".")[2]])
    drawn = (folder / "figures" / "heatmap.svg").read_text()
    assert "L1E28" in drawn and "var(--" not in drawn and LIGHT["candidate"] in drawn


def test_nothing_of_the_page_is_elsewhere(full):
    html = (full[0] / "report.html").read_text()
    page = Page(html)
    assert page.loads == [] and page.tags.count("script") == 3
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1].replace("&#39;", "'")
    code = [code for of, code in page.scripts if "type" not in of]
    digests = [base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in code]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"@import|url\(", html[: html.index("<body>")])


def test_a_large_model_gives_a_small_page(tmp_path):
    stats = synthetic_stats(48, 128)
    tokens = {t: f"token {t}" for t in range(50000)}
    ran = Run(stats.header.digest, "2026-01-01T00:00:00+00:00", "cpu", 1.0, 8192, tokens, [])
    write_report(Evidence(stats, sedetect.rank(stats), run=ran), tmp_path / "page.html")
    assert 1e6 < (tmp_path / "page.html").stat().st_size < 3e6
    experts = payload(Page((tmp_path / "page.html").read_text()))["data"]["experts"]
    assert len(experts["rows"]) == 48 * 128


def test_markup_stays_text(hostile):
    html = hostile.read_text()
    page = Page(html)
    assert page.loads == [] and page.tags.count("script") == 3 and "img" not in page.tags
    assert "<script>alert" not in html and HOSTILE not in html
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert page.text.count(HOSTILE) >= 5 and f"{shown}{shown}{shown}" in page.text
    data = payload(page)["data"]["experts"]
    assert {row[data["columns"].index("token")] for row in data["rows"]} == {repr(HOSTILE)}


# how it opens

EFFECT = Effect(0.2, 0.1, 0.3, 64)


def answered(stats, **levels):
    """The opening of a page of stats, with a proof of these verdicts by expert."""
    verdicts = [Verdict(name, level, f"why {name}", EFFECT, None, 64, 64) for name, level in levels.items()]
    proof = Proof("m", stats.header.digest, 4096, 32, 0.02, 0.05, 0.2, 0.5, 900.0, 0.01, verdicts, [], [], 1.0)
    proof = proof if levels else None
    return answer_section(Evidence(stats, sedetect.rank(stats, proof=proof), proof=proof, folder="my out"))


def words(opening) -> list[str]:
    return list(opening["answer"].values())


def test_the_answer_of_candidates(stats):
    opening = answered(stats)
    found, sure, advice = words(opening)
    assert found.startswith("The model may depend on L1E28 and L9E7: among its 320 experts") and "Not proved" in sure
    assert "2,048 tokens" in sure and "routed experts saw fewer than 32 tokens" in sure and "Prove it" in advice
    assert opening["todo"]["command"] == "sedetect prove MODEL --stats 'my out' -o 'my out' --seq-len 128"
    assert opening["todo"]["modules"] == ["model.layers.1.mlp.experts.28", "model.layers.9.mlp.experts.7"]
    assert opening["reasons"] == []


def test_the_answer_of_a_proof(stats):
    opening = answered(stats, L1E28="proved", L9E7="refuted")
    found, sure, advice = words(opening)
    assert found.startswith("The model depends on L1E28, of 320 experts") and "without it" in found
    assert sure.endswith("on 4,096 tokens of other text.") and advice.startswith("Keep it when you prune")
    assert opening["todo"]["command"] == "sedetect export 'my out' --to TOOL --model MODEL -o FILE"
    assert opening["todo"]["modules"] == ["model.layers.1.mlp.experts.28"]
    assert opening["reasons"] == ["L1E28: proved: why L1E28", "L9E7: refuted: why L9E7"]
    left_open = words(answered(stats, L1E28="proved"))[1]
    assert left_open.endswith("L9E7 is neither proved nor refuted, and protected too.")


def test_the_answer_of_a_proof_that_decides_nothing(stats):
    opening = answered(stats, L1E28="undecided", L9E7="undecided")
    assert "The answer is not clear." in words(opening)[1]
    assert opening["todo"]["command"].startswith("sedetect prove ")
    assert opening["todo"]["command"].endswith(" --tokens 16384")


def test_the_answer_where_nothing_is_to_be_done(stats, tmp_path):
    opening = answered(stats, L1E28="refuted", L9E7="refuted")
    assert opening["todo"] is None and words(opening)[0].startswith("The model does not depend on L1E28 and L9E7")
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (2, 20)))
    evidence = Evidence(prof.stats, sedetect.rank(prof.stats))
    opening = answer_section(evidence)
    assert opening["todo"] is None and re.match(r"None of the \d+ experts stands out", words(opening)[0])
    assert words(opening)[2].startswith("Nothing:")
    write_report(evidence, tmp_path / "page.html")
    assert "todo" not in Page((tmp_path / "page.html").read_text()).ids


def test_the_names_are_those_of_the_export(stats):
    tools = answered(stats)["todo"]["tools"]
    assert [row[0] for row in tools.rows] == list(TOOLS)
    experts = protect_list(stats)
    for tool, *names, _ in tools.rows:
        for granularity, cell in zip(GRANULARITIES, names, strict=True):
            if (tool, granularity) != ("llama.cpp", "expert"):
                document, _ = export(stats, experts, tool, granularity, model=TINY)
                text = document if isinstance(document, str) else json.dumps(document).replace("\\\\", "\\")
                assert all(name in text for name in cell.split("\n"))


def test_experts_that_no_list_can_name(stats, tmp_path):
    header = replace(stats.header, banks={n: replace(b, module="x.linear") for n, b in stats.header.banks.items()})
    evidence = Evidence(ModelStats(stats.banks, header), sedetect.rank(stats))
    assert "does not hold its experts by number" in answer_section(evidence)["todo"]["unnamed"]
    write_report(evidence, tmp_path / "page.html")
    assert "No list of module names: L1E28: x.linear does not" in Page((tmp_path / "page.html").read_text()).text


def test_sizes_in_bytes_are_of_the_checkpoint(tiny_profile, tmp_path):
    code, _, err = run("report", tiny_profile, "--model", TINY, "-o", tmp_path / "page.html")
    assert code == 0, err
    page = Page((tmp_path / "page.html").read_text())
    assert f"by expert, 2 of 320 routed experts: {2 * 3 * 256 * 48 * 1.5:,.0f} bytes, +1.88%" in page.text
    answer, box, facts = map(page.text.index, ("What was found", "sedetect prove MODEL", "calibration tokens"))
    assert answer < box < facts
    random_model("qwen2_moe").save_pretrained(tmp_path / "other")
    assert "the statistics are of another model (tiny-moe)" in refused(
        "report", tiny_profile, "--model", tmp_path / "other"
    )


def test_the_cost_of_4_bits(stats):
    def cost(budget):
        return answer_section(Evidence(stats, sedetect.rank(stats), budget=budget))["todo"]["cost"]

    plain, kept, *others = (Cost([], 0.25, {"code": 9.5}, {"code": x}, x) for x in (0.0135, 0.0093, 0.0131, 0.0142))
    budget = replace(SAMPLES[Budget], rows=[Row("int4", plain, kept, others)])
    said = "perplexity +1.35%; with L1E28 in full precision +0.93%, with random experts of the same layers instead "
    assert said + "+1.31% to +1.42%." in cost(budget)["text"] and cost(budget)["command"] is None
    for other in (None, replace(budget, rows=[]), replace(budget, rows=[Row("int4", plain, None, [])])):
        assert cost(other)["command"] == "sedetect budget MODEL --stats DIR -o DIR --seq-len 128 --format int4"


# bad input


def refused(*args) -> str:
    code, out, err = run(*args)
    assert code == 2 and out == "" and re.fullmatch(r"sedetect: [^\n]+; [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("name", ["run", "residual", "ablation", "traces", "budget", "frontier", "verification"])
def test_damaged_documents_are_refused_by_name(full, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(full[0], folder, ignore=shutil.ignore_patterns("figures", "report.html"))
    file = folder / f"{name}.json"
    for cls in (Budget, Frontier, Verification):
        if name == cls.__name__.lower():
            SAMPLES[cls].save(file)
    document = json.loads(file.read_text())
    cases = {
        "is not valid JSON": "{",
        "version": json.dumps(document | {"version": "2"}),
        "damaged": json.dumps({"format": document["format"], "version": "1"}),
        "not": "[]",
    }
    for said, content in cases.items():
        file.write_text(content)
        message = refused("report", folder)
        assert str(file) in message and said in message
    file.write_text(json.dumps(document | {"model" if name in ("traces", "budget") else "digest": "another"}))
    assert f"{file}: is of model another" in refused("report", folder)
    assert not (folder / "report.html").exists()


def test_folders_that_hold_no_profile_are_refused(tmp_path):
    assert "is not a folder" in refused("report", tmp_path / "nowhere")
    assert "no such statistics file" in refused("report", tmp_path)
    ModelStats.empty().save(tmp_path / "stats.safetensors")
    assert "holds no experts" in refused("report", tmp_path)
    synthetic_stats(2, 4).save(tmp_path / "stats.safetensors")
    assert "is a folder" in refused("report", tmp_path, "-o", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("report", tmp_path, "-o", tmp_path / "file" / "page.html")
    other = synthetic_stats(2, 4)
    other.header.digest = "another"
    (tmp_path / "domains").mkdir()
    other.save(tmp_path / "domains" / "text.safetensors")
    assert "text.safetensors: is of model another" in refused("report", tmp_path)


def test_without_its_extra_it_says_what_to_install(tiny_profile):
    hidden = {name: None for name in sys.modules if name.split(".")[0] in ("altair", "vl_convert")}
    ours = [name for name in sys.modules if name.startswith("sedetect.report")]
    with mock.patch.dict(sys.modules, hidden | {"altair": None, "vl_convert": None}):
        for name in ours:
            del sys.modules[name]
        assert "pip install 'sedetect[report]'" in refused("report", tiny_profile)


# the page in a browser


def tooltip(page, cell: int) -> dict[str, str]:
    """What the heatmap says of its cell of that number (layer by layer)."""
    page.locator("#chart-heatmap g.mark-rect").first.locator("path").nth(cell).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    cells = page.locator("#vg-tooltip-element td").all_inner_texts()
    return dict(zip((key.rstrip(":") for key in cells[::2]), cells[1::2]))


def test_the_page_in_a_browser(full, opened):
    folder, _ = full
    stats = ModelStats.load(folder)
    page, events = opened(folder / "report.html")
    assert page.locator(".chart svg").count() == len(EVERY)
    assert page.locator("#chart-heatmap g.mark-rect").first.locator("path").count() == 320
    assert page.locator("#chart-heatmap text", has_text="L1E28").count() == 2  # and its halo
    for layer, e in ((1, 28), (9, 7), (4, 11)):
        state = stats.banks[BankId("decoder", layer, "routed")]
        shown = tooltip(page, 32 * layer + e)
        peak = {name: column(state.peak()[e], name).item() for name in ("channel", "position", "token_id")}
        assert shown["expert"] == f"L{layer}E{e}"
        assert float(shown["max|y|"]) == pytest.approx(state.out_max[e].item(), rel=1e-4)
        assert shown["channel"] == str(peak["channel"]) and shown["position"] == str(peak["position"])
        assert shown["rows"] == f"{state.rows[e].item():,}"
        assert shown["token"] == load_evidence(folder).token(peak["token_id"])
    assert tooltip(page, 60)["token"] == "'<|bos|>'"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.locator("nav").evaluate("e => getComputedStyle(e).position") == "sticky"
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    captions = page.locator("caption span")  # in view, however wide their table is
    edges = captions.evaluate_all(
        "all => all.filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().right)"
    )
    assert edges and max(edges) <= 400
    page.wait_for_timeout(300)  # for the charts to take the new width
    legends = page.locator(".chart .role-legend").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
    assert legends and max(legends) <= 400
    assert events == []


def test_shared_and_unseen_experts_in_a_browser(tmp_path, opened):
    """A model with shared experts and a dense layer, on so little text that experts see nothing; and on none at all."""
    model = random_model("qwen2_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.tensor([[1, 5, 9]]))
    stats = prof.stats
    assert any((s.rows == 0).any() for s in stats.banks.values())
    write_report(Evidence(stats, sedetect.rank(stats)), tmp_path / "few.html")
    page, events = opened(tmp_path / "few.html")
    marks = page.locator("#chart-heatmap g.mark-rect")
    unseen = sum(int((s.rows == 0).sum()) for b, s in stats.banks.items() if b.kind == "routed")
    assert [marks.nth(i).locator("path").count() for i in (0, 1)] == [14 - unseen, unseen]
    assert page.locator("#chart-heatmap text", has_text="shared").count() == 1
    assert "at least" in page.locator("#details").inner_text() and events == []

    with sedetect.profile(model) as prof:
        pass
    write_report(Evidence(prof.stats, sedetect.rank(prof.stats)), tmp_path / "none.html")
    page, events = opened(tmp_path / "none.html")
    assert "no candidate: none of the" in page.locator(".verdict").inner_text() and events == []


def rgb(color: str) -> str:
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:], 16)})"


@pytest.mark.parametrize(("scheme", "colors"), [("light", LIGHT), ("dark", DARK)])
def test_light_dark_and_print(full, opened, scheme, colors):
    page, events = opened(full[0] / "report.html", color_scheme=scheme)

    def seen():
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        marks = page.evaluate(
            "getComputedStyle(document.querySelector('#chart-by-layer .mark-text.role-mark text')).fill"
        )
        return ground, marks

    def wanted(of):
        return rgb(of["paper"]), rgb(of["candidate"])

    assert seen() == wanted(colors)
    page.emulate_media(media="print", color_scheme=scheme)
    assert seen() == wanted(LIGHT) and not page.locator("nav").is_visible()
    page.emulate_media(media="screen")
    assert page.pdf().startswith(b"%PDF-") and events == []


def test_markup_stays_text_in_a_browser(hostile, opened):
    page, events = opened(hostile)
    assert tooltip(page, 60)["token"] == repr(HOSTILE)
    assert page.locator("script").count() == 3 and page.locator("img").count() == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert events == []
