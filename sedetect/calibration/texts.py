"""Calibration texts: the embedded corpus, files, folders and hub data sets, as documents per domain."""

import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sedetect.errors import Argument, SedetectError, shorten

DOMAINS = ("english", "chinese", "mathematics", "code")
Document = str | list[dict[str, Any]]  # a text, or the messages of a chat
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")  # owner/name:config
_HUB_CHARACTERS = 16 * 2**20  # read from the start of a hub data set: some 4 million tokens, tens of calibrations


def load_texts(data: str | os.PathLike[str] | None = None) -> dict[str, list[Document]]:
    """Domain name -> documents.

    data is None for the embedded corpus (DOMAINS, one document each); a .txt (one document), .jsonl (an object with
    "text" or "messages" per line) or .parquet file (a column of that name); a folder of such files, one domain each;
    or a hub data set, "name" or "name:config", of which the first 16 million characters of split "train" are read.
    A domain is named after its file or data set.

    Raises SedetectError for what does not exist, is empty, is not UTF-8, or holds a record without text.
    """
    if data is None:
        corpus = importlib.resources.files("sedetect.calibration") / "corpus"
        return {domain: [(corpus / f"{domain}.txt").read_text(encoding="utf-8")] for domain in DOMAINS}
    path = Path(data)
    if not str(data):
        raise SedetectError(Argument("data"), ": is empty; give a file, a folder or a hub data set, or leave it out")
    if path.is_dir():
        texts = _read_folder(path)
    elif path.exists():
        texts = {path.stem: _read_file(path)}
    elif _HUB_NAME.fullmatch(str(data)) and not path.suffix[1:].isalpha():
        texts = _read_hub(str(data))
    else:
        raise SedetectError(
            f"{data}: no such file or folder; give a .txt, .jsonl or .parquet file, a folder of them or a hub data set"
        )
    if not any(_has_text(document) for documents in texts.values() for document in documents):
        raise SedetectError(f"{data}: empty; give a file with text in it")
    return texts


def _read_folder(folder: Path) -> dict[str, list[Document]]:
    texts: dict[str, list[Document]] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES):
        if file.stem in texts:
            raise SedetectError(f"{file}: a second file of the domain {file.stem!r}; rename one of them")
        texts[file.stem] = _read_file(file)
    if not texts:
        raise SedetectError(f"{folder}: no .txt, .jsonl or .parquet file in it; give a folder with text")
    return texts


def _read_file(file: Path) -> list[Document]:
    if file.suffix == ".txt":
        return [_read_text(file)]
    if file.suffix == ".jsonl":
        return _read_jsonl(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    raise SedetectError(f"{file}: files of type {file.suffix or 'none'!r} are not read; give .txt, .jsonl or .parquet")


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SedetectError(f"{file}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8)") from None


def _read_jsonl(file: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):  # JSON strings may hold other line breaks
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SedetectError(f"{file}: line {number} is not valid JSON ({error}); mend or drop it") from None
        documents.append(_document(record, f"{file}: line {number}"))
    return documents


def _read_parquet(file: Path) -> list[Document]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise SedetectError(f"{file}: reading parquet needs pyarrow; pip install 'sedetect[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            wanted = [name for name in ("text", "messages") if name in opened.schema_arrow.names]
            records = opened.read(columns=wanted).to_pylist() if wanted else [{}]
    except (pyarrow.ArrowException, OSError) as error:
        raise SedetectError(f"{file}: not a readable parquet file ({shorten(error)}); write it again") from None
    return [_document(record, f"{file}: row {number}") for number, record in enumerate(records)]


def _read_hub(data: str) -> dict[str, list[Document]]:
    try:
        import datasets
    except ImportError:
        raise SedetectError(
            f"{data}: no such file or folder; to read it as a hub data set, pip install 'sedetect[data]'"
        ) from None
    name, _, config = data.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        documents = list(_first_documents(rows, data))
    except SedetectError:
        raise
    except Exception as error:  # of the network, the hub, or any file format behind the data set
        raise SedetectError(
            f"{data}: no such file or folder, and not readable as a hub data set ({shorten(error)}); "
            "check the name and the connection"
        ) from error
    return {name.rpartition("/")[2]: documents}


def _first_documents(rows: Iterable[dict[str, Any]], data: str) -> Iterator[Document]:
    characters = 0
    for number, row in enumerate(rows):
        document = _document(row, f"{data}: row {number}")
        characters += len(document) if isinstance(document, str) else sum(len(str(m["content"])) for m in document)
        yield document
        if characters >= _HUB_CHARACTERS:
            return


def _document(record: Any, where: str) -> Document:
    """The text or the messages of one record; SedetectError naming where it stands if it has neither."""
    if not isinstance(record, dict):
        raise SedetectError(f"{where} is no object; every record needs a field 'text' or 'messages'")
    text, messages = record.get("text"), record.get("messages")
    document: Document
    if isinstance(text, str):
        document = text
    elif isinstance(messages, list) and messages and all(map(_is_message, messages)):
        document = messages
    else:
        raise SedetectError(f"{where} has no string 'text' and no 'messages' of role and content; mend or drop it")
    try:
        json.dumps(document, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise SedetectError(f"{where} holds a lone surrogate, which UTF-8 cannot express; mend or drop it") from None
    return document


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def _has_text(document: Document) -> bool:
    return bool(document.strip()) if isinstance(document, str) else True
