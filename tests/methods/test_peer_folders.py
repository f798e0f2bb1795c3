"""Folders that other tools wrote: read, or refused in words that name the tool; peft's prompt-learning folders wrap."""

import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.methods.test_combinations import fill
from tests.methods.test_folders import logits
from tests.support import small, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    model = get_peft_model(tiny.build("llama"), LoraConfig(r=3, target_modules=["q_proj", "up_proj"])).eval()
    fill(model)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS), logits(model)


def folder_of(path, config, tensors, file=WEIGHTS):
    if config is not None:
        (path / CONFIG).write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(tensors, path / file)
    else:
        torch.save(tensors, path / file)
    return path


@pytest.mark.parametrize("name", ["default", "customer_7"])
def test_an_adapters_name_inside_the_tensors_names_is_read_over(lora, tmp_path, name):
    config, tensors, expected = lora
    named = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in tensors.items()}
    torch.testing.assert_close(logits(ak.wrap(tiny.build("llama"), folder_of(tmp_path, config, named))), expected)


def test_an_option_of_a_newer_peft_is_refused_unless_it_is_off(lora, tmp_path):
    config, tensors, expected = lora
    off = folder_of(tmp_path, config | {"future": None, "later": False}, tensors)
    torch.testing.assert_close(logits(ak.wrap(tiny.build("llama"), off)), expected)
    on = folder_of(tmp_path, config | {"future_gain": 2.5}, tensors)
    with pytest.raises(AdapterError, match=r"future_gain=2\.5.*pip install -U peft"):
        ak.wrap(tiny.build("llama"), on)
    with pytest.raises(AdapterError, match="future_gain"):
        ak.merge(on, tmp_path / "merged", base=small.model("llama"))


@pytest.mark.parametrize(
    ("tool", "config", "file"),
    [
        ("MLX-LM", {"fine_tune_type": "lora", "lora_parameters": {"rank": 3}}, "adapters.safetensors"),
        ("torchtune", {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}, "adapter_2.pt"),
        ("LitGPT", None, "lit_model.pth.lora"),
        ("OpenDelta", {"delta_type": "lora", "lora_r": 3}, "pytorch_model.bin"),
        ("ms-swift", {"swift_type": "LLAMAPRO"}, WEIGHTS),
    ],
)
@pytest.mark.parametrize("verb", ["wrap", "merge"])
def test_another_tools_format_is_named_with_the_way_out(tmp_path, tool, config, file, verb):
    folder = folder_of(tmp_path, config, {"layers.0.attn.q_proj.lora_a.weight": torch.ones(3, 8)}, file)
    with pytest.raises(AdapterError, match=tool):
        ak.wrap(tiny.build("llama"), folder) if verb == "wrap" else ak.merge(folder, tmp_path / "out", base="unused")


@pytest.mark.parametrize(
    "kind",
    [
        PromptTuningConfig,
        PromptEncoderConfig,
        PrefixTuningConfig,
        lambda **given: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **given),
    ],
    ids=["prompt", "p-tuning", "prefix", "projected-prefix"],
)
def test_a_prompt_learning_folder_computes_what_was_saved_and_trains_on(tmp_path, kind):
    model = get_peft_model(tiny.build("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    fill(model)
    model.save_pretrained(tmp_path / "a")
    again = ak.wrap(tiny.build("llama"), tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model))
    again(**tiny.inputs(again), labels=tiny.inputs(again)["input_ids"]).loss.backward()
    trained = [parameter for parameter in again.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        trained[0].add_(0.1)
    again.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(ak.wrap(tiny.build("llama"), tmp_path / "b")), logits(again))
