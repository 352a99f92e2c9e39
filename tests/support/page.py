"""The page of a report, read as HTML."""

import json
from html.parser import HTMLParser

# The charts of tiny_report, in the order of the page.
EVERY = ["heatmap", "ablation", "tail", "first-rest", "by-layer", "by-expert", "positions", "residual", "sinks",
         "coverage", "headroom", "kurtosis"]  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: elements, ids, text outside scripts, scripts, and what it would load."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.ids, self.text, self.scripts, self.loads = [], [], "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        of = dict(attributes)
        self.ids += [of["id"]] if "id" in of else []
        self.scripts += [(of, "")] if tag == "script" else []
        self.loads += [value for name, value in of.items() if name in ("src", "srcset", "action", "data", "poster")]
        self.loads += [of["href"]] if "href" in of and not of["href"].startswith("#") else []
        self.loads += [name for name in of if name.startswith("on")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.cdata_elem:
            of, known = self.scripts[-1]
            self.scripts[-1] = (of, known + data)
        elif not self.cdata_elem:
            self.text += data


def payload(page: Page) -> dict:
    (data,) = [code for of, code in page.scripts if of.get("type") == "application/json"]
    return json.loads(data)


def tooltip(page, cell: int) -> dict[str, str]:
    """What the heatmap says of its cell of that number (layer by layer), in a browser."""
    page.locator("#chart-heatmap g.mark-rect").first.locator("path").nth(cell).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    cells = page.locator("#vg-tooltip-element td").all_inner_texts()
    return dict(zip((key.rstrip(":") for key in cells[::2]), cells[1::2]))
