"""The report: text of a model stays text, and the page loads nothing."""

import base64
import hashlib
import json
import re

import pytest
from support.command import run
from support.page import Page, payload, tooltip

from sedetect import ModelStats
from sedetect.stats.note import Note

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\u202e\"'&amp;"


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


def test_nothing_of_the_page_is_elsewhere(tiny_report):
    html = (tiny_report[0] / "report.html").read_text()
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


def test_markup_stays_text(hostile):
    html = hostile.read_text()
    page = Page(html)
    assert page.loads == [] and page.tags.count("script") == 3 and "img" not in page.tags
    assert "<script>alert" not in html and HOSTILE not in html
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert page.text.count(HOSTILE) >= 5 and f"{shown}{shown}{shown}" in page.text
    data = payload(page)["data"]["experts"]
    assert {row[data["columns"].index("token")] for row in data["rows"]} == {repr(HOSTILE)}


def test_markup_stays_text_in_a_browser(hostile, opened):
    page, events = opened(hostile)
    assert tooltip(page, 60)["token"] == repr(HOSTILE)
    assert page.locator("script").count() == 3 and page.locator("img").count() == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert events == []
