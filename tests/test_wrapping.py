"""wrap(): what it trains, what it refuses, and that a refusal leaves the model as it was."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType

import adapters_kit as ak
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError
from tests.support import tiny

PRESETS = ["lora", "rslora", "dora", "pissa", "olora", "ia3", "vera", "oft", "prompt", "p-tuning"]


def fingerprint(model):
    """Everything that a wrap may change: the modules, their parameters, which of them train."""
    return [(name, type(module)) for name, module in model.named_modules()], [
        (name, parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()
    ]


def assert_untouched(model, before):
    modules, parameters = fingerprint(model)
    assert modules == before[0]
    assert [entry[:2] for entry in parameters] == [entry[:2] for entry in before[1]]
    assert all(torch.equal(now[2], then[2]) for now, then in zip(parameters, before[1], strict=True))
    assert not hasattr(model, "peft_config") or isinstance(model, PeftModel)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_every_preset_trains_only_itself(family, method):
    model = ak.wrap(tiny.build(family), method)
    assert isinstance(model, PeftModel)
    batch = tiny.inputs(model.get_base_model(), labels=True)
    randomize(model)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def randomize(model):
    """Give every trainable parameter a value that is not the neutral one (LoRA's B starts at zero)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_lora_defaults_are_all_linears_of_the_blocks_and_twice_the_rank():
    model = ak.wrap(tiny.build("llama"), "lora", r=4)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, TaskType.CAUSAL_LM)
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    linears = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    assert adapted == {f"model.layers.{i}.{linear}" for i in range(2) for linear in linears.split()}


def test_overrides_win_over_defaults():
    config = ak.wrap(tiny.build("llama"), "lora", r=4, lora_alpha=5, target_modules=["q_proj"]).peft_config["default"]
    assert (config.lora_alpha, config.target_modules) == (5, {"q_proj"})


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_experts_train_and_so_do_linears_that_peft_takes_for_experts(family):
    model = ak.wrap(tiny.build(family), "lora")
    randomize(model)
    model(**tiny.inputs(model.get_base_model(), batch=4, length=16, labels=True)).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("experts" in name for name in trained)
    if family == "deepseek-v3":
        assert any("shared_experts.down_proj" in name for name in trained)
        assert any("layers.0.mlp.down_proj" in name for name in trained)


def test_any_peft_config_object():
    model = ak.wrap(tiny.build("llama"), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    config = model.peft_config["default"]
    assert (config.r, config.task_type) == (3, TaskType.CAUSAL_LM)


@pytest.mark.parametrize("method", ["loha", "lokr", "LN_Tuning", "fourierft", "hra"])
def test_other_peft_methods_under_their_own_names(method):
    model = ak.wrap(tiny.build("llama"), method)
    assert model.get_nb_trainable_parameters()[0] > 0
    model(**tiny.inputs(model.get_base_model()))


def test_a_second_wrap_adds_and_activates_an_adapter():
    model = ak.wrap(tiny.build("llama"), "lora", r=4)
    same = ak.wrap(model, "lora", adapter_name="second", r=8)
    assert same is model and set(model.peft_config) == {"default", "second"}
    assert model.active_adapter == "second"
    assert all("second" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet", "deberta-v2", "vit", "roberta"])
def test_a_fresh_head_is_trained_and_saved(family, tmp_path):
    base = tiny.build(family)
    model = ak.wrap(base, "lora")
    randomize(model)
    model.save_pretrained(tmp_path)
    fresh = tiny.build(family)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if any(name.startswith(head) for head in ("classifier", "logits_proj", "sequence_summary", "pooler")):
                parameter.normal_()  # another random head, as every load of a checkpoint without one makes
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    batch = tiny.inputs(fresh)
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_saved_adapter_folder(tmp_path):
    model = ak.wrap(tiny.build("llama"), "lora", r=4)
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    again = ak.wrap(tiny.build("llama"), tmp_path / "adapter")
    batch = tiny.inputs(model.get_base_model())
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    added = ak.wrap(model, str(tmp_path / "adapter"), adapter_name="copy")
    assert set(added.peft_config) == {"default", "copy"} and added.active_adapter == "copy"


REFUSED = {
    "method": (("lroa",), {}, "Did you mean.*lora"),
    "option": (("lora",), {"rank": 4}, "lora has no option 'rank'"),
    "one target of two": (("lora",), {"target_modules": ["q_proj", "v_porj"]}, "'v_porj' matches no module.*v_proj"),
    "regular expression": (("lora",), {"target_modules": r".*v_porj"}, "matches no module"),
    "broken expression": (("lora",), {"target_modules": "*.q"}, "not a regular expression"),
    "no target": (("lora",), {"target_modules": []}, "is empty"),
    "module to save": (("lora",), {"modules_to_save": ["lm_hed"]}, "lm_head"),
    "parameter": (("lora",), {"target_parameters": ["mlp.experts"]}, "target_parameters"),
    "not a linear": (("lora",), {"target_modules": ["self_attn"]}, "peft cannot put this adapter"),
    "rank": (("lora",), {"r": 0}, "not a rank"),
    "steps": (("adalora",), {}, "total_step"),
    "folder": (("nowhere/adapter",), {}, "neither a method nor an existing adapter folder"),
    "nothing": ((None,), {}, "is no method: give a name"),
    "options of a config": ((LoraConfig(target_modules=["q_porj"]),), {}, "q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case):
    arguments, options, message = REFUSED[case]
    model = tiny.build("llama")
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=message):
        ak.wrap(model, *arguments, **options)
    assert_untouched(model, before)


def test_refused_second_wrap_leaves_the_first(tmp_path):
    model = ak.wrap(tiny.build("llama"), "lora", r=4)
    before = fingerprint(model)
    with pytest.raises(UnknownNameError, match=r"already has an adapter named 'default'"):
        ak.wrap(model, "lora")
    with pytest.raises(AdapterError, match=r"peft cannot put"):
        ak.wrap(model, "lora", adapter_name="b", target_modules=["mlp"])
    assert_untouched(model, before)
    assert set(model.peft_config) == {"default"} and model.active_adapter == "default"


def test_an_adapter_for_another_base_is_refused(tmp_path):
    ak.wrap(tiny.build("llama", hidden_size=32), "lora").save_pretrained(tmp_path)
    model = tiny.build("llama")
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"does not fit this LlamaForCausalLM: .* has shape .* \(\d+ such tensors\)"):
        ak.wrap(model, tmp_path)
    assert_untouched(model, before)


def test_an_adapter_with_missing_keys_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ak.wrap(tiny.build("llama"), "lora").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "adapter_model.safetensors")
    model = tiny.build("llama")
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"is missing from the file"):
        ak.wrap(model, tmp_path)
    assert_untouched(model, before)


def test_an_adapter_of_an_unknown_type_is_refused(tmp_path):
    ak.wrap(tiny.build("llama"), "lora").save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LORRA"'))
    with pytest.raises(ModelError, match=r"'LORRA'.*lora"):
        ak.wrap(tiny.build("llama"), tmp_path)


def test_a_model_off_the_method_is_refused_with_what_works():
    with pytest.raises(ModelError, match=r"no.*ViTForImageClassification|ViTForImageClassification has none"):
        ak.wrap(tiny.build("vit"), "prompt")
    with pytest.raises(AdapterError, match=r"Conv1D"):
        ak.wrap(tiny.build("gpt2"), "olora")


def test_the_table_of_methods():
    table = {method.name: method for method in ak.methods()}
    assert set(PRESETS) <= set(table) and {"loha", "lokr", "boft", "xlora"} <= set(table)
    assert table["lora"].mergeable and not table["prompt"].mergeable
    assert all(method.trains and method.config_class for method in table.values())


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "houlsby"), ("houlsby", "lora"), ("prefix", "ia3"), ("lora", ["lora", "prefix"])]
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_second_adapter_of_another_kind(family, first, second, tmp_path):
    model = ak.wrap(tiny.build(family), first)
    randomize(model)
    batch = tiny.inputs(model.get_base_model())
    with_first = model.eval()(**batch).logits
    ak.wrap(model, second, adapter_name="b")
    assert all(".b" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    randomize(model)
    with_second = model.eval()(**batch).logits
    assert not torch.allclose(with_first, with_second, atol=1e-4)
    model.set_adapter("default")
    torch.testing.assert_close(model(**batch).logits, with_first, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, with_first), (tmp_path / "b", with_second)):
        loaded = PeftModel.from_pretrained(tiny.build(family), folder).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-6)


def test_virtual_tokens_cannot_join_another_adapter():
    model = ak.wrap(tiny.build("llama"), "lora")
    before = fingerprint(model)
    with pytest.raises(AdapterError, match="works on the model's input"):
        ak.wrap(model, "prompt", adapter_name="b")
    assert_untouched(model, before)
