"""Check that a streamed profile equals the resident one in the memory of three layers, and measure its speed.

    python benchmarks/bench_streaming.py FOLDER             on a GPU: writes about 10 GB to FOLDER, and deletes them
    python benchmarks/bench_streaming.py FOLDER --small     some MB, anywhere

Writes a random checkpoint of Qwen3-30B-A3B's shape with 8 layers and profiles it over the same batches

    streamed     through sedetect.profile_model, for its memory: above what the process took after import and CUDA start
    resident     to compare: counts, maxima and kept rows must be equal to the bit, sums to 1e-12
    apart        streamed, but nothing is loaded while a layer computes: load (read, copy and convert) and compute alone
    read, copy   the bytes of each layer alone: from disk into pinned memory, and from there to the GPU
    streamed     again, for its time per layer, beside max(read + copy, compute) and max(load, compute)

with the files dropped from the page cache before every run whose reading is timed. The last line is all of it as JSON.
The exit code is 1 where results differ or (not --small) memory or time per layer is more than it should be: GPU memory
that tensors take (what torch reserves beyond that is printed) and RSS above three layers, embeddings, lm_head and
hidden states; all layers but the first together above 1.15 of their max(read + copy, compute). Where computing takes
much less than loading, or much more, that says nothing of their overlap: load + compute, one after the other, is
printed beside it; choose --tokens so that both are alike.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from shapes import QWEN3, SMALL, TOKENIZER, differences, drop_cache, from_disk, texts
from timing import machine
from transformers import Qwen3MoeConfig

import sedetect
from sedetect.calibration.windows import calibration_windows
from sedetect.checkpoints import staging
from sedetect.models.banks import find_banks
from sedetect.models.loading import load_tokenizer
from sedetect.models.streamed import StreamedModel, open_streamed
from sedetect.profiling.streaming import stream_profile
from sedetect.stats.model import ModelStats

SHARD = 2.5e9  # bytes
SLACK = 1.15  # of the time per layer


def write_checkpoint(folder: Path, config: Qwen3MoeConfig, device: str) -> None:
    """A random checkpoint in bfloat16, under the names that published ones have, synced to disk."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    generator, shard, size, weight_map = torch.Generator(device).manual_seed(0), {}, 0, {}

    def flush() -> None:
        nonlocal shard, size
        file = folder / f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(shard, file, {"format": "pt"})
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        weight_map.update(dict.fromkeys(shard, file.name))
        shard, size = {}, 0

    for name, shape in _tensors(config):
        if len(shape) == 1:
            values = torch.ones(shape)
        else:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.04
        shard[name] = values.to(torch.bfloat16).cpu()
        size += shard[name].nbytes
        if size > SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    heads, groups = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        attention = {"q": (heads, hidden), "k": (groups, hidden), "v": (groups, hidden), "o": (hidden, heads)}
        yield from ((f"{layer}.self_attn.{name}_proj.weight", shape) for name, shape in attention.items())
        yield from ((f"{layer}.self_attn.{name}_norm.weight", (config.head_dim,)) for name in "qk")
        yield from ((f"{layer}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
        yield f"{layer}.mlp.gate.weight", (config.num_experts, hidden)
        for expert in range(config.num_experts):
            for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
                yield f"{layer}.mlp.experts.{expert}.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


class PeakMemory:
    """The largest resident set of this process, files mapped into it counted, in bytes above what it was at first.

    The kernel's own mark where it can be reset, and what a thread sees every few milliseconds.
    """

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what writing the checkpoint took
        self.base = self.peak = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.marked = True
        except OSError:
            self.marked = False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()
        mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if self.marked and mark is not None:
            self.peak = max(self.peak, int(mark[1]) * 1024)

    @property
    def above(self) -> int:
        return self.peak - self.base

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.over.wait(0.005):
            self.peak = max(self.peak, process.memory_info().rss)


class Clock:
    """The times (seconds) at which each layer was loaded, and finished and freed."""

    def __init__(self) -> None:
        self.loads: list[float] = []
        self.loaded: list[float] = []
        self.freed: list[float] = []

    @contextmanager
    def watching(self, streamed: StreamedModel) -> Iterator[None]:
        load, free = streamed.load, streamed.free

        def timed_load(layer: int) -> float:
            self.loads.append(load(layer))
            self.loaded.append(time.perf_counter())
            return self.loads[-1]

        def timed_free(layer: int) -> None:
            free(layer)
            self.freed.append(time.perf_counter())

        with patch.object(streamed, "load", timed_load), patch.object(streamed, "free", timed_free):
            yield


class Deferred(Future):
    """An executor that runs a task when its result is requested: nothing is loaded while a layer computes."""

    def __init__(self, *job) -> None:
        super().__init__()
        self.job = job

    def result(self, timeout: float | None = None) -> float:
        function, *arguments = self.job
        return function(*arguments)


class OneAfterAnother:
    def __init__(self, *_) -> None:
        pass

    def __enter__(self) -> "OneAfterAnother":
        return self

    def __exit__(self, *_) -> None:
        pass

    submit = staticmethod(Deferred)


def seconds_of_bytes(streamed: StreamedModel, layer: int) -> float:
    """Of bringing a layer's bytes to the device, or as much of it as is not patched away."""
    start = time.perf_counter()
    with streamed.staging.bringing(streamed.stored[layer].values()):
        pass
    if streamed.device.type == "cuda":
        torch.cuda.synchronize(streamed.device)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder, on the disk to measure")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="default: 65536; 2048 if small")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint; reuse it if it exists")
    options = parser.parse_args()
    begun, device, cuda = time.perf_counter(), torch.device(options.device), options.device.startswith("cuda")
    tokens = options.tokens or (2048 if options.small else 65536)
    text, loading = sedetect.Text(tokens, 64 if options.small else 512), sedetect.Loading(options.device)
    measuring = sedetect.Measuring(options.backend)
    settings = {"text": text, "loading": loading, "measuring": measuring}
    config = Qwen3MoeConfig(**SMALL if options.small else QWEN3, num_hidden_layers=options.layers, dtype="bfloat16")
    words = texts(tokens)

    if not (options.keep and options.folder.exists()):
        write_checkpoint(options.folder, config, options.device)
    written = time.perf_counter() - begun

    if cuda:
        _ = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    with PeakMemory() as main_memory:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            gpu_base = torch.cuda.memory_allocated()
        first = sedetect.profile_model(options.folder, words, **settings, stream=True)
    memory = {"rss": main_memory.above}
    if cuda:
        memory["gpu"] = torch.cuda.max_memory_allocated() - gpu_base
        memory["gpu_reserved"] = torch.cuda.max_memory_reserved()

    resident = sedetect.profile_model(options.folder, words, **settings, stream=False)
    failures = [f"streamed and resident differ in {where}" for where in differences(first.domains, resident.domains)]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()

    streamed = open_streamed(options.folder, loading)
    if streamed.staging is None:
        streamed.staging = staging.Staging(device, None)  # what a GPU has
    tokenizer = load_tokenizer(options.folder)
    domains = calibration_windows(streamed.model, tokenizer, words, text).domains
    banks = find_banks(streamed.model)
    layer_bytes = max(sum(tensor.nbytes for tensor in layer.values()) for layer in streamed.stored)
    outside = sum(tensor.nbytes for tensor in streamed.rest.values())  # embeddings, final norm and lm_head
    hidden = sum(windows.ids.numel() for windows in domains.values()) * config.hidden_size * 2
    limit = 3 * layer_bytes + outside + hidden

    def run(serial: bool = False) -> tuple[dict[str, ModelStats], Clock]:
        clock = Clock()
        executor = (
            patch("sedetect.profiling.streaming.ThreadPoolExecutor", OneAfterAnother) if serial else nullcontext()
        )
        with clock.watching(streamed), executor:
            stats, _ = stream_profile(
                streamed, banks, domains, text.batch_size, None, measuring,
                resume=None, report=lambda *_: None, stop=lambda: False,
            )  # fmt: skip
        return stats, clock

    layers = range(options.layers)
    drop_cache(options.folder)
    fetched = from_disk()
    _, apart = run(serial=True)
    fetched = from_disk() - fetched
    load = apart.loads
    compute = [apart.freed[n] - apart.loaded[n] for n in layers]
    drop_cache(options.folder)
    with patch.object(staging.Buffer, "send", lambda *_: None):
        read = [seconds_of_bytes(streamed, n) for n in layers]
    with patch.object(staging, "read_bytes", lambda *_: None):
        copy = [seconds_of_bytes(streamed, n) for n in layers]
    drop_cache(options.folder)
    again, clock = run()
    failures += [f"two streamed runs differ in {where}" for where in differences(again, first.domains)]
    layer = [after - before for before, after in zip(clock.freed, clock.freed[1:])]  # the first has nothing to overlap
    serial = sum(layer) / sum(load[n] + compute[n] for n in layers[1:])
    ratio = sum(layer) / sum(max(read[n] + copy[n], compute[n]) for n in layers[1:])
    of_load = sum(layer) / sum(max(load[n], compute[n]) for n in layers[1:])

    equal = not failures
    if not options.small:
        for name in ("rss", "gpu"):
            if memory.get(name, 0) > limit:
                failures.append(f"peak of {name} {memory[name]:,} bytes above the start, over {limit:,}")
        if ratio > SLACK:
            failures.append(f"a layer takes {ratio:.2f} of max(read + copy, compute), more than {SLACK}")
    if not options.keep:
        shutil.rmtree(options.folder)
    result = {
        "benchmark": "streaming",
        "machine": machine("cuda" if cuda else "cpu"),
        "model": "small" if options.small else "qwen3-30b-a3b",
        "backends": sorted({b for bank in first.stats.header.banks.values() for b in bank.backends}),
        "layers": options.layers,
        "tokens": tokens,
        "bytes": {
            "layer": layer_bytes,
            "layers": sum(tensor.nbytes for layer in streamed.stored for tensor in layer.values()),
            "outside": outside,
            "hidden": hidden,
            "limit": limit,
            "from_disk": fetched,
            "peak": memory,
        },
        "seconds": {
            "read": read, "copy": copy, "load": load, "compute": compute, "streamed": layer,
            "write": written, "all": time.perf_counter() - begun,
        },
        "of_max_read_copy_compute": ratio,
        "of_max_load_compute": of_load,
        "of_load_and_compute": serial,
        "equal": equal,
        "failures": failures,
    }  # fmt: skip
    show(result)
    return bool(failures)


def show(result: dict) -> None:
    size, seconds = result["bytes"], result["seconds"]
    table = Table(title=f"seconds per layer of {size['layer'] / 1e9:.3g} GB, {result['tokens']} tokens")
    for column in ("", "median", "least", "most", "GB/s"):
        table.add_column(column, justify="right")
    for name in ("read", "copy", "load", "compute", "streamed"):
        numbers = (statistics.median(seconds[name]), min(seconds[name]), max(seconds[name]))
        speed = f"{size['layer'] / numbers[0] / 1e9:.2f}" if name in ("read", "copy", "load") else ""
        table.add_row(name, *(f"{number:.4f}" for number in numbers), speed)
    console = Console(width=120)
    console.print(table)
    peaks = ", ".join(f"{name} {count / 1e9:.3g} GB" for name, count in size["peak"].items())
    limit = f"{size['limit'] / 1e9:.3g} GB"
    console.print(f"peak above the start: {peaks}; three layers, embeddings, lm_head and hidden states: {limit}")
    console.print(f"{size['from_disk'] / 1e9:.3g} of {size['layers'] / 1e9:.3g} GB of layers came from disk, not cache")
    console.print(
        f"a layer takes {result['of_max_read_copy_compute']:.2f} of max(read + copy, compute), "
        f"{result['of_max_load_compute']:.2f} of max(load, compute), "
        f"{result['of_load_and_compute']:.2f} of load + compute"
    )
    for failure in result["failures"]:
        console.print(f"FAILED: {failure}", style="red", markup=False)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
