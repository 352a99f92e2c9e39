"""Writing files so that a reader never sees half of one."""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sedetect.errors import SedetectError

_TEMPORARY = re.compile(r"\..+\.(safetensors|json)\.\w{8}")  # as mkstemp names it


def write_atomic(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Call write(temporary) beside path, sync it, and rename it to path.

    Raises SedetectError where the folder cannot be written; path keeps its old content then.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SedetectError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SedetectError(f"{path}: cannot be written ({why}); free space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what write_atomic left in a folder where its process was killed. No other process may write there."""
    for file in folder.glob(".*"):
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write document as indented UTF-8 JSON, atomically; NaN and infinities are refused by json (ValueError)."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
