"""Bottleneck adapters do what every peft method does: save, load, switch, mix, train."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

import adapters_kit as ak
from adapters_kit.errors import AdapterError, UnknownNameError
from adapters_kit.quantization import keep_layout
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


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "qwen3-moe", "t5", "vit", "whisper"])
@pytest.mark.parametrize("preset", ["pfeiffer", "parallel", "compacter"])
def test_gradient_checkpointing_changes_no_gradient(family: str, preset: str):
    gradients = []
    for reentrant in (None, True, False):
        model = adapted(family, preset).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**tiny.inputs(model, labels=True)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                other[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "preset"), [("llama", "parallel"), ("bert", "compacter++"), ("gpt2", "houlsby")])
def test_compiles_without_a_graph_break(family: str, preset: str):
    model = adapted(family, preset)
    batch = tiny.inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = model(**batch)
    plain.logits.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}
    model.zero_grad()
    output = compiled(**batch)
    torch.testing.assert_close(output.logits, plain.logits)
    output.logits.square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_half_precision_bases(family: str, dtype: torch.dtype, tmp_path: Path):
    model = ak.wrap(tiny.build(family).to(dtype), "pfeiffer")
    randomize(model)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}  # as peft does
    output = model(**tiny.inputs(model, labels=True))
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(family).to(dtype), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    halved = get_peft_model(tiny.build(family).to(dtype), ak.BottleneckConfig(), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in adapter_parameters(halved).values()} == {dtype}
    assert logits(halved).dtype == dtype


def test_autocast():
    model = adapted("llama", "parallel")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**tiny.inputs(model, labels=True))
        output.loss.backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(model).values())
    assert (output.logits - logits(model)).abs().max() < 0.3


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel"])
def test_quantized_bases(bits: str, preset: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    tiny.build("llama").save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        config = BitsAndBytesConfig(**QUANTIZED[bits])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()
        keep_layout(model)  # as wrap() does: compared bit by bit, both must compute in the same layout
        return model

    before = logits(base())
    model = ak.wrap(base(), preset)
    assert torch.equal(logits(model), before)
    randomize(model)
    output = model(**tiny.inputs(model, labels=True))
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(model).values())
    after = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), after)
    assert torch.equal(logits(loaded.unload()), before)


class Rows(torch.utils.data.Dataset):
    """Rows whose label is whether the first token is even: a tiny model learns it."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, tiny.VOCAB, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] % 2)}


@pytest.mark.slow
def test_trainer_evaluates_keeps_the_best_and_resumes(tmp_path: Path):
    def trainer(epochs: int, **options) -> Trainer:
        torch.manual_seed(0)
        model = ak.wrap(tiny.build("bert"), "pfeiffer", reduction_factor=2)
        arguments = TrainingArguments(
            tmp_path,
            num_train_epochs=epochs,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="constant",
            **options,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=Rows(128, 0),
            eval_dataset=Rows(64, 1),
            callbacks=[EarlyStoppingCallback(8)],
        )

    run = trainer(4)
    start = run.evaluate()["eval_loss"]
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = run.evaluate()["eval_loss"]
    assert best == pytest.approx(min(losses), abs=1e-6) and best < start
    full = {name: parameter.clone() for name, parameter in run.model.named_parameters() if parameter.requires_grad}

    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == 4 and (checkpoints[0] / "adapter_model.safetensors").is_file()
    again = trainer(4)
    again.train(resume_from_checkpoint=str(checkpoints[1]))
    for name, parameter in again.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, full[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora_first", [False, True])
@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
def test_mixed_with_lora(lora_first: bool, preset: str):
    """LoRA on linears inside the adapted MLP and attention, added before or after, gives the same model."""
    names = {
        "bottleneck": ak.BottleneckConfig(**_options(preset)),
        "lora": LoraConfig(target_modules=["q_proj", "down_proj"]),
    }
    order = ["lora", "bottleneck"] if lora_first else ["bottleneck", "lora"]
    base = logits(tiny.build("llama"))
    model = get_peft_model(tiny.build("llama"), names[order[0]], adapter_name=order[0], mixed=True)
    model.add_adapter(order[1], names[order[1]])
    assert isinstance(model, PeftMixedModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name or "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))) * 0.3
                )
    batch = tiny.inputs(tiny.build("llama"), labels=True)
    results = {}
    for active in (["lora"], ["bottleneck"], ["lora", "bottleneck"]):
        model.set_adapter(active)
        output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        trained = {
            name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
        }
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"lora" if "lora_" in name else "bottleneck" for name in trained} == set(active)
        results["+".join(active)] = output.logits.detach()
    assert len({result.sum().item() for result in [*results.values(), base]}) == 4

    lora = get_peft_model(tiny.build("llama"), names["lora"], adapter_name="lora")
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if "bottleneck" not in k}, strict=False)
    torch.testing.assert_close(results["lora"], lora(**batch).logits)
    with pytest.raises(AdapterError, match="not linear"):
        model.merge_and_unload()
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), base)
    assert not [name for name, _ in unloaded.named_modules() if "lora" in name or "residual" in name]


def _options(preset: str) -> dict:
    from adapters_kit import registry

    return dict(registry.get(preset).defaults)


def test_over_a_branch_that_is_itself_a_peft_layer():
    """OPT's feed-forward ends in the linear `fc2`, which LoRA replaces."""
    for order in (("lora", "houlsby"), ("houlsby", "lora")):
        configs = {"lora": LoraConfig(target_modules=["fc2"]), "houlsby": ak.BottleneckConfig(mh_adapter=False)}
        model = get_peft_model(tiny.build("opt"), configs[order[0]], adapter_name=order[0], mixed=True)
        model.add_adapter(order[1], configs[order[1]])
        model.set_adapter(list(order))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bottleneck_" in name or "lora_" in name:
                    parameter.normal_(std=0.3)
        model(**tiny.inputs(tiny.build("opt"), labels=True)).loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_copies_and_pickles_are_independent():
    model = adapted("llama", "parallel")
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        randomize(other, std=0.5, seed=3)
        assert not torch.equal(logits(other), before)
        assert torch.equal(logits(model), before)


def test_peft_reports_what_is_there():
    model = adapted("llama", "houlsby")
    status = model.get_layer_status()
    assert len(status) == 4 and {layer.module_type for layer in status} == {"BottleneckLayer"}
    assert model.get_model_status().trainable_params == sum(p.numel() for p in adapter_parameters(model).values())
    assert peft.PeftConfig.from_peft_type(peft_type="BOTTLENECK").peft_type == "BOTTLENECK"
