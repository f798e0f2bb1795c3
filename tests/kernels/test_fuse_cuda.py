"""The fused node on a GPU, plain and 4-bit, eager and compiled: against peft and float64. Skips itself without one."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters_kit.kernels.fuse import fuse
from adapters_kit.kernels.lora import LoraLinear
from tests.support.fused import gradients, live, relative, with_seeded_dropout

DEVICE, SEEDS = "cuda", 8
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Mlp(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.gate, self.up, self.down = make(128, 256), make(128, 256), make(256, 128)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def build(kind, p):
    """peft's model in bf16 with fp32 adapters, and the same weights and adapters in float64."""
    torch.manual_seed(0)
    net = Mlp(nn.Linear).bfloat16()
    dense = {name: layer.weight for name, layer in net.named_children()}
    if kind == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        quantized = Mlp(lambda i, o: bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.bfloat16))
        quantized.bfloat16().load_state_dict(net.state_dict())
        net = quantized.to(DEVICE)  # quantizes
        for name, layer in net.named_children():
            dense[name] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        net.is_loaded_in_4bit = True
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["gate", "up", "down"], lora_dropout=p)
    model = live(get_peft_model(net, config).to(DEVICE)).train()
    exact = get_peft_model(Mlp(nn.Linear), copy.deepcopy(config)).double().to(DEVICE).train()
    with torch.no_grad():
        for name, weight in dense.items():
            theirs, ours = getattr(model.base_model.model, name), getattr(exact.base_model.model, name)
            ours.base_layer.weight.copy_(weight)
            ours.base_layer.bias.copy_(theirs.base_layer.bias)
            for part in ("lora_A", "lora_B"):
                getattr(ours, part)["default"].weight.copy_(getattr(theirs, part)["default"].weight)
    return model, with_seeded_dropout(exact)


def run(model, x, upstream, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(upstream.to(y.dtype))
    found = {"output": y, "input": x.grad, **gradients(model)}
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 40, 128, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2)]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_no_further_from_float64_than_pefts_bf16_path(kind, p, adapter, monkeypatch):
    """That path has its adapters in bf16. Errors are means over seeds."""
    model, exact = build(kind, p)
    plain, fused = with_seeded_dropout(model), model
    for candidate, dtype in ((plain, torch.bfloat16), (fused, adapter)):
        for parameter in candidate.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    assert len(fuse(fused, inputs={"x": batch(0)[0]}).groups) == 1
    counted, real = [], LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: counted.append(len(args[5])) or real(*args))
    theirs, ours = Counter(), Counter()
    for seed in range(SEEDS):
        x, upstream = batch(seed)
        truth = run(exact, x.double(), upstream.double(), seed)
        assert len(truth) == 2 + 6 and all(value.norm() > 0 for value in truth.values())
        for candidate, errors in ((plain, theirs), (fused, ours)):
            for name, value in run(candidate, x, upstream, seed).items():
                errors[name] += relative(value, truth[name]) / SEEDS
    assert counted == [2, 1] * SEEDS
    for name, error in theirs.items():
        assert ours[name] <= 1.1 * error, name


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_compiled(kind):
    torch.compiler.reset()
    fused, exact = build(kind, 0.0)
    eager = copy.deepcopy(fused)
    for candidate in (eager, fused):
        fuse(candidate)
    x, upstream = batch(0)
    truth, expected = run(exact, x.double(), upstream.double(), 0), run(eager, x, upstream, 0)
    found = run(torch.compile(fused, fullgraph=kind != "nf4"), x, upstream, 0)  # bitsandbytes may break the graph
    for name, value in truth.items():
        assert relative(found[name], value) <= 1.5 * relative(expected[name], value) + 1e-3, name
