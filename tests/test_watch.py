"""sedetect watch, against a server that answers as vLLM's developer endpoint does; test_vllm.py has a real one."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from support.command import files_of, refused, run
from support.models import random_model

import sedetect
from sedetect.models.measure import Measuring
from sedetect.profiling.served import Served, join_workers, server_call
from sedetect.results import Results
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId

PART = 3000  # bytes of an answer


class Fake(ThreadingHTTPServer):
    """Two workers that each have some layers; every collection finds 10 tokens more. code: an HTTP error instead."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.model, self.folder = random_model("qwen3_moe"), folder
        self.source, self.code, self.seen, self.refuse = None, None, [], None
        self.collected, self.parts = 0, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def call(self, method, *args):
        self.seen.append(method)
        if method == "sedetect_start":
            if self.refuse:
                return [{"refused": self.refuse}] * 2
            if self.source is not None:
                return [{"refused": f"a profile is under way ({self.source}); leave it", "source": self.source}] * 2
            asked = json.loads(args[0])
            self.source, self.info, self.collected = asked["source"], asked["info"], 0
            return [{"routed": 2}, {"routed": 1}]
        if method == "sedetect_stop":
            self.source = None
            return [{}, {}]
        begin = int(args[0])
        if begin == 0:
            self.collected += 1
            ids = torch.randint(3, 96, (self.collected, 10), generator=torch.Generator().manual_seed(0))
            with sedetect.profile(self.model, source=self.source, info=self.info) as prof:
                self.model(input_ids=ids)
            self.parts = []
            for layers in ((0, 1), (2,)):
                part = ModelStats({b: s for b, s in prof.stats.banks.items() if b.layer in layers}, prof.stats.header)
                part.header.banks = {n: b for n, b in prof.stats.header.banks.items() if BankId.parse(n) in part.banks}
                part.save(self.folder / "part")
                self.parts.append((self.folder / "part").read_bytes())
        return [
            {"size": len(part), "part": base64.b64encode(part[begin : begin + PART]).decode()} for part in self.parts
        ]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code, content = self.server.code or 200, b"{}"
        if code == 200 and self.path == "/collective_rpc":
            answers = self.server.call(body["method"], *body["args"])
            content = json.dumps({"results": [json.dumps(answer) for answer in answers]}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
    fake = Fake(tmp_path)
    yield fake
    fake.shutdown()
    fake.server_close()


def watching(server, folder):
    """`sedetect watch` in a process of its own, after its first collection."""
    command = [sys.executable, "-m", "sedetect", "watch", server.address, "-o", str(folder), "--every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while not (folder / "stats.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    return process


def test_until_ctrl_c_then_again(server, tmp_path):
    folder = tmp_path / "out"
    process = watching(server, folder)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert server.source is None and server.seen[-1] == "sedetect_stop"
    assert out.splitlines()[-1] == f"written to {folder}"
    assert out.splitlines()[0].startswith("Qwen3MoeForCausalLM: 10 tokens in 1 requests; candidates: ")
    first = ModelStats.load(folder)
    assert first.header.tokens == 10 * server.collected
    assert len(first.banks) == 3
    assert first.header.sources.keys() == Results(folder).domains.load().keys()

    process = watching(server, folder)
    while server.source is None:
        time.sleep(0.05)
    while server.collected < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    both = ModelStats.load(folder)
    assert both.header.tokens == first.header.tokens + 10 * server.collected
    assert len(both.header.sources) == 2
    assert run("rank", folder).code == 0


def test_what_was_killed_goes_on(server, tmp_path):
    folder = tmp_path / "out"
    process = watching(server, folder)
    process.kill()
    process.communicate()
    assert server.source is not None
    kept, before = ModelStats.load(folder), server.collected
    assert kept.header.tokens >= 10
    process = watching(server, folder)
    while server.collected == before:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    (source,) = ModelStats.load(folder).header.sources
    assert out.splitlines()[0] == f"resuming {source}, which was still running on the server"
    assert ModelStats.load(folder).header.tokens == 10 * server.collected


def test_a_server_that_ends_in_the_middle(server, tmp_path):
    folder = tmp_path / "out"
    process = watching(server, folder)
    server.shutdown()
    server.server_close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"sedetect: {server.address}: no answer (") and err.count("\n") == 1
    assert f"is in {folder}" in err
    assert ModelStats.load(folder).header.tokens == 10 * server.collected


def test_refused(server, tmp_path):
    folder = tmp_path / "out"
    assert "give -o DIR" in refused(run("watch", server.address))
    assert "not the address of a server" in refused(run("watch", "ftp://x", "-o", folder))
    server.code = 404
    assert "VLLM_SERVER_DEV_MODE=1" in refused(run("watch", server.address, "-o", folder))
    server.code = 500
    assert "--worker-extension-cls sedetect.engines.vllm.Worker" in refused(run("watch", server.address, "-o", folder))
    server.code, server.refuse = None, "experts under enable_eplb are not measured; start the engine without it"
    assert "vLLM: experts under enable_eplb" in refused(run("watch", server.address, "-o", folder))
    server.refuse, server.source = None, "somebody's"
    assert "under way (somebody's)" in refused(run("watch", server.address, "-o", folder))
    assert not folder.exists()
    assert server.source == "somebody's"


def test_statistics_of_another_model_stay(server, tmp_path):
    model = random_model("qwen3_moe", seed=1)
    with sedetect.profile(model) as prof:
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    (tmp_path / "out").mkdir()
    prof.stats.save(tmp_path / "out" / "stats.safetensors")
    line = run("watch", server.address, "-o", tmp_path / "out").err
    assert "statistics of different models do not merge" in line and "nothing was collected" in line
    assert files_of(tmp_path / "out") == {"stats.safetensors"}
    assert ModelStats.load(tmp_path / "out").header.tokens == 4
    assert server.source is None


def test_parts_of_workers_are_joined(server):
    served = Served(server_call(server.address), "text", None, None, Measuring())
    served.start()
    joined = served.collect()
    ids = torch.randint(3, 96, (1, 10), generator=torch.Generator().manual_seed(0))
    with sedetect.profile(server.model, source="text") as prof:
        server.model(input_ids=ids)
    assert joined.banks.keys() == prof.stats.banks.keys()
    assert all(state.equal(prof.stats.banks[bank]) for bank, state in joined.banks.items())
    assert joined.header.to_json() == prof.stats.header.to_json()


def test_experts_of_ranks_are_joined():
    """Each worker has the whole bank, with what its own experts saw."""
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.arange(3, 63).view(3, 20))
    parts = []
    for mine in (slice(0, 3), slice(3, 8)):
        banks = {}
        for bank, state in prof.stats.banks.items():
            part = sedetect.BankStats.empty(state.num_experts)
            for tensor, whole in zip(part.kept(), state.kept(), strict=True):
                tensor[mine] = whole[mine]
            banks[bank] = part
        parts.append(ModelStats(banks, prof.stats.header))
    joined = join_workers(parts)
    assert joined.header.tokens == 60
    assert all(state.equal(prof.stats.banks[bank]) for bank, state in joined.banks.items())


def test_engines_that_are_refused():
    class Asynchronous:
        async def collective_rpc(self):
            pass

    class Plain:
        llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=""))
        )

        def collective_rpc(self, method, args):
            raise AttributeError(f"no attribute {method!r}")

    with pytest.raises(sedetect.SedetectError, match="Asynchronous: its calls are asynchronous; .*sedetect watch"):
        sedetect.profile(Asynchronous())
    with pytest.raises(sedetect.SedetectError, match='Plain: .* give worker_extension_cls="sedetect.engines.vllm.Wo'):
        sedetect.profile(Plain()).__enter__()
    with pytest.raises(sedetect.SedetectError, match="pad_token_id"):
        sedetect.profile(Plain(), pad_token_id=0)
    Plain.llm_engine.vllm_config.parallel_config.worker_extension_cls = "mine.Worker"
    with pytest.raises(sedetect.SedetectError, match=r"mine.Worker.*start no profile \(AttributeError: "):
        sedetect.profile(Plain()).__enter__()
