"""What bottleneck adapters compute, and where they sit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapters_kit as ak
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError
from adapters_kit.methods.bottleneck.phm import PHMLinear, PHMRule
from tests.support import tiny

PRESETS = ["houlsby", "pfeiffer", "parallel", "adapterplus", "compacter", "compacter++"]
WITH_BRANCHES = [name for name in tiny.NAMES if name != "mamba"]


def randomize(model: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give every adapter parameter a value that is nowhere zero: fresh adapters hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_net" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "bottleneck_net" in name}


def net(model: nn.Module, path: str) -> nn.Module:
    return model.get_base_model().get_submodule(path).residual_adapter.bottleneck_net["default"]


@pytest.mark.parametrize("family", WITH_BRANCHES)
def test_every_preset_on_every_family(family: str):
    """Starts as the identity; every adapter parameter gets a gradient, the base none; unload leaves no trace."""
    model = tiny.build(family).requires_grad_(False)
    batch = tiny.inputs(model, labels=True)
    before = model(**batch)
    names = [name for name, _ in model.named_modules()]
    for preset in PRESETS:
        options = {"cross_adapter": True} if model.config.is_encoder_decoder and preset == "houlsby" else {}
        wrapped = ak.wrap(model, preset, **options)
        assert torch.equal(wrapped(**batch).logits, before.logits)
        randomize(wrapped)
        output = wrapped(**batch)
        assert (output.logits - before.logits).abs().max() > 1e-4
        output.loss.backward()
        dead = [name for name, p in adapter_parameters(wrapped).items() if p.grad is None or not p.grad.any()]
        assert not dead, (preset, dead)
        for name, parameter in wrapped.named_parameters():
            if "bottleneck_net" not in name and "modules_to_save" not in name:
                assert parameter.grad is None and not parameter.requires_grad, name
        model = wrapped.unload().requires_grad_(False)
        model.zero_grad()
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(model(**batch).logits, before.logits)


# The equations, in float64, against models put together by hand.


def plain(weights: nn.Module, activation, scaling):
    return lambda z: (
        scaling
        * F.linear(activation(F.linear(z, weights.down.weight, weights.down.bias)), weights.up.weight, weights.up.bias)
    )


SCALED = {"parallel": {"scaling": 4.0}}  # as the paper has it
ACTIVATIONS = {"houlsby": F.silu, "pfeiffer": F.relu, "parallel": F.relu, "adapterplus": F.gelu}


def reference(preset: str, weights: nn.Module):
    """(h, x, LN) -> the next value of the stream, by the published equation."""
    scaling = {"parallel": 4.0, "adapterplus": weights.scaling}.get(preset, 1.0)
    a = plain(weights, ACTIVATIONS[preset], scaling)
    if preset == "houlsby":
        return lambda h, x, norm: norm(a(h) + h + x)
    if preset == "pfeiffer":
        return lambda h, x, norm: norm(a(norm(h + x)) + h + x)
    if preset == "parallel":
        return lambda h, x, norm: norm(h + a(x) + x)
    return lambda h, x, norm: a(norm(h + x)) + norm(h + x)


@pytest.mark.parametrize("preset", ACTIVATIONS)
def test_equation_in_a_post_norm_model(preset: str):
    model = tiny.build("bert").double()
    batch = tiny.inputs(model)
    wrapped = ak.wrap(model, preset, reduction_factor=8, **SCALED.get(preset, {}))
    randomize(wrapped, std=0.3)
    found = wrapped(**batch, output_hidden_states=True).hidden_states
    carried_by_norm = preset in ("pfeiffer", "adapterplus")
    place = "LayerNorm" if carried_by_norm else "dropout"
    layers = model.bert.encoder.layer
    with torch.no_grad(), wrapped.disable_adapter():
        for number, layer in enumerate(layers):
            x = found[number]
            attention = layer.attention
            h = attention.output.dense(attention.self(x)[0])
            if preset == "houlsby":
                weights = net(wrapped, f"bert.encoder.layer.{number}.attention.output.dropout")
                x = reference(preset, weights)(h, x, attention.output.LayerNorm)
            else:
                x = attention.output.LayerNorm(h + x)
            h = layer.output.dense(layer.intermediate(x))
            weights = net(wrapped, f"bert.encoder.layer.{number}.output.{place}")
            x = reference(preset, weights)(h, x, layer.output.LayerNorm)
            torch.testing.assert_close(found[number + 1], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", ACTIVATIONS)
def test_equation_in_a_pre_norm_model(preset: str):
    model = tiny.build("gpt2").double()
    batch = tiny.inputs(model)
    wrapped = ak.wrap(model, preset, reduction_factor=8, **SCALED.get(preset, {}))
    randomize(wrapped, std=0.3)
    found = wrapped(**batch, output_hidden_states=True).hidden_states

    def identity(stream):
        return stream

    with torch.no_grad(), wrapped.disable_adapter():
        for number, block in enumerate(model.transformer.h):
            x = found[number]
            h = _causal_attention(block, x)
            if preset == "houlsby":
                x = reference(preset, net(wrapped, f"transformer.h.{number}.attn"))(h, x, identity)
            else:
                x = x + h
            x = reference(preset, net(wrapped, f"transformer.h.{number}.mlp"))(block.mlp(block.ln_2(x)), x, identity)
            if number + 1 == len(model.transformer.h):
                x = model.transformer.ln_f(x)
            torch.testing.assert_close(found[number + 1], x, rtol=1e-12, atol=1e-12)


def _causal_attention(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        part.unflatten(-1, (4, -1)).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
    )
    return block.attn.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("before", [False, True])
def test_sandwich_norm_adapts_after_or_before_the_norm(before: bool):
    model = tiny.build("gemma2").double()
    batch = tiny.inputs(model)
    wrapped = ak.wrap(model, "houlsby", mh_adapter=False, before_output_norm=before)
    randomize(wrapped, std=0.3)
    found = wrapped(**batch, output_hidden_states=True).hidden_states
    layer = model.model.layers[0]
    norm = layer.post_feedforward_layernorm
    a = plain(net(wrapped, "model.layers.0.post_feedforward_layernorm"), F.silu, 1.0)
    seen = {}
    handle = layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        wrapped(**batch)
        handle.remove()
        with wrapped.disable_adapter():
            h = layer.mlp(layer.pre_feedforward_layernorm(seen["x"]))
            expected = norm(h + a(h)) if before else norm(h) + a(norm(h))
    torch.testing.assert_close(found[1], seen["x"] + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("factorized", [False, True])
def test_phm_is_a_sum_of_kronecker_products(rank: int | None, factorized: bool):
    rule = PHMRule(4, factorized=factorized, learn=True, init="uniform", init_range=1.0)
    layer = PHMLinear(12, 20, rule, dim=4, rank=rank, bias=True).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    blocks = layer.weight if rank is None else layer.weight_left @ layer.weight_right
    dense = sum(torch.kron(a, b) for a, b in zip(rule(), blocks, strict=True))
    torch.testing.assert_close(layer(x), x @ dense + layer.bias, rtol=1e-12, atol=1e-12)


def test_compacter_shares_its_rule_between_all_layers():
    shared = ak.wrap(tiny.build("llama"), "compacter")
    own = ak.wrap(tiny.build("llama"), "compacter", shared_phm_rule=False)
    rules = {name for name in adapter_parameters(shared) if "rule" in name}
    assert len(rules) == 1  # named_parameters() gives a shared one once
    assert (
        len([name for name in adapter_parameters(own) if "rule" in name]) == 2 * 2 * 2
    )  # layers, branches, projections
    frozen = ak.wrap(tiny.build("llama"), "compacter", learn_phm=False)
    assert not [name for name in adapter_parameters(frozen) if "rule" in name]
    assert any("rule" in name for name in frozen.state_dict())


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 4),
        ({"reduction_factor": 16}, 4),
        ({"reduction_factor": 9}, 7),
        ({"reduction_factor": 0.5}, 128),
        ({"reduction_factor": 1000}, 1),
        ({"bottleneck_dim": 7}, 7),
    ],
)
def test_counts(options: dict, size: int):
    model = ak.wrap(tiny.build("llama"), "houlsby", **options)
    sites, width = 4, 64
    count = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert count == sites * (2 * width * size + size + width)
    assert model.get_nb_trainable_parameters()[0] == count


def test_compacter_rounds_its_size_up_to_a_multiple_of_the_products():
    model = ak.wrap(tiny.build("llama"), "compacter++", reduction_factor=11)  # 64 // 11 = 5
    assert net(model, "model.layers.0.mlp").down.out_features == 8
    with pytest.raises(AdapterError, match=r"bottleneck_dim=6 is no multiple of phm_dim=4; 8 is"):
        ak.wrap(tiny.build("llama"), "compacter", bottleneck_dim=6)
    with pytest.raises(AdapterError, match=r"phm_dim=5 does not divide the hidden size 64"):
        ak.wrap(tiny.build("llama"), "compacter", phm_dim=5)


def sizes(model: nn.Module) -> dict[str, int]:
    sites = model.peft_config["default"].sites
    return {path: net(model, path).down.out_features for path in sites}


def test_a_reduction_for_each_layer_or_pattern():
    model = ak.wrap(tiny.build("t5"), "houlsby", reduction_factor={"decoder": 8, "0": 32, "default": 4})
    found = sizes(model)
    assert found["encoder.block.0.layer.0.dropout"] == 2
    assert found["encoder.block.1.layer.1.dropout"] == 16
    assert {size for path, size in found.items() if path.startswith("decoder")} == {8}
    with pytest.raises(AdapterError, match=r"no entry for layer 1 .*Add 'default'"):
        ak.wrap(tiny.build("llama"), "houlsby", reduction_factor={"0": 4})


def sites(model: nn.Module) -> list[str]:
    return sorted(model.peft_config["default"].sites)


def test_filters():
    def found(**options):
        return sites(ak.wrap(tiny.build("llama"), "houlsby", **options))

    mlps = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found(layers=[1]) == ["model.layers.1.mlp", "model.layers.1.self_attn"]
    assert found(leave_out=[1]) == ["model.layers.0.mlp", "model.layers.0.self_attn"]
    assert found(target_modules=r".*\.mlp") == mlps
    assert found(target_modules=["mlp"]) == mlps
    assert found(target_modules=["layers.0.mlp", "layers.1.self_attn"]) == [mlps[0], "model.layers.1.self_attn"]
    assert found(exclude_modules=["self_attn"]) == mlps
    assert found(exclude_modules=r".*0\.mlp|.*attn") == mlps[1:]
    assert found(mh_adapter=False) == mlps
    # A post-norm model carries Pfeiffer's adapter at the norm, but its branch can be named as well.
    bert = ak.wrap(tiny.build("bert"), "pfeiffer", target_modules=r".*1\.output\.dropout")
    assert sites(bert) == ["bert.encoder.layer.1.output.LayerNorm"]


def test_encoder_decoder_layers_are_counted_through():
    model = ak.wrap(tiny.build("bart"), "houlsby", cross_adapter=True, layers=[1, 2])
    roles = {path: (site["layer"], site["role"]) for path, site in model.peft_config["default"].sites.items()}
    assert sorted(roles.values()) == [
        (1, "attention"),
        (1, "ffn"),
        (2, "attention"),
        (2, "cross-attention"),
        (2, "ffn"),
    ]
    assert all(
        path.startswith("model.encoder.layers.1." if n == 1 else "model.decoder.layers.0.")
        for path, (n, _) in roles.items()
    )


def test_a_mixture_of_experts_is_adapted_as_a_whole():
    model = ak.wrap(tiny.build("mixtral"), "pfeiffer")
    assert sites(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [7]}, UnknownNameError, r"layers has \[7\], but the model's 2 layers are 0 to 1"),
        ({"layers": [0], "leave_out": [0]}, AdapterError, "leave no layer"),
        ({"target_modules": ["q_proj"]}, UnknownNameError, r"'q_proj' matches no branch"),
        ({"target_modules": ["mpl"]}, UnknownNameError, r"Did you mean .*mlp"),
        ({"layers": [0], "target_modules": ["layers.1.mlp"]}, AdapterError, "leave nothing"),
        ({"mh_adapter": False, "output_adapter": False}, AdapterError, "all off"),
        ({"mh_adapter": False, "output_adapter": False, "cross_adapter": True}, ModelError, "Switch on mh_adapter or"),
        ({"non_linearity": "rleu"}, UnknownNameError, r"Did you mean .*relu"),
        ({"init_weights": "burt"}, UnknownNameError, r"Did you mean bert"),
        ({"scaling": "chanel"}, AdapterError, "'learned' or 'channel'"),
        ({"reduction_factor": 0}, AdapterError, r"reduction_factor=0"),
        ({"reduction_factor": {"0": -1}}, AdapterError, r"reduction_factor\['0'\]=-1"),
        ({"bottleneck_dim": 0}, AdapterError, "at least one unit"),
        ({"dropout": 1.5}, AdapterError, "dropout is 1.5"),
        ({"original_ln_after": False}, AdapterError, "loses the residual stream"),
        ({"original_ln_before": True, "original_ln_after": False}, AdapterError, "lose the residual stream"),
        ({"original_ln_before": True, "residual_before_ln": False}, AdapterError, "twice"),
        ({"is_parallel": True, "original_ln_after": False}, AdapterError, "is_parallel"),
        ({"adapter_residual_before_ln": True}, AdapterError, "ln_after"),
        ({"reduction_facto": 3}, UnknownNameError, "reduction_factor"),
    ],
)
def test_bad_options_are_refused_and_the_model_is_left_alone(options: dict, error: type, message: str):
    model = tiny.build("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        ak.wrap(model, "houlsby", **options)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_without_a_residual_branch_are_refused_by_name():
    with pytest.raises(ModelError, match="MambaForCausalLM has no place for bottleneck adapters"):
        ak.wrap(tiny.build("mamba"), "pfeiffer")


def test_adapterhub_inits():
    def up(**options):
        torch.manual_seed(0)
        return net(ak.wrap(tiny.build("llama"), "houlsby", reduction_factor=1, **options), "model.layers.0.mlp").up

    assert not up().weight.any() and not up(init_weights="mam_adapter").weight.any()
    assert up(init_weights="bert").weight.std().item() == pytest.approx(0.02, rel=0.05)
    truncated = up(init_weights="houlsby").weight
    assert truncated.abs().max() <= 0.02 and truncated.std() > 0.007
    assert not up(init_weights="bert").bias.any()


def test_own_norms_and_learned_scaling():
    model = tiny.build("llama").double()
    batch = tiny.inputs(model)
    before = model(**batch).logits
    wrapped = ak.wrap(model, "houlsby", ln_before=True, ln_after=True, scaling="learned")
    assert torch.equal(wrapped(**batch).logits, before)
    randomize(wrapped, std=0.5)
    one = net(wrapped, "model.layers.0.mlp")
    z = torch.randn(2, 5, 64, dtype=torch.float64)
    inner = F.layer_norm(z, [64], one.norm_before.weight, one.norm_before.bias)
    inner = one.scaling * one.up(F.silu(one.down(inner)))
    expected = F.layer_norm(inner, [64], one.norm_after.weight, one.norm_after.bias)
    torch.testing.assert_close(one.added_to(z, z), z + expected, rtol=1e-12, atol=1e-12)
    spanning = ak.wrap(tiny.build("llama"), "houlsby", ln_after=True, adapter_residual_before_ln=True).double()
    randomize(spanning, std=0.5)
    one = net(spanning, "model.layers.0.mlp")
    expected = F.layer_norm(z + one.up(F.silu(one.down(z))), [64], one.norm_after.weight, one.norm_after.bias)
    torch.testing.assert_close(one.added_to(z, z), expected, rtol=1e-12, atol=1e-12)


def test_dropout_and_stochastic_depth_act_in_training_only():
    model = ak.wrap(tiny.build("llama"), "houlsby", stochastic_depth=0.5, dropout=0.5)
    randomize(model)
    one = net(model, "model.layers.0.mlp")
    z = torch.randn(64, 3, 64)
    assert torch.equal(one(z), one(z))
    one.train()
    torch.manual_seed(0)
    update = one(z)
    dropped = ~update.flatten(1).any(1)
    assert 16 < dropped.sum() < 48
    kept = update[~dropped]
    assert 0.4 < (kept == 0).float().mean() < 0.6
    torch.testing.assert_close(kept[kept != 0], (4 * one.eval()(z))[~dropped][kept != 0])
