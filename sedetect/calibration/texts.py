"""Calibration texts: the embedded corpus, files, folders and hub datasets, as documents per domain.

They are streamed: nothing is read beyond the point to which the caller iterates.
"""

import codecs
import gzip
import importlib.resources
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sedetect.calibration.records import CHATS, FIELDS, MEDIA_FIELDS, Document, Pair, characters, named, read_record
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.files import check_readable

DOMAINS = ("english", "chinese", "mathematics", "code")
HEAD = 2**20  # characters of a domain that are read and checked at once: some 250,000 tokens, eight calibrations
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
_KINDS = ".txt, .jsonl, .json (each also as .gz) or .parquet"
_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # of the library datasets
_SHARD = re.compile(r"[-_.]\d+-of-\d+$")  # train-00000-of-00012
_NUMBERED = re.compile(r"((part|shard|chunk)[-_.]?)?\d+([-_.].*)?")  # a shard whose name says no more
_TRAIN = re.compile(r"train(?![a-z])")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")  # owner/name:config
_PIECE = 2**20  # bytes
_SEPARATORS = re.compile(r"[\s,]*")


class Documents:
    """The documents of a domain longer than HEAD; each iteration reads them anew, as far as it goes."""

    def __init__(self, read: Callable[[], Iterator[Document]]):
        self._read = read

    def __iter__(self) -> Iterator[Document]:
        return self._read()


def load_texts(data: str | os.PathLike[str] | None = None) -> dict[str, list[Document] | Documents]:
    """Domain name -> documents.

    data is None for the embedded corpus (DOMAINS, one document each); a .txt (one document), .jsonl or .json file (an
    object per line, or an array of them), each also as .gz, or a .parquet file; a folder of such files, one domain
    each; a local clone of a hub dataset; or the split "train" of a hub dataset, "name" or "name:config".
    A record has "text", or the fields of another known layout (sedetect.calibration.records). A domain is named after
    its file or data set; numbered shards are one domain, and of a data set's splits "train" alone is read.

    The first HEAD characters of each domain (most domains whole) are read at once; a longer domain is Documents.

    Raises SedetectError for data that does not exist, is empty, is not UTF-8, or holds a record without text; Documents
    raises it on reaching the fault.
    """
    if data is None:
        corpus = importlib.resources.files("sedetect.calibration") / "corpus"
        return {domain: [(corpus / f"{domain}.txt").read_text(encoding="utf-8")] for domain in DOMAINS}
    path = Path(data)
    if not str(data):
        raise SedetectError(Argument("data"), ": is empty; give a file, a folder or a hub dataset, or leave it out")
    try:
        found = path.exists()
    except OSError as error:
        raise SedetectError(f"{str(data)[:80]}: cannot be read ({error.strerror}); give another path") from None
    if path.is_dir():
        files = _find_files(path)
    elif found:
        _check_kind(path)
        files = {_stem(path): [path]}
    elif _HUB_NAME.fullmatch(str(data)) and not path.suffix[1:].isalpha():
        name = str(data).partition(":")[0]
        return _checked({name.rpartition("/")[2]: lambda: _read_hub(str(data))}, str(data))
    else:
        raise SedetectError(f"{data}: no such file or folder; give a {_KINDS} file, a folder of them or a hub dataset")
    return _checked({domain: _reader(shards) for domain, shards in files.items()}, str(data))


def _checked(domains: dict[str, Callable[[], Iterator[Document]]], data: str) -> dict[str, list[Document] | Documents]:
    """The documents per domain, checked at the start of each."""
    texts = {domain: _begin(read) for domain, read in domains.items()}
    if not any(_has_text(document) for documents in texts.values() for document in documents):
        raise SedetectError(f"{data}: empty; give a file with text in it")
    return texts


def _begin(read: Callable[[], Iterator[Document]]) -> list[Document] | Documents:
    head: list[Document] = []
    length = 0
    for document in read():
        head.append(document)
        length += characters(document)
        if length > HEAD:
            return Documents(read)
    return head


def _reader(files: list[Path]) -> Callable[[], Iterator[Document]]:
    return lambda: (document for file in files for document in _read_file(file))


def _suffix(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _stem(file: Path) -> str:
    return file.name.removesuffix(_suffix(file))


def _files_of(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if _suffix(file) in _SUFFIXES and file.name not in _METADATA and file.is_file()
    )


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """Domain -> its files, of a folder of files or a clone of a data set, where they are in folders."""
    within = folder
    while not (files := _files_of(within)):
        inner = [one for one in sorted(within.iterdir()) if one.is_dir() and one.name[0] != "." and _holds_data(one)]
        if not inner:
            raise SedetectError(f"{folder}: no {_KINDS} file in it; give a folder with text")
        if len(inner) > 1:
            names = named(one.name for one in inner)
            raise SedetectError(f"{within}: has text in several folders, {names}; give one of them")
        within = inner[0]
    domains: dict[str, list[Path]] = {}
    for file in files:
        stem = _stem(file)
        shard = _SHARD.search(stem) is not None or (_NUMBERED.fullmatch(stem) is not None and within != folder)
        name = _SHARD.sub("", stem) if _SHARD.search(stem) else "" if shard else stem
        if not shard and name in domains:
            raise SedetectError(f"{file}: a second file of the domain {name!r}; rename one of them")
        domains.setdefault(name, []).append(file)
    split = within != folder or any(_SHARD.search(_stem(file)) for file in files)
    train = [name for name in domains if _TRAIN.match(name)]
    if split and train:
        domains = {name: domains[name] for name in train}
    if (within != folder and len(domains) == 1) or "" in domains:
        own = folder.resolve().name
        domains = {own if len(domains) == 1 or not name else name: shards for name, shards in domains.items()}
    return domains


def _holds_data(folder: Path) -> bool:
    return any(_files_of(Path(inner)) for inner, _, _ in os.walk(folder))


def _check_kind(file: Path) -> None:
    if _suffix(file) not in _SUFFIXES:
        raise SedetectError(f"{file}: files of type {file.suffix or 'none'!r} are not read; give {_KINDS}")


def _read_file(file: Path) -> Iterator[Document]:
    check_readable(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    kind = _suffix(file).removesuffix(".gz")
    return _read_text(file) if kind == ".txt" else _read_jsonl(file) if kind == ".jsonl" else _read_json(file)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            yield opened  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise SedetectError(f"{file}: cannot be read ({why}); give a file that can") from None


def _decoded(file: Path) -> Iterator[str]:
    """The text of a file, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _opened(file) as opened:
        done = 0
        while True:
            piece = opened.read(_PIECE)
            held = len(decoder.getstate()[0])
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, done - held + error.start) from None
            if not piece:
                return
            done += len(piece)


def _not_utf8(file: Path, at: int) -> SedetectError:
    return SedetectError(f"{file}: not UTF-8 at byte {at}; convert it (iconv -t utf-8)")


def _read_text(file: Path) -> Iterator[Document]:
    """One document; a file longer than HEAD in pieces, see pieces."""
    held = ""
    for more in _decoded(file):
        held += more
        while len(held) > HEAD:
            end = _cut(held, 0)
            yield held[:end]
            held = held[end:]
    yield held


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most HEAD characters, each to the end of a line or else of a word where it has one."""
    start = 0
    while len(text) - start > HEAD:
        end = _cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int) -> int:
    """The end of the piece that begins at start."""
    middle, most = start + HEAD // 2, start + HEAD
    line = text.rfind("\n", middle, most)
    return (line if line >= 0 else text.rfind(" ", middle, most)) + 1 or most


def _read_jsonl(file: Path) -> Iterator[Document]:
    done = 0
    with _opened(file) as opened:
        for number, line in enumerate(opened, start=1):  # by \n alone: JSON strings may hold other line breaks
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, done + error.start) from None
            done += len(line)
            if text.strip():
                where = f"{file}: line {number}"
                yield read_record(_parse(text, where), where, file.parent)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SedetectError(f"{where} is not valid JSON ({error}); fix or remove it") from None


def _read_json(file: Path) -> Iterator[Document]:
    """The objects of an array, or of JSON lines, which many .json files hold."""
    more = _decoded(file)
    held = next(filter(str.strip, more), "")
    at = len(held) - len(held.lstrip())
    if held[at : at + 1] != "[":
        if held[at:].split("\n", 1)[0].strip() == "{":
            raise SedetectError(
                f"{file}: is one object over several lines; give an array of records, or one record per line"
            )
        yield from _read_jsonl(file)
        return
    decoder, number, at = json.JSONDecoder(), 0, at + 1
    while True:
        at = _SEPARATORS.match(held, at).end()  # type: ignore[union-attr] # matches nothing, too
        if held[at : at + 1] == "]":
            return
        where = f"{file}: record {number}"
        try:
            record, at = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            rest = "".join(islice(more, 1 + (len(held) - at) // _PIECE))  # read twice as much, for a long record
            if not rest:
                why = getattr(error, "msg", error)
                raise SedetectError(f"{where} is not valid JSON ({why}); fix or remove it") from None
            held, at = held[at:] + rest, 0
            continue
        yield read_record(record, where, file.parent)
        number += 1


def _read_parquet(file: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise SedetectError(f"{file}: reading parquet needs pyarrow; pip install 'sedetect[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            wanted = [name for name in names if name in FIELDS]
            if not wanted:
                read_record(dict.fromkeys(names), f"{file}: row 0")
            if set(CHATS) & set(wanted):
                wanted += [name for name in names if name in MEDIA_FIELDS]
            for batch in opened.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    yield read_record(record, f"{file}: row {number}", file.parent)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise SedetectError(f"{file}: not a readable parquet file ({shorten(error)}); write it again") from None


def _read_hub(data: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise SedetectError(
            f"{data}: no such file or folder; to read it as a hub dataset, pip install 'sedetect[data]'"
        ) from None
    name, _, config = data.partition(":")
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            yield read_record(row, f"{data}: row {number}")
    except SedetectError:
        raise
    except Exception as error:  # from the network, the hub, or any file format behind the dataset
        raise SedetectError(
            f"{data}: no such file or folder, and not readable as a hub dataset ({shorten(error)}); "
            "check the name and the connection"
        ) from error


def _has_text(document: Document) -> bool:
    text = document.text if isinstance(document, Pair) else document
    return bool(text.strip()) if isinstance(text, str) else True
