"""Adapters saved by AdapterHub's `adapters` 1.3.0 give the same outputs here.

The fixtures come from fixtures/adapterhub/make.py.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import adapters_kit as ak
from adapters_kit.errors import ModelError, ShippingError
from adapters_kit.methods.adapterhub.folder import convert, convert_folder, is_adapterhub

FIXTURES = Path(__file__).parents[1] / "fixtures" / "adapterhub"
CASES = sorted(
    f"{folder.parent.name}/{folder.name}"
    for folder in FIXTURES.glob("*/*")
    if folder.is_dir() and folder.name != "base"
)
# adapters 1.3 does not save the rule that all of T5's layers share.
LOST = ["t5/compacter"]


def base(family: str) -> nn.Module:
    folder = FIXTURES / family / "base"
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def expected(family: str) -> tuple[dict, dict]:
    saved = load_file(FIXTURES / family / "expected.safetensors")
    inputs = {key.removeprefix("inputs."): value for key, value in saved.items() if key.startswith("inputs.")}
    return inputs, saved


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_there_is_something_to_test():
    assert len(CASES) > 50
    assert {case.partition("/")[0] for case in CASES} >= {"bert", "gpt2", "llama", "t5", "bart", "vit"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in LOST])
def test_same_outputs(case: str):
    family, _, name = case.partition("/")
    model = base(family)
    inputs, saved = expected(family)
    torch.testing.assert_close(outputs(model, inputs), saved["base"], rtol=1e-5, atol=1e-5)
    config, state = convert(FIXTURES / case, model)
    model = get_peft_model(model, config)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    trained = {key for key, _ in model.named_parameters() if "bottleneck_net" in key or "lora_" in key}
    assert not trained & set(result.missing_keys)
    torch.testing.assert_close(outputs(model.eval(), inputs), saved[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bart/houlsby", "vit/parallel", "gpt2/lora"])
def test_wrap_takes_the_folder(case: str):
    family, _, name = case.partition("/")
    inputs, saved = expected(family)
    model = ak.wrap(base(family), FIXTURES / case)
    torch.testing.assert_close(outputs(model.eval(), inputs), saved[name], rtol=1e-5, atol=1e-5)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(
        "residual_adapter" in key or "lora_" in key or "modules_to_save" in key for key in trainable
    )
    other = "pfeiffer" if name != "lora" else "lora"
    ak.wrap(model, FIXTURES / family / other, adapter_name="second")
    torch.testing.assert_close(outputs(model.eval(), inputs), saved[other], rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(outputs(model, inputs), saved[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bert/pfeiffer", "llama/compacter", "gpt2/lora"])
def test_a_converted_folder_is_a_peft_adapter(case: str, tmp_path: Path):
    family, _, name = case.partition("/")
    folder = convert_folder(FIXTURES / case, base(family), tmp_path / "out")
    inputs, saved = expected(family)
    loaded = PeftModel.from_pretrained(base(family), folder)
    torch.testing.assert_close(outputs(loaded, inputs), saved[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ShippingError, match="not an empty folder"):
        convert_folder(FIXTURES / case, base(family), folder)
    with pytest.raises(ModelError):
        convert_folder(FIXTURES / case, base("vit"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_recognized_by_content(tmp_path: Path):
    assert is_adapterhub(FIXTURES / "bert/houlsby")
    assert not is_adapterhub(FIXTURES / "bert")
    ak.wrap(base("bert"), "lora").save_pretrained(tmp_path)
    assert not is_adapterhub(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert not is_adapterhub(tmp_path)
    with pytest.raises(ShippingError, match="holds no adapter saved by AdapterHub"):
        convert(tmp_path, base("bert"))


def changed(tmp_path: Path, case: str, **options) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / case, folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    saved["config"] |= options
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("bert/houlsby", {"inv_adapter": "nice"}),
        ("bert/houlsby", {"use_gating": True}),
        ("bert/compacter", {"shared_W_phm": True}),
        ("bert/adapterplus", {"residual_before_ln": "post_add"}),
        ("bert/houlsby", {"something_new": 3}),
        ("bert/lora", {"use_dora": True}),
        ("bert/lora", {"use_gating": True}),
        ("bert/lora", {"vera_d": 0.1}),
        ("bert/lora", {"composition_mode": "scale"}),
        ("bert/lora", {"architecture": "reft"}),
    ],
)
def test_options_without_an_equal_are_named(case: str, options: dict, tmp_path: Path):
    with pytest.raises(ShippingError, match=next(iter(options))):
        convert(changed(tmp_path, case, **options), base("bert"))


def test_weights_that_the_file_lacks_or_the_model_has_no_place_for(tmp_path: Path):
    with pytest.raises(ShippingError, match="shared phm_rule is not in the file"):
        convert(FIXTURES / "t5/compacter", base("t5"))
    with pytest.raises(ModelError, match=r"model_type 'bert', but this DistilBertForMaskedLM has 'distilbert'"):
        convert(FIXTURES / "bert/lora", base("distilbert"))
    shallow = transformers.BertForMaskedLM(
        transformers.BertConfig(**base("bert").config.to_dict() | {"num_hidden_layers": 1})
    )
    for name in ("lora", "houlsby"):
        with pytest.raises(ModelError, match=r"encoder\.layer\.1\..* has no place in this BertForMaskedLM"):
            convert(FIXTURES / "bert" / name, shallow)
    with pytest.raises(ModelError, match=r"has no weights for bert\.encoder\.layer\.0\.attention"):
        convert(changed(tmp_path, "bert/pfeiffer", mh_adapter=True, original_ln_before=False), base("bert"))


def test_a_pickle_that_could_run_code_is_not_opened(tmp_path: Path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    folder = changed(tmp_path, "bert/pfeiffer")
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(ShippingError, match=r"pytorch_adapter\.bin holds more than tensors"):
        convert(folder, base("bert"))
    assert not marker.exists()
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(ShippingError, match="holds no weights"):
        convert(folder, base("bert"))
