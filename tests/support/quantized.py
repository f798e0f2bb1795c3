"""Quantized tiny models without files, and their dequantized fp32 twins.

model = quantized.base("llama", "nf4")         # fp32 arithmetic around 4-bit linears; the same at every call
twin = quantized.dequantized(copy.deepcopy(model))
"""

import copy
from functools import cache

import torch
from torch import nn

from adapters_kit import quantization
from tests.support import tiny

CLASSES = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}


@cache
def _base(name: str, kind: str) -> nn.Module:
    model = tiny.build(name)
    paths = quantization.quantizable(model)
    quantization.check_sizes(model, paths, kind)
    skip = quantization.modules_to_leave(model, paths)
    quantization.quantize_in_place(model, paths, quantization.bnb_config(kind, compute_dtype=torch.float32, skip=skip))
    quantization.keep_layout(model)
    with torch.no_grad():
        model(**tiny.inputs(model))  # 8-bit layers move their weights into their state at the first call
    return model


def base(name: str, kind: str) -> nn.Module:
    """A family of tiny.py with the linears of its blocks quantized, everything else in fp32.

    Modules of one's own around tensors that all copies share: a base is frozen.
    """
    model = _base(name, kind)
    tensors = [*model.parameters(), *model.buffers(), *(getattr(each, "state", None) for each in model.modules())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if tensor is not None})


def paths(model: nn.Module) -> set[str]:
    """The quantized linears of a model, wrapped or not."""
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__ in CLASSES.values() and type(module).__module__.startswith("bitsandbytes")
    }


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with ordinary fp32 linears in place of the quantized ones; changed in place."""
    from bitsandbytes import functional

    for path in sorted(paths(model)):
        old = model.get_submodule(path)
        if type(old).__name__ == "Linear4bit":
            weight = functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
        else:
            scale = old.weight.SCB if old.weight.SCB is not None else old.state.SCB
            weight = old.weight.data.float() * scale[:, None] / 127
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        new.weight.data = weight.float()
        if old.bias is not None:
            new.bias.data = old.bias.data.float()
        model.set_submodule(path, new)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    # Methods that refuse quantized models ask for these.
    model.is_quantized = False
    return model


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter a value away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def cosine(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Of two lists of tensors, each taken as one vector in float64."""
    one, other = (torch.cat([entry.flatten().double() for entry in entries]) for entries in (first, second))
    return float(one @ other / one.norm() / other.norm())
