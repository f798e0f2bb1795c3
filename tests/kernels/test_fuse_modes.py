"""Fused LoRA under the ways of running a model: dtypes, autocast, activation checkpointing, torch.compile."""

import copy

import pytest
import torch
from torch import nn

import adapters_kit as ak
from adapters_kit.kernels import fuse as fusing
from adapters_kit.kernels import products
from adapters_kit.kernels.fuse import fuse
from adapters_kit.kernels.lora import LoraLinear
from adapters_kit.recipe import Recipe
from tests.support import small, tiny
from tests.support.fused import gradients, lora, relative, with_seeded_dropout


class Mlp(nn.Module):
    def __init__(self, wide=256) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(wide, 2 * wide, bias=False), nn.Linear(wide, 2 * wide, bias=False)
        self.down = nn.Linear(2 * wide, wide)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def models(dtype, adapter_dtype, p=0.0):
    """peft's model, the same fused, and the same in float64 with equal (rounded) weights."""
    torch.manual_seed(0)
    plain = lora(Mlp().to(dtype), target_modules=["gate", "up", "down"], r=8, lora_alpha=16, lora_dropout=p).train()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    fused = copy.deepcopy(plain)
    plain = with_seeded_dropout(plain)
    fuse(fused, inputs={"x": torch.zeros(1, 256, dtype=dtype)})
    return plain, fused, copy.deepcopy(plain).double()


def run(model, x, upstream, autocast=None):
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(upstream.to(y.dtype))
    return y, x.grad, gradients(model)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_error_against_float64_is_no_larger_than_pefts(dtype, adapter, p):
    """Within 10 % of peft's error with the same adapters: fp32 ones are peft's default on a bf16 model."""
    plain, fused, exact = models(dtype, adapter, p)
    x, upstream = torch.randn(4, 64, 256).to(dtype), torch.randn(4, 64, 256).to(dtype)
    truth = run(exact, x.double(), upstream.double())
    theirs, ours = run(plain, x, upstream), run(fused, x, upstream)
    slack = 1.1 if dtype != torch.float32 else 1.5  # rounding in fp32 is luck at this size
    for i in (0, 1):
        assert ours[i].dtype == theirs[i].dtype
        assert relative(ours[i], truth[i]) <= slack * relative(theirs[i], truth[i])
    for name, grad in truth[2].items():
        assert ours[2][name].dtype == adapter
        assert relative(ours[2][name], grad) <= slack * relative(theirs[2][name], grad), name


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("path", products.PATHS)
def test_bf16_by_every_path_and_in_blocks(path, p, monkeypatch):
    """A CPU may multiply bf16 weights in fp32, block by block, or narrow ones in tiles: never further from float64 than
    peft is."""
    monkeypatch.setattr(products, "cpu_path", lambda: path)
    plain, fused, exact = models(torch.bfloat16, torch.float32, p)
    x, upstream = torch.randn(3, 500, 256).bfloat16(), torch.randn(3, 500, 256).bfloat16()
    truth, theirs = run(exact, x.double(), upstream.double()), run(plain, x, upstream)
    found = []
    for size in (2**22, 512):  # all at once, and in three blocks of 512 tokens or fewer
        monkeypatch.setattr(products, "_BLOCK", size)
        fused.zero_grad()
        found.append(run(fused, x, upstream))
        assert len(products.blocks(x.view(-1, 256), products.wide_dtype(x.view(-1, 256))) or [1]) == (
            3 if path == "float32" and size == 512 else 1
        )
    for ours in found:
        assert relative(ours[0], truth[0]) <= 1.1 * relative(theirs[0], truth[0])
        assert relative(ours[1], truth[1]) <= 1.1 * relative(theirs[1], truth[1])
        for name, grad in truth[2].items():
            assert relative(ours[2][name], grad) <= 1.1 * relative(theirs[2][name], grad), name
    assert relative(found[1][0], found[0][0]) < 1e-3 and relative(found[1][1], found[0][1]) < 1e-3


def test_a_few_tokens_are_multiplied_as_they_are():
    """Generation, a token at a time, would convert the weights at every step."""
    assert products.wide_dtype(torch.zeros(1, 8, dtype=torch.bfloat16)) == torch.bfloat16
    assert products.wide_dtype(torch.zeros(100, 8)) == torch.float32
    assert products.wide_dtype(torch.zeros(100, 8, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, adapter):
    plain, fused, exact = models(dtype, adapter, 0.1)
    x, upstream = torch.randn(3, 32, 256).to(dtype), torch.randn(3, 32, 256)
    truth = run(exact, x.double(), upstream.double())
    theirs, ours = run(plain, x, upstream, torch.bfloat16), run(fused, x, upstream, torch.bfloat16)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    assert ours[1].dtype == theirs[1].dtype == dtype
    for i in (0, 1):
        assert relative(ours[i], truth[i]) <= 1.1 * relative(theirs[i], truth[i])
    for name, grad in truth[2].items():
        assert ours[2][name].dtype == adapter
        assert relative(ours[2][name], grad) <= 1.1 * relative(theirs[2][name], grad), name


def test_backward_inside_autocast():
    _, fused, _ = models(torch.float32, torch.float32)
    x = torch.randn(3, 256)
    y = fused(x)
    expected = torch.autograd.grad(y.square().sum(), [p for p in fused.parameters() if p.requires_grad])
    y = fused(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), [p for p in fused.parameters() if p.requires_grad])
    for a, b in zip(expected, found, strict=True):
        assert relative(b, a) < 1e-6


def test_float64_inputs_ignore_autocast():
    _, fused, exact = models(torch.float32, torch.float32)
    fused = fused.double()
    x = torch.randn(3, 256, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(x)
    assert y.dtype == torch.float64 and relative(y, exact(x)) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "vit"])
def test_checkpointing_recomputes_the_same(name, reentrant):
    """Also the first step after fusing, and two forwards before one backward."""
    model = lora(tiny.build(name), lora_dropout=0.1).train()
    fuse(model)
    batches = [tiny.inputs(model, labels=True, seed=seed) for seed in (0, 1)]

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        return gradients(model)

    checkpointed = copy.deepcopy(model)
    expected = step()
    model = checkpointed
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = step()
    assert sum(p.requires_grad for p in model.parameters()) == len(found)
    for key, grad in expected.items():
        assert relative(found[key], grad) < 1e-5, key


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compile_without_graph_breaks(p):
    torch.compiler.reset()
    _, fused, _ = models(torch.float32, torch.float32, p)
    x = torch.randn(2, 16, 256, requires_grad=True)
    expected = run(fused, x.detach(), torch.ones(2, 16, 256)) if p == 0 else None
    fused.zero_grad()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found = run(compiled, x.detach(), torch.ones(2, 16, 256))
    if p == 0:
        assert relative(found[0], expected[0]) < 1e-6 and relative(found[1], expected[1]) < 1e-6
        for name, grad in expected[2].items():
            assert relative(found[2]["_orig_mod." + name], grad) < 1e-5, name
    else:
        again = compiled(x)
        assert not torch.equal(again, compiled(x))  # a new mask every time
        assert all(grad.norm() > 0 for grad in found[2].values())


def test_compiled_dropout_uses_one_mask_forward_and_backward():
    """With A, B and x of ones, the gradient of A counts the rows in which an element was kept."""
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    model = lora(net, target_modules=["0"], r=1, lora_alpha=1, lora_dropout=0.5).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.requires_grad else 0.0)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.ones(64, 8, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    kept = x.grad / (8 * 2)  # ones where kept: 8 outputs, scaled by 1 / (1 - 0.5)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(y, (kept.sum(1, keepdim=True) * 2).expand(-1, 8))
    down = model.base_model.model[0].lora_A["default"].weight.grad
    torch.testing.assert_close(down, kept.sum(0, keepdim=True) * 16)


@pytest.mark.slow
def test_compiled_language_model():
    torch.compiler.reset()
    model = lora(tiny.build("llama"))
    fuse(model)
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model.base_model.model.model, fullgraph=True)
    hidden = compiled(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.base_model.model.lm_head(hidden)
    model.base_model.model.loss_function(logits, batch["labels"], vocab_size=logits.shape[-1]).backward()
    for name, grad in expected.items():
        assert relative(gradients(model)[name], grad) < 1e-4, name


def test_every_step_of_a_training_run_goes_through_the_node(monkeypatch, tmp_path):
    """`ak.train` as it comes: 14 layers of a llama, dropout, evaluation before and after."""
    small.write_jsonl(tmp_path / "train.jsonl", small.sentiment(16))
    small.write_jsonl(tmp_path / "test.jsonl", small.sentiment(8, seed=1))
    method = {"name": "lora", "r": 4, "lora_dropout": 0.1}
    recipe = {"model": str(small.model("llama")), "task": "text-classification", "data": str(tmp_path)}
    recipe |= {"method": method, "training": {"epochs": 1, "batch_size": 4, "samples": 0}}
    calls, nodes, real_forward, real_apply = [], [], fusing._Fused.forward, LoraLinear.apply

    def counted_forward(self, x, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return real_forward(self, x, *args, **kwargs)

    def counted_apply(*args):
        nodes.append((torch.is_grad_enabled(), len(args[5])))
        return real_apply(*args)

    monkeypatch.setattr(fusing._Fused, "forward", counted_forward)
    monkeypatch.setattr(LoraLinear, "apply", counted_apply)
    run = ak.train(Recipe(**recipe), tmp_path / "run", quiet=True)
    steps = run.metrics["steps"]
    assert steps == 4 and calls.count(True) == 14 * steps
    training = [count for trained, count in nodes if trained]
    assert len(training) == 2 * 4 * steps  # a block's nodes: q, k and v; o; gate and up; down
    assert sum(training) == calls.count(True)
    assert sum(count for _, count in nodes) == len(calls)


def test_the_compiled_graph_contains_the_node(monkeypatch):
    """Compiling must not fall back to peft's path: its fp32 copies of a bf16 input would show up."""
    torch.compiler.reset()
    _, fused, _ = models(torch.bfloat16, torch.float32)
    graphs = []
    backend = lambda graph, example: graphs.append(graph) or graph  # noqa: E731
    torch.compile(fused, fullgraph=True, backend=backend)(torch.randn(2, 256, dtype=torch.bfloat16))
    text = "\n".join(graph.print_readable(print_output=False) for graph in graphs)
    assert "autograd_function_apply" in text
    assert LoraLinear.__name__
