"""Bottleneck adapters in training: checkpointing, compilation, half precision, quantized bases, Trainer, LoRA."""

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from adapters_kit.quantization import keep_layout
from tests.methods.test_bottleneck import adapter_parameters, randomize
from tests.methods.test_bottleneck_peft import adapted, logits
from tests.support import tiny


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
