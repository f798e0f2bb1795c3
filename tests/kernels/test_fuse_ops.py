"""How many operations a fused layer dispatches: each costs a few microseconds wherever it runs, and they creep up."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapters_kit.kernels import products
from adapters_kit.kernels.fuse import fuse
from tests.support.fused import lora

FP32, BF16 = torch.float32, torch.bfloat16


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


class Sum(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


# Layers that share an input, dtype, path on the CPU, dropout, DoRA; what was counted forward (the sums of `Sum`
# included) and backward (accumulation of the gradients included).
COUNTED = [
    (1, FP32, "float32", 0.0, False, 10, 24),
    (1, FP32, "float32", 0.0, True, 28, 33),
    (1, FP32, "float32", 0.1, False, 35, 50),
    (1, BF16, "float32", 0.0, False, 14, 28),
    (1, BF16, "float32", 0.0, True, 34, 38),
    (1, BF16, "float32", 0.1, False, 39, 54),
    (1, BF16, "tiles", 0.0, False, 33, 73),
    (1, BF16, "tiles", 0.0, True, 54, 84),
    (1, BF16, "tiles", 0.1, False, 56, 98),
    (3, FP32, "float32", 0.0, False, 25, 54),
    (3, BF16, "float32", 0.0, False, 35, 62),
    (3, BF16, "tiles", 0.0, False, 66, 157),
]


@pytest.mark.parametrize(("count", "dtype", "path", "p", "dora", "forward", "backward"), COUNTED, ids=str)
def test_no_more_operations_than_were_counted(count, dtype, path, p, dora, forward, backward, monkeypatch):
    monkeypatch.setattr(products, "cpu_path", lambda: path)
    options = {"target_modules": [f"layers.{i}" for i in range(count)], "lora_dropout": p, "use_dora": dora}
    model = lora(Sum(count).to(dtype), **options).train()
    report = fuse(model, inputs={"x": torch.zeros(1, 64, dtype=dtype)})
    assert len(report.fused) == count and len(report.groups) == (count > 1)
    x = torch.randn(80, 64, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    with Count() as there:
        y = model(x)
    with Count() as back:
        y.sum().backward()
    # Versions of torch differ by a view or two in how they take a product apart.
    assert there.number <= 1.1 * forward and back.number <= 1.1 * backward, (there.number, back.number)
