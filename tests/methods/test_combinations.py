"""Several methods as one adapter: trained, saved, switched, disabled together; the mergeable part merges."""

import copy
import csv
import json
import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import adapters_kit as ak
from adapters_kit.methods.prefix.model import prefix_layers
from tests.methods.test_prefix import CLOSE, ON, logits
from tests.support import tiny
from tests.support.numerics import close

PAIRS = [
    ["lora", "prefix"],
    ["prefix", "lora"],
    ["lora", "pfeiffer"],
    ["ia3", "lora"],
    ["prefix", "houlsby"],
    ["dora", "prefix", "parallel"],
    ["ia3", "lora", "pfeiffer", "prefix"],
]
SMALL = {"lora": {"r": 4}, "dora": {"r": 4}, "prefix": {"num_virtual_tokens": 3}}
# With four units, ReLU can be off for every token, and a gradient zero by chance.
SMALL["pfeiffer"] = SMALL["parallel"] = {"non_linearity": "gelu"}


def fill(model, adapter="default", seed=3):
    """Random weights everywhere in an adapter, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{adapter}." in f"{key}." and "magnitude" not in key and "modules_to_save" not in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def combined(methods, name="llama", adapter_name="default", model=None, **options):
    parts = {label: SMALL[label] for label in methods if label in SMALL}
    model = model if model is not None else tiny.build(name)
    return fill(ak.wrap(model, methods, adapter_name=adapter_name, parts=parts, **options), adapter_name).eval()


@pytest.mark.parametrize("methods", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_one_adapter_of_several_methods(methods, name, tmp_path):
    base = tiny.build(name)
    batch = tiny.inputs(base, labels=True)
    plain = logits(base, **batch)
    model = combined(methods, name)
    model(**batch).loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trained)
    expected, near = logits(model, **batch), close(model, batch, least=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **batch), plain, **CLOSE)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "COMBINED" and set(saved["parts"]) == set(methods)
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path)
    torch.testing.assert_close(logits(again, **batch), expected, **near)
    assert not any(p.requires_grad for p in again.parameters())
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(again.eval(), **batch), expected, **near)
    assert {key for key, p in again.named_parameters() if p.requires_grad} == set(trained)
    again = ak.wrap(tiny.build(name), tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(logits(again, **batch), expected, **near)
    bare = model.unload()
    torch.testing.assert_close(logits(bare, **batch), plain, **CLOSE)


@pytest.mark.parametrize("name", ON)
@pytest.mark.parametrize("methods", [["lora", "pfeiffer", "prefix"]], ids="+".join)
def test_every_family_takes_combinations(name, methods):
    model = combined(methods, name)
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    ours = {key: p for key, p in model.named_parameters() if p.requires_grad and "experts" not in key}
    assert not [key for key, p in ours.items() if p.grad is None or p.grad.abs().sum() == 0]


@pytest.mark.parametrize("methods", [["lora", "prefix"], ["ia3", "lora", "pfeiffer"]], ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_mergeable_part_merges_and_the_rest_stays(methods, name, tmp_path):
    model = combined(methods, name)
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    rest = methods[-1]
    with pytest.raises(ak.AdapterError, match=rf"{rest}.*fold"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model, **batch), expected)
    model.base_model.merge_adapter()
    torch.testing.assert_close(logits(model, **batch), expected, rtol=1e-3, atol=1e-3)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(model, **batch), expected, rtol=1e-3, atol=1e-3)
    folded = ak.fold(model)
    torch.testing.assert_close(logits(folded, **batch), expected, rtol=1e-3, atol=1e-3)
    assert list(folded.peft_config["default"].parts) == [rest]
    assert not any("lora_" in key or "ia3_" in key or "base_layer" in key for key in folded.state_dict())
    folded.save_pretrained(tmp_path / "rest")
    weights = {key.removeprefix("base_model.model."): value for key, value in folded.state_dict().items()}
    base = tiny.build(name)
    base.load_state_dict({key: value for key, value in weights.items() if key in base.state_dict()})
    again = PeftModel.from_pretrained(base, tmp_path / "rest")
    torch.testing.assert_close(logits(again, **batch), expected, rtol=1e-3, atol=1e-3)


def test_a_fully_mergeable_combination_becomes_a_plain_model():
    for end in (ak.fold, lambda model: model.merge_and_unload()):
        model = combined(["ia3", "lora"])
        batch = tiny.inputs(model)
        expected = logits(model, **batch)
        merged = end(model)
        assert type(merged).__name__ == "LlamaForCausalLM"
        assert list(merged.state_dict()) == list(tiny.build("llama").state_dict())
        torch.testing.assert_close(logits(merged, **batch), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_two_combinations_switch_mix_and_go(name, tmp_path):
    model = combined(["lora", "prefix"], name)
    batch = tiny.inputs(model, batch=3)
    first, near = logits(model, **batch), close(model, batch, least=1e-4)
    combined(["lora", "pfeiffer"], name, "b", model=model)
    model.set_adapter("b")
    second = logits(model, **batch)
    assert (first - second).abs().max() > 1e-3
    mixed = logits(model, **batch, adapter_names=["b", "__base__", "default"])
    with model.disable_adapter():
        base = logits(model, **batch)
    torch.testing.assert_close(mixed, torch.stack([second[0], base[1], first[2]]), **CLOSE)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny.build(name), tmp_path / "b")
    torch.testing.assert_close(logits(fresh, **batch), second, **near)
    fresh.load_adapter(tmp_path, "a")
    fresh.set_adapter("a")
    torch.testing.assert_close(logits(fresh, **batch), first, **near)
    model.delete_adapter("b")
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model, **batch), first, **near)
    assert not any(".b." in key or key.endswith(".b") for key in model.state_dict())


@pytest.mark.slow
def test_copies_pickles_and_folders_alone(tmp_path):
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    model = combined(["lora", "pfeiffer", "prefix"], model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin, **batch), expected)
        fill(twin)
        twin.set_adapter("default")
        assert (logits(twin, **batch) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, **batch), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again, **batch), expected, **CLOSE)


def test_the_parts_of_a_folder_are_those_of_the_methods_alone(tmp_path):
    combined(["lora", "prefix"]).save_pretrained(tmp_path / "both")
    ak.wrap(tiny.build("llama"), "lora", r=4).save_pretrained(tmp_path / "lora")
    ak.wrap(tiny.build("llama"), "prefix", num_virtual_tokens=3).save_pretrained(tmp_path / "prefix")
    both, lora, prefix = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("both", "lora", "prefix"))
    assert both.keys() == lora.keys() | prefix.keys()


@pytest.mark.parametrize("method", ["mam", "unipelt"])
@pytest.mark.parametrize("name", ["llama", "bert", "bart", "vit"])
def test_published_combinations(method, name, tmp_path):
    torch.manual_seed(0)  # four units with a ReLU: with bad luck one is never on, and has no gradient
    model = fill(ak.wrap(tiny.build(name), method)).eval()
    config = model.peft_config["default"]
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    expected = logits(model, **batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(again, **batch), expected, **CLOSE)
    if method == "mam":
        assert config.parts["prefix"].num_virtual_tokens == 30
        assert config.parts["parallel"].bottleneck_dim == 512 and config.parts["parallel"].scaling == 1
        return
    assert config.parts["prefix"].num_virtual_tokens == 10 and config.parts["lora"].r == 8
    gates = [
        p
        for key, p in model.named_parameters()
        if "gate" in key.split(".default")[0].rsplit(".", 1)[-1] or ".default.gate." in key
    ]
    assert len(gates) >= 3 * len(prefix_layers(model))
    with torch.no_grad():
        for gate in gates:
            gate.fill_(-1e4 if gate.numel() == 1 else 0)
    with model.disable_adapter():
        base = logits(model, **batch)
    torch.testing.assert_close(logits(model, **batch), base, **CLOSE)
    with pytest.raises(ak.AdapterError, match="No part"):
        ak.fold(model)


def test_a_gated_adapter_is_causal_and_blind_to_padding():
    model = fill(ak.wrap(tiny.build("llama"), "unipelt")).eval()
    batch = tiny.inputs(model, batch=1)
    full = logits(model, **batch)
    start = logits(model, input_ids=batch["input_ids"][:, :5])
    torch.testing.assert_close(full[:, :5], start, **CLOSE)


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("pfeiffer", "pfeiffer"),
        ("lora", "prefix"),
        ("prefix", "lora"),
        ("houlsby", "lora"),
        (["lora", "prefix"], "pfeiffer"),
    ],
)
def test_a_new_adapter_stacks_on_a_frozen_one(below, above, tmp_path):
    model = fill(ak.wrap(tiny.build("llama"), below, adapter_name="language"), "language").eval()
    batch = tiny.inputs(model, labels=True)
    lower = logits(model, **batch)
    model = ak.stack(model, above, adapter_name="task").eval()
    if above != "prefix":
        torch.testing.assert_close(logits(model, **batch), lower, **CLOSE)
    frozen = {key: p for key, p in model.named_parameters() if ".language" in key}
    fill(model, "task", seed=4)
    expected = logits(model, **batch)
    model(**batch).loss.backward()
    assert all(p.grad is None for p in frozen.values())
    task = [p for key, p in model.named_parameters() if ".task" in key]
    assert task and all(p.grad.abs().sum() > 0 for p in task)
    model.set_adapter("language")
    torch.testing.assert_close(logits(model, **batch), lower, **CLOSE)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "language", adapter_name="language")
    again.load_adapter(tmp_path / "task", "task")
    ak.activate(again, ["language", "task"])
    torch.testing.assert_close(logits(again, **batch), expected, **CLOSE)


def test_stacked_classifiers_use_the_upper_head():
    model = fill(ak.wrap(tiny.build("bert"), "houlsby")).eval()
    model = ak.stack(model, "pfeiffer")
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    heads = {key: p.grad is not None for key, p in model.named_parameters() if "modules_to_save" in key}
    assert {key for key, moved in heads.items() if moved} == {key for key in heads if ".task." in key}


@pytest.mark.slow
def test_a_language_adapter_goes_under_a_classifier(tmp_path):
    """examples/stack.py on a tiny model: two runs, two folders, one classifier of both."""
    import stack

    from tests.support import small

    for part, count in (("train", 96), ("test", 32)):
        with open(tmp_path / f"{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(small.sentiment(count, seed=count))
    folder = str(small.model("llama"))
    trained, loaded = stack.main(folder, str(tmp_path), tmp_path / "out", limit=96, rate=2e-2)
    assert trained == loaded > 0.6
    adapters = tmp_path / "out" / "adapters"
    for name, kept in (("language", "residual_adapter"), ("task", "lora_")):
        keys = list(load_file(adapters / name / "adapter_model.safetensors"))
        assert any(kept in key for key in keys) and all(kept in key or "score" in key for key in keys)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["lora", "lora"], {}, "same method twice"),
        (["lora", "dora"], {}, "'lora' and 'dora' are both LORA"),
        (["lora", "prompt"], {}, r"'prompt' .*'prefix'"),
        (["lora", "adalora"], {"parts": {"adalora": {"total_step": 10}}}, "adalora"),
        (["lora", "vera"], {}, "'vera'"),
        (["lora", "prefxi"], {}, "prefix"),
        (["lora", "prefix"], {"target_modules": ["q_proj"]}, r"lora and prefix.*parts=\{'lora'"),
        (["lora", "prefix"], {"num_tokens": 3}, "num_virtual_tokens"),
        (["lora", "prefix"], {"parts": {"loar": {}}}, "lora"),
        (["lora", "prefix"], {"parts": {"lora": {"rank": 3}}}, "rank"),
        (["ia3", "prefix"], {"gate": True}, "cannot be gated"),
        ([], {}, "[Nn]ame some"),
    ],
)
def test_combinations_that_cannot_be_are_refused(methods, options, message):
    model = tiny.build("llama")
    keys = list(model.state_dict())
    with pytest.raises(ak.AdapterError, match=message):
        ak.wrap(model, methods, **options)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_options_find_their_part_and_configs_are_taken_as_given():
    model = ak.wrap(tiny.build("llama"), ["lora", "prefix"], r=3, num_virtual_tokens=5)
    parts = model.peft_config["default"].parts
    assert parts["lora"].r == 3 and parts["prefix"].num_virtual_tokens == 5
    model = ak.wrap(tiny.build("llama"), [LoraConfig(r=2, target_modules=["q_proj"]), ak.PrefixConfig()])
    assert model.peft_config["default"].parts["lora"].r == 2
    assert not any("v_proj.lora" in key for key in model.state_dict())


def test_further_adapters_that_would_nest_are_refused():
    model = combined(["lora", "ia3"])
    with pytest.raises(ak.AdapterError, match="order"):
        ak.wrap(model, ["ia3", "prefix"], adapter_name="b")
    assert list(model.peft_config) == ["default"]
    ak.wrap(model, ["prefix", "pfeiffer"], adapter_name="c")
    assert isinstance(model.peft_config["default"].parts["ia3"], IA3Config)


def test_families_off_the_interface_combine_what_they_take():
    model = combined(["lora", "pfeiffer"], "bloom")
    model(**tiny.inputs(model, labels=True)).loss.backward()
    with pytest.raises(ak.AdapterError, match="BloomForCausalLM"):
        ak.wrap(tiny.build("bloom"), ["lora", "prefix"])
