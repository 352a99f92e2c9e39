"""What the documents name is there: paths, names in files, links, the order of the packages."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sedetect", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "setup.py", ".ci/run")


def named(document: str) -> list[str]:
    """The paths of this repository in a document's code spans, each with ":name" where a name in the file is meant."""
    spans = re.findall(r"`([\w./-]+(?::[\w.]+)?)`", (ROOT / document).read_text(encoding="utf-8"))
    return [span for span in spans if span.partition("/")[0] in FOLDERS or span.partition(":")[0] in FILES]


@cache
def names_in(path: Path) -> set[str]:
    """The names that a file defines: those of modules and, behind a dot, of classes; every word of other languages."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    found = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def tree() -> list[tuple[str, list[str]]]:
    """The tree of docs/architecture.md: (path, files that are named beside it), in its order."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    text = re.search(r"# Where what lives\n\n((?: {4}.*\n)+)", text)[1]
    entries, parents = [], {}
    for line in text.splitlines():
        if entry := re.match(r"( {4,6})(\S+) {2,}(.*)", line):
            depth, path = len(entry[1]), entry[2]
            parents[depth] = path
            entries.append((path if depth == 4 else parents[4] + path, []))
            line = entry[3]
        entries[-1][1].extend(re.findall(r"[\w-]+\.(?:py|md)\b|\b\w+/(?=,)", line))
    return entries


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_names_and_links_are_there(document):
    for span in named(document):
        path, _, name = span.partition(":")
        assert (ROOT / path).exists(), span
        assert not name or name in names_in(ROOT / path), span
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or ((ROOT / document).parent / link).exists(), link


def test_every_document_is_linked():
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    for document in DOCUMENTS[2:]:
        name = document.removeprefix("docs/")
        assert any(f"]({name})" in text or f"]({document})" in text for text in texts), document


def test_every_recipe_says_what_to_copy_and_what_to_show():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Recipes\n")[2]
    recipes = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert len(recipes) == 12
    for recipe in recipes:
        assert re.search(r"^Copy: ", recipe, re.MULTILINE) and re.search(r"^Show: ", recipe, re.MULTILINE), recipe


def test_the_tree_is_the_one_that_is_there():
    entries = tree()
    assert len(entries) > 20
    for path, files in entries:
        assert (ROOT / path).is_dir() == path.endswith("/") and (ROOT / path).exists(), path
        for file in files:
            assert (ROOT / path / file).exists(), f"{path}{file}"
    listed = {path for path, _ in entries}
    packages = {f"sedetect/{path.parent.name}/" for path in (ROOT / "sedetect").glob("*/__init__.py")}
    assert packages <= listed, packages - listed


def test_the_tree_stands_in_the_order_of_the_layers():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    order = [re.findall(r"\w+", layer) for layer in layers]
    height = {name: level for level, layer in enumerate(order) for name in layer}
    inside = [path.split("/")[1].removesuffix(".py") for path, _ in tree() if re.match(r"sedetect/.", path)]
    assert inside == sorted(inside, key=height.__getitem__)
