"""vLLM: a worker extension with which the engine's own experts are measured while they serve.

    llm = vllm.LLM(MODEL, worker_extension_cls="sedetect.engines.vllm.Worker")
    with sedetect.profile(llm) as prof:
        llm.generate(prompts)

vLLM imports this module in every worker, on every node, before the model is built, and only where that option names
Worker: the option enables profiling, and without it vLLM runs unmodified. On import, the classes of the unquantized
experts and of the linears are registered as out-of-tree replacements. From then on the experts compute by our ops on
the engine's own weights in their loaded layout; vLLM still computes routing, shared experts and the rest, and every
layer of an engine that is refused. down_proj of shared experts and dense MLPs is computed by vLLM and only observed.

Which row is which token stands in buffers that captured graphs read too. They count nothing until a profile starts;
then the runner's preparation of each step fills them. A graph that is being captured, or a dummy run, never counts.

Read in vLLM 0.22.0 and 0.30.0 to 0.32.0 (two model runners: "v2" prepares its inputs in prepare_inputs, the other one
in _prepare_inputs).
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import CustomOp, PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe import activation as activations
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from sedetect.adapters.listed import DOWN_NAMES
from sedetect.errors import SedetectError
from sedetect.files import STATS
from sedetect.kernels.rows import Rows
from sedetect.models.banks import Bank, find_banks
from sedetect.models.gate import candidate_gates, probe_gate
from sedetect.models.identity import digest_notes, join_digest, model_id, model_name
from sedetect.models.loading import without_weights
from sedetect.models.measure import Measuring
from sedetect.models.row_context import NO_PREFIX
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.functions import moe_mlp, output_stats
from sedetect.stats.bank import BankStats
from sedetect.stats.model import BankInfo, Header, ModelStats, Source, digest
from sedetect.stats.note import Note, sorted_notes
from sedetect.stats.place import BankId
from sedetect.version import __version__

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
_PART = 2**24  # bytes of statistics in an answer, at most
_OPTION = 'worker_extension_cls="sedetect.engines.vllm.Worker"'
PREFIX_CACHE = (
    "tokens came from the prefix cache: they were not computed and do not count (first tokens included); start the "
    "engine with enable_prefix_caching=False to measure them"
)
UNDER_WAY = "requests were running when the profile began: their earlier tokens do not count (first tokens included)"
DRAFTS = "draft tokens of speculative decoding count: both rejected ones and their replacements"


def refusal(config: Any) -> str | None:
    """The reason why an engine with this configuration cannot be measured; None if it can."""
    parallel = config.parallel_config
    if not _asked(parallel.worker_extension_cls):
        return f"its engine was started without it; give {_OPTION}"
    if current_platform.is_cpu() and vllm.__version_tuple__ < (0, 30):
        return f"on a CPU vLLM {vllm.__version__} routes inside its own experts kernels; install vLLM 0.30 or later"
    if parallel.data_parallel_size > 1:
        return "its data-parallel ranks send each other tokens; start an engine for each, and merge what they give"
    if parallel.tensor_parallel_size > 1 and not parallel.enable_expert_parallel:
        return (
            "tensor parallelism splits the input of down_proj, so each rank sees partial sums; give "
            "enable_expert_parallel=True"
        )
    unknown = {
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_eplb": parallel.enable_eplb,
        "enable_dbo": parallel.enable_dbo or parallel.ubatch_size > 1,
        "enable_lora": config.lora_config is not None,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    option = next((name for name, given in unknown.items() if given), None)
    return None if option is None else f"experts under {option} are not measured; start the engine without it"


def _asked(extension: str) -> bool:
    """Whether the engine's worker extension is Worker or a subclass of it."""
    return bool(extension) and issubclass(resolve_obj_by_qualname(extension), Worker)


class StepRows:
    """The token of each row of the current step, in buffers that captured graphs read. Between steps, no row counts."""

    def __init__(self, size: int, device: torch.device):
        self._counted, self._first = (torch.zeros(size, dtype=torch.bool, device=device) for _ in range(2))
        self._sequence, self._position, self._token_id = torch.full((3, size), -1, device=device)

    def rows(self, tokens: int) -> Rows:
        """Of a call with so many tokens."""
        if tokens > len(self._counted):
            raise SedetectError(
                f"a step of {tokens} tokens, in an engine whose steps have {len(self._counted)} at most"
            )
        columns = (self._counted, self._first, self._sequence, self._position, self._token_id)
        return Rows(*(column[:tokens] for column in columns))

    def fill(self, known: torch.Tensor, position: torch.Tensor, token_id: torch.Tensor) -> Rows:
        """Set the rows of a step's N tokens, and clear the rest. known (2, N): the sequence of each token, and the
        first
        position in it that has not counted before."""
        device, count = self._counted.device, known.shape[1]
        known = (known.pin_memory() if device.type == "cuda" else known).to(device, non_blocking=True)
        rows = self.rows(count)
        rows.sequence.copy_(known[0])
        rows.position.copy_(position[:count])
        rows.token_id.copy_(token_id[:count])
        torch.ge(rows.position, known[1], out=rows.counted)
        torch.logical_and(rows.counted, rows.position == 0, out=rows.first)
        self._counted[count:] = False
        return rows

    def clear(self) -> None:
        self._counted.zero_()


class MeasuredBank:
    """One bank of this worker, and its statistics so far.

    experts: of the whole model. here: (E,) numbers of those that this worker has, None for all. top_k, served and
    fallbacks are those of the engine's calls from its start on: a captured graph calls only once.
    """

    def __init__(self, path: str, sizes: tuple[int, int, int], routed: bool, here: torch.Tensor | None = None):
        self.path, (self.experts, self.hidden, self.intermediate), self.routed = path, sizes, routed
        self.here, self.top_k, self.measuring = here, 1, Measuring()
        self.state: BankStats | None = None
        self.served: set[str] = set()
        self.fallbacks: set[str] = set()

    def note(self, backend: str, why: str | None) -> None:
        """Remember which backend served a call, and why it was not the one asked for."""
        self.served.add(backend)
        if why is not None:
            self.fallbacks.add(why)

    def begin(self, measuring: Measuring) -> None:
        """Reset the statistics in place: captured graphs write to these tensors."""
        if self.state is not None:
            empty = self._empty(self.state.counts.device, measuring)
            if measuring == self.measuring:
                for tensor, value in zip(self.state.kept(), empty.kept(), strict=True):
                    tensor.copy_(value)
            else:
                self.state, self.served, self.fallbacks = empty, set(), set()
        self.measuring = measuring

    def prepare(self, device: torch.device) -> BankStats:
        if self.state is None:
            with torch.inference_mode(False):
                self.state = self._empty(device, self.measuring)
        return self.state

    def _empty(self, device: torch.device | str, measuring: Measuring, whole: bool = False) -> BankStats:
        count = self.experts if whole or self.here is None else len(self.here)
        channels = (self.hidden, self.intermediate) if measuring.channels else None
        coactivation = measuring.coactivation and self.experts > 1
        return BankStats.empty(count, device, channels, coactivation, measuring.first_rows and self.routed)

    def whole(self) -> BankStats:
        """The statistics of all experts, on the CPU. Synchronizes."""
        if self.state is None:
            return self._empty("cpu", self.measuring, whole=True)
        state = self.state.to("cpu")
        if self.here is None:
            return state
        whole = self._empty("cpu", self.measuring, whole=True)
        for tensor, mine in zip(whole.kept(), state.kept(), strict=True):
            tensor[self.here] = mine
        return whole


class Serving:
    """The measurement of one engine in this worker: banks by module path, and the rows of a step.

    The engine's configuration holds it, beside the layers that its forwards find by name.
    """

    NAME = "sedetect"

    def __init__(self, config: Any):
        captured = getattr(config.compilation_config, "max_cudagraph_capture_size", None) or 0
        self._size = max(config.scheduler_config.max_num_batched_tokens, captured)
        self._step: StepRows | None = None
        self.banks: dict[str, MeasuredBank] = {}

    @classmethod
    def of(cls, config: Any) -> "Serving":
        held = config.compilation_config.static_forward_context
        if cls.NAME not in held:
            held[cls.NAME] = cls(config)
            if isinstance(config.additional_config, dict):  # a part of the name of what was compiled before
                config.additional_config[cls.NAME] = __version__
        return held[cls.NAME]

    def step(self, device: torch.device) -> StepRows:
        if self._step is None:
            with torch.inference_mode(False):
                self._step = StepRows(self._size, device)
        return self._step

    def stacks(self) -> set[str]:
        """The lists of layers that have routed experts."""
        return {_layer(bank.path)[0] for bank in self.banks.values() if bank.routed}

    def experts(self, layer: Any, x: torch.Tensor, gates: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The experts of a layer: x (T, H), gates and index (T, k) -> (T, H)."""
        method = layer.quant_method
        bank = method.bank
        bank.top_k = index.shape[1]
        if layer.expert_map is not None:
            index = torch.where(index < 0, -1, layer.expert_map[index.clamp(min=0).long()])
        if layer.apply_router_weight_on_input:
            x, gates = x * gates.to(x.dtype), torch.ones_like(gates)
        weights = ExpertWeights(
            layer.w13_weight,
            layer.w2_weight,
            method.gate,
            gate_up_bias=getattr(layer, "w13_bias", None),
            down_bias=getattr(layer, "w2_bias", None),
        )
        state, rows = bank.prepare(x.device), self.step(x.device).rows(len(x))
        return moe_mlp(x, index, gates, weights, state, rows=rows, backend=bank.measuring.backend, served=bank.note)

    def down(self, path: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """A down projection that vLLM computed: y (T, H) of x (T, I). Those of a vision tower are left out."""
        bank = self.banks[path]
        if _layer(path)[0] in self.stacks():
            state, rows = bank.prepare(y.device), self.step(y.device).rows(len(y))
            output_stats(y, x.to(y.dtype), state, rows=rows, backend=bank.measuring.backend, served=bank.note)


def _layer(path: str) -> tuple[str, int]:
    """(path of the list of layers, index in it) of a module; ("", -1) for a module outside such a list."""
    found = _LAYER.match(path)
    return ("", -1) if found is None else (found[1], int(found[2]))


# In a graph that is being compiled the calls are one op each, which finds its layer by name as vLLM's own do.


@torch.library.custom_op("sedetect::vllm_experts", mutates_args=())
def _experts_op(x: torch.Tensor, gates: torch.Tensor, index: torch.Tensor, path: str) -> torch.Tensor:
    layers = get_forward_context().no_compile_layers
    layer = layers[path]
    return layers[Serving.NAME].experts(getattr(layer, "routed_experts", layer), x, gates, index)


@_experts_op.register_fake
def _(x, gates, index, path):
    return torch.empty_like(x)


# so that the call is not optimized away: nothing is written to y
@torch.library.custom_op("sedetect::vllm_down", mutates_args=("y",))
def _down_op(x: torch.Tensor, y: torch.Tensor, path: str) -> None:
    get_forward_context().no_compile_layers[Serving.NAME].down(path, x, y)


@_down_op.register_fake
def _(x, y, path):
    return None


taken = {"UnquantizedFusedMoEMethod", "RowParallelLinear"} & op_registry_oot.keys()
if taken:
    raise SedetectError(f"vLLM: another package replaces {taken.pop()}; uninstall its plugin, or leave out {_OPTION}")


@CustomOp.register_oot(name="UnquantizedFusedMoEMethod")
class MeasuredExperts(UnquantizedFusedMoEMethod):
    """The experts of one layer, computed by our ops; the weights are neither repacked nor padded."""

    def __init__(self, moe: Any):
        config = get_current_vllm_config()
        clamped = moe.swiglu_limit is not None and not hasattr(activations, "ApplyMoEActivationConfig")
        if refusal(config) is None and not clamped:  # 0.22 clamps in the kernels that ours replace
            self._serving = Serving.of(config)
        else:
            self.__class__ = UnquantizedFusedMoEMethod
        UnquantizedFusedMoEMethod.__init__(self, moe)

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def supports_internal_mk(self) -> bool:
        return True  # no modular kernel of vLLM replaces it

    def maybe_roundup_sizes(self, *sizes: Any, **named: Any) -> tuple[int, int]:
        return FusedMoEMethodBase.maybe_roundup_sizes(self, *sizes, **named)

    def process_weights_after_loading(self, layer: Any) -> None:
        experts, hidden, intermediate = layer.w2_weight.shape
        here = None
        if layer.expert_map is not None:
            owned = layer.expert_map.cpu()
            here = torch.empty(experts, dtype=torch.int64)
            here[owned[owned >= 0].long()] = (owned >= 0).nonzero().flatten()
            experts = len(owned)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        if hasattr(self, "bank"):  # reloaded weights: captured graphs hold the old tensors
            return
        self.gate = self._gate(layer, intermediate)
        self.bank = self._serving.banks[layer.layer_name] = MeasuredBank(
            layer.layer_name, (experts, hidden, intermediate), True, here
        )
        self.bank.prepare(layer.w2_weight.device)
        self._serving.step(layer.w2_weight.device)

    def _gate(self, layer: Any, intermediate: int) -> Any:
        """vLLM's own activation of the layer, as a Gate where one agrees with it."""
        how: dict[str, Any] = {}
        if hasattr(activations, "ApplyMoEActivationConfig"):  # not in 0.22
            kind = activations.ApplyMoEActivationConfig
            how["activation_config"] = kind.from_configs(layer.moe_config, self.moe_quant_config)

        def own(z: torch.Tensor) -> torch.Tensor:
            h = z.new_empty(len(z), intermediate)
            activations.apply_moe_activation(layer.activation, h, z.contiguous(), **how)
            return h

        gated = layer.activation.is_gated
        limit = getattr(layer, "swiglu_limit", None)
        gates = candidate_gates(gated, [] if limit is None else [limit])
        return probe_gate(own, intermediate, gates, device=layer.w2_weight.device) or own

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _experts_op(x, topk_weights, topk_ids, layer.layer_name)
        return self._serving.experts(layer, x, topk_weights, topk_ids)


@PluggableLayer.register_oot(name="RowParallelLinear")
class MeasuredDown(RowParallelLinear):
    """The down projection of a shared expert or dense MLP, computed by vLLM and observed.

    Under tensor parallelism the parts of its rows are gathered, and summed where vLLM sums them later.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        RowParallelLinear.__init__(self, *args, **kwargs)
        config, path = get_current_vllm_config(), self.prefix
        if path.rpartition(".")[2] not in DOWN_NAMES or refusal(config) is not None:
            self.__class__ = RowParallelLinear
            return
        self._serving = Serving.of(config)
        self._serving.banks[path] = MeasuredBank(path, (1, self.output_size, self.input_size), False)

    def forward(self, input_: torch.Tensor) -> Any:
        out = super().forward(input_)
        y = out[0] if isinstance(out, tuple) else out
        x, whole = input_, y
        if self.tp_size > 1:
            x = tensor_model_parallel_all_gather(input_) if self.input_is_parallel else input_
            whole = y if self.reduce_results else tensor_model_parallel_all_reduce(y.clone())
        if self.skip_bias_add and self.bias is not None:
            whole = whole + self.bias
        x, whole = x.reshape(-1, x.shape[-1]), whole.reshape(-1, whole.shape[-1])
        if torch.compiler.is_compiling():
            _down_op(x, whole, self.prefix)
        else:
            self._serving.down(self.prefix, x, whole)
        return out


class Requests:
    """The running requests of a profile: the sequence number of each, and how many of its tokens have counted."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        self._drafted: set[str] = set()
        self.count = self.cached = self.under_way = self.drafts = 0

    def schedule(self, output: Any) -> None:
        """Record the tokens that a step will compute."""
        for name in output.finished_req_ids:
            self._number.pop(name, None)
            self._drafted.discard(name)
        new, old = output.scheduled_new_reqs, output.scheduled_cached_reqs
        for request in new:
            # otherwise a request that was preempted, or continues with a longer prompt
            if request.req_id not in self._number:
                self._begin(request.req_id)
                self.cached += request.num_computed_tokens
        for name in old.req_ids:
            if name not in self._number:
                self._begin(name)
                self.under_way += 1
        begins = {request.req_id: request.num_computed_tokens for request in new}
        self._begins = begins | dict(zip(old.req_ids, old.num_computed_tokens))

    def _begin(self, name: str) -> None:
        self._number[name], self._counted[name] = self.count, 0
        self.count += 1

    def rows(self, names: Sequence[str], sizes: Sequence[int], drafts: dict[str, list[int]]) -> torch.Tensor:
        """(2, N) int64, see StepRows.fill: of a step of so many tokens of each of these requests."""
        known = np.array([[self._number[name], self._counted[name]] for name in names], dtype=np.int64)
        for name, size in zip(names, sizes):
            drafted = len(drafts.get(name, ()))
            self.drafts += drafted
            if drafted:
                self._drafted.add(name)
            # Where drafts were rejected, other tokens are computed at their positions.
            if name not in self._drafted:
                self._counted[name] = max(self._counted[name], self._begins[name] + int(size))
        return torch.from_numpy(np.repeat(known, sizes, axis=0).T.copy())


class Followed:
    """A running profile in this worker: it follows the runner's steps until it is stopped."""

    def __init__(self, worker: Any, banks: list[MeasuredBank], asked: dict[str, Any]):
        self.source, self._info, self._prefix = asked["source"], asked["info"], asked["prefix"]
        self.banks, self.runner, self._config = banks, worker.model_runner, worker.model_config
        self.device = self.runner.device
        self.step = Serving.of(worker.vllm_config).step(self.device)
        self.measuring = Measuring(asked["backend"], asked["channels"], asked["coactivation"], asked["first_rows"])
        self.restart()
        self._prepare = "prepare_inputs" if hasattr(self.runner, "prepare_inputs") else "_prepare_inputs"
        for name, wrapper in (("execute_model", self._execute), (self._prepare, self._prepared)):
            setattr(self.runner, name, partial(wrapper, getattr(self.runner, name)))

    def restart(self) -> None:
        self.requests = Requests()
        self.totals = torch.zeros(3, dtype=torch.int64, device=self.device)  # tokens, first tokens, those not prefix
        for bank in self.banks:
            bank.begin(self.measuring)

    def leave(self) -> None:
        for name in ("execute_model", self._prepare):
            delattr(self.runner, name)
        self.step.clear()

    def _execute(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("dummy_run"):
            self.requests.schedule(scheduler_output)
        try:
            return original(scheduler_output, *args, **kwargs)
        finally:
            self.step.clear()

    def _prepared(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(scheduler_output, *args, **kwargs)
        if self._prepare == "prepare_inputs":
            names, position, token_id = inputs.req_ids, inputs.positions, inputs.input_ids
        else:
            runner = self.runner
            names, position, token_id = runner.input_batch.req_ids, runner.positions, runner.input_ids.gpu
        if self._config.enable_prompt_embeds:  # a token may be in none of them
            token_id = torch.full_like(token_id, -1)
        sizes = [scheduler_output.num_scheduled_tokens[name] for name in names]
        known = self.requests.rows(names, sizes, scheduler_output.scheduled_spec_decode_tokens)
        rows = self.step.fill(known, position, token_id)
        bare = rows.first & (rows.token_id != (-1 if self._prefix is None else self._prefix))
        self.totals += torch.stack([rows.counted.sum(), rows.first.sum(), bare.sum()])
        return inputs

    def stats(self) -> ModelStats:
        """The statistics of this worker so far. Synchronizes with the device."""
        model, known = _without_weights(self._config)
        tokens, begun, bare = self.totals.tolist()
        named = _named(self.banks)
        present = {_layer(name)[1] for name, _ in self.runner.get_model().named_parameters()}
        notes = {
            Note("not_measured", f"{bank.id} ({bank.path}) is not measured in vLLM")
            for bank in known.values()
            if bank.id not in named and bank.id.layer in present
        }
        counts = {"cached": (self.requests.cached, PREFIX_CACHE), "under_way": (self.requests.under_way, UNDER_WAY)}
        counts["drafts"] = self.requests.drafts, DRAFTS
        if self._prefix is not None:
            counts["no_prefix"] = bare, f"of {begun} {NO_PREFIX}"
        notes |= {Note(code, f"{count} {text}", count=count) for code, (count, text) in counts.items() if count}
        banks, described = {}, {}
        for bank_id, bank in named.items():
            if not bank.routed and get_tensor_model_parallel_rank():
                continue  # all ranks have measured the same
            banks[bank_id] = bank.whole()
            notes.update(Note("fallback", why, bank_id) for why in bank.fallbacks)
            path = known[bank_id].path if bank_id in known else bank.path
            described[str(bank_id)] = BankInfo(path, bank.top_k, sorted(bank.served))
        config, name = self._config, str(self._config.model)
        found = join_digest(digest(config.hf_config.to_json_string()) if model is None else model_id(model), None)
        if model is not None:
            notes.update(digest_notes(model, found))
        header = Header(
            model=model_name(model) if model is not None else name,
            digest=found,
            dtype=str(config.dtype).removeprefix("torch."),
            layers={"decoder": config.hf_text_config.num_hidden_layers},
            banks=described,
            sources={self.source: Source([[0, self.requests.count]] if self.requests.count else [], self._info)},
            tokens=tokens,
            sequences=self.requests.count,
            versions={
                "sedetect": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "vllm": vllm.__version__,
            },
            notes=sorted_notes(notes),
        )
        return ModelStats(banks, header)


class Worker:
    """The worker extension: what sedetect.profile calls in every worker of an engine.

    Arguments and answers are text, as an HTTP server passes them on; answers are JSON objects, {"refused": why} where a
    request cannot be served.
    """

    _sedetect: Followed | None  # vLLM forbids attributes here that a worker might have
    _collected: bytes

    def sedetect_start(self, asked: str) -> str:
        """Begin a profile. asked: JSON of source, info, prefix, backend, channels, coactivation, first_rows."""
        worker: Any = self
        if (followed := getattr(self, "_sedetect", None)) is not None:
            under_way = f"a profile of this engine is running ({followed.source}); leave it first"
            return json.dumps({"refused": under_way, "source": followed.source})
        why = refusal(worker.vllm_config)
        if why is not None:
            return _refused(why)
        wanted = json.loads(asked)
        try:
            banks = _banks(worker)
            fixed = [name for name in ("backend", "channels", "coactivation", "first_rows") if wanted[name]]
            if fixed and not worker.model_config.enforce_eager:
                raise SedetectError(
                    f"{fixed[0]}: graphs are compiled when the engine starts; give it enforce_eager=True"
                )
            if wanted["coactivation"] and worker.vllm_config.parallel_config.tensor_parallel_size > 1:
                raise SedetectError("coactivation of experts on different ranks cannot be counted; leave it out")
            self._sedetect = Followed(worker, banks, wanted)
        except SedetectError as error:
            return _refused(str(error))
        return json.dumps({"routed": sum(bank.routed for bank in banks)})

    def sedetect_stop(self) -> str:
        """End the profile; statistics that were not collected are lost."""
        if (followed := getattr(self, "_sedetect", None)) is not None:
            followed.leave()
            self._sedetect = None
        return "{}"

    def sedetect_reset(self) -> str:
        """Reset the statistics. Running requests continue as if they had begun before the profile."""
        followed = getattr(self, "_sedetect", None)
        if followed is None:
            return _refused("no profile of this engine is running; start one first")
        followed.restart()
        return "{}"

    def sedetect_collect(self, begin: str = "0") -> str:
        """What was seen so far, as a statistics file: its size, and the base64 of its bytes from begin on, at most 16
        MiB of them. A call with begin 0 takes what there is then, and the later ones read on in it."""
        followed = getattr(self, "_sedetect", None)
        if followed is None:
            return _refused("no profile of this engine is running; start one first")
        start = int(begin)
        if start == 0:
            self._collected = _as_bytes(followed.stats())
        part = self._collected[start : start + _PART]
        return json.dumps({"size": len(self._collected), "part": base64.b64encode(part).decode()})


def _refused(why: str) -> str:
    return json.dumps({"refused": why})


def _as_bytes(stats: ModelStats) -> bytes:
    with TemporaryDirectory() as folder:
        stats.save(Path(folder) / STATS)
        return (Path(folder) / STATS).read_bytes()


def _banks(worker: Any) -> list[MeasuredBank]:
    """The measurement of this worker. Raises SedetectError if it has experts that cannot be measured."""
    model, serving = worker.model_runner.get_model(), Serving.of(worker.vllm_config)
    if getattr(worker.model_runner, "adaptive_verification", None) is not None:
        raise SedetectError("adaptive verification chooses draft tokens on the device; start the engine without it")
    found: dict[str, MeasuredBank] = {}
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MeasuredExperts):
            found[method.bank.path] = method.bank
        elif isinstance(method, FusedMoEMethodBase):
            raise SedetectError(
                f"{path}: {type(method).__name__} keeps the experts in an unsupported layout; serve the "
                "unquantized checkpoint, or profile this one with `sedetect profile`"
            )
        elif isinstance(module, MeasuredDown):
            found[module.prefix] = serving.banks[module.prefix]
    stacks = serving.stacks()
    return [bank for bank in found.values() if _layer(bank.path)[0] in stacks]


def _without_weights(config: Any) -> tuple[Any, dict[BankId, Bank]]:
    """transformers' model of an engine's configuration, on the meta device, and its banks; None where it has none."""
    try:
        model = without_weights(str(config.model), deepcopy(config.hf_config))
        return model, {bank.id: bank for bank in find_banks(model)}
    except SedetectError:  # a class that only vLLM has
        return None, {}


def _named(banks: Sequence[MeasuredBank]) -> dict[BankId, MeasuredBank]:
    """The banks by the ids that they have in a transformers model."""
    with_experts, named = {_layer(bank.path) for bank in banks if bank.routed}, {}
    taken: Counter[tuple[tuple[str, int], str]] = Counter()
    for bank in banks:
        where = _layer(bank.path)
        kind = "routed" if bank.routed else "shared" if "shared" in bank.path or where in with_experts else "dense"
        number = taken[where, kind]
        taken[where, kind] += 1
        named[BankId("decoder", where[1], f"{kind}_{number}" if number else kind)] = bank
    return named
