"""What an exception in the middle of a step leaves behind, and what the compiler makes of layers that recompute."""

import gc
import weakref

import pytest
import torch

import adapters_kit as ak
from adapters_kit.kernels.fuse import forget
from tests.support import tiny
from tests.support.fused import gradients, live, relative


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_after_running_out_of_memory_the_graph_can_be_freed(family, monkeypatch):
    """Siblings that were computed ahead would hold every activation, and a smaller batch would meet a full GPU."""
    model = live(ak.wrap(tiny.build(family), "lora", r=4)).train()
    batch = tiny.inputs(model, batch=2, length=8, labels=True)
    layers = [module for module in model.modules() if "_fused_siblings" in module.__dict__]
    group = layers[-1].__dict__["_fused_siblings"]
    kept: list[weakref.ref] = []

    class Full(Exception):
        pass

    def fail(*_):
        raise Full

    def note(tensor):
        holder = [tensor.detach()]
        kept.append(weakref.ref(holder[0]))
        return holder

    handle = group.members[1].register_forward_pre_hook(fail)  # the first of the group has run, the second has not
    with pytest.raises(Full), torch.autograd.graph.saved_tensors_hooks(note, lambda holder: holder[0]):
        model(**batch)
    handle.remove()
    gc.collect()
    assert any(ref() is not None for ref in kept), "otherwise this shows nothing"
    assert forget(model) == 1 and forget(model) == 0
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert model(**batch).loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "backend"),
    [("llama", torch.float32, "eager"), ("llama", torch.bfloat16, "aot_eager"), ("gemma", torch.bfloat16, "eager")],
    ids=str,
)
def test_compiled_models_may_recompute(family, dtype, backend):
    torch.compiler.reset()
    plain = live(ak.wrap(tiny.build(family).to(dtype), "lora", r=4, fuse=False)).train()
    compiled = live(ak.wrap(tiny.build(family).to(dtype), "lora", r=4, recompute="cheap")).train()
    batch = tiny.inputs(plain, batch=2, length=10, labels=True)
    losses = []
    for run in (plain, torch.compile(compiled, backend=backend)):
        loss = run(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert losses[1] == pytest.approx(losses[0], rel=bound)
    for name, grad in gradients(plain).items():
        assert relative(gradients(compiled)[name], grad) < bound, name
