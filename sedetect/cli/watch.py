"""sedetect watch: the experts of a vLLM server, measured under its own traffic."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from sedetect.cli.shared import (
    MEASURE,
    Output,
    app,
    check_writable,
    interruptible,
    print_line,
    stderr,
    uncollected,
)
from sedetect.cli.tables import ranking_table
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from rich.table import Table

    from sedetect.profiling.served import Served
    from sedetect.stats.model import ModelStats

Address = Annotated[str, typer.Argument(help="address of a vLLM server", metavar="URL")]
Every = Annotated[float, typer.Option(help="seconds between two collections", min=1)]


@app.command("watch", rich_help_panel=MEASURE)
def watch_command(url: Address, output: Output = None, every: Every = 60) -> None:
    """Measure the experts of a running vLLM server under its traffic, until Ctrl-C.

    The server is started with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls sedetect.engines.vllm.Worker. New
    statistics are merged with those already in the folder; Ctrl-C ends the profile on the server.
    """
    if output is None:
        raise SedetectError("watch keeps what it collects; give -o DIR")
    check_writable(output)
    with uncollected():
        from rich.live import Live

        from sedetect.models.measure import Measuring
        from sedetect.profiling.served import Served, server_call
    kept = _Kept(Results(output))
    name = f"traffic-{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    served = Served(server_call(url), name, {"domain": name}, None, Measuring())
    served.start(kept.parts)
    if served.source in kept.parts:
        print_line(f"resuming {served.source}, which was still running on the server")
    view = _View()
    with (
        interruptible("collecting once more") as stopped,
        Live(console=stderr, auto_refresh=False, transient=True) as live,
    ):
        ended = False
        while not ended:
            ended = stopped()
            began = time.monotonic()
            try:
                view.update(kept.collect(served))
                if ended:
                    served.stop()
            except SedetectError as error:
                if served.source not in kept.parts:  # otherwise the same command resumes it
                    with suppress(SedetectError):
                        served.stop()
                raise SedetectError(*error.args, f"; {kept.said}") from None
            if stderr.is_terminal:
                live.update(view.table(), refresh=True)
            else:
                print_line(view.line)
            while not stopped() and time.monotonic() < began + every:
                time.sleep(0.1)
    print_line(view.line)
    print_line(view.headline)
    print_line(f"written to {output}")


class _Kept:
    """The folder's statistics: one file per session of watching, and all of them merged."""

    def __init__(self, results: Results):
        self._results = results
        self.parts = results.domains.load()
        if not self.parts and results.stats_path.is_file():
            self.parts = {"before": results.stats()}
        self.said = "nothing was collected"

    def collect(self, served: Served) -> ModelStats:
        """All statistics, with the newest of the server. Raises SedetectError where they are of another model."""
        from sedetect.stats.model import merge_all

        parts = self.parts | {served.source: served.collect()}
        together = merge_all(parts.values())
        self._results.domains.save(parts)
        together.save(self._results.stats_path)
        self.parts = parts
        self.said = f"what was collected until {datetime.now():%H:%M:%S} is in {self._results.path}"
        return together


class _View:
    """The progress shown: tokens, the candidates, and how the set changed."""

    def __init__(self) -> None:
        self._tokens: list[tuple[float, int]] = []
        self._set: list[str] | None = None
        self._changes: list[str] = []

    def update(self, stats: ModelStats) -> None:
        from sedetect.ranking.rule import rank

        self._stats, self._ranking = stats, rank(stats)
        self._tokens = [*self._tokens[-1:], (time.monotonic(), stats.header.tokens)]
        names = [str(expert) for expert in self._ranking.found]
        if self._set is not None and set(names) != set(self._set):
            new, gone = ([n for n in one if n not in other] for one, other in ((names, self._set), (self._set, names)))
            moved = " ".join([*(f"+{n}" for n in new), *(f"-{n}" for n in gone)])
            self._changes.append(f"{datetime.now():%H:%M:%S} {moved}")
        self._set = names

    @property
    def headline(self) -> str:
        return self._ranking.headline

    @property
    def line(self) -> str:
        """One line of it."""
        header, (began, before), (now, tokens) = self._stats.header, self._tokens[0], self._tokens[-1]
        rate = f", {(tokens - before) / (now - began):,.0f} tokens/s" if now > began else ""
        found = ", ".join(self._set or []) or "none"
        changes = f"; changed {self._changes[-1]}" if self._changes else ""
        return f"{header.model}: {tokens:,} tokens in {header.sequences:,} requests{rate}; candidates: {found}{changes}"

    def table(self) -> Table:
        table = ranking_table(self._ranking)
        table.title, table.caption = self.line, "Ctrl-C ends the profile"
        return table
