"""Where LoRA starts: the base stays, the function at the start is the base's, and what is saved is a plain LoRA."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError, RecipeError
from adapters_kit.methods import starts
from adapters_kit.training.resolve import resolve
from tests.support import small, stopping, tiny

KINDS = ("eva", "corda", "lora-ga", "pissa", "olora")
CASES = [
    *[("llama", kind) for kind in KINDS],
    *[("gpt2", "corda"), ("gpt2", "lora-ga"), ("gpt2", "olora"), ("bert", "lora-ga"), ("t5", "corda"), ("vit", "eva")],
]


def batches(model, count=4):
    ids = torch.randint(5, 60, (count, 3, 12), generator=torch.Generator().manual_seed(1))
    if "pixel_values" in model.main_input_name:
        size = model.config.image_size
        pixels = torch.randn((count, 6, 3, size, size), generator=torch.Generator().manual_seed(1))
        return [{"pixel_values": one, "labels": torch.arange(6) % 2} for one in pixels]
    if hasattr(model, "classifier"):
        return [
            {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": torch.arange(3) % 2} for one in ids
        ]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def loss(model, batch):
    return model(**batch).loss


def wrapped(family, kind, **options):
    base = tiny.build(family)
    options = starts.doubled(kind, {"r": 3, "lora_dropout": 0.0, **options})
    return base, ak.wrap(base, "lora", fuse=False, **options)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_start_computes_what_the_base_computes(family, kind):
    base, model = wrapped(family, kind)
    before = {name: value.clone() for name, value in base.state_dict().items() if "lora" not in name}
    given = batches(base)
    with torch.no_grad():
        expected = model.eval()(**given[0]).logits
    told = starts.begin(model, kind, given, loss)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**given[0]).logits, expected, rtol=1e-4, atol=1e-5)
    for name, value in base.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name]), name
    assert f"start by {kind}" in told
    layers = [one for one in model.modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    assert all(one.r["default"] == (6 if kind in starts.TAKEN_OUT else 3) for one in layers)
    assert all(bool(one.lora_A["default"].weight.any()) for one in layers)
    assert starts.standing_still(model) == (
        sum(p.numel() for p in model.parameters() if p.requires_grad and hasattr(p, "held")) // 2
    )
    # Only the moving half has a gradient, and a step moves it.
    loss(model.train(), given[0]).backward()
    for one in layers if kind in starts.TAKEN_OUT else ():
        for gradient in (one.lora_A["default"].weight.grad, one.lora_B["default"].weight.grad.T):
            assert bool(gradient[:3].any()) and not bool(gradient[3:].any())


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_factors_are_pefts(kind):
    """peft's own way: base minus the product, plus the factors."""
    _, model = wrapped("llama", kind, target_modules=["q_proj", "down_proj"], lora_alpha=5)
    starts.begin(model, kind)
    reference = peft.get_peft_model(
        tiny.build("llama"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=kind),
    )
    ours = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    theirs = {name: m for name, m in reference.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ours.keys() == theirs.keys() and ours
    for name, one in theirs.items():
        assert ours[name].scaling["default"] == pytest.approx(one.scaling["default"])
        torch.testing.assert_close(ours[name].lora_A["default"].weight[:3], one.lora_A["default"].weight)
        torch.testing.assert_close(ours[name].lora_B["default"].weight[:, :3], one.lora_B["default"].weight)


def test_gradients_and_directions_are_pefts():
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    reference = tiny.build("llama")
    given = batches(reference)
    asked = peft.LoraConfig(**config, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    step = lambda: [loss(reference, one).backward() for one in given]  # noqa: E731
    torch.manual_seed(0)
    peft.tuners.lora.loraga.preprocess_loraga(reference, asked, step)
    path = "model.layers.0.mlp.down_proj"
    gradient = reference.get_submodule(path)._peft_loraga_grad
    _, model = wrapped("llama", "lora-ga", **config)
    torch.manual_seed(0)
    starts.begin(model, "lora-ga", given, loss)
    layer = model.get_submodule(f"base_model.model.{path}")
    a, b = layer.lora_A["default"].weight[:3], layer.lora_B["default"].weight[:, :3]
    u, _, v = torch.linalg.svd(gradient)
    # In the first six directions of the gradient, which peft takes by turns.
    torch.testing.assert_close((a @ v[:6].T).norm(dim=1), torch.ones(3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((u[:, :6].T @ b).norm(dim=0), b.norm(dim=0), rtol=1e-3, atol=1e-3)
    # EVA: A's rows are the directions in which what comes in varies most.
    base, model = wrapped("llama", "eva", **config)
    seen = []
    hook = base.get_submodule(f"{path}.base_layer").register_forward_hook(
        lambda _, x, __: seen.append(x[0].flatten(0, 1))
    )
    for one in given:
        model(**one)
    hook.remove()
    starts.begin(model, "eva", given, loss)
    rows = torch.cat(seen) - torch.cat(seen).mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False)[2][:3]
    found = model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
    assert ((found @ directions.T).norm() / found.norm()) > 0.9


def recipe(tmp_path, kind, **more):
    data = small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(40))
    given = {
        "model": str(small.model("bert")),
        "task": "text-classification",
        "data": {"train": str(data), "test_size": 8},
        "method": {"name": "lora", "r": 4},
        "training": {"max_steps": 6, "batch_size": 8, "init": kind, "samples": 0, "learning_rate": 1e-2},
    }
    return {**given, **more}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eva", "lora-ga"])
def test_what_is_shipped_is_what_was_trained(tmp_path, kind):
    run = ak.train(recipe(tmp_path, kind), tmp_path / "run", quiet=True)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (8 if kind in starts.TAKEN_OUT else 4)
    assert run.metrics["trainable_params"] < 40_000 and any(f"start by {kind}" in note for note in run.metrics["notes"])
    merged = ak.merge(run, tmp_path / "merged")
    assert merged.check.largest < 1e-4
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.recipe.model, num_labels=2, ignore_mismatched_sizes=True
    )
    plain = peft.PeftModel.from_pretrained(base, run.adapter).eval()
    shipped = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 17)[None]
    torch.testing.assert_close(plain(ids).logits, shipped(ids).logits, rtol=1e-4, atol=1e-5)
    assert ak.evaluate(run)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path):
    given = recipe(tmp_path, "corda")
    given["training"]["save_every"] = 2
    whole = ak.train(given, tmp_path / "whole", quiet=True)
    with stopping.killed_at_step(4), pytest.raises(stopping.Killed):
        ak.train(given, tmp_path / "stopped", quiet=True)
    again = ak.train(given, tmp_path / "stopped", resume=True, quiet=True)
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_loftq_starts_nearer_to_the_plain_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    given = recipe(tmp_path, "loftq", quantize="nf4")
    run = ak.train(given, tmp_path / "run", quiet=True)
    assert ak.evaluate(run)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-2)
    packed = ak.load(str(small.model("llama")), task="causal-lm", quantize="nf4", dtype=torch.float32)
    whole = ak.load(str(small.model("llama")), task="causal-lm", dtype=torch.float32)
    model = ak.wrap(packed, "lora", fuse=False, **starts.doubled("loftq", {"r": 8}))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = (model(ids).logits - whole(ids).logits).norm()
        starts.begin(model, "loftq", plain=whole)
        after = (model(ids).logits - whole(ids).logits).norm()
    assert after < 0.9 * before


def test_what_does_not_go_together_is_refused(tmp_path):
    def refused(told, kind="pissa", training=(), **more):
        given = recipe(tmp_path, kind, **more)
        given["training"] |= dict(training)
        with pytest.raises((RecipeError, AdapterError), match=told):
            resolve(ak.Recipe(**given))

    refused("the method is houlsby. Set method to lora", method="houlsby")
    refused("the method is pissa", method="pissa")
    refused("the method is adalora", method="adalora")
    refused(r"lora\+prefix", method=["lora", "prefix"])
    refused("set quantize: nf4, or take pissa", "loftq")
    refused("half of the adapter that corda holds still", "corda", {"weight_decay": 0.1})
    with pytest.raises(AdapterError, match="two starts"):
        starts.doubled("eva", {"init_lora_weights": "gaussian"})
    _, model = wrapped("llama", "lora-ga", r=40)
    with pytest.raises(AdapterError, match=r"set method\.r to 32 at most"):
        starts.begin(model, "lora-ga", batches(model), loss)
    _, model = wrapped("llama", "eva", r=20)
    with pytest.raises(AdapterError, match="more or longer rows"):
        starts.begin(model, "eva", [{"input_ids": torch.full((1, 2), 5), "labels": torch.full((1, 2), 5)}], loss)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 4, "use_rslora": True, "lora_alpha": 12}, {"lora_alpha": 3}])
def test_twice_the_rank_has_the_same_scale(options):
    from adapters_kit.artifacts.factors import scale_of

    made = starts.doubled("olora", options)
    rank = options.get("r", 16)
    scale = scale_of(options.get("lora_alpha", rank), rank, options.get("use_rslora", False))
    assert made["r"] == 2 * rank
    assert scale_of(made["lora_alpha"], made["r"], options.get("use_rslora", False)) == pytest.approx(scale)
    assert starts.doubled("eva", options) == options and starts.doubled(None, options) == options
