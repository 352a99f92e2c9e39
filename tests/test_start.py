"""What is imported when: nothing heavy before it is needed."""

import gc
import importlib.util
import json
import subprocess
import sys
from typing import get_args

import pytest
from support.models import TINY

from sedetect.cli import COMMANDS, choices, load
from sedetect.cli.shared import hidden, uncollected
from sedetect.compression.merging import METHODS
from sedetect.compression.protect import GRANULARITIES, TOOLS
from sedetect.compression.pruning import BUDGETS
from sedetect.compression.runtimes import RUNTIMES
from sedetect.compression.simulated import GROUP
from sedetect.experiments.ablation import HOW
from sedetect.ranking.saliencies import SALIENCIES

HEAVY = ("torch", "transformers", "triton", "numpy", "scipy", "sklearn")

# Runs command lines in one process, one after another, and prints which heavy libraries each found or left imported.
RUN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout

lines, heavy = json.loads(sys.argv[1]), json.loads(sys.argv[2])
from sedetect.cli import main

found = []
for line in lines:
    sys.argv = ["sedetect", *line]
    out = io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    found.append([code, out.getvalue(), [name for name in heavy if name in sys.modules]])
print(json.dumps(found))
"""


def run(*lines: tuple[str, ...]) -> list[tuple[int, str, list[str]]]:
    command = [sys.executable, "-c", RUN, json.dumps([[*map(str, line)] for line in lines]), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


def commands() -> list[tuple[str, ...]]:
    """Every command with its group."""
    from typer.main import get_command

    found: list[tuple[str, ...]] = []
    for name, command in get_command(load()).commands.items():
        inner = getattr(command, "commands", None)
        found += [(name,)] if inner is None else [(name, one) for one in inner]
    return found


def test_the_library_imports_nothing_until_it_is_asked():
    code = f"import sys, sedetect; print([name for name in {HEAVY} if name in sys.modules]); sedetect.ModelStats"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_and_every_help():
    names = commands()
    assert {name for name, *_ in names} == COMMANDS.keys()
    lines = [("--version",), ("--help",), *((*command, "--help") for command in names)]
    for line, (code, out, heavy) in zip(lines, run(*lines), strict=True):
        assert (code, heavy) == (0, []), (line, out)
        assert out.strip()


WRONG = [
    ("profil", TINY),
    ("profile", TINY, "--tokenz", 5),
    ("profile", TINY, "--tokens", "many"),
    ("profile", "/no/such/folder"),
    ("ablate", TINY, "--how", "burn"),
    ("ablate", TINY, "--controls", -1),
    ("prune", TINY, "--protect", "all", "-o", "x"),
    ("export", TINY, "--to", "torch"),
    ("rank", TINY, "--by", "beauty"),
    ("analyze", "trace", TINY, "--top", 0),
]


def test_wrong_arguments_are_one_line_before_anything_is_imported():
    for line, (code, out, heavy) in zip(WRONG, run(*WRONG), strict=True):
        assert (code, heavy) == (2, []), (line, out)
        assert out.startswith("sedetect: ") and out.count("\n") == 1, (line, out)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    line = ("profile", TINY, "--tokens", 1024, "--seq-len", 128, "-o", folder)
    ((code, out, heavy),) = run(line)
    assert (code, heavy) == (0, ["torch", "transformers", "triton", "numpy"]), out
    return folder


def test_reading_statistics_needs_no_transformers(profiled, tmp_path):
    lines = [
        ("rank", profiled),
        ("rank", profiled, "--by", "reap"),
        ("compare", profiled, profiled),
        ("merge", profiled / "domains" / "english.safetensors", "-o", tmp_path / "merged.safetensors"),
        ("stability", profiled),
        ("export", profiled, "--to", "json"),
        ("report", profiled),
    ]
    for line, (code, out, heavy) in zip(lines, run(*lines), strict=True):
        assert code == 0, (line, out)
        assert "transformers" not in heavy, line


def test_choices_are_those_of_the_library():
    assert get_args(choices.Saliency) == tuple(SALIENCIES)
    assert tuple(choices.How) == HOW
    assert get_args(choices.Tool) == tuple(TOOLS)
    assert get_args(choices.Granularity) == GRANULARITIES
    assert get_args(choices.Runtime) == RUNTIMES
    assert get_args(choices.Spread) == BUDGETS
    assert get_args(choices.Merge) == METHODS
    assert choices.GROUP == GROUP


def test_garbage_is_collected_again_after_the_start():
    with pytest.raises(ZeroDivisionError), uncollected():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.unfreeze()  # what the tests made so far


def test_a_package_is_hidden_for_a_while(tmp_path, monkeypatch):
    (tmp_path / "sometimes.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("sometimes"):
        assert importlib.util.find_spec("sometimes") is None
        with pytest.raises(ImportError):
            importlib.import_module("sometimes")
    assert importlib.import_module("sometimes").__name__ == "sometimes"
    with hidden("sometimes"):  # it is there already
        assert importlib.import_module("sometimes").__name__ == "sometimes"
    del sys.modules["sometimes"]
