"""The report of a folder of results: its sections, its figures, and folders that it refuses."""

import json
import re
import shutil
import sys
from unittest import mock

from support.command import refused, run
from support.page import EVERY, Page, payload
from support.synthetic import synthetic_stats

import sedetect
from sedetect import ModelStats
from sedetect.profiling.record import Run
from sedetect.ranking.stability import agreement, margins
from sedetect.report import text
from sedetect.report.data import datasets
from sedetect.report.evidence import Evidence, load_evidence
from sedetect.report.glossary import HEADS, TERMS
from sedetect.report.sections import sections
from sedetect.report.style import LIGHT
from sedetect.report.write import write_report
from sedetect.results import Results

OF_A_PROFILE = [name for name in EVERY if name not in ("residual", "sinks", "ablation")]


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


def test_sections_appear_with_their_data(tiny_report):
    folder, _ = tiny_report
    page = Page((folder / "report.html").read_text())
    assert [i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")] == EVERY
    ablation = json.loads((folder / "ablation.json").read_text())
    for shown in (
        "Massive activations form in L1, written by L1E28",
        ablation["conclusion"][1:],
        f"{ablation['baseline']['perplexity']['english']:.2f}",
        "1 random, same layers: worst",
        "L1E28: skip, first only",
        "keeping the router from choosing it",
        "position 0",
    ):
        assert shown in page.text
    changes = [outcome["mean_change"] for outcome in ablation["outcomes"]]
    drawn = payload(page)["data"]["ablation"]
    at = drawn["columns"].index("change")
    assert [row[at] for row in drawn["rows"]][: len(changes)] == changes


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
    assert "001.safetensors: is of model another" in refused(run("report", folder))


def test_figures(tiny_report):
    folder, out = tiny_report
    assert f"12 charts as PNG, SVG and PDF in {folder / 'figures'}" in out
    magic = {"png": b"\x89PNG\r\n", "svg": b"<svg", "pdf": b"%PDF-"}
    magic["txt"] = b""
    files = {f"{name}.{form}" for name in EVERY for form in magic}
    assert {p.name for p in (folder / "figures").iterdir()} == files
    for file in files:
        assert (folder / "figures" / file).read_bytes().startswith(magic[file.rpartition(".")[2]])
    drawn = (folder / "figures" / "heatmap.svg").read_text()
    assert "L1E28" in drawn and "var(--" not in drawn and LIGHT["candidate"] in drawn
    assert "tiny-moe" in drawn and "Heatmap of the largest output of 320 experts" in drawn
    caption, measured = (folder / "figures" / "tail.txt").read_text().splitlines()
    assert "layers below 8" in caption and measured == "tiny-moe (bfloat16): 2,048 tokens in 16 sequences."


def test_terms_are_buttons_that_open_their_definitions(tiny_report):
    """In heads and sentences, and once more in the glossary: those of the page, and no others."""
    html = (tiny_report[0] / "report.html").read_text()
    page = Page(html)
    targets = set(re.findall('popovertarget="([^"]+)"', html))
    definitions = dict(re.findall(r'<div id="(term-\d+)" popover><b>[^<]+</b> ([^<]+)</div>', html))
    assert targets == definitions.keys() and len(targets) < len(TERMS)
    for term in ("super expert", "÷ median", "candidate", "D_sink", "kurtosis"):
        assert targets > {f"term-{list(TERMS).index(term)}"} and page.text.count(TERMS[term]) == 2
    assert TERMS["fed by"] not in page.text  # nothing was proved
    assert set(HEADS.values()) <= TERMS.keys() and not HEADS.keys() & TERMS.keys()


def test_a_large_model_gives_a_small_page(tmp_path):
    stats = synthetic_stats(48, 128)
    tokens = {t: f"token {t}" for t in range(50000)}
    ran = Run(stats.header.digest, "2026-01-01T00:00:00+00:00", "cpu", 1.0, 8192, tokens, [])
    write_report(Evidence(stats, sedetect.rank(stats), run=ran), tmp_path / "page.html")
    assert 1e6 < (tmp_path / "page.html").stat().st_size < 3e6
    experts = payload(Page((tmp_path / "page.html").read_text()))["data"]["experts"]
    assert len(experts["rows"]) == 48 * 128


# refusals


def test_folders_that_hold_no_profile_are_refused(tmp_path):
    assert "is not a folder" in refused(run("report", tmp_path / "nowhere"))
    assert "no such statistics file" in refused(run("report", tmp_path))
    ModelStats.empty().save(tmp_path / "stats.safetensors")
    assert "holds no experts" in refused(run("report", tmp_path))
    synthetic_stats(2, 4).save(tmp_path / "stats.safetensors")
    assert "is a folder" in refused(run("report", tmp_path, "-o", tmp_path))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(run("report", tmp_path, "-o", tmp_path / "file" / "page.html"))
    other = synthetic_stats(2, 4)
    other.header.digest = "another"
    (tmp_path / "domains").mkdir()
    other.save(tmp_path / "domains" / "text.safetensors")
    assert "text.safetensors: is of model another" in refused(run("report", tmp_path))


def test_without_its_extra_it_says_what_to_install(tiny_profile):
    hidden = {name: None for name in sys.modules if name.split(".")[0] in ("altair", "vl_convert")}
    ours = [name for name in sys.modules if name.startswith("sedetect.report")]
    with mock.patch.dict(sys.modules, hidden | {"altair": None, "vl_convert": None}):
        for name in ours:
            del sys.modules[name]
        assert "pip install 'sedetect[report]'" in refused(run("report", tiny_profile))
