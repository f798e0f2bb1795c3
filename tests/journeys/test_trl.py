"""A wrapped model runs unchanged in TRL's trainers and in a plain PyTorch loop: the examples, on tiny models."""

import sys

import plain_loop
import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from tests.support import small

trl = pytest.importorskip("trl")
import dpo_trl  # noqa: E402
import sft_trl  # noqa: E402

COMMON = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
COMMON |= {"disable_tqdm": True, "max_length": 32}


def moved(model, run) -> None:
    """`run()` changes every trained parameter and none of the base's."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter.detach(), before[name]), name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_trainer(tmp_path, checkpointing):
    """With TRL's default, activation checkpointing, and without."""
    folder = str(small.model("llama", chat=True))
    rows = Dataset.from_list([{"text": row["context"]} for row in small.questions(32)])
    trainer = sft_trl.trainer_for(folder, rows, tmp_path, activation_checkpointing=checkpointing, **COMMON)
    moved(trainer.model, trainer.train)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    trainer.save_model(str(tmp_path / "adapter"))
    again = ak.wrap(ak.load(folder), tmp_path / "adapter").eval()
    batch = ak.load_processor(folder)("anna lives in", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)


def test_dpo_trainer(tmp_path):
    reviews = [{"text": row["text"], "label": f"{'posi' if row['label'] == 'good' else 'nega'}tive"} for row in ROWS]
    pairs = dpo_trl.kind_reviews(Dataset.from_list(reviews))
    assert len(pairs) == 16
    trainer = dpo_trl.trainer_for(str(small.model("llama", chat=True)), pairs, tmp_path, **COMMON)
    moved(trainer.model, trainer.train)
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[0] == pytest.approx(0, abs=1e-6), "with the adapter off, the reference is the base model"
    assert margins[-1] > 0


ROWS = small.sentiment(32)


def test_plain_loop(tmp_path):
    folder = str(small.model("bert"))
    model = ak.wrap(ak.load(folder, task="text-classification", labels=["bad", "good"]), "lora", r=4)
    losses = []

    def run() -> None:
        torch.manual_seed(0)
        found = plain_loop.loop(model, ak.load_processor(folder), Dataset.from_list(ROWS), ["bad", "good"], 12, 1e-2)
        losses.extend(found)

    moved(model, run)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("example", ["sft_trl", "dpo_trl", "plain_loop"])
def test_the_examples_run_as_commands(example, tmp_path, monkeypatch, capsys):
    rows = {
        "sft_trl": [{"text": row["text"]} for row in ROWS],
        "dpo_trl": [{"prompt": "one", "chosen": " two", "rejected": " three"}] * 8,
        "plain_loop": ROWS,
    }[example]
    data = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    family = "bert" if example == "plain_loop" else "llama"
    words = ["--model", str(small.model(family)), "--data", str(data), "--steps", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [example, *words])
    sys.modules[example].main()
    assert f"Adapter: {tmp_path / 'out' / 'adapter'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
