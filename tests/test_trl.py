"""A wrapped model runs unchanged in TRL's trainers and in a plain PyTorch loop."""

import pytest
import small
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit.loading import load_processor

trl = pytest.importorskip("trl")


@pytest.fixture
def model_and_tokenizer():
    folder = small.model("llama", chat=True)
    return ak.wrap(ak.load(folder), "lora", r=4), load_processor(folder)


def moved(model, run) -> None:
    """`run()` changes every trained parameter and none of the base's."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter.detach(), before[name]), name


COMMON = {"report_to": "none", "use_cpu": True, "max_steps": 8, "disable_tqdm": True, "save_strategy": "no"}
COMMON |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False}


def test_sft_trainer(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    rows = [{"text": row["context"]} for row in small.questions(32)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), max_length=32, gradient_checkpointing=False, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    moved(model, trainer.train)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    trainer.save_model(str(tmp_path / "adapter"))
    again = ak.wrap(ak.load(small.model("llama", chat=True)), tmp_path / "adapter").eval()
    batch = tokenizer("anna lives in", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)


def test_dpo_trainer(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    rows = [
        {"prompt": row["question"], "chosen": f" {row['answer']}", "rejected": " one two"}
        for row in small.questions(32)
    ]
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_length=32, gradient_checkpointing=False, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    moved(model, trainer.train)
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[0] == pytest.approx(0, abs=1e-6), "with the adapter off, the reference is the base model"
    assert margins[-1] > 0


def test_plain_loop(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = tokenizer([row["context"] for row in small.questions(8)], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []

    def loop() -> None:
        model.train()
        for _ in range(8):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    moved(model, loop)
    assert losses[-1] < 0.9 * losses[0]
