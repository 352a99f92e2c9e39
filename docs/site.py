"""What the site has beside the pages in this folder, made when mkdocs builds it: the documents of the top level, a page
of all commands from the commands themselves, one of all public names from their docstrings, the notebook as it was
run, and the glossary of the report."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCUMENTS = {"README.md": "index.md", "benchmarks/RESULTS.md": "RESULTS.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}
FACES = ("", "stats", "ranking", "calibration", "ops", "experiments", "analysis", "compression", "training")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: _linked((ROOT / source).read_text(encoding="utf-8")) for source, page in DOCUMENTS.items()}
    made |= {"commands.md": _commands(), "api.md": _names(), "glossary.md": _glossary()} | _notebook()
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _linked(markdown)


def _linked(text: str) -> str:
    """Links as they are between the pages of the site; of files that are no page, the words alone."""
    text = re.sub(r"\]\((?:\.\./)?(?:docs|benchmarks)/", "](", text)
    text = re.sub(r"\]\(\.\./(?=\w+\.md)", "](", text)
    text = text.replace("](notebook.ipynb)", "](notebook.md)")
    return re.sub(r"\[([^]]+)\]\((?:LICENSE|CITATION\.cff)\)", r"\1", text)


def _notebook() -> dict[str, str]:
    """Files for the notebook: its cells and their outputs as a page, and the pictures in it."""
    made, parts = {}, []
    for cell in json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            forms = output.get("data", {"text/plain": output.get("text")})
            data = {kind: "".join(text) for kind, text in forms.items()}
            if "image/svg+xml" in data:
                picture = f"notebook-{len(made)}.svg"
                made[picture] = data["image/svg+xml"]
                parts.append(f"![the picture that {source} shows]({picture})")
            elif "text/html" in data:  # pandas' own style of a table aside
                parts.append(re.sub(r"<style.*?</style>|(?<=<table)[^>]+", "", data["text/html"], flags=re.DOTALL))
            else:
                parts.append(f"```text\n{data['text/plain'].rstrip()}\n```")
    title, *rest = parts
    download = "[Download the notebook](./notebook.ipynb)"
    return made | {"notebook.md": "\n\n".join([title, download, *rest]) + "\n"}


def _commands() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from sedetect.cli import load

    lines = ["# Commands", "", "What `sedetect COMMAND --help` prints. [cli.md](cli.md) says when to use which.", ""]
    for name, command in get_command(load()).commands.items():  # type: ignore[attr-defined]
        for path, one in (
            [(f"{name} {inner}", c) for inner, c in command.commands.items()]
            if hasattr(command, "commands")
            else [(name, command)]
        ):
            lines += [f"## {path}", "", one.help, "", "| option | | default |", "|---|---|---|"]
            for parameter in one.params:
                if parameter.name == "help":
                    continue
                options = [*parameter.opts, *parameter.secondary_opts]
                shown = parameter.metavar or parameter.name.upper()
                label = shown if parameter.param_type_name == "argument" else " ".join(options)
                default = (
                    "" if parameter.default in (None, False, ()) or callable(parameter.default) else parameter.default
                )
                cells = [f"`{label}`", parameter.help or "", f"`{default}`" if default != "" else ""]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


def _glossary() -> str:
    """Every term of the report and of these pages."""
    from sedetect.report.glossary import TERMS

    lines = ["# Glossary", "", "The terms of these pages and of the report, which explains them where they stand.", ""]
    lines += ["| term | meaning |", "|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in TERMS.items()]
    return "\n".join([*lines, ""])


def _names() -> str:
    """Every public name, by the package that it is imported from."""
    lines = ["# Python", "", "The names that `sedetect` and its public packages export.", ""]
    seen: set[str] = set()
    for face in FACES:
        stub = ROOT / "sedetect" / face / "__init__.pyi"
        lines += [f"## {'.'.join(['sedetect', face]).rstrip('.')}", ""]
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                path = ".".join(filter(None, ("sedetect", face, node.module, alias.name)))
                if path not in seen and alias.name in _defined(ROOT / "sedetect" / face, node.module):
                    seen.add(path)
                    lines += [f"::: {path}", ""]
    return "\n".join(lines)


def _defined(folder: Path, module: str) -> set[str]:
    """What a module itself defines; what it imports is shown where that is defined, and kernels are no package."""
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not file.exists():
        return set()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    names |= {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return names | {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
