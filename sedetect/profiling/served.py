"""The profile of a model in a serving engine, measured by its workers: the requests to them and their answers.

Nothing of an engine is imported here. A call is a worker extension's method with text as arguments, made in every
worker; answers are JSON objects (sedetect.engines.vllm.Worker). Statistics come as the bytes of our files, in parts.
"""

import base64
import inspect
import json
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sedetect.errors import SedetectError, shorten
from sedetect.files import STATS
from sedetect.models.measure import Measuring
from sedetect.ops.choose import check_backend
from sedetect.stats.bank import BankStats
from sedetect.stats.model import BankInfo, ModelStats, join_banks
from sedetect.stats.note import Note, sorted_notes
from sedetect.stats.place import BankId

EXTENSION = "sedetect.engines.vllm.Worker"
_PATIENCE = 600  # seconds for an answer, which comes between two steps of the engine
Call = Callable[..., Sequence[str]]  # (method, *arguments) -> the answers of all workers


class Engine(Protocol):
    """The part of vllm.LLM that is used."""

    llm_engine: Any

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[str, ...] = ()) -> list[Any]: ...


class Served:
    """One profile in the workers of an engine. Raises SedetectError for what a worker refuses."""

    def __init__(self, call: Call, source: str | None, info: dict[str, Any] | None, prefix: int | None, how: Measuring):
        check_backend(how.backend)
        self.source = source or f"profile-{uuid.uuid4().hex[:12]}"
        self._call = call
        self._asked = json.dumps({"source": self.source, "info": info or {}, "prefix": prefix, **asdict(how)})

    def start(self, known: Collection[str] = ()) -> None:
        """Begin a profile, or resume a running one whose source is known.

        Raises SedetectError where the engine or its model cannot be measured; it serves on as before.
        """
        answers = [json.loads(answer) for answer in self._call("sedetect_start", self._asked)]
        under_way = {answer.get("source") for answer in answers}
        if len(under_way) == 1 and under_way <= {*known}:
            (self.source,) = under_way
            return
        begun = [answer["routed"] for answer in answers if "refused" not in answer]
        why = next((answer["refused"] for answer in answers if "refused" in answer), None)
        if why is None and not any(begun):
            why = "no MoE layer found; serve a Mixture-of-Experts model"
        if why is not None:
            if begun:
                self.stop()
            raise SedetectError(f"vLLM: {why}")

    def stop(self) -> None:
        self._call("sedetect_stop")

    def collect(self) -> ModelStats:
        """The statistics of all workers so far, merged."""
        parts: list[bytearray] = []
        begin, end = 0, 1
        while begin < end:
            answers = [json.loads(answer) for answer in self._call("sedetect_collect", str(begin))]
            why = next((answer["refused"] for answer in answers if "refused" in answer), None)
            if why is not None:
                raise SedetectError(f"vLLM: {why}")
            parts = parts or [bytearray() for _ in answers]
            sent = [base64.b64decode(answer["part"]) for answer in answers]
            for part, more in zip(parts, sent, strict=True):
                part += more
            begin, end = begin + max(map(len, sent)), max(answer["size"] for answer in answers)
        return join_workers([_read(bytes(part)) for part in parts])


def _read(content: bytes) -> ModelStats:
    with TemporaryDirectory() as folder:
        (Path(folder) / STATS).write_bytes(content)
        return ModelStats.load(folder)


def join_workers(parts: list[ModelStats]) -> ModelStats:
    """One run from the statistics of an engine's workers over the same tokens: each has its layers, experts, or
    both.
    """
    whole: dict[BankId, BankStats] = {}
    for part in parts:
        for bank, state in part.banks.items():
            whole[bank] = whole[bank].merge(state) if bank in whole else state
    joined = join_banks(parts)
    banks: dict[str, BankInfo] = {}
    for name, info in (item for part in parts for item in part.header.banks.items()):
        served = {*info.backends, *(banks[name].backends if name in banks else ())}
        banks[name] = replace(info, backends=sorted(served))
    idle = [(bank, banks[str(bank)].module) for bank, state in whole.items() if not state.rows.any()]
    notes = [Note("never_ran", f"{name} never ran: this profile is not complete", bank) for bank, name in idle]
    header = replace(joined.header, banks=banks, notes=sorted_notes([*joined.header.notes, *notes]))
    return ModelStats(dict(sorted(whole.items())), header)


def server_call(url: str) -> Call:
    """The calls of a vLLM server, by its developer endpoint. They raise SedetectError, naming the way out."""
    address = url if "://" in url else f"http://{url}"
    if urlsplit(address).scheme not in ("http", "https"):
        raise SedetectError(f"{url}: not the address of a server; give one as http://localhost:8000")

    def call(method: str, *args: str) -> Sequence[str]:
        body = json.dumps({"method": method, "args": args}).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(f"{address.rstrip('/')}/collective_rpc", body, headers)
        try:
            with urlopen(request, timeout=_PATIENCE) as answer:
                answers: Sequence[str] = json.load(answer)["results"]
                return answers
        except HTTPError as error:
            if error.code in (404, 405):
                why = "it takes no calls; start the server with VLLM_SERVER_DEV_MODE=1 (see docs/serving.md before)"
            elif error.code == 500 and method == "sedetect_start":
                why = f"its workers do not know sedetect; start the server with --worker-extension-cls {EXTENSION}"
            else:
                why = f"{method} ended with HTTP {error.code}; see the server's log"
            raise SedetectError(f"{url}: {why}") from None
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise SedetectError(f"{url}: no answer ({reason}); start the server, or give its address") from None

    return call


class ServedProfile:
    """sedetect.profile of an engine: what its model computes inside the with block is measured, in its workers.

    stats may be read there and later.
    """

    def __init__(
        self, llm: Engine, source: str | None, info: dict[str, Any] | None, prefix: int | None, how: Measuring
    ):
        if inspect.iscoroutinefunction(llm.collective_rpc):
            raise SedetectError(
                f"{type(llm).__name__}: its calls are asynchronous; profile an LLM, or a server by `sedetect watch`"
            )
        self._llm = llm
        self._served = Served(self._call, source, info, prefix, how)
        self._stats: ModelStats | None = None
        self._running = False

    def _call(self, method: str, *args: str) -> Sequence[str]:
        return self._llm.collective_rpc(method, args=args)

    def __enter__(self) -> Self:
        parallel = self._llm.llm_engine.vllm_config.parallel_config
        if not parallel.worker_extension_cls:
            raise SedetectError(
                f"{type(self._llm).__name__}: started without sedetect; a profile is asked for when the engine starts: "
                f'give worker_extension_cls="{EXTENSION}"'
            )
        try:
            self._served.start()
        except SedetectError:
            raise
        except Exception as error:  # of any kind, as vLLM passes on what its workers raise
            raise SedetectError(
                f"worker_extension_cls={parallel.worker_extension_cls!r}: its workers start no profile ("
                f'{shorten(error)}); give "{EXTENSION}", or a class derived from it'
            ) from None
        self._running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        try:
            self._stats = self._served.collect()
            self._served.stop()
        except Exception:
            if kind is None:  # else the engine may be gone, which error tells
                raise

    def batch(self, **given: Any) -> None:
        """As Profile.batch; always refused for an engine."""
        raise SedetectError("prof.batch: an engine knows its rows; leave it out")

    @property
    def stats(self) -> ModelStats:
        """The statistics so far. Raises SedetectError before the block is entered."""
        if self._running:
            return self._served.collect()
        if self._stats is None:
            raise SedetectError("prof.stats: nothing was measured; enter the profile first")
        return self._stats
