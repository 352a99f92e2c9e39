"""Check that a wheel holds what the tree holds: python tests/check_wheel.py dist/sedetect-*.whl

The tree is the checkout this file is in. Expected are every module and data file under sedetect/, those of its kernels
(a symlink) too, and sedetect._C unless the wheel is pure; anything else but extensions and metadata is unwanted. Prints
what is missing and unwanted, and exits 1 where something is. Needs the standard library alone.
"""

import os
import re
import sys
from pathlib import Path
from zipfile import ZipFile

TREE = Path(__file__).parent.parent
EXTENSION = re.compile(r"sedetect/_(C|cuda)\.[^/]*\b(so|pyd)")
METADATA = re.compile(r"sedetect-[^/]+\.dist-info/.+")
ENTRY = "sedetect = sedetect.cli:main"


def expected() -> set[str]:
    """The files of sedetect/ that Python or sedetect reads, as names within a wheel."""
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(TREE / "sedetect", followlinks=True)
        for name in names
        if Path(folder).name != "__pycache__"
    ]
    names = {path.relative_to(TREE).as_posix() for path in paths}
    return {name for name in names if not EXTENSION.fullmatch(name)}


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel, one line each; empty where nothing is."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entries = [archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt")]
    extensions = {name for name in names if EXTENSION.fullmatch(name)}
    wanted = expected()
    found = [f"missing: {name}" for name in sorted(wanted - names)]
    found += [f"unwanted: {name}" for name in sorted(names - wanted - extensions) if not METADATA.fullmatch(name)]
    if not any(ENTRY in entry.splitlines() for entry in entries):
        found.append(f"missing: the command, {ENTRY!r}")
    version = re.search(r'"(.+)"', (TREE / "sedetect/version.py").read_text().split("__version__")[1]).group(1)
    if not wheel.name.startswith(f"sedetect-{version}-"):
        found.append(f"another version: the tree's is {version}")
    pure = wheel.name.endswith("-py3-none-any.whl")
    if pure == any("_C" in name for name in extensions):
        found.append("unwanted: an extension in a pure wheel" if pure else "missing: sedetect._C")
    return found


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    failed = False
    for path in map(Path, sys.argv[1:]):
        lines = problems(path)
        failed |= bool(lines)
        print(f"{path.name}: {'; '.join(lines) or f'all {len(expected())} files of sedetect/'}")
    sys.exit(failed)
