"""JSON documents: values written with the name and version of their format, and read back."""

import html
import json
import os
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Any, ClassVar, Self

from sedetect.errors import SedetectError
from sedetect.files import check_readable, file_in, write_json

_WIDTH = 80
SHOWN = 20  # rows, in a notebook


def short_repr(value: Any) -> str:
    """One line per field, with large values abbreviated to their size: the __repr__ for a whole model's numbers."""
    fields = "".join(f"\n    {name}={_brief(field)}," for name, field in vars(value).items() if name[0] != "_")
    return f"{type(value).__name__}({fields}\n)" if fields else f"{type(value).__name__}()"


def _brief(value: Any) -> str:
    """On one line, and short."""
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        if len(value) > 8 or not all(isinstance(one, (str, int, float, NoneType)) for one in inner):
            return f"<{len(value)} {'entry' if len(value) == 1 else 'entries'}>"
    elif type(value).__repr__ is short_repr:
        return type(value).__name__
    elif not isinstance(value, (str, int, float, NoneType)):
        return repr(value) if type(value).__module__.startswith("sedetect.stats") else type(value).__name__
    return textwrap.shorten(repr(value), _WIDTH, placeholder=" ...")


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table for a notebook: text and integers unchanged, floats with four digits; a dash for None."""

    def cell(value: Any) -> str:
        shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<td>{html.escape(shown)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>"
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def data_frame(records: Sequence[dict[str, Any]]) -> Any:
    """A pandas.DataFrame with a row per record. Raises SedetectError where pandas is missing."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise SedetectError("to_dataframe needs pandas; install it with: pip install pandas") from None
    return pandas.DataFrame(records)


class Tabular:
    """A result with a row per thing it measured: a table in a notebook, and a data frame."""

    def records(self) -> list[dict[str, Any]]:
        """A value per column, for every row; None for what was not measured."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame of records. Raises SedetectError where pandas is missing."""
        return data_frame(self.records())

    def _repr_html_(self) -> str:
        rows = self.records()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        more = f" (the first {SHOWN} of {len(rows)})" if len(rows) > SHOWN else ""
        cells = [[row.get(name) for name in columns] for row in rows[:SHOWN]]
        return html_table(f"{type(self).__name__}{more}", columns, cells)


class Document:
    """A JSON file: its format, its version, and the fields that a class adds in to_dict.

    FORMAT, VERSION    as written; load refuses every other
    FILE      its name in a folder of results, where load takes the folder too
    REMEDY    the way out of every refusal
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[str] = "1"
    FILE: ClassVar[str | None] = None
    REMEDY: ClassVar[str] = "write it again with this sedetect"

    def to_dict(self) -> dict[str, Any]:
        """The document, ready for JSON without NaN and infinities."""
        return {"format": self.FORMAT, "version": self.VERSION}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """The inverse of to_dict, in classes that can be read back; unknown keys are ignored."""
        raise NotImplementedError(f"{cls.__name__} is only written")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically. Raises SedetectError where that fails."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by save.

        Raises SedetectError for a file that is missing or cannot be read, is not valid JSON, is not of this format and
        version, or lacks what from_dict looks for.
        """
        path = file_in(path, cls.FILE)
        if not path.exists():
            raise SedetectError(f"{path}: no such file; {cls.REMEDY}")
        try:
            check_readable(path)
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SedetectError(f"{path}: cannot be read ({error.strerror}); give a file that can") from None
        except ValueError as error:
            raise SedetectError(f"{path}: is not valid JSON ({error}); {cls.REMEDY}") from None
        found = (document.get("format"), document.get("version")) if isinstance(document, dict) else (None, None)
        if found != (cls.FORMAT, cls.VERSION):
            shown = "a document without format" if found == (None, None) else f"{found[0]} version {found[1]}"
            raise SedetectError(f"{path}: is {shown}, not {cls.FORMAT} version {cls.VERSION}; {cls.REMEDY}")
        try:
            return cls.from_dict(document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SedetectError(f"{path}: damaged ({type(error).__name__}: {error}); {cls.REMEDY}") from None
