"""Weights stored in FP8, packed FP4 and MXFP4, and models beside twins with what these stand for."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from sedetect.kernels.dequantize import dequantize
from support.interpreter import DEVICE
from support.models import random_model
from support.remote_code import MixtralBlock, as_remote_code

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def fp8(weight, block=(128, 128), scales=torch.float32):
    """(stored, scales) of (E, M, K) weights with one scale for each block."""
    e, rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(e, high * block[0], wide * block[1])
    padded[:, :rows, :columns] = weight
    blocks = padded.view(e, high, block[0], wide, block[1])
    scale = (blocks.abs().amax((2, 4)) / 448).clamp(min=1e-12)
    if scales == E8M0:
        scale = scale.log2().ceil().exp2()
    stored = (blocks / scale[:, :, None, :, None]).view(padded.shape)[:, :rows, :columns].to(FP8)
    return stored.contiguous(), scale.to(scales)


def fp4(weight, scales=torch.uint8):
    """(stored, scales) of (E, M, K) weights, two values to a byte, one scale for 32 columns."""
    e, rows, columns = weight.shape
    wide = -(-columns // 32)
    padded = torch.zeros(e, rows, wide * 32)
    padded[:, :, :columns] = weight
    groups = padded.view(e, rows, wide, 32)
    exponent = (groups.abs().amax(-1).clamp(min=1e-12) / 6).log2().ceil()
    values = torch.tensor(E2M1)
    code = (padded.view(*groups.shape) / exponent.exp2()[..., None])[..., None].sub(values).abs().argmin(-1)
    code = code.view(padded.shape)[:, :, :columns]
    stored = (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)
    return stored, (exponent + 127).to(torch.uint8) if scales == torch.uint8 else exponent.exp2().to(scales)


def twins(kind, dtype=torch.float32, block=(16, 8)):
    """A model stored in this way, and the same with what its weights stand for."""
    plain = random_model("gpt_oss" if kind == "mxfp4" else "qwen2_moe", dtype)
    stored = copy.deepcopy(plain)
    if kind == "mxfp4":
        for path, block in [(p, m) for p, m in stored.named_modules() if p.endswith(".mlp")]:
            block.experts = as_mxfp4(block.experts, plain.get_submodule(path).experts)
            block.forward = forward_of_the_kernels
        return plain.to(DEVICE), stored.to(DEVICE)
    scales = torch.float32 if kind == "fp8" else E8M0
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt="float" if kind == "fp8" else "ue8m0")
    if kind == "fp4":
        config.expert_dtype = stored.config.expert_dtype = "fp4"  # the model's before transformers 5.23
    # a router that is no nn.Linear stays as it is
    replace_with_fp8_linear(stored, ["lm_head"], config)
    for path, module in stored.named_modules():
        twin = plain.get_submodule(path)
        if isinstance(module, FP8Linear):
            store(module, "weight", twin.weight, block, scales)
            module.bias = twin.bias
        elif isinstance(module, FP8Experts):
            for name in ("gate_up_proj", "down_proj"):
                store(module, name, getattr(twin, name), None if kind == "fp4" else block, scales)
    return plain.to(DEVICE), stored.eval().to(DEVICE)


def forward_of_the_kernels(hidden_states):
    raise AssertionError("the package kernels is not here")


@torch.no_grad()
def store(module, name, weight, block, scales):
    """Put a weight into a module in FP8, or packed where block is None, and what that stands for into the weight."""
    stacked = weight.float().reshape(-1, *weight.shape[-2:])
    stored, scale = fp4(stacked) if block is None else fp8(stacked, block, scales)
    if block is None:
        stored, scale = stored.view(torch.int8), scale.view(E8M0)
    weight.copy_(torch.stack([dequantize(s, f, block, weight.dtype) for s, f in zip(stored, scale)]).view(weight.shape))
    for key, value in ((name, stored), (f"{name}_scale_inv", scale)):
        value = value.reshape(*weight.shape[:-2], *value.shape[-2:])
        assert getattr(module, key).shape == value.shape
        module._parameters[key] = nn.Parameter(value, requires_grad=False)


class Turned:
    """A layout of the kernels' kind: the bytes in another order than the checkpoint's."""

    def unswizzle_data(self, data):
        return data.flip(1)


@torch.no_grad()
def as_mxfp4(experts, twin):
    """The module that stands for GptOssExperts where the package kernels is installed, as its loader fills it."""
    module = Mxfp4GptOssExperts(experts.config)
    for name in ("gate_up_proj", "down_proj"):
        stored, scale = fp4(getattr(twin, name).float().transpose(1, 2))
        back = torch.stack([dequantize(s, f, None, experts.down_proj.dtype) for s, f in zip(stored, scale)])
        getattr(twin, name).copy_(back.transpose(1, 2))
        turned = [SimpleNamespace(storage=SimpleNamespace(data=t.transpose(1, 2).flip(1).to(DEVICE), layout=Turned()))
                  for t in (stored, scale)]  # fmt: skip
        del module._parameters[name]
        setattr(module, name, turned[0])
        setattr(module, f"{name}_precision_config", SimpleNamespace(weight_scale=turned[1]))
        getattr(module, f"{name}_bias").copy_(getattr(twin, f"{name}_bias"))
    return module


class PackedLinear(nn.Module):
    """What GPTQ and AWQ put in the place of a linear, as far as we see it: sizes, packed integers and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 7)
        values = (linear.weight.detach() / self.scales).round().int() + 8
        self.register_buffer("qweight", (values[:, ::2] | values[:, 1::2] << 4).to(torch.int32))

    def unpacked(self):
        values = torch.stack((self.qweight & 15, self.qweight >> 4), -1).flatten(-2) - 8
        return values.to(self.scales.dtype) * self.scales

    def forward(self, x):
        return x @ self.unpacked().T


@torch.no_grad()
def in_fp8(linear):
    """An FP8Linear in the place of a linear, which becomes what it stands for."""
    stored = FP8Linear(linear.in_features, linear.out_features, block_size=(8, 8))
    store(stored, "weight", linear.weight, (8, 8), torch.float32)
    return stored


@torch.no_grad()
def packed(linear):
    stored = PackedLinear(linear)
    linear.weight.copy_(stored.unpacked())
    return stored


def listed_twins(kind):
    """Remote code whose experts' linears became what kind makes of them, and the same with what these stand for."""
    plain = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    stored = copy.deepcopy(plain)
    for (_, twin), module in zip(list(plain.named_modules()), list(stored.modules())):
        if type(module).__name__ == "Expert":
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(module, name, kind(getattr(twin, name)))
    return plain.to(DEVICE), stored.to(DEVICE)
