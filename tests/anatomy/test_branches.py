"""What a branch computes: x + h is the sum, nothing else writes, whatever feeds it."""

from collections import defaultdict

import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit.anatomy import (
    blocks,
    probe_inputs,
    render,
)
from tests.anatomy.test_anatomy import FURTHER, GQA, further, model_of
from tests.support import tiny


def first_tensor(values):
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


class Run:
    """One forward in which every branch is recorded: its h, where the map says that x and x + h are; and every block.

    With `silenced`, every branch gives zeros instead. Only the first pass through a shared block is kept.
    """

    def __init__(self, model, amap, silenced=False):
        self.h, self.x, self.sum, self.entered, self.left = {}, {}, {}, {}, {}
        self.hooks, self.silenced = [], silenced
        for block in amap.blocks:
            module = model.get_submodule(block.path)
            self.before(module, self.entered, block.path, None)
            for number, branch in enumerate(block.branches):
                key = (block.path, number)
                for store, tap in ((self.x, branch.residual), (self.sum, branch.sum)):
                    if tap is not None:
                        keep = self.before if tap.side == "input" else self.after
                        keep(model.get_submodule(tap.path), store, key, tap.key)
                if branch.module is not None:
                    self.branch(model.get_submodule(branch.module), key, branch.index)
            self.after(module, self.left, block.path, "first")
        try:
            with torch.no_grad():
                model(**probe_inputs(model))
        finally:
            for hook in self.hooks:
                hook.remove()

    def before(self, module, store, key, argument):
        def hook(module, args, kwargs):
            given = {**dict(enumerate(args)), **kwargs}
            store.setdefault(key, (first_tensor(given.values()) if argument is None else given[argument]).clone())

        self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module, store, key, place):
        def hook(module, args, output):
            parts = output if isinstance(output, tuple) else (output,)
            store.setdefault(key, (first_tensor(parts) if place == "first" else parts[place or 0]).clone())

        self.hooks.append(module.register_forward_hook(hook))

    def branch(self, module, key, index):
        def hook(module, args, output):
            h = output if index is None else output[index]
            assert key in self.x  # in time for what a parallel adapter adds to h
            self.h.setdefault(key, h.clone())
            if not self.silenced:
                return None
            silent = torch.zeros_like(h)
            return silent if index is None else (*output[:index], silent, *output[index + 1 :])

        self.hooks.append(module.register_forward_hook(hook))


COMPUTED = [*tiny.NAMES, *FURTHER]


@pytest.mark.parametrize("name", COMPUTED)
def test_x_plus_h_is_the_sum(name):
    """x, read where the map says, plus all h added to it give what the map calls the sum."""
    model = model_of(name)
    amap = ak.map_model(model)
    run = Run(model, amap)
    checked = 0
    for block in amap.blocks:
        if block.path not in run.entered:  # a tower that these inputs do not reach
            continue
        for total, numbers in sums(block).items():
            if any(block.branches[number].module is None for number in numbers):
                continue
            x = run.x[block.path, numbers[0]]
            h = sum(scale(name, block.branches[number]) * run.h[block.path, number].view_as(x) for number in numbers)
            assert torch.allclose(x + h, run.sum[block.path, numbers[-1]], atol=1e-5), total
            checked += 1
    assert checked or name == "opt"  # its sums are flattened before any module sees them


def sums(block):
    """Where a sum is seen -> the branches in it: several where they are parallel."""
    found = defaultdict(list)
    parallel = len({branch.residual for branch in block.branches}) == 1
    last = block.branches[-1].sum
    for number, branch in enumerate(block.branches):
        # Cohere adds its parallel branches one by one: only the last sum is seen by a module.
        if place := branch.sum or (last if parallel else None):
            found[place].append(number)
    return found


def scale(name, branch):
    """Granite multiplies what it adds, the Conformer halves its feed-forwards."""
    return 0.5 if name == "granite" or (name == "four branches" and branch.kind == "ffn") else 1.0


@pytest.mark.parametrize("name", [name for name in COMPUTED if name != "two lists for one layer"])
def test_nothing_else_writes(name):
    """With every branch silenced, a block gives back its input, run through the norms that follow additions."""
    model = model_of(name)
    amap = ak.map_model(model)
    if name == "xlnet":  # no module to silence: its attention ends with this parameter
        for block in blocks(model).values():
            torch.nn.init.zeros_(block.rel_attn.o)
    run = Run(model, amap, silenced=True)
    checked = 0
    for block in amap.blocks:
        if block.path not in run.entered:
            continue
        expected = run.entered[block.path]
        for branch in block.branches:
            if branch.norm is not None:
                with torch.no_grad():
                    expected = model.get_submodule(branch.norm)(expected)
        found = run.left[block.path]
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5), block.path
        checked += 1
    assert checked == len(run.entered) >= 1


# branches that need words


def test_a_raw_operation_is_called_so():
    block = ak.map_model(tiny.build("xlnet")).blocks[0]
    attention = block.branches[0]
    assert (attention.kind, attention.module, attention.index) == ("attention", None, None)
    assert attention.sum.path == attention.norm == "transformer.layer.0.rel_attn.layer_norm"
    # x can be read before, and h = sum - x: what an adapter needs.
    model = tiny.build("xlnet")
    run = Run(model, ak.map_model(model))
    key = ("transformer.layer.0", 0)
    assert run.sum[key].shape == run.x[key].shape
    assert not torch.allclose(run.sum[key], run.x[key], atol=1e-3)


def test_attention_fed_from_elsewhere():
    kinds = {
        name: {branch.kind for block in ak.map_model(model_of(name)).blocks for branch in block.branches}
        for name in ("cross-attention switched on", "positions added to queries", "four branches", "llama")
    }
    three = {"attention", "cross-attention", "ffn"}
    assert kinds == {
        "cross-attention switched on": three,
        "positions added to queries": three,
        "four branches": {"attention", "mixer", "ffn"},
        "llama": {"attention", "ffn"},
    }


def test_hybrids_have_both():
    for name, kinds in {
        "mamba between attention": [["mixer", "ffn"], ["attention", "ffn"]],
        "convolutions between attention": [["mixer", "ffn"], ["attention", "ffn"]],
        "recurrence between attention": [["mixer", "ffn"], ["mixer", "ffn"], ["attention", "ffn"]],
        "no attention but feed-forwards": [["mixer", "ffn"], ["mixer", "ffn"]],
        "one write for a whole layer": [["ffn"], ["ffn"]],
    }.items():
        assert [[one.kind for one in block.branches] for block in ak.map_model(further(name)).blocks] == kinds, name


def test_the_tower_that_text_does_not_reach_is_probed_by_itself():
    amap = ak.map_model(further("a vision tower"))
    assert [(block.stack.rpartition(".")[0], block.calls, len(block.branches)) for block in amap.blocks] == [
        *[("model.vision_tower.encoder", 1, 2)] * 2,
        *[("model.language_model", 1, 2)] * 2,
    ]


def test_flattened_output_is_not_aligned():
    config = transformers.Llama4TextConfig(
        **GQA, num_local_experts=4, intermediate_size_mlp=96, head_dim=16, attn_temperature_tuning=False
    )
    block = ak.map_model(transformers.Llama4ForCausalLM(config).eval()).blocks[0]
    assert [branch.aligned for branch in block.branches] == [True, False]
    assert all(branch.aligned for _, branch in ak.map_model(tiny.build("opt")).branches())


@pytest.mark.parametrize("name", ["mamba", "resnet", "convnext"])
def test_a_model_without_branches_says_so(name):
    if name == "mamba":
        model = tiny.build("mamba")
    elif name == "resnet":
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2])
        model = transformers.ResNetForImageClassification(config)
    else:
        config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
        model = transformers.ConvNextForImageClassification(config)
    amap = ak.map_model(model)
    assert not list(amap.branches("attention", "cross-attention", "ffn"))
    assert type(model).__name__ in amap.reason
    assert "no attention and no feed-forward" in amap.reason
    assert amap.reason in " ".join(render(amap).split())
