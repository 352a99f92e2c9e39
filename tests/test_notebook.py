"""What a notebook shows of results: tables without markup of a model's own, and data frames."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import save_random
from support.documents import SAMPLES
from support.models import CONFIGS
from support.page import Page
from support.synthetic import synthetic_stats

import sedetect
from sedetect.documents import Tabular
from sedetect.errors import SedetectError
from sedetect.experiments.study import Experiment
from sedetect.kernels.records import COLUMN, float_bits
from sedetect.ranking.result import SuperExpert
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId
from sedetect.stats.proof import Proof
from sedetect.training.histories import Timeline

HOSTILE = "<script>alert(1)</script>&amp;\"'"


@pytest.fixture
def stats():
    stats = synthetic_stats(3, 4, model=HOSTILE)
    state = stats.banks[BankId("decoder", 2, "routed")]
    state.outliers[1, 0, COLUMN["value"]] = float_bits(torch.tensor(math.nan))
    return stats


@pytest.fixture
def ranking(stats):
    ranking = sedetect.rank(stats)
    first, *others = ranking.super_experts
    return replace(ranking, super_experts=[replace(first, source=HOSTILE, reason=HOSTILE), *others])


@pytest.fixture
def frames(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))


def test_tables(stats, ranking):
    expert = ranking.super_experts[0]
    for shown, rows in ((stats, 3), (ranking, len(ranking.judged)), (expert, None)):
        html = shown._repr_html_()
        page = Page(html)
        assert page.tags[0] == "table" and "script" not in page.tags and HOSTILE in page.text
        assert rows is None or page.tags.count("tr") == rows + 1
    page = Page(ranking._repr_html_())
    assert ranking.headline in page.text and "L1E3candidate700" in page.text
    assert "L1E3" in Page(stats._repr_html_()).text and "nan" not in Page(stats._repr_html_()).text
    assert "None" not in Page(expert._repr_html_()).text


def test_tables_of_nothing(ranking):
    assert ModelStats.empty()._repr_html_().endswith("<tbody></tbody></table>")
    empty = replace(ranking, super_experts=[], others=[])
    assert empty._repr_html_().endswith("<tbody></tbody></table>")


def test_banks_that_saw_nothing_or_gave_no_number(stats):
    """Of experts that are all NaN, or saw nothing, no largest one is named; infinity is one."""
    values = {0: math.nan, 1: math.inf}
    for layer, value in values.items():
        for name in ("outliers", "first_outliers"):
            getattr(stats.banks[BankId("decoder", layer, "routed")], name)[..., COLUMN["value"]] = float_bits(
                torch.tensor(value)
            )
    stats.banks[BankId("decoder", 2, "routed")] = BankStats.empty(4)
    html = stats._repr_html_()
    assert "<td>decoder.0.routed</td><td>4</td><td>–</td><td>–</td><td>nan</td>" in html
    assert "<td>decoder.1.routed</td><td>4</td><td>inf</td><td>L1E0</td>" in html
    assert "<td>decoder.2.routed</td><td>4</td><td>–</td><td>–</td><td>0</td><td>0</td><td>0</td>" in html


def test_plots(stats, tmp_path):
    """The report's figures: of statistics, of a folder, which has more, and of an analysis."""
    alone = sedetect.plot(stats).to_dict()
    assert alone["layer"][0]["mark"]["type"] == "rect" and len(alone["datasets"]["experts"]) == 12
    stats.save(tmp_path / "stats.safetensors")
    assert sedetect.plot(tmp_path).to_dict() == alone
    tail = sedetect.plot(stats, "tail").to_dict()
    assert {*tail["datasets"]} == {"experts", "thresholds"}
    with pytest.raises(SedetectError, match="chart 'tails': there is none; give one of heatmap, tail, first-rest"):
        sedetect.plot(stats, "tails")
    with pytest.raises(SedetectError, match="results: a Ranking; give statistics, an analysis or a folder"):
        sedetect.plot(sedetect.rank(stats))
    with pytest.raises(SedetectError, match="nothing in them to draw"):
        sedetect.plot(ModelStats.empty())


def test_plots_of_an_analysis(tmp_path):
    analysis = sedetect.analyze_weights(save_random(CONFIGS["qwen3_moe"](), tmp_path))
    chart = sedetect.plot(analysis).to_dict()
    assert chart["datasets"] and chart != sedetect.plot(analysis, "weights-L1-down-matrices").to_dict()
    with pytest.raises(SedetectError, match="'weights-L1-down': there is none; give one of weights-L1-.* others"):
        sedetect.plot(analysis, "weights-L1-down")


def test_plots_without_altair(stats, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(SedetectError, match=r"plot needs altair; install it with: pip install 'sedetect\[report\]'"):
        sedetect.plot(stats)


def test_long_tables_say_so(ranking):
    many = replace(ranking, super_experts=ranking.super_experts * 25, others=[])
    html = many._repr_html_()
    assert f"the first 20 of {25 * len(ranking.super_experts)}" in html and html.count("<tr>") == 21


def test_data_frames(stats, ranking, frames):
    rows = stats.to_dataframe()
    assert len(rows) == 12 and rows[7]["name"] == "L1E3" and (rows[7]["layer"], rows[7]["expert"]) == (1, 3)
    state = stats.banks[BankId("decoder", 1, "routed")]
    assert [row["out_max"] for row in rows[4:8]] == state.out_max.tolist()
    assert [row["rows"] for row in rows[4:8]] == state.rows.tolist()
    judged = ranking.to_dataframe()
    assert [row["name"] for row in judged] == [str(expert) for expert in ranking.judged]
    assert set(judged[0]) == {"name", *SuperExpert.__dataclass_fields__}


@pytest.mark.parametrize("of", [one for one in SAMPLES if issubclass(one, Tabular)])
def test_every_result_is_a_table(of, frames):
    """Rows with the same columns, of plain values, in a notebook and as a data frame."""
    result = SAMPLES[of]
    rows = result.to_dataframe()
    assert rows and {tuple(row) for row in rows} == {tuple(rows[0])}
    assert all(value is None or isinstance(value, (str, int, float)) for row in rows for value in row.values())
    page = Page(result._repr_html_())
    assert page.tags[0] == "table" and page.tags.count("tr") == len(rows) + 1
    assert page.tags.count("th") == len(rows[0]) and of.__name__ in page.text


def test_what_the_tables_of_results_hold(frames):
    (row, *_) = SAMPLES[Proof].to_dataframe()
    (verdict, *_) = SAMPLES[Proof].verdicts
    assert (row["expert"], row["level"], row["reason"]) == (verdict.expert, verdict.level, verdict.reason)
    assert row["alone_rise"] == (None if verdict.alone is None else verdict.alone.rise)
    runs = SAMPLES[Experiment].to_dataframe()
    assert [run["runs"] for run in runs] == ["baseline", "chosen", "random, same layers"]
    assert [run["mean_change"] for run in runs] == [0.0, 0.5, 0.25]
    (state,) = SAMPLES[Timeline].to_dataframe()
    (expert,) = SAMPLES[Timeline].experts
    assert state["step"] == SAMPLES[Timeline].states[0].step and state[str(expert.expert)] == 7.5


def test_an_analysis_is_a_table_of_its_experts(tmp_path):
    analysis = sedetect.analyze_weights(save_random(CONFIGS["qwen3_moe"](), tmp_path))
    layer = next(iter(analysis.layers.values()))
    rows = analysis.records()
    assert [row["name"] for row in rows[: layer.experts]] == layer.members[: layer.experts]
    assert [row["down.peak"] for row in rows[: layer.experts]] == layer.arrays["down.peak"][: layer.experts].tolist()
    assert len(rows) == sum(of.experts for of in analysis.layers.values())
    page = Page(analysis._repr_html_())
    assert page.tags.count("tr") == min(len(rows), 20) + 1 and "router.norm" in page.text


def test_without_pandas(stats, ranking, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for one in (stats, ranking):
        with pytest.raises(SedetectError, match="to_dataframe needs pandas; install it with: pip install pandas"):
            one.to_dataframe()
