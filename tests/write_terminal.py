"""Draw what a terminal shows of a command into docs/images/terminal.svg.

python tests/write_terminal.py
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COMMAND = ["profile", "tests/data/tiny-moe"]
WIDTH = 100


def main() -> None:
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    run = [sys.executable, "-m", "sedetect", *COMMAND]
    shown = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), ("sedetect " + " ".join(COMMAND), "bold")))
    console.print(Text.from_ansi(shown))
    drawn = console.export_svg(title="sedetect", unique_id="terminal")
    (ROOT / "docs/images/terminal.svg").write_text(re.sub(r"[ \t]+$", "", drawn, flags=re.MULTILINE), encoding="utf-8")


if __name__ == "__main__":
    main()
