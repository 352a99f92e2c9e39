"""Losses of a checkpoint in vLLM, in a separate process, which frees the device's memory when it ends.

    verify("model", "model-w4a16", runtime=VLLM())

Only that process imports vLLM.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sedetect.calibration.windows import Windows
from sedetect.checkpoints.files import shards_of
from sedetect.checkpoints.options import Loading
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.experiments.divergence import Scores
from sedetect.experiments.evaluation import predictions

_SEQUENCES = 8  # windows at a time, and tokens of a step: their float32 logits are in memory
_STEP = 2048


class VLLM:
    """A Runtime of verify: runs both checkpoints in the installed vLLM, on the device that it chooses, without graphs.

    loading: dtype and trust_remote_code are given to the engine. Raises SedetectError for the others, and where vLLM is
    not installed.
    """

    def __init__(self, loading: Loading = Loading()):
        for name in ("device", "attn"):
            if getattr(loading, name) is not None:
                raise SedetectError(Argument(name), f" {getattr(loading, name)}: vLLM chooses its own; leave it out")
        if importlib.util.find_spec("vllm") is None:
            raise SedetectError(
                Argument("runtime"),
                " vllm: vLLM is not installed here; install sedetect into vLLM's environment and run it there, or "
                "leave it out to run both by transformers",
            )
        self._loading = loading

    def __call__(self, folder: Path, domains: dict[str, Windows], prefix: int) -> Scores:
        """Raises SedetectError with vLLM's message for a checkpoint that vLLM cannot load or run."""
        windows = [row for one in domains.values() for row in one.ids.tolist()]
        job = {
            "folder": str(folder),
            "windows": windows,
            "dtype": str(self._loading.dtype).removeprefix("torch."),
            "trust_remote_code": self._loading.trust_remote_code,
        }
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        environment.setdefault(
            "VLLM_CPU_KVCACHE_SPACE", "4"
        )  # GiB; otherwise it requires most of a CPU's memory to be free
        with tempfile.TemporaryDirectory(prefix="sedetect-") as temporary:
            asked, given, log = (Path(temporary) / name for name in ("job.json", "answer.json", "log"))
            asked.write_text(json.dumps(job))
            with log.open("w") as written:
                subprocess.run(
                    [sys.executable, "-m", __name__, asked, given], stdout=written, stderr=written, env=environment
                )
            if not given.is_file():
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise SedetectError(f"{folder}: vLLM's process ended without an answer: {''.join(last)}")
            answer = json.loads(given.read_text())
        if "error" in answer:
            raise SedetectError(f"{folder}: vLLM {answer['version']} does not run it: {answer['error']}")
        scores, begin = Scores({}, {}, answer["unloaded"]), 0
        for domain, one in domains.items():
            count, end = predictions(one.ids, prefix), begin + len(one.ids)
            losses = torch.tensor(answer["losses"][begin:end], dtype=torch.float64)
            scores.losses[domain] = losses[:, -count:].sum(1)
            scores.likely[domain] = torch.tensor(answer["likely"][begin:end])[:, -count:]
            begin = end
        return scores


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """For windows (N, L), losses and most likely tokens (N, L - 1) of all tokens but the first; and names of weights
    into which nothing was loaded.
    """
    import vllm
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    unloaded: set[str] = set()
    original = DefaultModelLoader.load_weights

    def load_weights(self: Any, model: Any, *args: Any) -> None:
        read = model.load_weights

        def noted(weights: Any) -> Any:
            wanted = {name for name, _ in model.named_parameters()}
            loaded = read(weights)
            if loaded is not None:  # otherwise vLLM's class does not report it
                # 0.30 and 0.31 say experts.w2_weight of what is experts.routed_experts.w2_weight.
                said = {name.replace(".routed_experts.", ".") for name in loaded}
                unloaded.update(name for name in wanted if name.replace(".routed_experts.", ".") not in said)
            return loaded

        model.load_weights = noted
        try:
            original(self, model, *args)
        finally:
            del model.load_weights

    DefaultModelLoader.load_weights = load_weights
    windows = job["windows"]
    length = max(map(len, windows))
    try:
        llm = vllm.LLM(
            job["folder"],
            dtype=job["dtype"],
            trust_remote_code=job["trust_remote_code"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=length + 1,
            max_num_seqs=_SEQUENCES,
            max_num_batched_tokens=max(_STEP, length + 1),
        )
        settings = vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, detokenize=False)
        done = llm.generate([{"prompt_token_ids": ids} for ids in windows], settings, use_tqdm=False)
    except Exception as error:
        return {"error": shorten(error), "version": vllm.__version__}
    losses, likely = [], []
    for ids, one in zip(windows, done, strict=True):
        places = one.prompt_logprobs[1:]  # by token: the actual one, and the most likely one
        losses.append([-found[token].logprob for token, found in zip(ids[1:], places, strict=True)])
        likely.append([min(found, key=lambda token: found[token].rank) for found in places])
    # Scales of a cache and the like have names that no tensor of the checkpoint has, and values of their own.
    stored = _last_names(Path(job["folder"]))
    left = [name for name in unloaded if name.rpartition(".")[2].removeprefix("w13_").removeprefix("w2_") in stored]
    return {"losses": losses, "likely": likely, "unloaded": sorted(left)}


def _last_names(folder: Path) -> set[str]:
    """The names of a checkpoint's tensors within their modules, such as "weight"."""
    names: set[str] = set()
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as file:
            names.update(name.rpartition(".")[2] for name in set(file.keys()))
    return names


if __name__ == "__main__":
    asked, given = map(Path, sys.argv[1:])
    given.write_text(json.dumps(_answer(json.loads(asked.read_text()))))
