"""Expert-parallel models, by transformers' own plan on two ranks: every rank has what one process would measure."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from support.models import random_model, token_ids
from transformers.distributed import DistributedConfig

import sedetect
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats

RANK = """
import json, sys
jobs, out = json.loads(sys.argv[1]), sys.argv[2]
sys.path[:0] = json.loads(sys.argv[3])
import torch
import torch.distributed as dist
from support.models import token_ids
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import sedetect
from sedetect.experiments.ablation import ablate
from sedetect.stats.place import Place

torch.set_num_threads(1)
def line(run):
    try:
        run()
    except sedetect.SedetectError as error:
        return str(error)
def measured(name, checkpoint, settings):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(**settings)).eval()
    refused = line(lambda: sedetect.profile(model))
    if refused is not None:
        return {"refused": refused}
    ids = token_ids()
    with sedetect.profile(model, source="text", channels=True, prefix=1) as prof:
        prof.batch(sequence_ids=range(len(ids)))
        logits = model(input_ids=ids).logits
        during = prof.stats
    prof.stats.save(f"{out}.{name}.safetensors")
    torch.save(logits, f"{out}.{name}.logits")
    bank = next(bank for bank in during.banks if bank.kind == "routed")
    def switch_off():
        with ablate(model, [Place(*bank, 1)]):
            pass
    return {
        "during": {str(bank): state.rows.tolist() for bank, state in during.banks.items()},
        "notes": [[str(note) for note in stats.header.notes] for stats in (during, prof.stats)],
        "ablate": line(switch_off),
        "coactivation": line(lambda: sedetect.profile(model, coactivation=True)),
    }
print(json.dumps({name: measured(name, *job) for name, job in jobs.items()}))
dist.destroy_process_group()
"""
KNOWN = inspect.signature(DistributedConfig).parameters
ONE_LAYOUT = "ep_size" not in KNOWN  # transformers before 5.23
PLAN = {"tp_size": 2, "tp_plan": "auto"}
MEASURED = dict.fromkeys(
    ("deepseek_v3", "gpt_oss"), PLAN | {"enable_expert_parallel": True} if ONE_LAYOUT else {"tp_size": 2, "ep_size": 2}
)
REFUSED = {
    "tensor-parallel": (PLAN, "split by tensor parallelism.*expert-parallel plan instead"),
    "fsdp": ({"fsdp_size": 2, "ep_size": 2}, "its ranks send each other rows.*tp_size=N, ep_size=N"),
    "all-to-all": (
        {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, "its ranks send each other rows",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Two ranks that load and measure one model after the other: their folder, and what each said of each model."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in (*MEASURED, "qwen3_moe"):
        random_model(name).save_pretrained(folder / name)
    jobs = {name: (str(folder / name), settings) for name, settings in MEASURED.items()}
    for name, (settings, _) in REFUSED.items():
        if KNOWN.keys() >= settings.keys():
            jobs[name] = (str(folder / "qwen3_moe"), settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = [json.dumps(jobs), str(folder / f"rank{rank}"), json.dumps([p for p in sys.path if p])]
        command = [sys.executable, "-c", RANK, *words]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    results = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return folder, results


@pytest.fixture(scope="module", params=MEASURED)
def ranks(request, launched):
    """What each of two ranks measured and said of a model, and what one process measures."""
    folder, results = launched
    model, ids = random_model(request.param), token_ids()
    with sedetect.profile(model, source="text", channels=True, prefix=1) as prof:
        prof.batch(sequence_ids=range(len(ids)))
        logits = model(input_ids=ids).logits
    files = [folder / f"rank{rank}.{request.param}" for rank in (0, 1)]
    return [result[request.param] for result in results], files, prof.stats, logits


def test_every_rank_has_the_statistics_of_all_experts(ranks):
    results, files, expected, logits = ranks
    for result, file in zip(results, files, strict=True):
        stats = ModelStats.load(f"{file}.safetensors")
        own = torch.load(f"{file}.logits")
        assert torch.allclose(own, logits, atol=1e-4)
        assert result["notes"][1] == expected.header.notes
        assert list(stats.banks) == list(expected.banks) and stats.header.sources == expected.header.sources
        for bank, state in stats.banks.items():
            alone = expected.banks[bank]
            assert torch.equal(state.counts[:, :3], alone.counts[:, :3]), bank
            for name in ("out_max", "first_max", "channel_max", "in_channel_max", "norm_sum", "gate_norm_sum"):
                assert torch.allclose(getattr(state, name), getattr(alone, name), rtol=1e-3, atol=1e-4), (bank, name)
            for name in ("outliers", "first_outliers", "in_max"):
                places = [getattr(one, name)[:, 0, [2, 4, 5, 6]] for one in (state, alone)]
                assert (places[0] == places[1]).all(-1).float().mean() > 0.9, (bank, name)


def test_a_rank_by_itself_has_its_own_experts_under_their_numbers(ranks):
    results, _, expected, _ = ranks
    for bank, state in expected.banks.items():
        if bank.kind == "routed":
            rows, half = state.rows.tolist(), len(state.rows) // 2
            assert results[0]["during"][str(bank)] == rows[:half] + [0] * half
            assert results[1]["during"][str(bank)] == [0] * half + rows[half:]
    assert any("experts of other ranks are not in it" in str(note) for note in results[0]["notes"][0])


def test_what_sees_one_ranks_experts_alone_is_refused(ranks):
    for result in ranks[0]:
        assert "expert-parallel models are profiled, nothing else" in result["ablate"]
        assert "coactivation" in result["coactivation"]


@pytest.mark.parametrize("layout", REFUSED)
def test_other_layouts_are_refused(layout, launched):
    for result in launched[1]:
        if layout not in result:
            pytest.skip("this transformers has one layout of experts")
        assert re.search(REFUSED[layout][1], result[layout]["refused"])


def test_states_among_others():
    state = BankStats.empty(2, channels=(3, 4))
    state.counts[1, 0], state.channel_max[0] = 5, 2.0
    whole = state.among(1, 4)
    assert whole.rows.tolist() == [0, 0, 5, 0] and whole.channel_max[:, 0].tolist() == [0, 2, 0, 0]
    assert whole.merge(BankStats.empty(4, channels=(3, 4))).equal(whole)
