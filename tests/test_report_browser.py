"""The report as a browser shows it: wide, narrow, light, dark and in print."""

import pytest
import torch
from support.models import random_model
from support.page import EVERY, tooltip

import sedetect
from sedetect import ModelStats
from sedetect.kernels.records import column
from sedetect.report.evidence import Evidence, load_evidence
from sedetect.report.glossary import TERMS
from sedetect.report.style import DARK, LIGHT
from sedetect.report.write import write_report
from sedetect.stats.place import BankId


def test_the_page_in_a_browser(tiny_report, opened):
    folder, _ = tiny_report
    stats = ModelStats.load(folder)
    page, events = opened(folder / "report.html", has_touch=True)
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
    term, definition = page.locator("#experts .term", has_text="÷"), page.locator("[popover]:popover-open")
    term.first.focus()
    page.keyboard.press("Enter")
    assert definition.inner_text() == f"÷ median {TERMS['÷ median']}"
    page.keyboard.press("Escape")
    assert definition.count() == 0
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
    wide = "all => all.filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth).length"
    assert page.locator(".scroll").count() > 10 and page.locator(".scroll").evaluate_all(wide) == 0
    page.locator("#details h3 .term").first.tap()
    box = definition.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and box["y"] + box["height"] <= 900
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
def test_light_dark_and_print(tiny_report, opened, scheme, colors):
    page, events = opened(tiny_report[0] / "report.html", color_scheme=scheme)

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
    page.set_viewport_size({"width": 688, "height": 900})  # of A4 between its margins
    right = page.locator("table").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
    assert len(right) > 10 and max(right) <= 688
    page.emulate_media(media="screen")
    assert page.pdf().startswith(b"%PDF-") and events == []
