"""`sedetect` run in this process or in one of its own, and what it printed and wrote."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from sedetect import cli

SMALL = ("--tokens", 256, "--seq-len", 16)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args) -> Result:
    """`sedetect ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sedetect", *map(str, args)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return Result(ended.value.code, out.getvalue(), err.getvalue())


def spawn(*args, **environment) -> Result:
    """`python -m sedetect ARGS` in a process of its own."""
    command = [sys.executable, "-m", "sedetect", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def refused(result: Result) -> str:
    """The message of a refusal, checked to be the only output: one line with what is wrong and the way out."""
    assert result.code == 2 and result.out == ""
    assert re.fullmatch(r"sedetect: [^\n]+(; |: must be )[^\n]+\n", result.err), result.err
    return result.err


def row(out: str, name: str) -> list[str]:
    """Cells of the table's row on an expert: name, max|y|, /median, chan, pos, token, set, first, carried where
    the residual stream was observed, verdict."""
    (line,) = [line.strip() for line in out.splitlines() if line.strip().startswith(f"{name} ")]
    return re.split(r"\s{2,}", line)


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def ranked(file: Path) -> dict:
    """A ranking document, which must be JSON to the letter: no NaN, no infinity."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {file.name}"))
