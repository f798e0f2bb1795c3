"""Fused DoRA computes what peft's DoRA computes, and keeps less."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_kit.kernels import products
from adapters_kit.kernels.dora import row_norms
from adapters_kit.kernels.fuse import fuse, why_plain
from adapters_kit.kernels.lora import LoraLinear
from adapters_kit.kernels.products import PATHS
from adapters_kit.kernels.projection import Projection
from tests.support import tiny
from tests.support.fused import gradients, lora, relative

INPUTS = {"x": torch.zeros(1, 12)}


class Block(nn.Module):
    """Two projections of one input and one of their product."""

    def __init__(self, make) -> None:
        super().__init__()
        self.gate, self.up, self.down = make(12, 20), make(12, 20), make(20, 12)

    def forward(self, x):
        return self.down(self.gate(x).tanh() * self.up(x))


def build(make, dtype, **options):
    """peft's DoRA, away from its start in every parameter, and the same fused."""
    torch.manual_seed(0)
    net = Block(make).to(dtype)
    plain = lora(net, target_modules=["gate", "up", "down"], use_dora=True, **options).train()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "magnitude" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    report = fuse(fused, inputs={"x": INPUTS["x"].to(dtype)})
    assert len(report.fused) == 3 and not report.plain and [len(group) for group in report.groups] == [2]
    return plain, fused


def run(model, x, upstream, autocast=None):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(upstream.to(y.dtype))
    return {"output": y, "input": x.grad, **gradients(model)}


@pytest.fixture
def nodes(monkeypatch):
    counted, real = [], LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: counted.append(len(args[5])) or real(*args))
    return counted


@pytest.mark.parametrize("shape", [(2, 5, 12), (0, 12)])
@pytest.mark.parametrize(
    "options",
    [{}, {"base": "no bias"}, {"bias": "all"}, {"use_rslora": True, "r": 5}, {"base": "conv"}],
    ids=str,
)
def test_values_and_gradients_are_pefts(options, shape, nodes):
    options = dict(options)
    kind = options.pop("base", "linear")
    make = {
        "linear": nn.Linear,
        "no bias": lambda i, o: nn.Linear(i, o, bias=False),
        "conv": lambda i, o: Conv1D(o, i),
    }[kind]
    plain, fused = build(make, torch.float64, fan_in_fan_out=kind == "conv", **options)
    plain, fused = plain.double(), fused.double()
    x, upstream = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    theirs, ours = run(plain, x, upstream), run(fused, x, upstream)
    assert nodes == [2, 1] and len(theirs) >= 2 + 9
    for name, value in theirs.items():
        assert value.norm() > 0 or not value.numel() or 0 in shape, name
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_norms_from_narrow_products():
    weight, down, up = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (3, 5), (7, 3)))
    expected = (weight + 0.7 * up @ down).norm(dim=1)
    torch.testing.assert_close(row_norms(Projection(weight, None, down, up), 0.7), expected, rtol=1e-12, atol=0)
    undone = Projection(-0.7 * up @ down, None, down, up)  # nothing is left of the rows, and no root of less than zero
    assert row_norms(undone, 0.7).max() < 1e-6


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "path"), [(torch.float32, "float32"), *((torch.bfloat16, p) for p in PATHS)], ids=str
)
def test_no_further_from_float64_than_peft(dtype, path, autocast, monkeypatch):
    """Errors are means over seeds; the adapters are fp32, peft's default. `path`: what the CPU at hand would choose."""
    monkeypatch.setattr(products, "cpu_path", lambda: path)
    plain, fused = build(nn.Linear, dtype)
    exact = copy.deepcopy(plain).double()
    theirs, ours = Counter(), Counter()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x, upstream = (torch.randn(6, 40, 12, generator=generator).to(dtype) for _ in range(2))
        truth = run(exact, x.double(), upstream.double())
        for model, errors in ((plain, theirs), (fused, ours)):
            for name, value in run(model, x, upstream, autocast).items():
                errors[name] += relative(value, truth[name])
    slack = 1.1 if torch.bfloat16 in (dtype, autocast) else 1.5  # the last bit of fp32 depends on the CPU's kernels
    for name, error in theirs.items():
        assert ours[name] <= slack * error, name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases(kind, nodes):
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    def make(i, o):
        if kind == "int8":
            return bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)
        return bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32)

    torch.manual_seed(0)
    wide = Block(lambda i, o: nn.Linear(64, 64))
    net = Block(lambda i, o: make(64, 64))
    net.load_state_dict(wide.state_dict())
    net = net.to("cpu")  # moving to a device quantizes
    for name, layer in net.named_children():  # the reference has the weights as they are stored
        if kind == "int8":
            rounded = layer.weight.data.double() * (layer.weight.SCB.double() / 127).unsqueeze(1)
        else:
            rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        getattr(wide, name).weight.data = rounded.double()
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "int8", kind == "nf4"
    config = LoraConfig(r=4, target_modules=["gate", "up", "down"], use_dora=True)
    fused, exact = get_peft_model(net, config).train(), get_peft_model(wide.double(), copy.deepcopy(config)).train()
    with torch.no_grad():
        twins = dict(exact.named_parameters())
        for name, parameter in fused.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                twins[name].data = parameter.detach().double()
    assert len(fuse(fused).fused) == 3
    x, upstream = torch.randn(9, 64), torch.randn(9, 64)
    truth = run(exact, x.double(), upstream.double())
    for _ in range(2):
        ours = run(fused, x, upstream)
    assert nodes == [1, 1, 1] * 2
    for name, value in truth.items():
        assert value.norm() > 0 and relative(ours[name], value) < 1e-5, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_language_model_checkpointed(reentrant):
    plain = lora(tiny.build("llama"), use_dora=True).train()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 14
    batch = tiny.inputs(plain, labels=True)
    plain(**batch).loss.backward()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    fused(**batch).loss.backward()
    for name, grad in gradients(plain).items():
        assert grad.norm() > 0 and relative(gradients(fused)[name], grad) < 1e-4, name


@pytest.mark.slow
def test_compiled_and_differentiated_twice():
    torch.compiler.reset()
    plain, fused = build(nn.Linear, torch.float32)
    x, upstream = torch.randn(4, 12), torch.randn(4, 12)
    expected = run(plain, x, upstream)
    found = run(torch.compile(fused, fullgraph=True, backend="aot_eager"), x, upstream)
    for name, value in expected.items():
        twin = found[name if name in found else f"_orig_mod.{name}"]
        assert relative(twin, value) < 1e-5, name
    slopes = []
    for model in (plain, fused):
        model.zero_grad()
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(y).square().sum(), y, create_graph=True)
        slope.square().sum().backward()
        slopes.append(gradients(model))
    for name, grad in slopes[0].items():
        assert relative(slopes[1][name], grad) < 1e-4, name


def test_merging_and_switching_off_are_pefts():
    plain, fused = build(nn.Linear, torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = fused(x)
    with fused.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x))
    fused.merge_adapter()
    assert why_plain(fused.base_model.model.gate) == "its adapter is merged"
    torch.testing.assert_close(fused(x), expected)
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(x), expected)


def test_pefts_cache_of_norms_is_used_where_it_is_switched_on(nodes):
    from peft.helpers import DoraCaching

    plain, fused = build(nn.Linear, torch.float64)
    plain.eval(), fused.eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    with DoraCaching():
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    assert not nodes and fused.base_model.model.gate.lora_magnitude_vector["default"]._dora_cache
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)
    assert nodes == [2, 1]


def test_less_is_kept_than_by_peft():
    kept = []
    for model in build(nn.Linear, torch.float32):
        seen = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(400, 12, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
        del y
    assert kept[1] < 0.75 * kept[0]
