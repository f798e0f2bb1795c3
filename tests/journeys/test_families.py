"""wrap() on every model family: what is trained, what is not, and that an adapter survives save and load.

The adapters are given random values first: a fresh LoRA has B = 0, which hides every mistake in A.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters_kit as ak
from tests.support import tiny
from tests.support.numerics import close

# Linears whose weight the model reads without calling the layer: an adapter on them would never run.
READ_PAST_THE_LAYER = {"mamba": ("out_proj", "dt_proj")}
BASE = "base_model.model."


@pytest.fixture(autouse=True)
def no_model_card(monkeypatch):
    """peft renders a template at every save, which is most of the time of saving a tiny adapter."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


@dataclass
class Wrapped:
    """A family with a random LoRA on it."""

    model: PeftModel
    base_output: torch.Tensor
    output: torch.Tensor
    near: dict[str, float]  # bounds for two fp32 results of one function


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return read(model(**tiny.inputs(model, padding=padding(model))))


def read(output) -> torch.Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=-1)


def padding(model: nn.Module) -> str | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "right" if base.main_input_name == "input_ids" else None


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every trainable parameter a seeded random value near the size of trained adapters."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@cache
def wrapped(name: str) -> Wrapped:
    base = tiny.build(name)
    before = logits(base)
    model = ak.wrap(base, "lora", r=4)
    randomize(model)
    near = close(model, tiny.inputs(model, padding=padding(model)), read=read)
    return Wrapped(model, before, logits(model), near)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_all_linears_of_the_blocks_are_targets_and_no_others(name):
    base = tiny.build(name)
    linears = {path for path, module in base.named_modules() if is_linear(module)}
    in_blocks = {path for path in linears if re.search(r"\.\d+\.", path)}  # repeated things are numbered
    past = {path for path in in_blocks if path.endswith(READ_PAST_THE_LAYER.get(name, ()) or "-")}
    experts = {
        path.rpartition(".")[0]
        for path, parameter in base.named_parameters()
        if parameter.dim() == 3 and ".experts." in path
    }
    found = {
        path.removeprefix(BASE).replace(".base_layer", "")
        for path, module in wrapped(name).model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert found == in_blocks - past | experts
    assert in_blocks, "the family has linears at all"
    # Both matrices of a fused expert are adapted: peft stacks one wrapper on the other.
    stacked = [module for path, module in wrapped(name).model.named_modules() if path.endswith("experts.base_layer")]
    assert len(stacked) == len(experts) and all(isinstance(module, LoraLayer) for module in stacked)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_adapter_parameter_gets_a_gradient_and_the_base_none(name):
    model = wrapped(name).model
    model.zero_grad()
    model(**tiny.inputs(model, labels=True, padding=padding(model))).loss.backward()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    without = [path for path, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert not [path for path, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    fresh = tiny.build(name).state_dict()
    adapter_only = [path for path in trained if "lora_" in path]
    heads = {path.removeprefix(BASE).replace("modules_to_save.default.", "") for path in trained.keys() - adapter_only}
    assert heads <= fresh.keys() and adapter_only
    model.zero_grad()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_adapter_changes_the_output_and_switches_off_exactly(name):
    case = wrapped(name)
    assert not torch.allclose(case.output, case.base_output, atol=1e-3)
    with case.model.disable_adapter():
        torch.testing.assert_close(logits(case.model), case.base_output, **case.near)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_saved_and_loaded_by_peft_it_computes_the_same_and_merges(name, tmp_path):
    case = wrapped(name)
    case.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(name), tmp_path)
    torch.testing.assert_close(logits(loaded), case.output, **case.near)
    assert not [path for path, p in loaded.named_parameters() if p.requires_grad]
    merged = loaded.merge_and_unload()
    assert type(merged) is type(tiny.build(name))
    torch.testing.assert_close(logits(merged), case.output, rtol=1e-4, atol=1e-4 * case.output.abs().max().item())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linears_that_a_model_reads_past_are_no_targets(device):
    """WavLM gives its projections' weights to a function of torch: LoRA layers there would be silent, then merged."""
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.WavLMModel(transformers.WavLMConfig(**options)).to(device)
    model = ak.wrap(model, "lora", r=2)
    found = {path.split(".layers.")[1] for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    # The gate of the positions is called as a layer, unlike the four projections beside it.
    called = ("feed_forward.intermediate_dense", "feed_forward.output_dense", "attention.gru_rel_pos_linear")
    assert found == {f"{block}.{name}" for block in (0, 1) for name in called}


CHECKPOINTED = ["bert", "deberta-v2", "gpt2", "llama", "gemma3", "mixtral", "gpt-oss", "mamba", "t5", "vit", "whisper"]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradients_under_checkpointing_are_the_same(name):
    model = ak.wrap(tiny.build(name), "lora", r=4).train()
    randomize(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**tiny.inputs(model, labels=True)).loss.backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()  # reentrant checkpoints need it: the frozen base gives no gradient
        for path, gradient in gradients().items():
            scale = expected[path].abs().max().item()
            torch.testing.assert_close(gradient, expected[path], rtol=1e-4, atol=1e-5 * scale)
        model.gradient_checkpointing_disable()


# Not wav2vec2: transformers gives that class a `load_adapter` of another kind.
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "deberta-v2": "AutoModelForSequenceClassification",
    "modernbert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "gemma3": "AutoModelForCausalLM",
    "gpt-oss": "AutoModelForCausalLM",
    "deepseek-v3": "AutoModelForCausalLM",
    "mamba": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
}


@pytest.mark.parametrize(("name", "auto_class"), AUTO.items())
def test_the_adapter_folder_loads_by_itself_with_auto_classes(name, auto_class, tmp_path):
    """transformers finds the base that the adapter names; peft's own auto class finds base and task."""
    tiny.build(name).save_pretrained(tmp_path / "base")
    model = ak.wrap(getattr(transformers, auto_class).from_pretrained(tmp_path / "base"), "lora", r=4)
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval())
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)
    if model.peft_config["default"].task_type is not None:
        auto_peft = {
            "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
            "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
            "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        }[model.peft_config["default"].task_type]
        if name != "whisper":  # peft's seq2seq class is for text
            loaded = auto_peft.from_pretrained(tmp_path / "adapter")
            torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)


TEXT_CLASSIFIERS = [*tiny.names("encoder"), "gpt2", "llama", "qwen2", "gemma3", "mixtral", "bart", "t5"]
IMAGE_CLASSIFIERS = ["vit", "dinov2", "clip-vision"]
LABELS = ["bad", "mixed", "good"]
HEADS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}


def without_head(name: str, folder: Path) -> None:
    """Save the family's backbone only, as pretrained checkpoints come."""
    model = tiny.build(name, model_class="CLIPModel" if name == "clip-vision" else None, num_labels=2)
    getattr(model, model.base_model_prefix, model).save_pretrained(folder)


def randomly_headed(folder: Path, task: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ak.load(folder, task=task, labels=None if task == "question-answering" else LABELS)


FRESH_HEADS = [
    *((name, "text-classification") for name in TEXT_CLASSIFIERS),
    *((name, "image-classification") for name in IMAGE_CLASSIFIERS),
    *((name, "token-classification") for name in ("bert", "modernbert", "llama")),
    *((name, "question-answering") for name in ("bert", "modernbert", "llama")),
]


@pytest.mark.parametrize(("name", "task"), FRESH_HEADS)
def test_a_fresh_head_is_trained_and_saved_with_the_adapter(name, task, tmp_path):
    without_head(name, tmp_path / "base")
    auto_class = getattr(transformers, HEADS[task])
    fresh = auto_class.from_pretrained(tmp_path / "base", output_loading_info=True)[1]["missing_keys"]
    model = randomly_headed(tmp_path / "base", task, seed=1)
    base_output = logits(model)
    wrapped_model = ak.wrap(model, "lora", r=4)
    trained = {
        path.removeprefix(BASE).replace("modules_to_save.default.", "").replace(".base_layer", "")
        for path, parameter in wrapped_model.named_parameters()
        if parameter.requires_grad
    }
    assert fresh and fresh <= trained, f"frozen at random: {fresh - trained}"
    more = {path for path in trained - fresh if "lora_" not in path and ".pooler." not in path}
    assert not more, "the head with its pooler, and nothing else that was pretrained"

    randomize(wrapped_model)
    before = {path: p.detach().clone() for path, p in wrapped_model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in wrapped_model.parameters() if p.requires_grad], lr=0.1)
    wrapped_model(**tiny.inputs(wrapped_model, batch=3, labels=True)).loss.backward()
    optimizer.step()
    changed = {path for path, p in wrapped_model.named_parameters() if not torch.equal(p, before[path])}
    still = {path for path, p in wrapped_model.named_parameters() if p.requires_grad} - changed
    # A softmax over positions does not see a bias that all positions share.
    assert all(path.endswith("qa_outputs.modules_to_save.default.bias") for path in still)
    assert not [path for path in changed if not wrapped_model.get_parameter(path).requires_grad]

    wrapped_model.save_pretrained(tmp_path / "adapter")
    other = randomly_headed(tmp_path / "base", task, seed=2)
    assert not torch.equal(logits(other), base_output), "another random head"
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(wrapped_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Albert", "DebertaV2", "MPNet"])
def test_a_pooler_that_the_checkpoint_lacks_is_not_left_at_random(family, tmp_path):
    """A masked-LM checkpoint has no pooler; a classifier made from it does."""
    name = {"DebertaV2": "deberta-v2"}.get(family, family.lower())
    checkpoint = tiny.build(name, model_class=f"{family}ForMaskedLM")
    checkpoint.save_pretrained(tmp_path / "base")
    stored = checkpoint.state_dict().keys()
    model = randomly_headed(tmp_path / "base", "text-classification", seed=1)
    fresh = {path for path, _ in model.named_parameters() if path not in stored}
    model = ak.wrap(model, "lora", r=4)
    trained = {
        path.removeprefix(BASE).replace("modules_to_save.default.", "")
        for path, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert fresh and fresh <= trained
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        randomly_headed(tmp_path / "base", "text-classification", seed=2), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_trainer_of_transformers_takes_it_as_it_is(name, tmp_path):
    model = ak.wrap(tiny.build(name), "lora", r=4)
    batch = tiny.inputs(model, batch=4, labels=True)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert changed == {path for path, p in model.named_parameters() if p.requires_grad}
    assert trainer.evaluate()["eval_loss"] < losses[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.build(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral", "bart"])
def test_two_adapters_beside_each_other_switch(name):
    model = ak.wrap(tiny.build(name), "lora", r=4)
    randomize(model)
    first = logits(model)
    model = ak.wrap(model, "lora", r=2, adapter_name="second")
    assert model.active_adapter == "second"
    randomize(model)
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-6)
