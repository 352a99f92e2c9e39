"""Writing files so that a reader never sees half of one."""

import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sedetect.errors import SedetectError

# In a folder of results, see sedetect.results.
STATS, RESIDUAL, PROOF, TIMELINE = "stats.safetensors", "residual.json", "proof.json", "timeline.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_TEMPORARY = re.compile(r"\..+\.(safetensors|json)\.\w{8}")  # as _temporary names it


def file_in(path: str | os.PathLike[str], name: str | None) -> Path:
    """The file that a path means: the path itself or, for a folder, the file of that name in it."""
    path = Path(path)
    return path / name if name is not None and path.is_dir() else path


def check_readable(file: str | os.PathLike[str]) -> None:
    """Raise SedetectError for a file that cannot be read, and for a git-lfs pointer, which a clone without git-lfs has
    in place of a large file.
    """
    try:
        with Path(file).open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise SedetectError(f"{file}: cannot be read ({error.strerror}); give a file that can") from None
    if start == _POINTER:
        raise SedetectError(f"{file}: a git-lfs pointer and not the file itself; run `git lfs pull` in its folder")


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call write(temporary) beside path, sync it, and rename it to path.

    Raises SedetectError where the folder cannot be written; path keeps its old content then.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        if path.exists() and not path.is_file():  # a file would replace it
            raise SedetectError(f"{path}: exists and is not a file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # by the umask, which can only be read by setting it
    except OSError as error:
        raise SedetectError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors replaces the file with one that only its owner may read
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SedetectError(f"{path}: cannot be written ({why}); free space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_space(folder: str | os.PathLike[str], size: int) -> None:
    """Raise SedetectError if a folder, which need not exist yet, lacks space for size bytes."""
    nearest = next(one for one in (Path(folder).absolute(), *Path(folder).absolute().parents) if one.exists())
    free = shutil.disk_usage(nearest).free
    if free < size:
        raise SedetectError(f"{folder}: {size:,} bytes to write and {free:,} free; free space or choose another folder")


def check_new_folder(path: Path) -> None:
    """Raise SedetectError where path exists, unless it is an empty folder."""
    try:
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise SedetectError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    if taken:
        raise SedetectError(f"{path}: exists already; choose a new folder")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside path, renamed to path on exit and deleted on an exception.

    Raises SedetectError where path exists with something in it, or cannot be written.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666  # mode of a new file, by the umask
    except OSError as error:
        raise SedetectError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        for file in temporary.iterdir():
            os.chmod(file, mode)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SedetectError(f"{path}: cannot be written ({why}); free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes (write_atomic) in a folder. No other process may write there."""
    for file in folder.glob(".*"):
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """value with NaN and infinities, also in lists and dictionaries, as None, "inf" and "-inf": JSON cannot express
    them.
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def restored(value: float | str | None) -> float:
    """The inverse of finite for a field that must hold a number."""
    return math.nan if value is None else float(value)


def write_json(path: str | os.PathLike[str], document: Any, *, allow_nan: bool = False) -> None:
    """Write document as indented UTF-8 JSON, atomically; NaN and infinities are refused (ValueError) unless allowed."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _temporary(path: Path) -> Path:
    """An unused name beside path."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"
