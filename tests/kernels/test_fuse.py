"""Fused LoRA computes what peft computes: single layers to float64 precision, whole models on every family."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

from adapters_kit.kernels.fuse import fuse
from adapters_kit.kernels.lora import LoraLinear, lora_linear
from adapters_kit.kernels.projection import Projection
from tests.support.fused import gradients, live, lora, relative, with_seeded_dropout


class Attention(nn.Module):
    """Three projections of one input and one more behind them."""

    def __init__(self, bias: bool = True, kind: type = nn.Linear) -> None:
        super().__init__()
        make = (lambda i, o: nn.Linear(i, o, bias=bias)) if kind is nn.Linear else (lambda i, o: Conv1D(o, i))
        self.q, self.k, self.v, self.o = make(12, 12), make(12, 8), make(12, 8), make(12, 12)
        if kind is Conv1D:
            for module in (self.q, self.k, self.v, self.o):
                nn.init.normal_(module.bias)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k.tanh() * v, x[..., :4]], -1))


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.second = Attention(**options), Attention(**options)

    def forward(self, x):
        return self.second(self.first(x).relu())


def pair(dtype=torch.float64, grouped=True, shared_dropout=False, kind=nn.Linear, base_bias=True, **options):
    """The same live LoRA twice: peft's (with the seeded masks) and fused."""
    torch.manual_seed(0)
    net = Net(kind=kind, bias=base_bias).to(dtype)
    plain = lora(net, target_modules=["q", "k", "v", "o"], fan_in_fan_out=kind is Conv1D, **options).to(dtype).train()
    fused = copy.deepcopy(plain)
    plain = with_seeded_dropout(plain)
    report = fuse(
        fused, shared_dropout=shared_dropout, inputs={"x": torch.randn(1, 12, dtype=dtype)} if grouped else None
    )
    assert len(report.fused) == 8 and not report.plain
    assert len(report.groups) == (2 if grouped else 0)
    return plain, fused


def step(model, x, seed=5):
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return y, x.grad, gradients(model)


def agree(plain, fused, shape=(2, 5, 12), dtype=torch.float64, bound=1e-10, seed=5):
    x = torch.randn(shape, dtype=dtype)
    a, b = (step(model, x.clone().requires_grad_(), seed) for model in (plain, fused))
    assert relative(b[0], a[0]) <= bound
    assert relative(b[1], a[1]) <= bound
    assert a[2].keys() == b[2].keys() and len(a[2]) >= 16
    for name, grad in a[2].items():
        assert grad.norm() > 0, name
        assert relative(b[2][name], grad) <= bound, name


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.1},
        {"lora_dropout": 0.6},
        {"lora_bias": True},
        {"use_rslora": True, "r": 5},
        {"bias": "all", "lora_dropout": 0.1},
        {"bias": "lora_only", "lora_bias": True},
        {"base_bias": False},
        {"kind": Conv1D},
        {"kind": Conv1D, "lora_dropout": 0.1, "bias": "all"},
        {"rank_pattern": {"k": 2}, "alpha_pattern": {"k": 3, "v": 11}, "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_values_and_gradients_are_pefts(options, grouped):
    agree(*pair(grouped=grouped, **options))


def test_the_node_runs_once_for_a_group(monkeypatch):
    _, fused = pair(lora_dropout=0.1)
    sizes = []
    real = LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: sizes.append(len(args[5])) or real(*args))
    fused(torch.randn(3, 12, dtype=torch.float64))
    assert sizes == [3, 1, 3, 1]


def test_a_shared_mask_is_one_mask():
    plain, fused = pair(shared_dropout=True, lora_dropout=0.3)
    # peft with one mask for the three projections: the first draws it, the others use it again.
    for block in (plain.base_model.model.first, plain.base_model.model.second):
        for name in ("k", "v"):
            getattr(block, name).lora_dropout["default"] = Repeat(block.q.lora_dropout["default"])
    agree(plain, fused)


class Repeat(nn.Module):
    def __init__(self, first) -> None:
        super().__init__()
        self.first = [first]

    def forward(self, x):
        return x * self.first[0].factor


def projections(count, dtype=torch.float64, out=(4, 3, 5), wide=6, rank=2, bias=True):
    torch.manual_seed(1)
    made = []
    for i in range(count):
        size = out[i]
        made.append(
            Projection(
                torch.randn(size, wide, dtype=dtype),
                torch.randn(size, dtype=dtype, requires_grad=bias),
                torch.randn(rank + i, wide, dtype=dtype, requires_grad=True),
                torch.randn(size, rank + i, dtype=dtype, requires_grad=True),
                torch.randn(size, dtype=dtype, requires_grad=True),
            )
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("p", "shared"), [(0.0, False), (0.1, True), (0.5, False)])
def test_first_and_second_derivatives_by_finite_differences(p, shared):
    parts = projections(3)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [t for part in parts for t in (part.bias, part.down, part.up, part.up_bias)]

    def function(x, *leaves):
        torch.manual_seed(0)  # the same mask at every evaluation
        again = [Projection(part.weight, *leaves[4 * i : 4 * i + 4]) for i, part in enumerate(parts)]
        return lora_linear(x, again, 1.5, p, shared)

    assert gradcheck(function, (x, *leaves))
    assert gradgradcheck(function, (x, *leaves))


def test_outputs_that_nobody_uses_have_no_gradient():
    parts = projections(3)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    outputs = lora_linear(x, parts, 1.0)
    outputs[1].sum().backward()
    assert parts[0].down.grad is None and parts[0].up.grad is None and parts[2].bias.grad is None
    assert parts[1].down.grad.norm() > 0
    alone = torch.autograd.grad(lora_linear(x, parts[1:2], 1.0)[0].sum(), x)[0]
    torch.testing.assert_close(x.grad, alone, rtol=1e-12, atol=1e-12)


def test_only_what_asks_for_a_gradient_gets_one():
    part = projections(1, bias=False)[0]
    part.down.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    lora_linear(x, [part], 1.0)[0].sum().backward()
    assert part.down.grad is None and part.bias.grad is None and x.grad is None
    assert part.up.grad.norm() > 0


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_strides_do_not_matter(p):
    part = projections(1)[0]
    wide = torch.randn(6, 7, 2, dtype=torch.float64)
    strided = wide.permute(2, 1, 0).requires_grad_()
    straight = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    upstream = torch.randn(4, 7, 2, dtype=torch.float64).permute(2, 1, 0)
    found = []
    for x, grad in ((strided, upstream), (straight, upstream.contiguous())):
        torch.manual_seed(0)
        y = lora_linear(x, [part], 1.0, p)[0]
        found.append((y, *torch.autograd.grad(y, (x, part.down, part.up), grad)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    turned = torch.randn(6, 5, dtype=torch.float64).t()
    torch.manual_seed(0)
    expected = lora_linear(turned.contiguous(), [part], 1.0, p)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(lora_linear(turned, [part], 1.0, p)[0], expected, rtol=1e-12, atol=1e-12)
    expanded = lora_linear(straight, [part], 1.0)[0].sum()
    expanded.backward()  # the gradient of a sum has stride zero


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (1, 1, 1, 12)])
def test_any_leading_shape(shape):
    plain, fused = pair(lora_dropout=0.2)
    x = torch.randn(shape, dtype=torch.float64)
    a, b = (step(model, x.clone().requires_grad_()) for model in (plain, fused))
    assert b[0].shape == a[0].shape and b[1].shape == shape
    torch.testing.assert_close(b[0], a[0], rtol=1e-10, atol=1e-10)
    for name, grad in a[2].items():
        torch.testing.assert_close(b[2][name], grad, rtol=1e-9, atol=1e-10)


def test_two_forwards_before_one_backward():
    plain, fused = pair(lora_dropout=0.1)
    xs = [torch.randn(3, 12, dtype=torch.float64) for _ in range(2)]
    results = []
    for model in (plain, fused):
        torch.manual_seed(2)
        first, second = model(xs[0]), model(xs[1])
        (second.square().sum() - first.tanh().sum()).backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert relative(results[1][name], grad) < 1e-10


def test_the_same_input_twice():
    plain, fused = pair()
    x = torch.randn(3, 12, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        (model(x).sum() + model(x).square().sum()).backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert relative(results[1][name], grad) < 1e-10


def test_an_input_changed_between_siblings_is_not_mistaken():
    plain, fused = pair()
    x = torch.randn(3, 12, dtype=torch.float64)
    for model in (plain, fused):
        block, y = model.base_model.model.first, x.clone()
        with torch.no_grad():
            block.q(y)
            y.mul_(2)
            model.changed = block.k(y)
    torch.testing.assert_close(fused.changed, plain.changed, rtol=1e-12, atol=1e-12)


def test_an_input_changed_before_backward_is_refused():
    _, fused = pair()
    x = torch.randn(3, 12, dtype=torch.float64)
    y = fused.base_model.model.first.q(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_grad_mode_between_siblings_is_respected():
    _, fused = pair()
    block, x = fused.base_model.model.first, torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        block.q(x)
    assert block.k(x).requires_grad
    block.q(x)
    with torch.no_grad():
        assert not block.k(x).requires_grad


def test_switching_adapters_between_siblings_is_respected():
    plain, fused = pair()
    for model in (plain, fused):
        model.add_adapter("other", LoraConfig(r=3, target_modules=["q", "k", "v", "o"]))
        live(model, seed=9)
        model.double()
    x = torch.randn(3, 12, dtype=torch.float64)
    for model in (plain, fused):
        block = model.base_model.model.first
        model.set_adapter("default")
        block.q(x)
        model.set_adapter("other")
        live(model, seed=11)
        model.answer = block.k(x)
    torch.testing.assert_close(fused.answer, plain.answer, rtol=1e-12, atol=1e-12)


def test_retain_graph_and_anomaly_mode():
    plain, fused = pair(lora_dropout=0.1)
    x = torch.randn(3, 12, dtype=torch.float64)
    results = []
    with torch.autograd.detect_anomaly(check_nan=True):
        for model in (plain, fused):
            torch.manual_seed(0)
            y = model(x).square().sum()
            y.backward(retain_graph=True)
            y.backward()
            results.append(gradients(model))
    for name, grad in results[0].items():
        assert relative(results[1][name], grad) < 1e-10


def test_in_place_writes_to_the_outputs():
    plain, fused = pair()
    x = torch.randn(3, 12, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        model.zero_grad()
        block = model.base_model.model.first
        q, k = block.q(x), block.k(x)
        q.mul_(2)
        k.transpose(0, 1).div_(3)
        (q.square().sum() + k.square().sum()).backward()
        results.append({n: g for n, g in gradients(model).items() if g is not None})
    assert len(results[0]) == 4
    for name, grad in results[0].items():
        assert relative(results[1][name], grad) < 1e-12


def test_no_grad_inference_mode_and_eval():
    plain, fused = pair(lora_dropout=0.5)
    plain.eval(), fused.eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-12, atol=1e-12)


def test_dropout_follows_the_seed_and_the_training_flag():
    _, fused = pair(lora_dropout=0.3)
    x = torch.randn(3, 12, dtype=torch.float64)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(fused(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    fused.eval()
    assert torch.equal(fused(x), fused(x))


def test_siblings_draw_different_masks():
    base = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    part = [
        Projection(torch.zeros(64, 64), None, torch.eye(64), torch.eye(64)),
        Projection(torch.zeros(64, 64), None, torch.eye(64), torch.eye(64)),
    ]
    first, second = lora_linear(torch.ones(200, 64), part, 1.0, 0.2)
    del base
    assert not torch.equal(first, second)
    for y in (first, second):
        assert set(y.unique().tolist()) == {0.0, 1.25}
        assert abs((y == 0).float().mean() - 0.2) < 0.02
        assert abs((y == 0).float().mean(0) - 0.2).max() < 0.15  # every column, and
        assert abs((y == 0).float().mean(1) - 0.2).max() < 0.25  # every row
    both = ((first == 0) & (second == 0)).float().mean()
    assert abs(both - 0.04) < 0.01
    same, again = lora_linear(torch.ones(200, 64), part, 1.0, 0.2, shared_mask=True)
    assert torch.equal(same, again)
