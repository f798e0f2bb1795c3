"""Shared by the tests of fused LoRA: models with live adapters, and peft with the dropout that a seed derives."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters_kit.kernels.dropout import draw_pattern, draw_seeds, zero_dropped


class SeededDropout(nn.Module):
    """Dropout with the masks of the fused node, in plain operations: the reference under dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        ones = torch.ones(x.numel(), device=x.device)
        mask = zero_dropped(ones, draw_pattern(ones, int(draw_seeds(1)[0]), self.p)).view(x.shape)
        self.factor = mask.to(x.dtype) / (1 - self.p)
        return x * self.factor


def live(model: nn.Module, seed: int = 1, std: float = 0.05) -> nn.Module:
    """Give every trainable parameter random values: a fresh B is zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def lora(base: nn.Module, **options) -> nn.Module:
    """`base` with live LoRA by peft alone; every linear by default."""
    cast = options.pop("autocast_adapter_dtype", True)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})
    return live(get_peft_model(base, config, autocast_adapter_dtype=cast))


def with_seeded_dropout(model: nn.Module) -> nn.Module:
    """A copy of a peft model whose LoRA dropout is `SeededDropout`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[name] = SeededDropout(dropout.p)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the trainable parameters, by name; asserts that the frozen ones have none."""
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm of `b`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
