"""Sources of a checkpoint: a folder, the hub, or the http(s) address of a folder with its files.

A remote checkpoint is mirrored in a temporary folder: config, tokenizer and safetensors headers are copied, and weights
are holes in sparse files, which take no disk space. Code that reads configs and headers uses the mirror; only
Source.tensors reads weights.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import torch

from sedetect.checkpoints.files import (
    MAX_HEADER,
    check_checkpoint,
    read_json,
    shards_named,
    shards_of,
    source_name,
)
from sedetect.checkpoints.staging import Piece, StoredTensor, pieces_of, read_bytes
from sedetect.checkpoints.web import Meter, Stand, Web, shown
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.files import write_atomic

CONNECTIONS = 8
_PIECE = 2**24  # bytes of a request
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Files needed beside the weights: requested one by one where there is no list of files.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_KINDS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of a list of files
_PLAIN = re.compile(r"\w[\w.-]*")


class Source:
    """A checkpoint whose tensors are read in pieces, several at a time.

    name     as it was given
    folder   config, tokenizer and headers of its files
    remote   whether the weights are elsewhere
    meter    counts the bytes read: of tensors; of a remote one, of everything
    """

    remote = False

    def __init__(self, name: str, folder: Path, meter: Meter):
        self.name, self.folder, self.meter = name, folder, meter
        self._pool = ThreadPoolExecutor(CONNECTIONS, "source")

    def tensors(self, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
        """Read these tensors. May run in several threads. Raises SedetectError, naming the file, where that fails."""
        buffers = {tensor: tensor.buffer() for tensor in stored.values()}
        self._fill({tensor: buffer for tensor, buffer in buffers.items() if len(buffer)})
        return {name: tensor.shaped(buffers[tensor]) for name, tensor in stored.items()}

    def named(self, text: str) -> str:
        """text with the source's name in place of its folder."""
        return text.replace(str(self.folder), self.name)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fill(self, targets: dict[StoredTensor, torch.Tensor]) -> None:
        running = [self._pool.submit(self._carry, piece) for piece in pieces_of(targets, _PIECE)]
        for done in running:
            done.result()

    def _carry(self, piece: Piece) -> None:
        if len(piece.targets) == 1:
            self._read(piece.file, piece.start, piece.targets[0][1])
            return
        buffer = torch.empty(piece.length, dtype=torch.uint8)
        self._read(piece.file, piece.start, buffer)
        for place, target in piece.targets:
            target.copy_(buffer[place : place + len(target)])

    def _read(self, file: Path, start: int, buffer: torch.Tensor) -> None:
        read_bytes(file, start, buffer)
        self.meter.add(len(buffer))


class _Remote(Source):
    """A checkpoint at an address; folder is its mirror."""

    remote = True

    def __init__(
        self,
        name: str,
        folder: Path,
        web: Web,
        address_of: Callable[[str], str],
        cache: "_Cache | None",
        sizes: Mapping[str, int | None] = {},
    ):
        super().__init__(name, folder, web.meter)
        self._web, self._address_of, self._cache, self._sizes = web, address_of, cache, dict(sizes)

    def mirror(self, names: list[str] | None, code: bool) -> None:
        """Fill the folder. names: the existing files, or None if unknown."""
        self._bring("config.json")
        config = read_json(self.folder / "config.json")
        wanted = [one for one in names if one.endswith(_KINDS)] if names is not None else list(_BESIDE)
        if code:
            wanted += [one for one in names if one.endswith(".py")] if names is not None else _code_of(config)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(self._bring, [name for name in wanted if name != "config.json" and _PLAIN.fullmatch(name)]))
        for name in dict.fromkeys((str(config.get("transformers_weights") or _SINGLE), _SINGLE, _INDEX)):
            if names is not None and name not in names:
                continue
            if name.endswith(".json"):
                if (self.folder / name).exists() or self._bring(name):
                    shards = shards_named(self.folder / name)
                    break
            elif _PLAIN.fullmatch(name) and self._exists(name):
                shards = [name]
                break
        else:
            for other in names or ():
                if _PLAIN.fullmatch(other) and not (self.folder / other).exists():
                    (self.folder / other).touch()
            shards_of(self.folder)  # says what the files are instead
            raise SedetectError(f"{self.folder}: no weights in it; give the address of a checkpoint")
        for shard in shards:
            if not _PLAIN.fullmatch(shard):
                raise SedetectError(f"{self.folder / name}: names a shard {shard!r}, which is not a file beside it")
            if names is not None and shard not in names:
                raise SedetectError(
                    f"{self.folder / shard}: missing ({len(shards)} shards are named); give another one"
                )
        first, *others = shards
        self._bring_header(first)  # one at a time: a server without ranges begins to send the whole file
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(self._bring_header, others))

    def _exists(self, name: str) -> bool:
        return self._web.stand(self._address_of(name)) is not None

    def _bring(self, name: str) -> bool:
        """Copy a small file; False if it is missing."""
        content = None if self._cache is None else self._cache.load(name, self._version(name), 0, None)
        if content is None:
            content = self._web.get(self._address_of(name), MAX_HEADER)
            if content is not None and self._cache is not None:
                self._cache.save(name, self._version(name), 0, content, whole=True)
        if content is None:
            return False
        (self.folder / name).write_bytes(content)
        return True

    def _bring_header(self, shard: str) -> None:
        """Create a sparse file of the remote file's length that holds only its header."""
        length = self._ranged(shard, 0, 8)
        count = int.from_bytes(length, "little")
        header = length + (self._ranged(shard, 8, count) if 0 < count <= MAX_HEADER else b"")
        size = self._sizes[shard]
        with (self.folder / shard).open("wb") as file:
            file.write(header)
            if size is not None:
                file.truncate(size)

    def _ranged(self, name: str, start: int, count: int) -> bytes:
        buffer = torch.empty(count, dtype=torch.uint8)
        self._read_cached(name, start, buffer)
        return bytes(buffer.numpy().data)

    def _fill(self, targets: dict[StoredTensor, torch.Tensor]) -> None:
        if self._cache is None:
            super()._fill(targets)
            return
        missing = {
            tensor: target
            for tensor, target in targets.items()
            if not self._load_cached(tensor.file.name, tensor.start, target)
        }
        super()._fill(missing)
        for tensor, target in missing.items():
            name = tensor.file.name
            self._cache.save(name, self._version(name), tensor.start, target.numpy().data)

    def _read(self, file: Path, start: int, buffer: torch.Tensor) -> None:
        name = file.name
        self._sizes[name] = self._web.read(self._address_of(name), start, buffer.numpy().data, self._sizes.get(name))

    def _read_cached(self, name: str, start: int, buffer: torch.Tensor) -> None:
        if self._load_cached(name, start, buffer):
            return
        self._read(Path(name), start, buffer)
        if self._cache is not None:
            self._cache.save(name, self._version(name), start, buffer.numpy().data)

    def _load_cached(self, name: str, start: int, buffer: torch.Tensor) -> bool:
        found = None if self._cache is None else self._cache.load(name, self._version(name), start, len(buffer))
        if found is None:
            return False
        buffer.copy_(torch.frombuffer(bytearray(found), dtype=torch.uint8))
        return True

    def _version(self, name: str) -> str:
        """A key that changes with the content of a file."""
        assert self._cache is not None
        stand = self._cache.stand(name, lambda: self._web.stand(self._address_of(name)))
        if stand is not None:
            self._sizes.setdefault(name, stand.size)
        return "" if stand is None else f"{stand.size} {stand.version}"


class _Cache:
    """A cache of bytes read, in a folder: one file per tensor, or part of one, that was requested.

    known: metadata of files by name; for other files the server is asked, once per run.
    """

    def __init__(self, folder: Path, address: str, known: Mapping[str, Stand]):
        self._folder = folder / hashlib.sha256(address.encode()).hexdigest()[:16]
        self._stands: dict[str, Stand | None] = dict(known)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SedetectError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None

    def stand(self, name: str, ask: Callable[[], Stand | None]) -> Stand | None:
        if name not in self._stands:
            self._stands[name] = ask()
        return self._stands[name]

    def load(self, name: str, version: str, start: int, count: int | None) -> bytes | None:
        """count bytes (None: the whole file) from start on, if cached."""
        file = self._file(name, version, start, count)
        content = file.read_bytes() if file.is_file() else None
        return content if content is None or count is None or len(content) == count else None

    def save(self, name: str, version: str, start: int, content: Any, whole: bool = False) -> None:
        file = self._file(name, version, start, None if whole else len(content))
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, lambda temporary: temporary.write_bytes(content))

    def _file(self, name: str, version: str, start: int, count: int | None) -> Path:
        content = hashlib.sha256(f"{name}\0{version}".encode()).hexdigest()[:16]
        return self._folder / content / ("whole" if count is None else f"{start}-{count}")


def is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


@contextmanager
def open_source(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    code: bool = False,
) -> Iterator[Source]:
    """The source of a checkpoint: a folder, a hub name, or the http(s) address of a folder.

    cache: a folder that keeps the bytes read from a remote checkpoint, for later runs. code: fetch the model's own
    code too. Raises SedetectError where the checkpoint cannot be found or its headers are not right, and gives those
    raised inside the context the address in the place of the mirror.
    """
    name = str(name)
    if is_address(name) and (page := re.fullmatch(_page(), name)) is not None:
        name, revision = page[1], page[2] or revision
    if not is_address(name):
        name = source_name(name)
    if Path(name).is_dir():
        check_checkpoint(name)
        source = Source(name, Path(name), Meter())
        try:
            yield source
        finally:
            source.close()
        return
    with tempfile.TemporaryDirectory(prefix="sedetect-") as temporary:
        found = (_at_address if is_address(name) else _of_hub)(name, revision, Path(temporary), cache)
        if isinstance(found, Path):
            with open_source(found) as source:
                yield source
            return
        remote, names = found
        try:
            remote.mirror(names, code)
            check_checkpoint(remote.folder)
            yield remote
        except SedetectError as error:
            here, there = str(remote.folder), shown(name) if is_address(name) else name
            told = (part.replace(here, there) if isinstance(part, str) else part for part in error.args)
            raise SedetectError(*told) from None
        finally:
            remote.close()


def _at_address(
    address: str, revision: str | None, temporary: Path, cache: str | os.PathLike[str] | None
) -> tuple[_Remote, list[str] | None]:
    """The source of an address, without a list of its files."""
    if revision is not None:
        raise SedetectError(Argument("revision"), f" {revision}: an address has no revision; leave it out")
    parts = urlsplit(address)
    folder = temporary / (Path(parts.path).name or "checkpoint")
    folder.mkdir()

    def address_of(name: str) -> str:
        return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment="").geturl()

    kept = None if cache is None else _Cache(Path(cache), address, {})
    return _Remote(address, folder, Web(address, {}, hub=False), address_of, kept), None


def _of_hub(
    name: str, revision: str | None, temporary: Path, cache: str | os.PathLike[str] | None
) -> tuple[_Remote, list[str] | None] | Path:
    """The source of a hub name and the names of its files; the folder of a complete snapshot in the hub's own cache."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    endpoint, at = constants.ENDPOINT, revision or "main"
    web = Web(endpoint, build_hf_headers(), hub=True)
    try:
        listing = web.get(f"{endpoint}/api/models/{name}/revision/{quote(at, safe='')}?blobs=true", MAX_HEADER)
    except Exception as error:  # offline mode, and what else the session of the hub raises
        if (snapshot := _in_hub_cache(name, revision)) is not None:
            return snapshot
        if isinstance(error, SedetectError):
            raise
        raise SedetectError(f"{name}: the hub cannot be reached ({shorten(error)}); give a folder") from None
    if listing is None:
        raise SedetectError(f"{name}: no such folder, and the hub has no such model (revision {at}); check the name")
    try:
        answer = json.loads(listing)
        commit = str(answer["sha"])
        known = {
            str(one["rfilename"]): Stand(int(one["size"]), str(one.get("blobId") or commit))
            for one in answer["siblings"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise SedetectError(f"{name}: the hub's answer cannot be read ({shorten(error)}); try again later") from None
    if (snapshot := _in_hub_cache(name, commit)) is not None:
        return snapshot
    folder = temporary / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    kept = None if cache is None else _Cache(Path(cache), f"{endpoint}/{name}", known)
    sizes = {file: stand.size for file, stand in known.items()}

    def address_of(file: str) -> str:
        return hf_hub_url(name, file, revision=commit, endpoint=endpoint)

    return _Remote(name, folder, web, address_of, kept, sizes), list(known)


def _page() -> str:
    """The pattern of a hub model page's address: name and revision."""
    from huggingface_hub import constants

    return re.escape(constants.ENDPOINT) + r"/([\w.-]+/[\w.-]+)(?:/tree/([^/]+))?/?"


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a complete snapshot in the cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        check_checkpoint(folder)
    except Exception:  # of many kinds, all of which mean that it is missing
        return None
    return folder


def _code_of(config: dict[str, Any]) -> list[str]:
    """The files of a model's own code, by its config."""
    named = [value if isinstance(value, list) else [value] for value in (config.get("auto_map") or {}).values()]
    return sorted({f"{str(one).rpartition('--')[2].partition('.')[0]}.py" for several in named for one in several})
