"""Prefixes and combinations under Trainer, TRL and on quantized bases."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import adapters_kit as ak
from adapters_kit.quantization import keep_layout
from tests.methods.test_prefix import CLOSE, fill, logits, wrapped
from tests.support import small, tiny


def rows(model, count=16):
    batch = tiny.inputs(model, batch=count, labels=True)
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")


def arguments(folder, **options):
    return {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "use_cpu": True, "seed": 0} | options


@pytest.mark.parametrize("method", ["prefix", ["lora", "prefix"], "unipelt"], ids=str)
@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("gpt2", True), ("bert", True)])
def test_trainer_learns_and_the_saved_adapter_is_what_was_trained(name, checkpointing, method, tmp_path):
    torch.manual_seed(0)
    model = ak.wrap(tiny.build(name), method)
    data = rows(model)
    before = model.get_base_model().state_dict()
    frozen = {key: value.clone() for key, value in before.items() if "default" not in key}
    options = {"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 16}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, gradient_checkpointing=checkpointing, **options)),
        train_dataset=data,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-3:]) < losses[0] - 0.03
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    trainer.save_model(tmp_path / "adapter")
    batch = tiny.inputs(model)
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, **batch), logits(model.eval(), **batch), **CLOSE)


# That each family's prefix gets a gradient is in test_prefix.py; here the Trainer's part, on one family of each make.
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper", "clip-vision"])
def test_trainer_runs_on_every_kind_of_family(name, tmp_path):
    model = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=3)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    options = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    Trainer(model=model, args=TrainingArguments(**arguments(tmp_path, **options)), train_dataset=rows(model, 4)).train()
    for key, parameter in model.named_parameters():
        trained = ".prefix_" in key or ("modules_to_save" in key and parameter.requires_grad)
        assert torch.isfinite(parameter).all() and torch.equal(parameter, before[key]) != trained, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_trl_with_its_defaults(name, tmp_path):
    trl = pytest.importorskip("trl")
    folder = small.model(name)
    model = ak.wrap(AutoModelForCausalLM.from_pretrained(folder), "prefix", num_virtual_tokens=4)
    data = Dataset.from_list([{"text": row["text"]} for row in small.sentiment(16)])
    steps = 8 if name == "llama" else 2
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder),
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=steps, learning_rate=3e-2, logging_steps=1, bf16=False)),
        train_dataset=data,
    )
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[key]) != (".prefix_" in key) for key, p in model.named_parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps and (name != "llama" or losses[-1] < losses[0])


# Every other family over nf4 and int8 is in test_quantized_methods.py.
@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["prefix", ["lora", "pfeiffer", "prefix"]], ids=str)
def test_quantized_bases(bits, method, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny.build("llama").save_pretrained(tmp_path / "base")
    how = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[bits]

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how)

    model = prepare_model_for_kbit_training(base(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = fill(ak.wrap(model, method))
    batch = tiny.inputs(model, labels=True)
    model.train()
    model(**batch).loss.backward()
    ours = [p for key, p in model.named_parameters() if ".prefix_" in key]
    assert ours and all(p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in ours)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(model, **batch)
    with model.disable_adapter():
        assert (logits(model, **batch) - expected).abs().max() > 1e-3
    plain = base()
    keep_layout(plain)  # as wrap() did: repacked weights have other scales
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, **batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart"])
def test_flash_attention_agrees_on_a_gpu(name):
    pytest.importorskip("flash_attn")
    model = wrapped(name).cuda().bfloat16()
    for padding in (None, "left", "right"):
        batch = tiny.inputs(model, padding=padding)
        model.get_base_model().set_attn_implementation("eager")
        expected = logits(model, **batch)
        model.get_base_model().set_attn_implementation("flash_attention_2")
        got = logits(model, **batch)
        real = batch["attention_mask"].bool() if expected.dim() == 3 and name != "bart" else slice(None)
        torch.testing.assert_close(got[real], expected[real], rtol=0.05, atol=0.1)
