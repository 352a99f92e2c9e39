"""Files at an http(s) address: whole, or ranges of their bytes, through whatever the network does.

A request that fails in a way that may pass (a dropped connection, 429, 5xx) is retried after a pause from the byte
where it ended. Everything here relies on ranges: a server that answers with a whole file instead is refused before its
body is read. Redirects are followed by hand: credentials stay with the origin they are for, and plain http is taken
from the origin the user named alone.
"""

import email.utils
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from sedetect.errors import SedetectError, shorten

_TRIES = 6  # in a row without a byte
_LONGEST = 300.0  # seconds that a server may ask to wait
_TIMEOUT = 30.0  # seconds without a byte
_REDIRECTS = 10
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class Stand(NamedTuple):
    """A server's metadata of a file: its size, and a tag that changes with its content ("" if there is none)."""

    size: int
    version: str


class Meter:
    """Thread-safe counter of bytes read. told is called with the total after each arrival."""

    def __init__(self) -> None:
        self.total = 0
        self.told: Callable[[int], None] = lambda count: None
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count
        self.told(count)


class Web:
    """Reads files at addresses; meter counts the bytes of every body.

    headers are sent only to the origin of home, whose scheme may be http. hub: with the session of huggingface_hub
    (its proxies, its offline mode).
    """

    def __init__(self, home: str, headers: Mapping[str, str], hub: bool):
        from huggingface_hub.utils import get_session

        session: Any = get_session()
        own: Any = next(kind for kind in type(session).__mro__ if kind.__module__.startswith("httpx"))
        self._client = session if hub else own(timeout=_TIMEOUT)
        self._errors: type[Exception] = sys.modules[own.__module__.partition(".")[0]].TransportError
        self.meter = Meter()
        self._home, self._headers = _origin(home), dict(headers)
        self._signed: dict[str, str] = {}  # where an address was redirected to
        self._versions: dict[str, str] = {}

    def get(self, address: str, most: int) -> bytes | None:
        """The body of a file of at most `most` bytes; None for a missing file (404)."""
        for wait in _waits(address):
            body = bytearray()
            try:
                with self._answer("GET", address, {}) as answer:
                    if answer.status_code == 404:
                        return None
                    if _must_wait(address, answer, wait):
                        continue
                    for chunk in answer.iter_bytes():
                        self.meter.add(len(chunk))
                        body += chunk
                        if len(body) > most:
                            raise SedetectError(
                                f"{shown(address)}: more than {most:,} bytes; give a checkpoint's address"
                            )
                    return bytes(body)
            except self._errors as error:
                wait(shorten(error))
        raise AssertionError  # the last wait raises

    def stand(self, address: str) -> Stand | None:
        """The server's metadata of a file, without reading it; None if its size is unknown."""
        for wait in _waits(address):
            try:
                with self._answer("HEAD", address, {}) as answer:
                    if answer.status_code >= 400 and answer.status_code not in _AGAIN:
                        return None
                    if not _must_wait(address, answer, wait):
                        length = answer.headers.get("content-length", "")
                        return Stand(int(length), _version(answer)) if length.isdigit() else None
            except self._errors as error:
                wait(shorten(error))
        raise AssertionError  # the last wait raises

    def read(self, address: str, start: int, view: memoryview, size: int | None) -> int:
        """Fill view from byte start of a file, which has size bytes in all (None: unknown yet); returns its size."""
        done = 0
        while done < len(view):
            before = done
            for wait in _waits(address):
                wanted = {"range": f"bytes={start + done}-{start + len(view) - 1}"}
                why = "an answer without a byte"
                try:
                    with self._answer("GET", address, wanted) as answer:
                        if _must_wait(address, answer, wait):
                            continue
                        size = self._check_range(address, answer, start + done, size)
                        for chunk in answer.iter_raw():
                            self.meter.add(len(chunk))
                            if done + len(chunk) > len(view):
                                raise SedetectError(f"{shown(address)}: sends more bytes than it was asked for")
                            view[done : done + len(chunk)] = chunk
                            done += len(chunk)
                except self._errors as error:
                    why = shorten(error)
                if done > before:
                    break
                wait(why)
        assert size is not None  # callers never ask for zero bytes
        return size

    def _check_range(self, address: str, answer: Any, start: int, size: int | None) -> int:
        """The size of the file, from an answer with its bytes from start on. Raises SedetectError for any other
        answer.
        """
        if answer.status_code == 416:
            raise SedetectError(
                f"{shown(address)}: ends before byte {start:,}, where its header has more; upload it again"
            )
        if answer.status_code == 200:
            raise SedetectError(
                f"{shown(address)}: the server does not serve parts of a file (no range requests); download the "
                "checkpoint and give its folder"
            )
        unit, _, place = answer.headers.get("content-range", "").partition(" ")
        first, _, rest = place.partition("-")
        total = rest.rpartition("/")[2]
        if unit != "bytes" or first != str(start) or not total.isdigit() or "content-encoding" in answer.headers:
            raise SedetectError(
                f"{shown(address)}: asked for bytes from {start}, the server answers with "
                f"{answer.headers.get('content-range') or 'none'}; download the checkpoint and give its folder"
            )
        if size is not None and int(total) != size:
            raise SedetectError(f"{shown(address)}: has {int(total):,} bytes, expected {size:,}; upload it again")
        version = _version(answer)
        if self._versions.setdefault(address, version) != version:
            raise SedetectError(f"{shown(address)}: changed during the download; run the command again")
        return int(total)

    @contextmanager
    def _answer(self, method: str, address: str, headers: dict[str, str]) -> Iterator[Any]:
        """The answer to a request, after redirects, its body unread."""
        target = self._signed.get(address, address)
        for _ in range(_REDIRECTS):
            own = self._headers if _origin(target) == self._home else {}
            sent = {"accept-encoding": "identity"} | own | headers
            with self._client.stream(method, target, headers=sent, follow_redirects=False, timeout=_TIMEOUT) as answer:
                onward = answer.headers.get("location")
                if answer.status_code // 100 == 3 and onward is not None:
                    target = urljoin(target, onward)
                    if urlsplit(target).scheme != "https" and _origin(target) != self._home:
                        raise SedetectError(
                            f"{shown(address)}: redirects to {shown(target)}, which is not https; give that address "
                            "itself, if you trust it"
                        )
                    continue
                if target != address:
                    if answer.status_code in (400, 401, 403, 404, 410) and self._signed.pop(address, ""):
                        target = address  # its signature may have expired
                        continue
                    if answer.status_code < 400:
                        self._signed[address] = target
                yield answer
                return
        raise SedetectError(f"{shown(address)}: redirect loop; give another address")


def _must_wait(address: str, answer: Any, wait: Callable[..., None]) -> bool:
    """Wait and return whether to retry. Raises SedetectError for a permanent status."""
    status = answer.status_code
    if status in _AGAIN:
        wait(f"status {status}", _retry_after(answer.headers.get("retry-after")))
        return True
    if status in (401, 403):
        raise SedetectError(
            f"{shown(address)}: access is denied (status {status}); accept the model's terms on its page, and log in "
            "with `hf auth login`"
        )
    if status == 404:
        raise SedetectError(f"{shown(address)}: missing (status 404); give the address of a complete checkpoint")
    if status >= 400 and status != 416:
        raise SedetectError(f"{shown(address)}: refused (status {status}); check the address")
    return False


def _waits(address: str) -> Iterator[Callable[..., None]]:
    """One function wait(why, seconds=None) per try: each sleeps; the last raises SedetectError instead."""
    for number in range(_TRIES):

        def wait(why: str, seconds: float | None = None, number: int = number) -> None:
            if number + 1 == _TRIES:
                raise SedetectError(f"{shown(address)}: cannot be read after {_TRIES} tries ({why}); try again later")
            if seconds is not None and seconds > _LONGEST:
                raise SedetectError(
                    f"{shown(address)}: the server asks to wait {seconds:.0f} s ({why}); try again later"
                )
            time.sleep(min(0.5 * 2**number, 8.0) if seconds is None else seconds)

        yield wait


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _version(answer: Any) -> str:
    tag = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
    return str(tag).removeprefix("W/").strip('"')


def _origin(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    return parts.scheme, parts.netloc.lower()


def shown(address: str) -> str:
    """An address without parts that may be secret."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
