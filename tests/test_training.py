"""ExpertMonitor: training goes on as without it, and what it keeps is what plain PyTorch sees."""

import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import put_model
from support.command import files_of, refused, row, run
from support.models import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import sedetect
from sedetect.calibration.windows import Text, calibration_windows, prefix_ids
from sedetect.errors import SedetectError
from sedetect.training import ExpertMonitor, Series, timeline

TEXT = Text(tokens=512, seq_len=64)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_model(tmp_path_factory.mktemp("model") / "m")


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


def train(folder, tmp_path, monitor=None, **options):
    """Losses of six steps, with dropout, and the weights after them."""
    torch.manual_seed(0)
    model = loaded(folder, attention_dropout=0.2)
    ids = torch.randint(3, 4000, (12, 32), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"} | options
    arguments = TrainingArguments(tmp_path / "t", report_to=[], use_cpu=True, disable_tqdm=True, **settings)
    losses = Losses()
    trainer = Trainer(
        model, arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(TINY), callbacks=[losses]
    )
    if monitor is not None:
        monitor._log = trainer.log
        trainer.add_callback(monitor)
    trainer.train()
    return losses.seen, {name: p.detach().clone() for name, p in model.named_parameters()}, trainer.state.log_history


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_as_without(folder, tmp_path, checkpointing):
    plain = train(folder, tmp_path, gradient_checkpointing=checkpointing)
    monitor = ExpertMonitor(tmp_path / "run", text=TEXT, every=2)
    watched = train(folder, tmp_path, monitor, gradient_checkpointing=checkpointing)
    assert watched[0] == plain[0] and len(plain[0]) == 6
    assert all(torch.equal(watched[1][name], weight) for name, weight in plain[1].items())
    states = monitor.series.states()
    assert [state.step for state in states] == [0, 2, 4, 6]
    assert [state.digest.endswith("unchecked") for state in states] == [False, True, True, False]
    logged = [entry["experts/loss"] for entry in watched[2] if "experts/loss" in entry]
    assert logged == [state.loss for state in states] and logged[-1] != logged[0]


def test_nothing_of_the_model_changes(folder, tokenizer, tmp_path):
    model = loaded(folder)
    model.train()
    model.model.layers[1].self_attn.eval()
    model(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    before = {
        "modes": [module.training for module in model.modules()],
        "gradients": [p.grad.clone() for p in model.parameters() if p.grad is not None],
        "random": (torch.get_rng_state(), random.getstate()),
        "attention": model.config._attn_implementation,
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }
    ExpertMonitor(tmp_path / "run", tokenizer=tokenizer, text=TEXT).measure(model, 0)
    assert [module.training for module in model.modules()] == before["modes"]
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(after, before["gradients"], strict=True))
    assert torch.equal(torch.get_rng_state(), before["random"][0]) and random.getstate() == before["random"][1]
    assert model.config._attn_implementation == before["attention"]
    assert [len(module._forward_hooks) for module in model.modules()] == before["hooks"]


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_is_compiled_again(folder, tokenizer, tmp_path, whole):
    """A model compiled by torch.compile, and one by its own compile()."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    model = loaded(folder).train()
    if whole:
        model.compile(backend="eager")
        called = model
    else:
        called = torch.compile(model, backend="eager")
    ids = torch.arange(3, 40)[None]
    monitor = ExpertMonitor(tmp_path / "run", tokenizer=tokenizer, text=TEXT, every=1)
    called(input_ids=ids, labels=ids).loss.backward()
    graphs = dict(counters["stats"])
    assert graphs["unique_graphs"]
    for step in range(2):
        monitor.step(called, step)
        called(input_ids=ids, labels=ids).loss.backward()
    assert dict(counters["stats"]) == graphs
    assert len(monitor.series.states()) == 2
    reset()


def test_a_state_is_what_separate_runs_see(tokenizer, tmp_path):
    """On the trained checkpoint: the profile, the residual stream and the loss, each by itself."""
    model = loaded(TINY).train()
    monitor = ExpertMonitor(tmp_path / "run", tokenizer=tokenizer, text=TEXT)
    state = monitor.measure(model, 0)
    model.eval()
    domains = calibration_windows(model, tokenizer, None, TEXT).domains
    residual = sedetect.observe_residual(model, domains, prefix=len(prefix_ids(tokenizer)), sequences=8)
    assert state.sink_mean == pytest.approx(residual.sink_mean, rel=1e-4)
    assert state.best_head == pytest.approx(residual.best_head, rel=1e-4)
    assert state.residual_max == pytest.approx(residual.inner_max, rel=1e-4)
    assert state.uniform == residual.uniform and state.digest == sedetect.model_digest(model)

    ids = torch.cat([windows.ids for windows in domains.values()])
    with sedetect.profile(model) as prof, torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert state.loss == pytest.approx(float(losses), rel=1e-5)
    stats = Series(tmp_path / "run").stats(state)
    for bank, expected in prof.stats.banks.items():
        assert torch.equal(stats.banks[bank].rows, expected.rows)
        assert torch.allclose(stats.banks[bank].out_max, expected.out_max, rtol=1e-4)
    (found,) = [str(one) for one in sedetect.rank(stats).found if one.layer == 1]
    assert found == "L1E28"


@pytest.fixture
def grown(tokenizer, tmp_path):
    """A series in which L1E3 grows, from step 200 on past all others, while L0E1 was large until then."""
    model = loaded(put_model(tmp_path / "m", num_hidden_layers=4))
    monitor = ExpertMonitor(tmp_path / "run", tokenizer=tokenizer, text=TEXT)
    weights = {layer: model.model.layers[layer].mlp.experts.down_proj for layer in (0, 1)}
    kept = {layer: weight.detach().clone() for layer, weight in weights.items()}
    for step, (early, late) in {0: (3e4, 1), 100: (3e4, 1), 200: (1, 4e4), 300: (1, 5e4)}.items():
        with torch.no_grad():
            weights[0][1] = kept[0][1] * early
            weights[1][3] = kept[1][3] * late
        monitor.measure(model, step)
    return tmp_path / "run"


def test_timeline(grown):
    line = timeline(grown)
    assert [state.step for state in line.states] == [0, 100, 200, 300]
    (one,) = line.experts
    assert (str(one.expert), one.leads_from, one.candidate_from) == ("L1E3", 200, 200)
    assert one.candidate == [False, False, True, True] and one.places[2:] == [1, 1]
    series = Series(grown)
    bank = [series.stats(state).banks[one.expert.bank] for state in line.states]
    assert one.values == [float(state.out_max[3]) for state in bank]
    assert one.medians == [pytest.approx(float(state.out_max[state.rows > 0].quantile(0.5))) for state in bank]
    (gone,) = line.passing
    assert (str(gone.expert), gone.candidate, gone.candidate_from) == ("L0E1", [True, True, False, False], None)
    assert line.sinks_from is None
    line.save(grown / "timeline.json")
    assert type(line).load(grown) == line


def test_a_killed_run_goes_on(grown, tokenizer, tmp_path):
    series = Series(grown)
    whole = series.states()
    with series.file.open("ab") as file:  # a line that was being written
        file.write(json.dumps(vars(whole[-1]) | {"step": 400}).encode()[:50])
    assert series.states() == whole
    model = loaded(tmp_path / "m")
    again = ExpertMonitor(grown, tokenizer=tokenizer, text=TEXT)
    again.measure(model, 150)  # resumed from a checkpoint of step 150
    assert [state.step for state in series.states()] == [0, 100, 150]
    assert len(list((grown / "states").iterdir())) == 3
    timeline(grown)


def test_refused(grown, folder, tokenizer, tmp_path):
    model = loaded(tmp_path / "m")

    def line(call) -> str:
        with pytest.raises(SedetectError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    fresh = ExpertMonitor(grown, tokenizer=tokenizer, text=TEXT)
    assert "holds a series already" in line(lambda: fresh.measure(model, 0))
    other = ExpertMonitor(grown, tokenizer=tokenizer, text=Text(tokens=256, seq_len=64))
    assert "a series on other text" in line(lambda: other.measure(model, 400))
    another = ExpertMonitor(grown, tokenizer=tokenizer, text=TEXT)
    assert "a series of another model" in line(lambda: another.measure(loaded(folder), 400))
    follows = ExpertMonitor(tmp_path / "f", tokenizer=tokenizer, text=TEXT)
    follows.measure(model, 0)
    assert "follows another model" in line(lambda: follows.step(loaded(folder), 100))
    assert "tokenizer" in line(lambda: ExpertMonitor(tmp_path / "n").measure(model, 0))
    assert "every 0" in line(lambda: ExpertMonitor(tmp_path / "n", every=0))
    assert "holds no states" in line(lambda: timeline(tmp_path))
    (grown / "series.jsonl").write_text("{}\n")
    assert "damaged" in line(lambda: timeline(grown))
    model.lm_head.bias = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves weights
    model.lm_head.bias.ds_id = 0
    assert "ZeRO-3" in line(lambda: ExpertMonitor(tmp_path / "n", tokenizer=tokenizer, text=TEXT).measure(model, 0))
    assert not Path(tmp_path / "n").exists()


def test_a_full_disk_does_not_end_training(folder, tokenizer, tmp_path, monkeypatch):
    model = loaded(folder)
    monitor = ExpertMonitor(tmp_path / "run", tokenizer=tokenizer, text=TEXT)
    monitor.measure(model, 0)

    def full(state, stats):
        raise SedetectError("states: cannot be written (No space left on device)")

    monkeypatch.setattr(monitor.series, "append", full)
    with pytest.warns(UserWarning, match="step 100 is not in the series"):
        monitor.measure(model, 100)


def test_a_chart_and_a_table_of_it(grown, tmp_path):
    pytest.importorskip("altair")
    assert run("timeline", grown).code == 0
    made = sedetect.make_report(grown)
    page = made.page.read_text(encoding="utf-8")
    assert 'id="timeline"' in page and "L1E3: leads its layer since step 200, a candidate since step 200" in page
    assert '"step":300,' in page or "[300," in page


def test_the_command_on_a_series(grown):
    done = run("timeline", grown)
    assert done.code == 0, done.err
    assert "1 candidate at step 300: L1E3 (since step 200)" in done.out
    assert "L0E1: a candidate for a while, not at the end" in done.out and "no attention sinks" in done.out
    assert [row(done.out, step)[0] for step in ("0", "100", "200", "300")] == ["0", "100", "200", "300"]
    assert {"timeline.json", "stats.safetensors"} <= files_of(grown)
    assert "leave out -o" in refused(run("timeline", grown, "-o", grown.parent / "other"))


def test_the_command_on_checkpoints(folder, tmp_path):
    """In a folder, one by one, interrupted in between, and the same numbers as a monitor's."""
    run_folder = tmp_path / "run"
    for step in (2000, 400):
        model = loaded(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[3] *= 50 * step
        model.save_pretrained(run_folder / f"checkpoint-{step}")
        AutoTokenizer.from_pretrained(TINY).save_pretrained(run_folder / f"checkpoint-{step}")
    flags = ("--tokens", "512", "--seq-len", "64", "--device", "cpu")
    first = run("timeline", run_folder / "checkpoint-400", "-o", tmp_path / "out", *flags)
    assert first.code == 0 and "one state is not a series" in first.out
    done = run("timeline", run_folder, "-o", tmp_path / "out", *flags)
    assert done.code == 0, done.err
    states = Series(tmp_path / "out").states()
    assert [state.step for state in states] == [400, 2000]
    before = Series(tmp_path / "out").file.read_bytes()
    assert run("timeline", run_folder, "-o", tmp_path / "out", *flags).code == 0
    assert Series(tmp_path / "out").file.read_bytes() == before  # nothing was measured again
    assert run("rank", tmp_path / "out").code == 0
    monitor = ExpertMonitor(tmp_path / "again", tokenizer=AutoTokenizer.from_pretrained(TINY), text=TEXT)
    state = monitor.measure(loaded(run_folder / "checkpoint-2000"), 2000)
    assert vars(state) | {"name": "", "seconds": 0} == vars(states[1]) | {"name": "", "seconds": 0}

    other = run("timeline", run_folder / "checkpoint-400", "-o", tmp_path / "out", "--tokens", "256", "--seq-len", "64")
    assert "a series on other text" in refused(other)
    (run_folder / "checkpoint-400").rename(tmp_path / "another-400")  # whose step is taken
    assert "step 400 is that of checkpoint-400" in refused(
        run("timeline", tmp_path / "another-400", "-o", tmp_path / "out", *flags)
    )
    (tmp_path / "another-400").rename(run_folder / "checkpoint-400")
    assert "is neither a checkpoint nor a series" in refused(run("timeline", tmp_path / "out" / "states"))
    both = run("timeline", run_folder / "checkpoint-400", run_folder / "checkpoint-2000", "--revisions", "a,b")
    assert "2 models: --revisions are of one" in refused(both)


# Two ranks train three steps on batches of their own, with the monitor and without it: DDP, and FSDP2.
RANKS = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer
from sedetect.calibration.windows import Text
from sedetect.training import ExpertMonitor

folder, out, port = sys.argv[1:]
rank = 1 - bool(os.fork())
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def train(kind, monitor):
    torch.manual_seed(rank)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attention_dropout=0.1).train()
    if kind == "ddp":
        called = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        called = fully_shard(model)
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        if monitor:
            monitor.step(called, step)
        ids = torch.randint(3, 4000, (2, 16))
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses

for kind in ("ddp", "fsdp"):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monitor = ExpertMonitor(f"{out}/{kind}", tokenizer=tokenizer, text=Text(tokens=512, seq_len=64), every=1)
    plain, watched = train(kind, None), train(kind, monitor)
    assert plain == watched, (kind, rank, plain, watched)
dist.barrier()
dist.destroy_process_group()
sys.exit(os.waitpid(-1, 0)[1] if not rank else 0)
"""


@pytest.mark.slow
def test_ranks(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", RANKS, folder, tmp_path, str(port)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replicated, sharded = (Series(tmp_path / kind) for kind in ("ddp", "fsdp"))
    assert [state.step for state in replicated.states()] == [0, 1, 2]
    for one, other in zip(replicated.states(), sharded.states(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.digest.partition("-")[0] in other.digest
        a, b = replicated.stats(one), sharded.stats(other)
        assert all(torch.equal(a.banks[bank].rows, b.banks[bank].rows) for bank in a.banks)
    assert replicated.states()[0].digest == sharded.states()[0].digest  # whole weights, wherever they lie
