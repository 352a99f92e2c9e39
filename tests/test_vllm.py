"""Profiles inside vLLM: what the engine's workers measure is what transformers measures of the same tokens.

They run where vLLM is installed (`make test-vllm`): 0.32 on a CPU, or 0.22 on GPUs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.heads import LAYERS, put_head
from support.models import COMMON, TINY
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen2MoeConfig

import sedetect
from sedetect.checkpoints.options import Loading
from sedetect.compression.pruning import prune_checkpoint
from sedetect.kernels.gate import Gate
from sedetect.stats.place import BankId

# Before vLLM is imported: its engine in this process, and 1 GiB for its cache. Its attention in float32 is exact.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "TRITON_F32_DEFAULT": "ieee"}
vllm = pytest.importorskip("vllm")
EXTENSION = "sedetect.engines.vllm.Worker"
L1 = BankId("decoder", 1, "routed")
GPU = torch.cuda.is_available()
SHARE = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**30} if GPU else {}  # with other engines

PIPELINE = """
import json, os, sys
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if os.cpu_count() > 1 else "0|0"
import vllm, sedetect
checkpoint, out, prompts, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
if __name__ == "__main__":
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64} | options
    llm = vllm.LLM(checkpoint, enable_prefix_caching=False, worker_extension_cls="sedetect.engines.vllm.Worker",
                   **options)
    settings = vllm.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    refused = tokens = None
    # Steps of nothing, which do not count. In the first, vLLM 0.32 makes what stages hand each other; the start of an
    # eager engine on a CPU leaves it out.
    dummy = lambda: llm.collective_rpc("execute_dummy_batch")
    dummy()
    try:
        with sedetect.profile(llm) as prof:
            dummy()
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        prof.stats.save(out)
    except sedetect.SedetectError as error:
        refused = str(error)
    print("RESULT", json.dumps({"refused": refused, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def llm():
    """An engine in this process: steps of at most 96 tokens, and a cache of 24 blocks of 32."""
    engine = vllm.LLM(
        str(TINY),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        block_size=32,
        num_gpu_blocks_override=24,
        async_scheduling=False,  # one engine.step is one step
        worker_extension_cls=EXTENSION,
        **SHARE,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def generate(llm, prompts, tokens=1):
    """What was computed of each prompt and of what was generated: all but the last token."""
    settings = vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    return [ids + list(output.outputs[0].token_ids)[:-1] for ids, output in zip(prompts, outputs)], outputs


def prompts_of(*lengths, seed=0):
    """BOS and random tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(2, 4096, (length - 1,), generator=draw).tolist()] for length in lengths]


def expected(model, sequences, **options):
    with sedetect.profile(model, **options) as prof:
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    return prof.stats


def same(stats, other, numbered=True):
    """Equal counts, and maxima and sums up to what other batches round. numbered: the requests came in order."""
    assert (stats.header.tokens, stats.header.sequences) == (other.header.tokens, other.header.sequences)
    assert stats.banks.keys() == other.banks.keys()
    for bank, state in stats.banks.items():
        one = other.banks[bank]
        assert state.rows.sum() == one.rows.sum()
        flips = int((state.rows - one.rows).abs().sum())  # routing near a tie
        assert flips <= 2, (bank, flips)
        assert int((state.first_rows - one.first_rows).abs().sum()) <= flips
        alike = state.rows == one.rows
        for name in ("first_max", "rest_max", "norm_sum", "gate_norm_sum", "gate_first_sum"):
            torch.testing.assert_close(getattr(state, name)[alike], getattr(one, name)[alike], rtol=1e-4, atol=1e-3)
        # Place and token of the strongest rows; of first tokens that are all BOS, the sequence is a matter of rounding.
        for records, others, columns in (
            (state.outliers, one.outliers, slice(4 if numbered else 5, 7)),
            (state.first_outliers, one.first_outliers, slice(5, 7)),
        ):
            assert (records[alike, 0, columns] == others[alike, 0, columns]).float().mean() > 0.95


def test_the_embedded_corpus(llm):
    text = sedetect.Text(tokens=4096, seq_len=128)
    result = sedetect.profile_model(TINY, text=text, loading=Loading(dtype="float32"))
    ids = [row.tolist() for windows in result.windows.values() for row in windows.ids][: 4096 // 128]
    with sedetect.profile(llm, source="corpus", info={"corpus": "embedded"}, prefix=0) as prof:
        generate(llm, ids)
    stats = prof.stats
    same(stats, result.stats, numbered=False)
    state = stats.banks[L1]
    record = state.peak_of(28)
    assert (record.channel, record.position, record.token_id) == (101, 0, 0)
    assert int(state.out_max.argmax()) == 28
    assert str(sedetect.rank(stats).super_experts[0]) == "L1E28"
    header = stats.header
    assert header.digest.split("-") == [result.stats.header.digest.split("-")[0], "unchecked"]
    assert (header.model, header.dtype, header.layers) == ("tiny-moe", "float32", {"decoder": 10})
    assert header.banks[str(L1)].module == "model.layers.1.mlp.experts"
    assert header.banks[str(L1)].backends == ["triton" if GPU else "cpu"]
    assert header.sources["corpus"].ranges == [[0, 32]]
    assert header.versions["vllm"] == vllm.__version__
    assert [note.code for note in header.notes] == ["unchecked_weights"]


def test_chunks_lengths_and_generated_tokens(llm, model):
    prompts = prompts_of(3, 250, 17, 120, 1)
    with sedetect.profile(llm, channels=True, coactivation=True) as prof:
        sequences, _ = generate(llm, prompts, tokens=6)
    assert [len(ids) for ids in sequences] == [8, 255, 22, 125, 6]
    other = expected(model, sequences, channels=True, coactivation=True)
    same(prof.stats, other)
    for bank, state in prof.stats.banks.items():
        one = other.banks[bank]
        torch.testing.assert_close(state.channel_max, one.channel_max, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(state.in_channel_sq, one.in_channel_sq, rtol=1e-3, atol=1e-2)
        assert int((state.coactivation - one.coactivation).abs().sum()) <= 8


def test_what_the_prefix_cache_holds_does_not_count(llm, model):
    (prompt,) = prompts_of(100, seed=1)
    with sedetect.profile(llm) as prof:
        _, (first,) = generate(llm, [prompt])
        during = prof.stats
        _, (again,) = generate(llm, [[*prompt, 5, 6]])
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)
    same(during, expected(model, [prompt]))
    assert prof.stats.header.tokens == 100 + 102 - 96
    assert int(prof.stats.banks[L1].first_rows.sum()) == 4  # of one sequence
    (note,) = (note for note in prof.stats.header.notes if note.code == "cached")
    assert note.count == 96 and "enable_prefix_caching=False" in note.text


def test_preempted_requests_count_once(llm, model, monkeypatch):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, original = [], scheduler._preempt_request

    def preempt(*args, **how):
        preempted.append(1)
        return original(*args, **how)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    llm.reset_prefix_cache()
    with sedetect.profile(llm) as prof:
        sequences, _ = generate(llm, prompts_of(*[90] * 6, seed=2), tokens=80)
    assert preempted
    same(prof.stats, expected(model, sequences))


def test_an_aborted_request_counts_as_far_as_it_came(llm, model):
    engine = llm.llm_engine
    long, short = prompts_of(200, 30, seed=3)
    settings = vllm.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    with sedetect.profile(llm) as prof:
        engine.add_request("a", {"prompt_token_ids": long}, settings)
        engine.step()  # 96 tokens of it
        engine.abort_request(["a"])
        sequences = [long[:96]]
        for ids in (short, short[:9]):  # the name, used again
            engine.add_request("a", {"prompt_token_ids": ids}, settings)
            while engine.has_unfinished_requests():
                outputs = engine.step()
            sequences.append(ids + list(outputs[0].outputs[0].token_ids)[:-1])
    same(prof.stats, expected(model, sequences))


def test_a_request_under_way_and_what_is_left_behind(llm):
    engine, runner = llm.llm_engine, runner_of(llm)
    before = {name: id(value) for name, value in vars(runner).items() if callable(value)}
    settings = vllm.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    engine.add_request("a", {"prompt_token_ids": prompts_of(40, seed=4)[0]}, settings)
    engine.step()
    with sedetect.profile(llm) as prof:
        while engine.has_unfinished_requests():
            engine.step()
    stats = prof.stats
    assert stats.header.tokens == 7 and not int(stats.banks[L1].first_rows.sum())
    assert [note.count for note in stats.header.notes if note.code == "under_way"] == [1]
    assert {name: id(value) for name, value in vars(runner).items() if callable(value)} == before
    generate(llm, prompts_of(20, seed=5))
    assert prof.stats is stats
    with sedetect.profile(llm) as prof:
        pass
    assert prof.stats.header.tokens == 0 and not int(prof.stats.banks[L1].rows.sum())
    assert [note.code for note in prof.stats.header.notes].count("never_ran") == 10


def test_reset(llm, model):
    with sedetect.profile(llm) as prof:
        generate(llm, prompts_of(20, seed=6))
        assert json.loads(llm.collective_rpc("sedetect_reset")[0]) == {}
        sequences, _ = generate(llm, prompts_of(33, seed=7))
    same(prof.stats, expected(model, sequences))


def test_statistics_come_in_parts(llm, monkeypatch):
    monkeypatch.setattr("sedetect.engines.vllm._PART", 5000)
    with sedetect.profile(llm) as prof:
        generate(llm, prompts_of(20, seed=8))
        (answer,) = llm.collective_rpc("sedetect_collect", args=("0",))
    assert json.loads(answer)["size"] > 5000
    assert prof.stats.header.tokens == 20


def test_refused(llm, monkeypatch):
    with sedetect.profile(llm), pytest.raises(sedetect.SedetectError, match="a profile of this engine is running"):
        sedetect.profile(llm).__enter__()
    with pytest.raises(sedetect.SedetectError, match="prof.batch: an engine knows its rows"):
        sedetect.profile(llm).batch(mask=None)
    with pytest.raises(sedetect.SedetectError, match="pad_token_id: an engine knows"):
        sedetect.profile(llm, pad_token_id=1)
    with pytest.raises(sedetect.SedetectError, match="modalities: an engine's tokens"):
        sedetect.profile(llm, modalities=True)
    with pytest.raises(sedetect.SedetectError, match="nothing was measured"):
        _ = sedetect.profile(llm).stats
    for method in ("sedetect_collect", "sedetect_reset"):
        assert "start one first" in json.loads(llm.collective_rpc(method)[0])["refused"]
    config = llm.llm_engine.vllm_config
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    with pytest.raises(sedetect.SedetectError, match="channels: graphs are compiled.*enforce_eager=True"):
        sedetect.profile(llm, channels=True).__enter__()
    monkeypatch.setattr(config.parallel_config, "worker_extension_cls", "")
    with pytest.raises(sedetect.SedetectError, match=f'give worker_extension_cls="{EXTENSION}"'):
        sedetect.profile(llm).__enter__()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tensor_parallel_size": 2}, "give enable_expert_parallel=True"),
        ({"data_parallel_size": 2}, "start an engine for each"),
        ({"worker_extension_cls": ""}, "give worker_extension_cls"),
        ({"enable_eplb": True}, "under enable_eplb"),
        ({"enable_dbo": True}, "under enable_dbo"),
        ({"ubatch_size": 2}, "under enable_dbo"),
        ({"lora_config": object()}, "under enable_lora"),
        ({"kv_sharing_fast_prefill": True}, "under kv_sharing_fast_prefill"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, None),
        ({"pipeline_parallel_size": 2}, None),
    ],
)
def test_what_an_engine_is_refused_for(given, why):
    from sedetect.engines.vllm import refusal

    parallel = {
        "worker_extension_cls": EXTENSION,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_eplb": False,
        "enable_dbo": False,
        "ubatch_size": 0,
    }
    parts = {"lora_config": None, "kv_sharing_fast_prefill": False} | parallel | given
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: parts[name] for name in parallel}),
        lora_config=parts["lora_config"],
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=parts["kv_sharing_fast_prefill"]),
    )
    found = refusal(config)
    assert found is None if why is None else why in found


def test_releases_that_route_in_their_kernels_are_refused_on_a_cpu(llm, monkeypatch):
    from sedetect.engines.vllm import refusal

    monkeypatch.setattr("vllm.__version_tuple__", (0, 29, 0))
    monkeypatch.setattr("sedetect.engines.vllm.current_platform.is_cpu", lambda: True)
    assert "install vLLM 0.30 or later" in refusal(llm.llm_engine.vllm_config)
    monkeypatch.setattr("sedetect.engines.vllm.current_platform.is_cpu", lambda: False)
    assert refusal(llm.llm_engine.vllm_config) is None


def test_an_engine_that_did_not_ask_keeps_its_classes(llm, monkeypatch):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import RowParallelLinear

    config = llm.llm_engine.vllm_config
    with set_current_vllm_config(config):
        assert type(RowParallelLinear(8, 8, prefix="model.layers.99.mlp.o_proj")) is RowParallelLinear
        assert type(RowParallelLinear(8, 8, prefix="model.layers.99.mlp.down_proj")).__name__ == "MeasuredDown"
        monkeypatch.setattr(config.parallel_config, "worker_extension_cls", "")
        assert type(RowParallelLinear(8, 8, prefix="model.layers.98.mlp.down_proj")) is RowParallelLinear


@pytest.mark.parametrize("owned", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]])
def test_expert_parallel_ranks_together_see_what_one_sees(owned):
    """A fabricated map of experts: ranks that each have some of them, in either of vLLM's placements."""
    from sedetect.engines.vllm import MeasuredBank, Serving

    draw = torch.Generator().manual_seed(0)
    experts, hidden, inner, tokens = 8, 16, 12, 40
    w13 = torch.randn(experts, 2 * inner, hidden, generator=draw)
    w2 = torch.randn(experts, hidden, inner, generator=draw)
    x = torch.randn(tokens, hidden, generator=draw)
    gates, index = torch.rand(tokens, experts, generator=draw).topk(3)

    def run(here, expert_map):
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens + 8),
        )
        serving = Serving(config)
        known = torch.stack((torch.arange(tokens) // 10, torch.zeros(tokens, dtype=torch.int64)))
        serving.step(x.device).fill(known, torch.arange(tokens) % 10, torch.arange(tokens))
        bank = MeasuredBank("model.layers.0.mlp.experts", (experts, hidden, inner), True, here)
        layer = SimpleNamespace(
            quant_method=SimpleNamespace(bank=bank, gate=Gate()),
            expert_map=expert_map,
            apply_router_weight_on_input=False,
            w13_weight=w13 if here is None else w13[here],
            w2_weight=w2 if here is None else w2[here],
        )
        return serving.experts(layer, x, gates, index.to(torch.int32)), bank.whole()

    out, whole = run(None, None)
    parts = []
    for numbers in owned:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[numbers] = torch.arange(len(numbers), dtype=torch.int32)
        parts.append(run(torch.tensor(numbers), expert_map))
    torch.testing.assert_close(parts[0][0] + parts[1][0], out)
    assert parts[0][1].merge(parts[1][1]).equal(whole)
    assert int(whole.rows.sum()) == tokens * 3 and int(whole.first_rows.sum()) == 4 * 3


def test_which_tokens_of_a_request_counted_before():
    """Drafts, and preempted requests as the second model runner is told of them: as new ones whose name is known."""
    from sedetect.engines.vllm import Requests, StepRows

    requests, step = Requests(), StepRows(32, torch.device("cpu"))

    def run(sizes, new=(), old=(), finished=(), drafts=()):
        """The sequence and position of each token that counts. new, old: (name, first position)."""
        requests.schedule(
            SimpleNamespace(
                finished_req_ids=set(finished),
                scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=begin) for name, begin in new],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=[name for name, _ in old], num_computed_tokens=[begin for _, begin in old]
                ),
            )
        )
        begins = dict([*new, *old])
        position = torch.cat([begins[name] + torch.arange(size) for name, size in sizes.items()])
        rows = step.fill(requests.rows([*sizes], [*sizes.values()], dict(drafts)), position, position)
        counted = rows.counted
        return list(zip(rows.sequence[counted].tolist(), rows.position[counted].tolist()))

    assert run({"a": 3, "b": 2}, new=[("a", 0), ("b", 0)]) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert int(step.rows(32).counted.sum()) == 5
    assert run({"a": 1}, old=[("a", 3)]) == [(0, 3)]
    # Preempted, and computed again from its begin on.
    assert run({"a": 4}, new=[("a", 0)]) == []
    assert run({"a": 1, "b": 1}, old=[("a", 4), ("b", 2)]) == [(0, 4), (1, 2)]
    # Two drafts, one of them rejected: another token is computed in its place.
    assert run({"b": 3}, old=[("b", 3)], drafts={"b": [7, 8]}) == [(1, 3), (1, 4), (1, 5)]
    assert run({"b": 3}, old=[("b", 5)], drafts={"b": [7, 8]}) == [(1, 5), (1, 6), (1, 7)]
    assert requests.drafts == 4
    # The name of one that ended, used again, with a prefix from the cache; one that nobody has seen begin.
    assert run({"a": 2, "c": 1}, new=[("a", 4)], old=[("c", 9)], finished=["a"]) == [(2, 4), (2, 5), (3, 9)]
    assert (requests.count, requests.cached, requests.under_way) == (4, 4, 1)
    step.clear()
    assert not step.rows(32).counted.any()


def run_apart(checkpoint, folder, prompts, **options):
    """The result of an engine with processes of its own, and what it saved."""
    out = folder / "stats.safetensors"
    script = folder / "run.py"
    script.write_text(PIPELINE)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    words = [checkpoint, out, json.dumps(prompts), json.dumps(SHARE | options)]
    command = [sys.executable, script, *map(str, words)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    result = next(line for line in ran.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(result.removeprefix("RESULT")), out


def saved_model(folder):
    """Shared experts beside routed ones, layer 1 dense, and heads of a size that vLLM's attention has on a CPU."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    experts = {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20}
    config = Qwen2MoeConfig(**COMMON | sizes | experts, mlp_only_layers=[1])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(folder)
    return model


def test_losses_and_what_was_not_loaded(tmp_path, model):
    """Of a checkpoint, and of one without a matrix, which vLLM 0.32 runs with what is in memory."""
    from sedetect.calibration.windows import Windows
    from sedetect.engines.scoring import VLLM
    from sedetect.experiments.evaluation import next_logits, window_losses

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = {domain: torch.tensor(prompts_of(*[size] * 5, seed=size)) for domain, size in (("a", 24), ("b", 40))}
    domains = {domain: Windows(each, torch.arange(5), domain, {}) for domain, each in ids.items()}
    run = VLLM(Loading(dtype="float32"))
    with ThreadPoolExecutor(1 if GPU else 2) as pool:
        scores, broken = pool.map(lambda folder: run(folder, domains, 2), (TINY, tmp_path))
    assert (scores.unloaded, broken.unloaded) == ([], ["model.layers.2.self_attn.o_proj.weight"])
    with torch.no_grad():
        for domain, each in ids.items():
            losses = torch.tensor(window_losses(model, each, 2), dtype=torch.float64)
            torch.testing.assert_close(scores.losses[domain], losses, rtol=1e-4, atol=1e-3)
            likely = next_logits(model, each, 2).argmax(-1)
            assert likely.shape == scores.likely[domain].shape
            assert (likely == scores.likely[domain]).float().mean() > 0.98


def test_a_pruned_head_drafts(tmp_path):
    """The head that predicts a further token of a pruned checkpoint is loaded and run, and the text is the model's."""
    from sedetect.engines.vllm import DRAFTS

    sizes = {"hidden_size": 64, "intermediate_size": 40, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    put_head(tmp_path / "whole", Glm4MoeConfig(**sizes, **heads, n_routed_experts=8, num_experts_per_tok=2))
    banks = (BankId("decoder", 1, "routed"), BankId("decoder", 2, "routed"), BankId("mtp", LAYERS, "routed"))
    prune_checkpoint(tmp_path / "whole", tmp_path / "pruned", {bank: [0, 2, 4, 5] for bank in banks})
    prompts = prompts_of(9, 14)
    draft = {"method": "mtp", "num_speculative_tokens": 1}
    result, out = run_apart(tmp_path / "pruned", tmp_path, prompts, speculative_config=draft)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        whole = pruned.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert whole[0, len(prompt) :].tolist() == tokens
    assert any(DRAFTS in str(note) for note in sedetect.ModelStats.load(out).header.notes)


two_gpus, two_processes = pytest.mark.gpu(number=2), pytest.mark.gpu(number=2 if GPU else 0)
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"pipeline_parallel_size": 2}, marks=two_processes),
        pytest.param({"pipeline_parallel_size": 2, "enforce_eager": False}, marks=two_gpus),
        pytest.param(EXPERTS, marks=two_gpus),
        pytest.param(EXPERTS | {"enforce_eager": False}, marks=two_gpus),
    ],
)
def test_parallel_with_shared_experts_and_dense_layers(tmp_path, options):
    model = saved_model(tmp_path / "model")
    prompts = [[1, *range(3 + n, 20 + 2 * n)] for n in range(3)]
    result, out = run_apart(tmp_path / "model", tmp_path, prompts, skip_tokenizer_init=True, **options)
    assert result["refused"] is None
    sequences = [ids + tokens[:-1] for ids, tokens in zip(prompts, result["tokens"])]
    stats, other = sedetect.ModelStats.load(out), expected(model, sequences)
    same(stats, other)
    assert {bank.kind for bank in stats.banks} == {"routed", "shared", "dense"}
    assert {name: bank.module for name, bank in stats.header.banks.items()} == {
        name: bank.module for name, bank in other.header.banks.items()
    }
    assert [note.code for note in stats.header.notes] == ["unchecked_weights"]


@pytest.mark.gpu
def test_graphs(tmp_path, model):
    """Compiled and captured, steps padded to the sizes of graphs."""
    prompts = prompts_of(*range(3, 14), seed=10)
    result, out = run_apart(TINY, tmp_path, prompts, enforce_eager=False)
    sequences = [ids + tokens[:-1] for ids, tokens in zip(prompts, result["tokens"])]
    same(sedetect.ModelStats.load(out), expected(model, sequences), numbered=False)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False])
def test_the_embedded_corpus_in_bfloat16(tmp_path, model, eager):
    """Routing near a tie is another in bfloat16, of one choice in twenty at most."""
    text = sedetect.Text(tokens=4096, seq_len=128)
    windows = sedetect.profile_model(TINY, text=text, loading=Loading(dtype="float32")).windows
    prompts = [row.tolist() for each in windows.values() for row in each.ids][: 4096 // 128]
    options = {"dtype": "bfloat16", "enforce_eager": eager, "max_model_len": 256}
    result, out = run_apart(TINY, tmp_path, prompts, **options)
    sequences = [ids + tokens[:-1] for ids, tokens in zip(prompts, result["tokens"])]
    stats, other = sedetect.ModelStats.load(out), expected(model, sequences)
    assert (stats.header.tokens, stats.header.sequences) == (other.header.tokens, other.header.sequences)
    flips = 0
    for bank, state in stats.banks.items():
        one = other.banks[bank]
        assert state.rows.sum() == one.rows.sum() and state.first_rows.sum() == one.first_rows.sum()
        flips += int((state.rows - one.rows).abs().sum()) / 2
        near = torch.isclose(state.out_max, one.out_max, rtol=0.05)
        assert near.float().mean() >= 0.8, (bank, state.out_max, one.out_max)
    assert flips <= 0.05 * sum(int(one.rows.sum()) for one in other.banks.values())
    record = stats.banks[L1].peak_of(28)
    assert (record.channel, record.position, record.token_id) == (101, 0, 0)
    torch.testing.assert_close(stats.banks[L1].out_max[28], other.banks[L1].out_max[28], rtol=0.02, atol=0)
    assert str(sedetect.rank(stats).super_experts[0]) == "L1E28"
    print("flips:", flips, "backends:", stats.header.banks[str(L1)].backends)


@two_processes
def test_tensor_parallel_is_refused(tmp_path):
    saved_model(tmp_path / "model")
    result, _ = run_apart(tmp_path / "model", tmp_path, [[1, 5, 6]], tensor_parallel_size=2, skip_tokenizer_init=True)
    assert result["refused"].startswith("vLLM: tensor parallelism splits the input of down_proj")


def post(address, path, body):
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}/{path}", json.dumps(body).encode(), headers), timeout=120) as answer:
        return json.load(answer)


@contextmanager
def serving(folder, *options):
    """A server of tiny-moe in developer mode."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TINY, "--host", "127.0.0.1"]
    command += ["--port", address.rpartition(":")[2]]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--no-enable-prefix-caching", *options]
    command += [word for name, value in SHARE.items() for word in ("--" + name.replace("_", "-"), value)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.5)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # an engine outlives a server that was killed


def test_watch_a_live_server(tmp_path, model):
    out = tmp_path / "out"
    with serving(tmp_path, "--worker-extension-cls", EXTENSION) as (address, server):
        command = [sys.executable, "-m", "sedetect", "watch", address, "-o", out, "--every", "1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        watch = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        while not (out / "stats.safetensors").exists() and watch.poll() is None:
            time.sleep(0.1)
        prompts = prompts_of(*range(20, 36), seed=9)
        body = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda ids: post(address, "v1/completions", body | {"prompt": ids}), prompts))
        sequences = [ids + one["choices"][0]["token_ids"][:-1] for ids, one in zip(prompts, answers)]
        watch.send_signal(signal.SIGINT)
        printed, err = watch.communicate(timeout=120)
        assert watch.returncode == 0, err
        assert "candidates: L1E28" in printed.decode()
        same(sedetect.ModelStats.load(out), expected(model, sequences), numbered=False)
        watch = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        first = watch.stdout.readline().decode()
        server.kill()
        _, err = watch.communicate(timeout=120)
        assert "tiny-moe: " in first and watch.returncode == 2
        assert err.decode().startswith(f"sedetect: {address}: no answer (")
        assert sedetect.ModelStats.load(out).header.tokens == sum(map(len, sequences))
