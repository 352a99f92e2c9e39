"""The numbers of the README are those of benchmarks/RESULTS.md: each claim is written from the tables there."""

import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, RESULTS, NOTES, PROOF, QUANTIZERS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md", "benchmarks/RESULTS.md", "docs/performance-notes.md", "docs/proof.md", "docs/quantizers.md",
    )
)  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d+(?:,\d{3})*(?:\.\d+)?")  # not those in names: L1E28, H100
# No results: requirements, code, commands, the paper's number.
ASIDE = re.compile(r"## Install\n(?:.|\n)*?(?=\n## )|```(?:.|\n)*?```|`[^`\n]*`|^    \$.*|\[arXiv .*?\)", re.MULTILINE)
SPEED = {
    "with hooks that record the maxima": "hooks",
    "nothing recorded": "grouped_mm",
    "Triton, all default statistics": "triton on",
    "CUDA, all default statistics": "cuda on",
}
COUNTS = {1: "one", 3: "three", 9: "nine"}


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(head: str, text: str = RESULTS) -> dict[str, dict[str, str]]:
    """The table whose head begins like this: {first cell: {column: cell}}, of equal first cells the first."""
    lines = text[text.index(f"\n{head}") + 1 :].partition("\n\n")[0].splitlines()
    names, found = cells(lines[0]), {}
    for line in lines[2:]:
        found.setdefault(cells(line)[0], dict(zip(names, cells(line), strict=True)))
    return found


def number(cell: str) -> float:
    return float(NUMBER.search(cell)[0].replace(",", ""))


def claims() -> list[str]:
    """Every sentence or row of the README that has numbers, as far as it has them, with the numbers of the results."""
    layer = table("| shape | T |")["Qwen3-30B-A3B"]
    found = [f"{words} | {' | '.join(re.findall('[0-9.]+', layer[name]))} |" for words, name in SPEED.items()]
    on, off, rival = (number(layer[name]) for name in ("cuda on", "cuda off", "grouped_mm"))
    faster = math.floor(10 * rival / on) / 10  # speedups are rounded down
    found.append(f"add {100 * (on / off - 1):.0f}% to a layer that is {faster} times as fast")
    tokens, floor = int(layer["T"]), number(layer["floor"])
    found.append(f"{tokens:,} tokens, bfloat16, on an H100; the hardware's floor is {floor:.2f} ms")

    proof = table("| expert | \\|y\\| |")
    rows = {name: row for name, row in proof.items() if row["verdict"]}
    largest = {name: int(number(row["|y|"])) for name, row in rows.items()}  # 1087.499 is printed as 1087.5
    shown = {
        row["verdict"]: f"{name} (|y| {largest[name]}, {row['over the median']}x its layer's median)"
        for name, row in rows.items()
    }
    found.append(f"1 super expert, proved: {shown['proved']}; 1 refuted: {shown['refuted']}")
    columns = ("expert", "|y|", "over the median", "channel", "position")
    found += [" ".join(row[column] for column in columns) for row in rows.values()]
    (name,) = (name for name, row in rows.items() if row["verdict"] == "proved")
    depth, expert, row = *re.findall(r"\d+", name), rows[name]
    found.append(f"Expert {expert} of layer {depth} writes {largest[name]} into output channel {row['channel']} on")
    found.append(f"{number(row['over the median']):.0f} times the median of its layer's experts")
    found.append(f"perplexity rises by {number(row['perplexity']):.0f}%")
    before, after = number(proof["(nothing off)"]["activation"]), number(row["activation"])
    found.append(f"the largest activation falls from {before:.0f} to {after:.0f}.")

    here, there = table("| | super experts |").values()
    found.append(f"each of {here['routed experts']} experts")
    few, of = zip(*((COUNTS[int(model["super experts"])], model["routed experts"]) for model in (here, there)))
    found.append(f"{few[0]} of {of[0]} experts here, {few[1]} of {of[1]} in Qwen3-30B-A3B")
    models = COUNTS[len(table("| model | expert |", PROOF).keys() - {""})]
    assert f"On {models} small models" in RESULTS
    found.append(f"{models} small models whose truth was measured separately, no verdict was wrong")

    tool = next(line for line in QUANTIZERS.splitlines() if line.startswith("| llm-compressor 0") and "vLLM" in line)
    nothing, listed, random = (re.search(r"\+([\d.]+%)", cell)[1] for cell in cells(tool)[4:7])
    found.append(
        f"Rounding all experts of a small Qwen3-MoE to {cells(tool)[1]} bits raised perplexity in vLLM by {nothing}; "
        f"with the layers of the listed experts kept in 16 bits, by {listed}; with as many random layers kept, "
        f"by {random}"
    )

    walk = table("| checkpoint | read, GB |")
    read, of = (number(walk["DeepSeek-R1"][column]) for column in ("read, GB", "of, GB"))
    limit = re.search(r"below (\d+) GB of memory", RESULTS)[1]
    assert all(number(row["memory, GB"]) < int(limit) for row in walk.values())
    found += [f"Reads {read:.0f} of {of:.0f} GB", f"any computer with {limit} GB of memory"]

    classes = table("| transformers |")
    oldest, *_, newest = classes
    column = "classes on its experts interface"
    found.append(f"{classes[oldest][column]} classes in {oldest}, {classes[newest][column]} in {newest}")
    adapters = re.search(r"(\w+) more architectures", RESULTS)[1].lower()
    found.append(f"{adapters} more by adapters")
    return found


def wrong(readme: str) -> list[str]:
    """The claims that the README does not make, and its numbers that are in none."""
    text = " ".join(ASIDE.sub("", readme).split())
    missing = [claim for claim in claims() if claim not in text]
    for claim in sorted(claims(), key=len, reverse=True):
        text = text.replace(claim, "")
    return missing + NUMBER.findall(text)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_its_numbers_are_those_of_the_results():
    assert wrong(README) == []


def test_a_number_that_differs_is_found():
    aside = {place for part in ASIDE.finditer(README) for place in range(*part.span())}
    numbers = [match for match in NUMBER.finditer(README) if match.start() not in aside]
    assert len(numbers) > 40
    for match in numbers:
        other = str((int(README[match.end() - 1]) + 1) % 10)
        changed = README[: match.end() - 1] + other + README[match.end() :]
        assert wrong(changed), README[match.start() - 30 : match.end()]


@pytest.mark.parametrize("heading", ["## Whole forwards on the CPU", "### Merging, and layers of different size"])
def test_rows_that_are_in_the_notes_too_are_the_same(heading):
    rows = re.findall(r"^\|.*", RESULTS.partition(f"{heading}\n")[2].partition("\n#")[0], re.MULTILINE)
    notes = re.sub(r" \[\d.*?\]", "", NOTES.partition(f"{heading}\n")[2].partition("\n#")[0])  # quartiles
    assert len(rows) > 5 and not [row for row in rows if f"{row}\n" not in notes]
