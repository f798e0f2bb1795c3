"""Folders that other tools wrote: read, or refused in words that name the tool; peft's prompt-learning folders wrap."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.methods.test_combinations import fill
from tests.methods.test_folders import logits
from tests.support import shipping, small, tiny

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
        ("MLX-LM", {"fine_tune_type": "full", "lora_parameters": None}, "adapters.safetensors"),
        ("torchtune", {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}, "adapter_2.pt"),
        ("LitGPT", None, "lit_model.pth.lora"),
        ("OpenDelta", {"delta_type": "lora", "lora_r": 3}, "pytorch_model.bin"),
        ("ms-swift", {"swift_type": "LLAMAPRO"}, WEIGHTS),
    ],
)
def test_another_tools_format_is_named_with_the_way_out_by_every_verb(tmp_path, tool, config, file):
    folder = tmp_path / "a"
    folder.mkdir()
    folder_of(folder, config, {"layers.0.attn.q_proj.lora_a.weight": torch.ones(3, 8)}, file)
    out = tmp_path / "out"
    verbs = {
        "wrap": lambda: ak.wrap(tiny.build("llama"), folder),
        "merge": lambda: ak.merge(folder, out, base="unused"),
        "predict": lambda: ak.predict(folder, [{"prompt": "a"}]),
        "export": lambda: ak.export(folder, out),
        "gguf": lambda: ak.export(folder, out, format="gguf"),
        "convert": lambda: ak.convert(folder, to="lora", out=out),
        "compress": lambda: ak.compress(folder, out),
    }
    if config is None:
        verbs["record"] = lambda: ak.record(folder, small.model("llama"))
    for verb in verbs.values():
        with pytest.raises(AdapterError, match=tool):
            verb()
    try:
        found = str(ak.check(folder))
    except AdapterError as error:
        found = str(error)
    assert tool in found and not out.exists()


SCALE, RANK = 2.5, 3


def mlx(path, kind="lora", **more):
    """A folder as MLX-LM 0.32 writes it, for the last layer of a tiny Llama, and the model it stands for in float64: by
    its documents `W + scale · (A B)ᵀ`, where DoRA gives every row the length m."""
    path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model, tensors = tiny.build("llama").double().eval(), {}
    for place in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        linear = model.get_submodule(f"model.layers.1.{place}")
        a, b = torch.randn(linear.in_features, RANK) * 0.2, torch.randn(RANK, linear.out_features) * 0.2
        m = linear.weight.detach().norm(dim=1).float() * 1.3
        tensors |= {f"model.layers.1.{place}.lora_a": a, f"model.layers.1.{place}.lora_b": b}
        tensors |= {f"model.layers.1.{place}.m": m} if kind == "dora" else {}
        with torch.no_grad():
            new = linear.weight + SCALE * (a.double() @ b.double()).T
            linear.weight.copy_(new if kind == "lora" else m.double()[:, None] * new / new.norm(dim=1, keepdim=True))
    save_file(tensors, path / "adapters.safetensors")
    save_file(tensors, path / "0000100_adapters.safetensors")
    options = {"rank": RANK, "dropout": 0.0, "scale": SCALE} | more
    config = {"model": str(small.model("llama")), "fine_tune_type": kind, "num_layers": 1, "lora_parameters": options}
    (path / CONFIG).write_text(json.dumps(config))
    return path, logits(model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_adapters_are_read(tmp_path, kind):
    folder, expected = mlx(tmp_path / "a", kind)
    torch.testing.assert_close(logits(ak.wrap(tiny.build("llama").double(), folder)), expected, rtol=1e-6, atol=1e-6)
    report = ak.merge(folder, tmp_path / "merged", base="original")
    assert "same function" in str(report)
    torch.testing.assert_close(logits(shipping.load(tmp_path / "merged")).double(), expected, rtol=1e-4, atol=1e-4)
    assert "adapters-kit export" in str(ak.check(folder, "vllm"))
    ak.export(folder, tmp_path / "peft")
    plain = PeftModel.from_pretrained(tiny.build("llama").double(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-6, atol=1e-6)


def test_what_mlx_lm_computes_otherwise_is_refused(tmp_path):
    folder, _ = mlx(tmp_path / "a", alpha=6)
    with pytest.raises(AdapterError, match="alpha in lora_parameters meant another scale"):
        ak.wrap(tiny.build("llama"), folder)
    folder, _ = mlx(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"multiplier=.*may have multiplied into the weights.*mlx_lm\.fuse"):
        ak.wrap(tiny.build("granite"), folder)
    save_file({"model.layers.1.mlp.switch_mlp.up_proj.lora_a": torch.ones(4, 3, 8)}, folder / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"switch_mlp\.up_proj\.lora_a \(4, 3, 8\) is no factor"):
        ak.merge(folder, tmp_path / "out", base="original")


def test_a_base_that_mlx_had_quantized_is_told(tmp_path):
    folder, _ = mlx(tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text()) | {"model": "mlx-community/Tiny-4bit"}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"MLX had quantized.*--dequantize"):
        ak.wrap(tiny.build("llama"), folder)


def test_torchtunes_own_form_beside_pefts_is_the_same_adapter(lora, tmp_path):
    config, tensors, expected = lora
    folder = folder_of(tmp_path, config, tensors)
    own = {f"layers.{number}.weight": tensor.flip(0) for number, tensor in enumerate(tensors.values())}
    torch.save(own, folder / "adapter_model.pt")
    torch.testing.assert_close(logits(ak.wrap(tiny.build("llama"), folder)), expected)
    torch.save(own | {"layers.0.weight": torch.ones(3, 64)}, folder / "adapter_model.pt")
    with pytest.raises(AdapterError, match=r"holds adapter_model\.pt beside the adapter"):
        ak.wrap(tiny.build("llama"), folder)


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
