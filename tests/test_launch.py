"""Launches by the compiled kernel: only what Triton compiles alike is launched alike, and with the same results."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import triton
from support.interpreter import DEVICE
from support.kernels import assert_equal_bits, assert_same_state, make_call, make_rows, moe_mlp
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from sedetect.kernels import launch
from sedetect.stats.bank import BankStats

OTHERS = [1.0, True, 2**31, -(2**31) - 1, 2**63, torch.empty(9, dtype=torch.bfloat16)[1:], "text"]


def matrix(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(64, 64, dtype=dtype)


def one(argument):
    pass


class Compiled(CompiledKernel):
    """Records how it is run."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    run = property(lambda self: lambda *arguments: self.runs.append(arguments))


class Kernel(JITFunction):
    """Compiles to a new Compiled at every ordinary launch."""

    def __init__(self):
        super().__init__(one)
        self.launched = []

    def run(self, *arguments, grid, warmup, **constants):
        self.launched.append(Compiled())
        return self.launched[-1]

    def counts(self) -> tuple[int, int]:
        """(ordinary launches, launches by a compiled kernel)"""
        return len(self.launched), sum(len(compiled.runs) for compiled in self.launched)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    return Kernel()


def test_arguments_of_a_kind_are_compiled_alike():
    tensors = [matrix(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int32)]
    descriptors = [TensorDescriptor.from_tensor(x, [16, n]) for x in tensors[:2] for n in (16, 32)]
    integers = [-(2**31), -16, -1, 0, 1, 2, 15, 16, 17, 2**31 - 16, 2**31 - 1]
    arguments = [None, *integers, *tensors, matrix(torch.bfloat16), *descriptors]
    function = JITFunction(one)
    binder = create_function_from_signature(
        function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    for a, b in combinations(arguments, 2):
        _, (first, second), _ = zip(binder(a), binder(b))
        if launch._kinds([a]) == launch._kinds([b]):
            assert first == second, (a, b)
    assert launch._kinds(tensors) == launch._kinds([matrix(x.dtype) for x in tensors])
    assert len({launch._kinds([n]) for n in integers}) == 3  # 1, multiples of 16, and others


@pytest.mark.parametrize("argument", OTHERS, ids=[str(n) for n in range(len(OTHERS))])
def test_an_unusual_argument_goes_the_ordinary_way(kernel, argument):
    for _ in range(3):
        launch.launch(kernel, (1, 1, 1), [argument], {})
    assert kernel.counts() == (3, 0)


def test_a_launch_like_an_earlier_one_runs_what_that_was_compiled_to(kernel):
    x, y = matrix(torch.bfloat16), matrix(torch.bfloat16)
    launch.launch(kernel, (1, 1, 1), [x, 7, None], {"BLOCK": 8, "GATE": None}, num_warps=4)
    launch.launch(kernel, (5, 6, 1), [y, 9, None], {"BLOCK": 8, "GATE": None}, num_warps=4)
    assert kernel.counts() == (1, 1)
    (run,) = kernel.launched[0].runs
    assert run[:9] == (5, 6, 1, 103, "function", "metadata", None, None, None)
    assert run[9] is y and run[10:] == (9, None, 8, None)


CHANGES = {
    "dtype": {"arguments": [matrix(torch.float16), 7]},
    "one": {"arguments": [matrix(torch.bfloat16), 1]},
    "multiple": {"arguments": [matrix(torch.bfloat16), 32]},
    "none": {"arguments": [None, 7]},
    "constant": {"constants": {"BLOCK": 16}},
    "name": {"constants": {"OTHER": 8}},
    "warps": {"options": {"num_warps": 8}},
    "option": {"options": {"num_stages": 4}},
    "device": {"device": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_compiles_to_another_kernel_is_told_apart(kernel, monkeypatch, change):
    usual = {"arguments": [matrix(torch.bfloat16), 7], "constants": {"BLOCK": 8}, "options": {"num_warps": 4}}

    def launch_by(how: dict) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: how.get("device", 0))
        launch.launch(kernel, (1, 1, 1), how["arguments"], how["constants"], **how["options"])

    for how in (usual, usual | change, usual, usual | change):
        launch_by(how)
    assert [len(compiled.runs) for compiled in kernel.launched] == [1, 1]


def test_kernels_are_told_apart(kernel):
    other = Kernel()
    other.fn = matrix
    for each in (kernel, other):
        launch.launch(each, (1, 1, 1), [], {})
    assert (kernel.counts(), other.counts()) == ((1, 0), (1, 0))


@pytest.mark.parametrize("watch", ["enter", "exit", "function", "pre_run", "debug", "instrumentation", "release"])
def test_profilers_and_debuggers_see_every_launch(kernel, monkeypatch, watch):
    knobs = triton.knobs
    launch.launch(kernel, (1, 1, 1), [], {})
    hook = SimpleNamespace(calls=[print])
    if watch in ("enter", "exit"):
        monkeypatch.setattr(knobs.runtime, f"launch_{watch}_hook", hook)
    elif watch == "function":
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
    elif watch == "pre_run":
        kernel.add_pre_run_hook(print)
    elif watch == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    elif watch == "instrumentation":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "fpsan")
    else:
        monkeypatch.setattr(launch, "_KNOWN", False)
    launch.launch(kernel, (1, 1, 1), [], {})
    assert kernel.counts() == (2, 0)


def test_what_was_not_compiled_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "run", lambda self, *arguments, **how: None)
    launch.launch(kernel, (1, 1, 1), [], {})
    assert launch._compiled == {}


def offset(x: torch.Tensor) -> torch.Tensor:
    """The same values on an address that is no multiple of 16."""
    room = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return room.copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [torch.Tensor.contiguous, offset], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8, 8), (16, 8, 16, 96, 48), (17, 3, 5, 33, 17), (515, 8, 16, 520, 264)], ids=str
)
def test_the_results_are_those_of_ordinary_launches(monkeypatch, shape, dtype, place):
    tokens, _, experts, *_ = shape
    call, rows = make_call(shape, dtype, seed=sum(shape)), make_rows(tokens, 1).to(DEVICE)
    call = {name: place(value.to(DEVICE)) if isinstance(value, torch.Tensor) else value for name, value in call.items()}

    def run() -> tuple[torch.Tensor, BankStats]:
        state = BankStats.empty(experts, DEVICE)
        return moe_mlp(call, state=state, rows=rows, backend="triton"), state

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_is_watched", lambda kernel: True)
        expected, expected_state = run()
    run()  # now every kind is known
    if place is not offset:
        monkeypatch.setattr(JITFunction, "run", None)
    out, state = run()
    assert_equal_bits("out", out, expected)
    assert_same_state(state, expected_state)
