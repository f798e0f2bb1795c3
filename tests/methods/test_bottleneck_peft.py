"""Bottleneck adapters do what every peft method does: save, load, switch, mix, train."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import adapters_kit as ak
from adapters_kit.errors import AdapterError, UnknownNameError
from tests.methods.test_bottleneck import PRESETS, WITH_BRANCHES, adapter_parameters, randomize
from tests.support import tiny


def adapted(family: str = "llama", preset: str = "pfeiffer", seed: int = 0, **options) -> PeftModel:
    model = ak.wrap(tiny.build(family), preset, **options)
    randomize(model, std=0.3, seed=seed)
    return model


def logits(model: nn.Module, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(model), **options).logits


# What a file holds differs between presets, and where its adapters go between families: every preset on four families
# of different make, and every other family with one preset, all by turns.
THOROUGH = ("llama", "bert", "t5", "vit")
SAVED = [(family, preset) for family in THOROUGH for preset in PRESETS]
SAVED += [(name, PRESETS[i % len(PRESETS)]) for i, name in enumerate(WITH_BRANCHES) if name not in THOROUGH]


@pytest.mark.parametrize(("family", "preset"), SAVED)
def test_save_and_load_is_exact(family: str, preset: str, tmp_path: Path, monkeypatch):
    model = adapted(family, preset)
    model.save_pretrained(tmp_path)
    # The places are in the file: loading runs no probe.
    monkeypatch.setattr("adapters_kit.anatomy.map_model", None)
    loaded = PeftModel.from_pretrained(tiny.build(family), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    frugal = PeftModel.from_pretrained(tiny.build(family), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    torch.testing.assert_close(logits(frugal), logits(model), rtol=1e-6, atol=1e-6)
    saved = adapter_parameters(model)
    assert adapter_parameters(frugal).keys() == saved.keys()  # a shared rule is still shared
    assert all(torch.equal(parameter, saved[name]) for name, parameter in adapter_parameters(frugal).items())


def test_the_file_says_where_every_adapter_is(tmp_path: Path):
    adapted("llama", "houlsby").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = [f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn", "mlp")]
    assert sorted(config["target_modules"]) == sorted(config["sites"]) == sorted(modules)
    assert config["peft_type"] == "BOTTLENECK"
    assert config["sites"]["model.layers.1.mlp"]["layer"] == 1


def test_many_layers_keep_full_paths(tmp_path: Path):
    """peft shortens lists of 20 targets and more to endings, unless it is kept from it."""
    model = ak.wrap(tiny.build("llama", num_hidden_layers=12), "houlsby")
    randomize(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 24 and "model.layers.11.mlp" in config["target_modules"]
    loaded = PeftModel.from_pretrained(tiny.build("llama", num_hidden_layers=12), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_loads_the_adapter_folder(tmp_path: Path, monkeypatch):
    # 5.24 asks for a peft that is not out; what it does to the layers is the same with this one.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    for family, auto in (("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)):
        base, folder = tmp_path / family, tmp_path / f"{family}-adapter"
        tiny.build(family).save_pretrained(base)
        model = ak.wrap(auto.from_pretrained(base), "compacter")
        randomize(model, std=0.3)
        model.save_pretrained(folder)
        loaded = auto.from_pretrained(folder).eval()
        assert not isinstance(loaded, PeftModel)
        torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=0, atol=0)
        loaded.disable_adapters()
        assert not torch.equal(logits(loaded), logits(model))
        loaded.enable_adapters()
        assert torch.equal(logits(loaded), logits(model))


def test_plain_peft_without_wrap():
    model = tiny.build("llama")
    before = logits(model)
    model = get_peft_model(model, ak.BottleneckConfig(is_parallel=True, layers=[1], mh_adapter=False))
    assert torch.equal(logits(model), before)
    assert list(model.peft_config["default"].sites) == ["model.layers.1.mlp"]
    randomize(model)
    assert not torch.equal(logits(model), before)


@pytest.mark.slow
def test_one_import_is_enough_behind_peft_s_too(tmp_path: Path):
    """In a process of its own: here, and in all other tests, the package came first."""
    tiny.build("gpt2").save_pretrained(tmp_path / "base")
    adapted("gpt2").save_pretrained(tmp_path / "adapter")
    code = (
        "import peft, adapters_kit; from peft import PeftModel; from transformers import AutoModelForCausalLM as A\n"
        f"m = PeftModel.from_pretrained(A.from_pretrained({str(tmp_path / 'base')!r}), {str(tmp_path / 'adapter')!r})\n"
        "print(sum('bottleneck_net' in name for name, _ in m.named_parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "8", done.stderr[-2000:]


def test_without_the_import_the_model_card_helps(tmp_path: Path):
    adapted("gpt2").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import adapters_kit" in card and "pip install adapters-kit" in card
    assert card.startswith("---\n")  # the metadata block of the hub stays first
    adapted("gpt2").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("pip install adapters-kit") == 1


def test_several_adapters(tmp_path: Path):
    model = adapted("llama", "pfeiffer")
    base, first = logits(tiny.build("llama")), logits(model)
    ak.wrap(model, "parallel", adapter_name="second", layers=[0])
    model.add_adapter("third", ak.BottleneckConfig(mh_adapter=False))
    for name, seed in (("second", 1), ("third", 2)):
        model.set_adapter(name)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in adapter_parameters(model).items():
                if f".{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    alone = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        assert {
            key.split("bottleneck_net.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad
        } == {name}
        alone[name] = logits(model)
    assert torch.equal(alone["default"], first)
    assert len({tensor.sum().item() for tensor in [base, *alone.values()]}) == 4
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    for name in ("second", "third"):
        loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), alone[name])
    # "second" and "third" sit on the same modules, so that one must survive the other.
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if ".second." in key]
    model.set_adapter("third")
    assert torch.equal(logits(model), alone["third"])
    model.delete_adapter("third")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), base)


def test_two_active_adapters_are_stacked():
    """As AdapterHub's Stack: the second adapter reads what the first one made."""
    model = adapted("llama", "houlsby", mh_adapter=False)
    ak.wrap(model, "houlsby", adapter_name="second", mh_adapter=False)
    randomize(model, std=0.3)
    model.base_model.set_adapter(["default", "second"])
    mlp = model.get_base_model().model.layers[0].mlp
    nets = mlp.residual_adapter.bottleneck_net
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        h = mlp.forward(x)
        h = h + nets["default"](h)
        torch.testing.assert_close(mlp(x), h + nets["second"](h))


@pytest.mark.parametrize(
    ("family", "preset"), [("llama", "parallel"), ("bert", "pfeiffer"), ("bart", "houlsby"), ("vit", "adapterplus")]
)
def test_rows_with_adapters_of_their_own(family: str, preset: str):
    model = adapted(family, preset)
    ak.wrap(model, "houlsby", adapter_name="second")
    randomize(model, std=0.3)
    model.eval()
    batch = tiny.inputs(model, batch=5)
    names = ["second", "__base__", "default", "second", "default"]
    expected = []
    with torch.no_grad():
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            if name == "__base__":
                with model.disable_adapter():
                    expected.append(model(**alone).logits)
            else:
                expected.append(model(**alone).logits)
        mixed = model(**batch, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert all(module.rows is None for module in model.modules() if hasattr(module, "bottleneck_net"))


def test_generation_with_beams_and_rows_of_different_adapters():
    model = adapted("bart", "houlsby", cross_adapter=True)
    ak.wrap(model, "pfeiffer", adapter_name="second")
    randomize(model, std=0.3)
    batch = tiny.inputs(model, batch=3)
    batch.pop("decoder_input_ids")
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    mixed = model.generate(**batch, **options, adapter_names=["default", "second", "__base__"])
    model.set_adapter("second")
    second = model.generate(**batch, **options)
    assert torch.equal(mixed[1], second[1])
    with model.disable_adapter():
        assert torch.equal(mixed[2], model.generate(**batch, **options)[2])


def test_bad_rows_are_refused():
    model = adapted("llama")
    batch = tiny.inputs(model)
    with pytest.raises(UnknownNameError, match=r"'defalt'.*Did you mean default"):
        model(**batch, adapter_names=["defalt", "default"])
    with pytest.raises(AdapterError, match="3 entries for 2 rows"):
        model(**batch, adapter_names=["default"] * 3)
    with pytest.raises(AdapterError, match="eval"):
        model.train()(**batch, adapter_names=["default"] * 2)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(call: str):
    model = adapted("llama")
    before = logits(model)
    with pytest.raises(AdapterError, match=r"not linear.*unload\(\)"):
        getattr(model, call)()
    assert torch.equal(logits(model), before)
