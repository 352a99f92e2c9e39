"""The commands analyze weights, outputs, routing: what they print, write and draw, and the section of the report."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.checkpoints import save_random
from support.command import run
from support.models import CONFIGS, TINY
from support.page import Page, payload
from transformers import MixtralConfig

import sedetect
from sedetect import ModelStats
from sedetect.analysis import weights
from sedetect.analysis.common import KINDS, Analysis, LayerArrays, file_of
from sedetect.analysis.outputs import summarize as summarize_outputs
from sedetect.analysis.tables import layers_table, marked_experts, standings_tables
from sedetect.analysis.weights import summarize
from sedetect.report.analyses import Inside
from sedetect.report.pictures import pictures_of, telling_layers
from sedetect.report.style import LIGHT
from sedetect.report.write import pictures_as_figures
from sedetect.stats.place import BankId

SHORT = ("--tokens", 256, "--seq-len", 64)
TEXT = "Water is wet"
ONE = BankId("decoder", 1, "routed")


@pytest.fixture(scope="module")
def folder(tiny_profile, tmp_path_factory):
    """A profile of tiny-moe with all analyses beside it; what each printed."""
    out = shutil.copytree(tiny_profile, tmp_path_factory.mktemp("inside") / "tiny")
    printed = {}
    for kind in KINDS:
        options = () if kind == "weights" else (*SHORT, "--texts", TEXT, "--texts", "one [b]two[/b]")
        code, printed[kind], err = run("analyze", kind, TINY, "-o", out, "--layers", "1,9", *options)
        assert code == 0, err
    return out, printed


@pytest.fixture(scope="module")
def results(folder):
    return {kind: Analysis.load(file_of(folder[0], kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def marked(folder):
    return marked_experts(sedetect.rank(ModelStats.load(folder[0])))


def test_what_they_print(folder, results):
    out, printed = folder
    for kind, text in printed.items():
        assert text.startswith(f"tiny-moe: {kind}\n")
        assert "L1E28 (candidate) among the 32 routed experts of its layer" in text
        assert "L9E7 (candidate) among" in text
        assert f"written to {out / f'{kind}-analysis.safetensors'}" in text
        assert [row.split()[0] for row in text.splitlines() if re.match(r" L\d ", row)] == ["L1", "L9"]
    found = summarize(results["weights"].layers[ONE])
    (row,) = [row.split() for row in printed["weights"].splitlines() if row.startswith(" L1 ")]
    assert row[1:4] == [f"{round(v, 2) + 0.0:.2f}" for v in found["similarity"].values()]
    assert "largest of down" in printed["weights"]
    chosen = summarize_outputs(results["outputs"].layers[ONE])["chosen"]
    assert f"{chosen:.3f}" in printed["outputs"]
    for kind in ("outputs", "routing"):
        tokens = [token for text in results[kind].settings["texts"] for token in text["tokens"]]
        assert "28*" in printed[kind] and any("[" in token for token in tokens)
        assert all(repr(token) in printed[kind] for token in tokens)  # also what looks like markup


def test_tables(results, marked):
    assert marked == dict.fromkeys(("L1E28", "L9E7"), "candidate")
    for result in results.values():
        cells = layers_table(result)
        assert [row[0] for row in cells.rows] == ["L1", "L9"] and {len(row) for row in cells.rows} == {
            len(cells.columns)
        }
        tables = standings_tables(result, marked)
        assert [title.split()[0] for title in tables] == ["L1E28", "L9E7"]
        assert standings_tables(result, {}) == {}
    rows = {row[0]: row[1:] for row in standings_tables(results["weights"], marked)[next(iter(tables))].rows}
    peaks = results["weights"].layers[ONE].arrays["down.peak"]
    assert rows["largest of down"] == [f"{float(peaks[28]):.3g}", f"{float(peaks.double().quantile(0.5)):.3g}", "1"]


def test_every_picture_marks_the_candidates(results, marked):
    for result in results.values():
        names = set()
        for picture in pictures_of(result, marked, page=False):
            assert picture.name not in names and any(picture.data.values())
            names.add(picture.name)
            if picture.form == "lines":
                assert picture.data[f"{picture.name}-marks"] == [
                    {"row": "L1", "expert": "L1E28"},
                    {"row": "L9", "expert": "L9E7"},
                ]
            elif "-L1-" in picture.name and "ranks" not in picture.name:
                assert picture.marked["28"] == "candidate"
        assert len(names) > 6
        for page in (False, True):
            pictures = pictures_of(result, marked, page=page)
            for chart in Inside(pictures, page=page).all():
                color = "var(--candidate)" if page else LIGHT["candidate"]
                if ("-L1-" in chart.name and "ranks" not in chart.name) or chart.name == "routing-load":
                    assert color in json.dumps(chart.spec), chart.name


def test_without_matched_pairs_there_is_no_picture_of_them(results, marked):
    """Nor one of nothing but the super expert's mark."""
    kept = {name: t for name, t in results["weights"].layers[ONE].arrays.items() if name.rpartition(".")[2] not in (
        "matched", "unmatched", "tau", "chance")}  # fmt: skip
    without = replace(results["weights"], layers={ONE: LayerArrays(32, results["weights"].layers[ONE].members, kept)})
    kept["pairs"] = kept["pairs"][:0]
    names = {picture.name for picture in pictures_of(without, marked, page=False)}
    whole = {p.name for p in pictures_of(results["weights"], marked, page=False) if "L9" not in p.name}
    of_layer = {f"weights-L1-{m}-{what}" for m in ("gate", "up", "down") for what in ("matched", "tau")}
    assert whole - names == {"weights-matched", *of_layer}


def test_only_experts_are_marked(results, marked):
    """A neuron or a token of the super expert's number is none."""
    pictures = pictures_of(results["outputs"], marked, page=False)
    charts = {chart.name: chart.spec for chart in Inside(pictures, page=False).all()}
    for name, rows in (("outputs-L1-token-0-states", 0), ("outputs-L1-text-norms", 0), ("outputs-L1-cosine", 1)):
        axes = charts[name]["layer"][0]["encoding"]
        assert ("labelColor" in axes["x"]["axis"], "labelColor" in axes["y"]["axis"]) == (True, bool(rows))
        bands = [layer for layer in charts[name]["layer"][1:] if layer["mark"]["stroke"] == LIGHT["candidate"]]
        assert len(bands) == 1 + rows


def test_the_section_in_a_browser(folder, tmp_path, opened):
    assert run("report", folder[0], "-o", tmp_path / "report.html")[0] == 0
    page, events = opened(tmp_path / "report.html")
    assert events == []
    drawn = page.locator("#inside .chart")
    assert drawn.count() == page.locator("#inside .chart svg").count() > 10
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_pictures_draw_the_arrays(results, marked):
    pictures = {p.name: p for kind in KINDS for p in pictures_of(results[kind], marked, page=False)}
    arrays = {kind: results[kind].layers[ONE].arrays for kind in KINDS}

    def grid(name, table, diagonal):
        records = pictures[name].data[name]
        columns, rows = pictures[name].columns, pictures[name].rows
        assert len({(r["x"], r["y"]) for r in records}) == len(records)
        drawn = {(rows.index(r["y"]), columns.index(r["x"])): r["value"] for r in records}
        size = table.numel() - (0 if diagonal else len(table)) - int(table.isnan().sum())
        assert len(drawn) == size
        for (i, j), value in drawn.items():
            assert value == pytest.approx(float(table[i, j]), rel=1e-3, abs=1e-9)

    grid("weights-L1-gate-embeddings", arrays["weights"]["router.similarity"], False)
    grid("weights-L1-down-matrices", arrays["weights"]["down.similarity"], False)
    grid("weights-L1-up-neurons", arrays["weights"]["up.neuron_similarity"], False)
    for name in ("matched", "tau"):
        table = torch.full((32, 32), torch.nan).fill_diagonal_(1)
        for (i, j), value in zip(arrays["weights"]["pairs"].tolist(), arrays["weights"][f"up.{name}"].tolist()):
            table[i, j] = table[j, i] = value
        drawn = len(pictures[f"weights-L1-up-{name}"].data[f"weights-L1-up-{name}"])
        assert drawn == 2 * len(arrays["weights"]["pairs"]) == 64
        grid(f"weights-L1-up-{name}", table, False)
    grid("outputs-L1-cosine", arrays["outputs"]["cosine"], False)
    grid("outputs-L1-angular", arrays["outputs"]["angular"], False)
    grid("outputs-L1-text-norms", arrays["outputs"]["text.norm"], True)
    grid("outputs-L1-text-scores", arrays["outputs"]["text.score"], True)
    grid("outputs-L1-token-2-cosine", arrays["outputs"]["text.cosine"][2], False)
    grid("outputs-L1-token-2-states", arrays["outputs"]["text.states"][2].t(), True)
    counts = arrays["outputs"]["rank_counts"]
    grid("outputs-L1-ranks", counts / counts.sum(1, keepdim=True), True)
    both = sum(layer.arrays["rank_counts"] for layer in results["outputs"].layers.values())
    grid("outputs-ranks", both / both.sum(1, keepdim=True), True)
    choice = pictures["routing-L1-choice"]
    index, weight = arrays["routing"]["text.index"], arrays["routing"]["text.weight"]
    drawn = {(r["y"], r["x"]): r["value"] for r in choice.data[choice.name]}
    for row, label in enumerate(choice.rows):
        chosen = {x: v for (y, x), v in drawn.items() if y == label}
        assert chosen == {str(int(e)): pytest.approx(float(w), rel=1e-3) for e, w in zip(index[row], weight[row])}
    scatter = pictures["weights-L1-down-projection"]
    for record, score in zip(scatter.data[scatter.name], arrays["weights"]["down.scores"]):
        assert (record["x"], record["y"]) == pytest.approx(tuple(score[:2].tolist()), rel=1e-3)
    load = {(r["y"], r["x"]): r for r in pictures["routing-load"].data["routing-load"]}
    assert len(load) == 64 and {at: r["verdict"] for at, r in load.items() if r["verdict"] != "other"} == {
        ("L1", "28"): "candidate", ("L9", "7"): "candidate",
    }  # fmt: skip
    shares = arrays["routing"]["load"].sum(0) / arrays["routing"]["tokens"].sum()
    assert [load["L1", str(e)]["value"] for e in range(32)] == pytest.approx(shares.tolist(), rel=1e-3)
    lines = pictures["weights-r2"].data["weights-r2"]
    assert [r["value"] for r in lines if r["row"] == "L1"] == [
        float(arrays["weights"][f"{m}.r2"]) for m in ("gate", "up", "down")
    ]


def test_figures_and_report(folder, tmp_path):
    out, _ = folder
    code, _, err = run("report", out, "-o", tmp_path / "report.html")
    assert code == 0, err
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Inside the layers" in page.text and "The experts' outputs" in page.text
    assert "L1E28 (candidate) among the 32 routed experts" in page.text and page.loads == []
    drawn = payload(page)
    charts = [name for name in drawn["charts"] if name.partition("-")[0] in KINDS]
    assert {f"chart-{name}" for name in charts} <= set(page.ids)
    assert {"weights-r2", "outputs-L1-cosine", "routing-L1-choice", "outputs-ranks"} <= set(charts)
    assert not any("L9" in name for name in charts)
    for name in charts:
        assert set(drawn["charts"][name]["datasets"]) <= drawn["data"].keys()
    code, text, err = run(
        "analyze", "routing", TINY, "-o", out, "--layers", "1,9", *SHORT, "--texts", TEXT, "--figures"
    )
    assert code == 0, err
    files = {file.name for file in (out / "figures").iterdir()}
    assert {
        f"routing-L{n}-{what}.{form}"
        for n in (1, 9)
        for what in ("choice", "coactivation", "domains")
        for form in ("png", "svg", "txt")
    } <= files
    assert f"{len(files) // 3} pictures" in text
    for file in (out / "figures").iterdir():
        start = file.read_bytes()[:8]
        assert start.startswith({".png": b"\x89PNG", ".svg": b"<svg", ".txt": b""}[file.suffix])
    caption = "Share of each domain's tokens that chose each expert in L9.\ntiny-moe (bfloat16).\n"
    assert (out / "figures" / "routing-L9-domains.txt").read_text() == caption


def test_figures_are_of_the_layers_that_matter(results, marked):
    """Those with an expert to protect, then one without for comparison."""
    of = results["weights"]
    for found, wanted in ((marked, [1, 9]), ({"L9E7": "proved"}, [9, 1]), ({"L9E7": "refuted"}, [9])):
        assert [bank.layer for bank in telling_layers(of, found)] == wanted
    every = pictures_as_figures(of, marked)
    assert (
        pictures_as_figures(of, marked, [ONE]).keys() == {name for name in every if "-L9-" not in name} < every.keys()
    )


def test_empty_and_odd_layers_are_drawn():
    """A bank that never ran, no router, members of another shape, one expert."""
    bank, nan = BankId("encoder", 2, "routed_vision"), torch.nan
    outputs = Analysis("outputs", "m", "d", "float32", {"domains": {"a": 4}, "texts": []})
    outputs.layers[bank] = LayerArrays(2, ["a", "b"])
    assert layers_table(outputs).rows == [["encoder.L2 vision"]] and pictures_of(outputs, {}, page=False) == []
    table = torch.tensor([[1, 0.5, nan], [0.5, 1, nan], [nan, nan, nan]])
    arrays = {
        "cosine": table,
        "angular": table,
        "norm_mean": torch.ones(3),
        "norm_max": torch.ones(3),
        "tokens": torch.tensor([4]),
    }
    arrays["chosen_ranks"] = torch.tensor([2, 2])
    outputs.layers[bank] = LayerArrays(2, ["encoder.L2E0", "encoder.L2E1", "encoder.L2shared"], arrays)
    pictures = {p.name: p for p in pictures_of(outputs, {}, page=True)}
    assert pictures["outputs-encoder.L2-vision-cosine"].columns == ["0", "1", "shared"]
    assert math.isnan(summarize_outputs(outputs.layers[bank])["shared"])
    Inside(list(pictures.values()), page=True).all()


def test_what_is_not_known_is_a_dash():
    """An R2 without spread, a domain without entropy: the same in tables and pictures."""
    weights = Analysis("weights", "m", "d", "float32", {"pairs": 0, "against": None})
    for number, r2 in enumerate((math.nan, 0.5)):
        arrays = {f"gate.{name}": torch.eye(2) for name in ("similarity", "neuron_similarity")}
        arrays["gate.r2"], arrays["gate.norm"] = torch.tensor([r2]), torch.ones(2)
        weights.layers[BankId("decoder", number, "routed")] = LayerArrays(2, ["a", "b"], arrays)
    cells = layers_table(weights)
    assert [row[cells.columns.index("gate R2")] for row in cells.rows] == ["-", "0.50"]
    assert cells.text.endswith("R2, mean of the layers: gate 0.50.")
    routing = Analysis("routing", "m", "d", "float32", {"domains": {"a": 4, "b": 4}, "texts": []})
    for number, entropy in enumerate((math.nan, 0.5)):
        arrays = {"load": torch.full((2, 2), 4), "tokens": torch.tensor([4, 4]), "coactivation": torch.full((2, 2), 8)}
        arrays |= {"weight": torch.ones(2), "entropy": torch.tensor([0.5, entropy])}
        routing.layers[BankId("decoder", number, "routed")] = LayerArrays(2, ["a", "b"], arrays)
    cells = layers_table(routing)
    assert [row[cells.columns.index("router")] for row in cells.rows] == ["-", f"{math.exp(0.5):.1f}"]
    lines = next(p for p in pictures_of(routing, {}, page=True) if p.name == "routing-effective")
    assert [r["row"] for r in lines.data[lines.name] if r["series"] == "router of a token"] == ["L1"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Five layouts with tiny-moe's tokenizer."""
    root = tmp_path_factory.mktemp("five")
    mixtral = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=256,
    )  # fmt: skip
    configs = {name: make() for name, make in CONFIGS.items()} | {"mixtral": mixtral}
    return {name: save_random(config, root / name) for name, config in configs.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CONFIGS, "mixtral"])
def test_five_architectures(checkpoints, kind, name, tmp_path):
    options = ("--pairs", 2) if kind == "weights" else SHORT
    code, _, err = run("analyze", kind, checkpoints[name], "-o", tmp_path, *options)
    assert code == 0, err
    result = Analysis.load(file_of(tmp_path, kind), kind)
    assert result.layers and all(layer.arrays for layer in result.layers.values())
    assert ("shared" in json.dumps([layer.members for layer in result.layers.values()])) == (
        kind != "routing" and name in ("qwen2_moe", "deepseek_v3")
    )


def test_refusals(folder, checkpoints, tmp_path):
    out, _ = folder

    def refused(*args):
        code, _, err = run(*args)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        return err

    assert "--figures: needs a folder" in refused("analyze", "weights", TINY, "--figures")
    assert "--layers 3-: 3- is not a layer" in refused("analyze", "routing", TINY, "--layers", "3-")
    assert "--layers 10: has no routed experts" in refused("analyze", "outputs", TINY, "--layers", "10", *SHORT)
    assert "--pairs -1: must be at least 0" in refused("analyze", "weights", TINY, "--pairs", -1)
    assert "--texts '': gives no token" in refused("analyze", "routing", TINY, *SHORT, "--texts", "")
    assert "backend 'x' does not exist" in refused("analyze", "outputs", TINY, *SHORT, "--backend", "x")
    (tmp_path / "stats.safetensors").write_bytes((out / "stats.safetensors").read_bytes())
    another = f"{tmp_path}: statistics of another model (tiny-moe, "
    assert another in refused("analyze", "routing", checkpoints["mixtral"], *SHORT, "-o", tmp_path)
    assert not file_of(tmp_path, "routing").exists()
    assert another in refused("analyze", "weights", checkpoints["mixtral"], "--pairs", 0, "-o", tmp_path)
    assert Analysis.load(file_of(tmp_path, "weights"), "weights").model == "mixtral"  # what was computed is kept
    file_of(tmp_path, "weights").unlink()
    with mock.patch.object(weights, "analyze_weights", lambda *_, **__: pytest.fail("worked")):
        assert "no such statistics file" in refused("analyze", "weights", TINY, "--stats", tmp_path / "none")
    with mock.patch.dict(sys.modules, {"sklearn": None}):
        assert "pip install 'sedetect[analysis]'" in refused("analyze", "weights", TINY)
    result = Analysis.load(file_of(out, "routing"), "routing")
    result.digest = "another"
    result.save(tmp_path)
    assert "routing-analysis.safetensors: is of model another" in refused("report", tmp_path)
