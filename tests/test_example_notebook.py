"""The outputs in docs/notebook.ipynb are those of a run."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"
FRACTION = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
COUNT = re.compile(r"(?<![\w.])\d{3,}(?![\w.])")  # of rows: on another CPU a token may go to another expert


@pytest.fixture(scope="module")
def stored():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def shown(cell) -> list[tuple[str, str]]:
    """What a code cell shows: the form of each output, and its text; of a picture, the words in it."""
    found = []
    for output in cell["outputs"]:
        kind = output["output_type"] if output["output_type"] != "stream" else output["name"]
        for form, text in output.get("data", {kind: output.get("text")}).items():
            text = "".join(text)
            found.append((form, "\n".join(re.findall(r">([^<]+)<", text)) if form == "image/svg+xml" else text))
    return sorted(found)


def same(one: str, other: str) -> bool:
    """Whether texts are equal, with numbers as near as kernels that round in another order leave them."""
    for number, rel in ((FRACTION, 1e-3), (COUNT, 5e-3)):
        numbers = [[float(found) for found in number.findall(text)] for text in (one, other)]
        if numbers[0] != pytest.approx(numbers[1], rel=rel):
            return False
        one, other = (number.sub("#", text) for text in (one, other))
    return one == other


@pytest.mark.slow
def test_a_run_shows_what_is_stored(stored, tmp_path):
    pytest.importorskip("nbclient", reason="needs nbclient, which runs the notebook")
    from write_notebook import executed

    made = [cell for cell in executed(tmp_path)["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in made] == ["".join(cell["source"]) for cell in cells]
    for one, other in zip(made, cells, strict=True):
        for (form, text), (stored_form, stored_text) in zip(shown(one), shown(other), strict=True):
            assert form == stored_form and same(text, stored_text), f"{text}\nis not\n{stored_text}"
    assert (tmp_path / "out/notebook/stats.safetensors").exists()


def test_other_texts_and_numbers_are_found(stored):
    texts = [text for cell in stored["cells"] if cell["cell_type"] == "code" for _, text in shown(cell)]
    numbers = [(text, match) for text in texts for match in FRACTION.finditer(text) if float(match[0])]
    assert len(numbers) > 40
    for text, match in numbers:
        assert same(text, text)
        assert not same(text, f"{text[: match.start()]}{float(match[0]) * 1.01}{text[match.end() :]}")
        assert not same(text, text[: match.start()] + text[match.end() :])
    assert not same("L1E28", "L1E29") and not same("101", "102") and same(" 900 ", " 901 ")


def test_nothing_of_the_machine_is_stored(stored):
    """What a run leaves beside the outputs: names of environments, times, warnings with paths."""
    assert stored["metadata"] == {"language_info": {"name": "python"}}
    for cell in stored["cells"]:
        assert not cell["metadata"] and "stderr" not in {form for form, _ in shown({"outputs": []} | cell)}
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000 and not re.search(r"/(?:home|root|tmp|work|Users)/|site-packages|0x[0-9a-f]{6}", text)
