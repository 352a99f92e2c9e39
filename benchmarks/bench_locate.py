"""A walk of the first token through a checkpoint of a published shape, over HTTP: bytes, memory and seconds by part.

    python benchmarks/bench_locate.py deepseek-r1 /tmp/r1            # about ten minutes of processor time
    python benchmarks/bench_locate.py kimi-k2 /tmp/k2 --layers 2     # of two layers with experts, both of which run

The files are holes, but for one planted expert, which must be found; they take no disk. A server on the loopback
interface counts the bytes it sends. The walk is a process of its own: its peak memory is that of nothing else. Prints a
line of JSON. Seconds are of the processor and by the clock: opening is all that comes before the first layer, reading
is what requests take, computing all else.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support import sparse
from support.servers import serving

SHAPES = {"deepseek-r1": sparse.DEEPSEEK_R1, "kimi-k2": sparse.KIMI_K2}
LAYER, EXPERT = 4, 100  # of the planted one, in layer 0 of a model of two


def walk(address: str, all_layers: bool) -> dict:
    """The result, bytes read and duration of a walk in this process."""
    import sedetect
    from sedetect.checkpoints.source import Source

    reading, opened = [], []
    carry, start, busy = Source._carry, time.perf_counter(), time.process_time()

    def timed(source, piece):
        before = time.thread_time()
        carry(source, piece)
        reading.append(time.thread_time() - before)

    def told(bytes_to_read):
        reading.clear()
        opened.extend((time.perf_counter() - start, time.process_time() - busy, bytes_to_read))

    Source._carry = timed
    found = sedetect.locate(address, all_layers=all_layers, told=told, found=lambda line: print(line, flush=True))
    clock, processor = time.perf_counter() - start, time.process_time() - busy
    seconds, busy_opening, wanted = opened
    return {
        "found": {str(one): [one.carried, one.weight] for one in found.candidates},
        "layers": found.layers,
        "of": found.of,
        "wanted": [wanted.common, wanted.experts],
        "read": found.read,
        "stored": found.stored,
        "peak": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024,
        "clock": {"opening": seconds, "all": clock},
        "processor": {
            "opening": busy_opening,
            "reading": sum(reading),
            "computing": processor - busy_opening - sum(reading),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument(
        "folder", help="folder of the sparse checkpoint files, created if missing; with --walk, their address"
    )
    parser.add_argument("--layers", type=int, help="number of layers with experts, all of which run; at least 2")
    parser.add_argument("--walk", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.walk:
        print(json.dumps(walk(args.folder, args.layers is not None)))
        return
    config, folder, layer = SHAPES[args.shape], Path(args.folder), LAYER
    if args.layers is not None:
        config = config | {"num_hidden_layers": args.layers, "first_k_dense_replace": 0}
        layer = min(LAYER, args.layers - 2)  # which a later one carries
    if not folder.exists():
        sparse.put_sparse(folder, config, layer, EXPERT)
    with serving({"o/m": folder}) as server:
        command = [sys.executable, __file__, "--walk", *sys.argv[1:2], server.files("o/m"), *sys.argv[3:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
    assert result["read"] == server.sent, (result["read"], server.sent)
    assert result["found"] == {f"L{layer}E{EXPERT}": [True, f"L{layer}E{EXPERT}[{sparse.CHANNEL},{sparse.INNER}]"]}
    print(json.dumps({"shape": args.shape} | result))


if __name__ == "__main__":
    main()
