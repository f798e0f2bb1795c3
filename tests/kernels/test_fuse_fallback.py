"""Where the fused node does not apply, peft's own forward runs, layer by layer, and the report says why."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.func import functional_call, grad, vmap

from adapters_kit.cli import main
from adapters_kit.kernels.fuse import fuse, fuse_report, unfuse, why_plain
from adapters_kit.kernels.lora import LoraLinear
from tests.support import tiny
from tests.support.fused import live, lora


@pytest.fixture
def runs(monkeypatch):
    """Counts how many projections the node computed."""
    counted = []
    real = LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: counted.append(len(args[5])) or real(*args))
    return counted


class Net(nn.Module):
    def __init__(self, bias=True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=bias), nn.Linear(6, 6, bias=bias)

    def forward(self, x):
        return self.b(self.a(x).relu())


def pair(**options):
    torch.manual_seed(0)
    plain = lora(Net(), target_modules=["a", "b"], **options)
    fused = copy.deepcopy(plain)
    return plain, fused, fuse(fused)


def same(plain, fused, x=None, **kwargs):
    x = torch.randn(4, 6) if x is None else x
    torch.testing.assert_close(fused(x, **kwargs), plain(x, **kwargs), rtol=1e-5, atol=1e-6)


def test_dora_with_dropout_runs_pefts_forward_in_training(runs):
    plain, fused, report = pair(use_dora=True, lora_dropout=0.1)
    assert not report.fused and set(report.plain) == {"base_model.model.a", "base_model.model.b"}
    assert "DoRA with dropout" in report.plain["base_model.model.a"]
    x, results = torch.randn(4, 6), []
    for model in (plain, fused):
        torch.manual_seed(0)
        results.append(model(x))
    torch.testing.assert_close(*results)
    assert not runs
    same(plain.eval(), fused.eval())
    assert why_plain(fused.base_model.model.a) is None and runs == [1, 1]


def test_an_activated_lora_runs_pefts_forward(runs):
    plain = lora(tiny.build("llama"), target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8])
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert not report.fused and set(report.plain.values()) == {"its adapter is a variant of LoRA, ALoraLinearVariant"}
    ids = torch.tensor([[3, 4, 7, 8, 5, 6]])
    torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not runs


def test_a_mixture_is_decided_layer_by_layer(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        model.base_model.model.b.register_module("base_layer", nn.Sequential(model.base_model.model.b.base_layer))
    assert why_plain(fused.base_model.model.a) is None
    assert why_plain(fused.base_model.model.b) == "its base layer is a Sequential"
    same(plain, fused)
    assert runs == [1]


def test_several_active_adapters(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        model.add_adapter("more", LoraConfig(r=2, target_modules=["a", "b"]))
        live(model, seed=3)
        model.base_model.set_adapter(["default", "more"])
    assert why_plain(fused.base_model.model.a) == "several adapters are active"
    same(plain, fused)
    assert not runs
    for model in (plain, fused):
        model.set_adapter("more")
    same(plain, fused)
    assert runs == [1, 1]


def test_no_active_adapter_disabled_and_merged(runs):
    plain, fused, _ = pair()
    with plain.disable_adapter(), fused.disable_adapter():
        same(plain, fused)
        assert why_plain(fused.base_model.model.a) == "its adapters are switched off"
    for model in (plain, fused):
        model.merge_adapter()
    same(plain, fused)
    for model in (plain, fused):
        model.unmerge_adapter()
        model.delete_adapter("default")
    assert why_plain(fused.base_model.model.a) == "none of its adapters is active"
    same(plain.base_model.model, fused.base_model.model)  # PeftModel itself wants an adapter
    assert not runs


def test_adapter_names_of_a_mixed_batch(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        model.add_adapter("more", LoraConfig(r=2, target_modules=["a", "b"]))
        live(model, seed=3)
        model.eval()
    same(plain, fused, adapter_names=["default", "more", "__base__", "more"])
    assert not runs


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_below_the_layer_run(runs, where, kind):
    _, fused, _ = pair(lora_dropout=0.1)
    module = getattr(fused.base_model.model.a, where)
    module = module if where == "base_layer" else module["default"]
    called = []
    getattr(module, kind)(lambda *args: called.append(1) and None)
    assert "hooks" in why_plain(fused.base_model.model.a)
    fused(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert called and runs == [1]


def test_hooks_on_the_layer_itself_run_with_the_node(runs):
    _, fused, _ = pair()
    called = []
    fused.base_model.model.a.register_forward_hook(lambda *args: called.append(1) and None)
    fused(torch.randn(4, 6))
    assert called == [1] and runs == [1, 1]


def test_a_hook_on_every_module_runs(runs):
    _, fused, _ = pair()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module) and None)
    try:
        fused(torch.randn(4, 6))
    finally:
        handle.remove()
    assert fused.base_model.model.a.base_layer in called and not runs


def test_a_replaced_forward_is_respected(runs):
    """accelerate's offloading puts its own `forward` on the instance."""
    _, fused, _ = pair()
    base = fused.base_model.model.a.base_layer
    real, called = base.forward, []
    base.forward = lambda x: called.append(1) or real(x)
    fused(torch.randn(4, 6))
    assert called == [1] and runs == [1]


def test_offloaded_layers(runs):
    from accelerate import cpu_offload

    plain, fused, _ = pair()
    cpu_offload(fused.base_model.model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        same(plain, fused)
    assert "hooks" in why_plain(fused.base_model.model.a) and not runs


def test_a_trained_base_weight(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        model.base_model.model.a.base_layer.weight.requires_grad_()
        model(torch.ones(2, 6)).square().sum().backward()
    assert why_plain(fused.base_model.model.a) == "its base weight is trained"
    torch.testing.assert_close(
        fused.base_model.model.a.base_layer.weight.grad, plain.base_model.model.a.base_layer.weight.grad
    )
    assert runs == [1]


def test_a_trained_base_weight_in_evaluation(runs):
    """No gradient is wanted: the node runs. Checkpointing's first pass has none either, but belongs to training."""
    plain, fused, _ = pair()
    fused.base_model.model.a.base_layer.weight.requires_grad_()
    with torch.no_grad():
        same(plain.eval(), fused.eval())
        assert runs == [1, 1]
        same(plain.train(), fused.train())
    assert runs == [1, 1, 1]


class Reordered(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.001


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Cast(nn.Linear):
    def forward(self, x):
        return super().forward(x.float().to(x.dtype))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach()) + 0 * x


@pytest.mark.parametrize("kind", [Reordered, Scaled, Clipped, Cast, Noisy, Detached])
@pytest.mark.parametrize("bias", [True, False])
def test_subclasses_of_linear_are_fused_where_they_compute_the_same(runs, kind, bias):
    torch.manual_seed(0)
    net = Net(bias)
    net.a = kind(6, 6, bias=bias)
    plain = lora(net, target_modules=["a", "b"]).eval()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    alike = kind is Reordered
    assert report.plain == ({} if alike else {"base_model.model.a": f"its base layer is a {kind.__name__}"})
    same(plain, fused)
    assert runs == ([1, 1] if alike else [1])
    unfuse(fused)
    assert fused.base_model.model.a.base_layer.__dict__.keys() == plain.base_model.model.a.base_layer.__dict__.keys()


def test_parametrized_base(runs):
    _, fused, _ = pair()
    torch.nn.utils.parametrizations.weight_norm(fused.base_model.model.a.base_layer)
    assert "Parametrized" in why_plain(fused.base_model.model.a)
    fused(torch.randn(4, 6))
    assert runs == [1]


def test_input_of_another_dtype_fails_as_in_peft(runs):
    plain, fused, _ = pair()
    messages = []
    for model in (plain, fused):
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(4, 6, dtype=torch.float64))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not runs


def test_casting_switched_off(runs):
    from peft.helpers import disable_input_dtype_casting

    plain, fused, _ = pair()
    with disable_input_dtype_casting(plain), disable_input_dtype_casting(fused):
        same(plain, fused)
    assert not runs
    same(plain, fused)
    assert runs == [1, 1]


def test_function_transforms(runs):
    plain, fused, _ = pair()
    x = torch.randn(5, 6)

    def loss(model):
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def one(weights, row):
            return functional_call(model, weights, (row[None],)).square().sum()

        return vmap(grad(one), in_dims=(None, 0))(weights, x)

    expected, found = loss(plain), loss(fused)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not runs


def test_forward_mode_differentiation(runs):
    plain, fused, _ = pair()
    x = torch.randn(2, 6)
    with torch.autograd.forward_ad.dual_level():
        tangents = []
        for model in (plain, fused):
            y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(tangents[1], tangents[0])
    assert not runs


def test_double_backward():
    plain, fused, _ = pair()
    found = []
    for model in (plain, fused):
        x = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        assert a.norm() > 0
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_other_kinds_of_layers_are_named():
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embed, self.out = nn.Conv2d(3, 4, 2), nn.Embedding(5, 4), nn.Linear(4, 4)

    report = fuse(lora(Pictures(), target_modules=["conv", "embed", "out"]))
    assert report.fused == ["base_model.model.out"]
    assert report.plain == {
        "base_model.model.conv": "Conv2d is not a kind of layer that is fused",
        "base_model.model.embed": "Embedding is not a kind of layer that is fused",
    }
    assert "1 of 3" in str(report) and "Conv2d" in str(report)


def test_a_model_without_lora_is_left_alone():
    model = tiny.build("llama")
    report = fuse(model)
    assert not report.fused and not report.plain and not report.groups


def test_experts_reached_through_parameters():
    report = fuse(lora(tiny.build("qwen3-moe"), lora_dropout=0.0))
    assert report.fused and set(report.plain.values()) == {"ParamWrapper is not a kind of layer that is fused"}


def test_a_sibling_that_is_not_covered_leaves_the_group(runs):
    plain = lora(tiny.build("llama", num_hidden_layers=1), target_modules=["q_proj", "k_proj", "v_proj"])
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).groups) == 1
    for model in (plain, fused):
        attention = model.base_model.model.model.layers[0].self_attn
        attention.k_proj.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    batch = tiny.inputs(plain)
    torch.testing.assert_close(fused(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
    assert runs == [2]


def test_the_report_of_a_model_as_it_stands():
    """`fuse_report` changes nothing, and follows what is done to the model afterwards."""
    model = lora(tiny.build("llama"), target_modules=["q_proj", "v_proj", "o_proj"])
    before = fuse_report(model)
    assert not before.fused and set(before.plain.values()) == {"fuse(model) was not called"}
    assert len(before.plain) == 6
    made = fuse(model)
    now = fuse_report(model)
    assert (now.fused, now.plain, set(now.groups)) == (made.fused, {}, set(made.groups))
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    layer.base_layer.weight.requires_grad_()
    assert fuse_report(model).plain == {
        "base_model.model.model.layers.1.self_attn.o_proj": "its base weight is trained"
    }
    assert "plain, 1×: its base weight is trained: model.layers.*.self_attn.o_proj" in str(fuse_report(model))
    assert not fuse_report(tiny.build("llama")).plain


def test_inspect_says_what_is_fused(tmp_path, capsys):
    tiny.build("bert").config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--methods", "lora"]) == 0
    assert "12 of 12 LoRA layers fused, 2 groups of siblings" in capsys.readouterr().out
