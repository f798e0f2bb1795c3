"""A task adapter on top of a language adapter (Pfeiffer et al. 2020, MAD-X, arXiv:2005.00052).

    python examples/stack.py                                  # SmolLM2 and movie reviews, some minutes on 2 cores
    python examples/stack.py --model MODEL --data FOLDER      # any causal model; train.csv and test.csv with text,label

1. A bottleneck adapter learns the language of the reviews: next tokens, no labels.
2. A classifier is put on the same base. The language adapter goes in below, frozen; a new adapter and the head are
   trained above it.
3. Both are saved apart, so that one language adapter can serve many tasks, and put together again.
"""

import argparse
import csv
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import adapters_kit as ak


def learn_language(model: str, data: str, out: Path, limit: int) -> Path:
    """Train a language adapter; returns its folder."""
    recipe = ak.Recipe(
        model=model,
        task="causal-lm",
        data={"train": data, "columns": {"text": "text"}, "limit": limit, "test_limit": max(limit // 4, 8)},
        method="pfeiffer",
        training={"epochs": 1, "batch_size": 8, "max_length": 64, "keep_best": False, "samples": 0},
    )
    run = ak.train(recipe, out)
    print(f"language: perplexity {run.metrics['base_perplexity']:.1f} -> {run.metrics['perplexity']:.1f}")
    return run.adapter


def rows(data: str, part: str, tokenizer, labels: list[str], limit: int) -> Dataset:
    """The first rows of `train.csv` or `test.csv`, as token ids."""
    with open(Path(data) / f"{part}.csv", encoding="utf-8") as file:
        read = list(csv.DictReader(file))[:limit]
    made = tokenizer([row["text"] for row in read], truncation=True, max_length=64)
    return Dataset.from_dict({**made, "labels": [labels.index(row["label"]) for row in read]})


def accuracy(model: torch.nn.Module, data: Dataset, collate) -> float:
    """Share of rows whose label the model gives."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), 16):
            batch = collate([data[i] for i in range(start, min(start + 16, len(data)))])
            right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(data)


def main(model: str, data: str, out: Path, limit: int, rate: float = 1e-3) -> tuple[float, float]:
    """Train both, then put them together from their folders; returns the accuracy before and after that."""
    language = learn_language(model, data, out / "language", limit)

    tokenizer = ak.load_processor(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(Path(data) / "train.csv", encoding="utf-8") as file:
        labels = sorted({row["label"] for row in csv.DictReader(file)})
    train, test = (rows(data, part, tokenizer, labels, limit) for part in ("train", "test"))
    collate = DataCollatorWithPadding(tokenizer)

    def base() -> torch.nn.Module:
        torch.manual_seed(0)  # both times the same fresh head
        loaded = ak.load(model, task="text-classification", labels=labels)
        loaded.config.pad_token_id = tokenizer.pad_token_id
        return loaded

    classifier = ak.wrap(base(), language, adapter_name="language")
    classifier = ak.stack(classifier, "lora", adapter_name="task", r=8)  # freezes "language"
    classifier.print_trainable_parameters()
    options = {"learning_rate": rate, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(out / "trainer"), num_train_epochs=2, use_cpu=True, **options)
    Trainer(model=classifier, args=arguments, train_dataset=train, data_collator=collate).train()
    trained = accuracy(classifier, test, collate)
    classifier.save_pretrained(out / "adapters")  # out/adapters/language and out/adapters/task

    again = PeftModel.from_pretrained(base(), out / "adapters" / "language", adapter_name="language")
    again.load_adapter(out / "adapters" / "task", "task")
    ak.activate(again, ["language", "task"])
    loaded = accuracy(again, test, collate)
    print(f"accuracy: {trained:.3f} trained, {loaded:.3f} loaded again from two folders")
    return trained, loaded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a hub id, folder or .gguf file of a causal model; SmolLM2 by default")
    parser.add_argument("--data", help="a folder with train.csv and test.csv; the movie reviews by default")
    parser.add_argument("--limit", type=int, default=400, help="rows to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/stack"))
    given = parser.parse_args()
    import assets

    main(given.model or str(assets.smollm2()), given.data or str(assets.reviews()), given.out, given.limit)
