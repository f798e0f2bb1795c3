"""Useful tokens a second: packing, fused LoRA and chunked loss beside peft with the Trainer's defaults.

    python benchmarks/throughput.py --model FOLDER.gguf --data TEXTS.csv --rounds 5
    python benchmarks/throughput.py --model FOLDER --data TEXTS.csv --steps 4 --rounds 1     # a quick look

Both sides train the same LoRA on the same real texts of different length for the same number of steps, in turn, so that
a machine that slows down slows both. A useful token is one that is not padding. Written to results/throughput.json:
every round, the medians, and the median of the rounds' ratios.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapters_kit.loading import load, load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.training.preparing import load_base, prepare
from adapters_kit.training.report import environment, write_json
from adapters_kit.training.trainer import train
from adapters_kit.wrapping import wrap


class Clock(Trainer):
    """A plain Trainer that counts useful tokens and the seconds of its steps, the first one left out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokens, self.begun, self.seen = 0, 0.0, 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += 1
        if self.seen == 2:
            self.begun = time.perf_counter()
        if self.seen > 1:
            self.tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, num_items_in_batch)


def plain(recipe: Recipe, steps: int) -> dict[str, float]:
    """peft's LoRA on the same layers, random order, padding to the longest of the batch."""
    torch.manual_seed(0)
    task, splits = prepare(recipe)
    model, processor = load_base(recipe, task)
    features = task.encode(splits.train)
    wrapped = wrap(model, recipe.method.name, fuse=False, **recipe.method.options)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = task.collate(rows)
        batch.pop("row")
        return batch

    args = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=recipe.training.batch_size,
        learning_rate=2e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Clock(model=wrapped, args=args, train_dataset=features, data_collator=collate, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"tokens_per_second": trainer.tokens / (time.perf_counter() - trainer.begun), "steps": steps}


def ours(recipe: Recipe, steps: int, folder: Path) -> dict[str, float]:
    """The same recipe through train(): its own count, evaluations left out."""
    changes = {"training.packing": True, "training.max_steps": steps, "training.evals_per_epoch": 0}
    run = train(recipe.changed(**changes), folder, overwrite=True, quiet=True)
    return {"tokens_per_second": run.metrics["tokens_per_second"], "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="texts; a column `text`")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    options = parser.parse_args()
    recipe = Recipe(
        model=options.model,
        task="causal-lm",
        data={"train": options.data, "test_limit": 4},
        method={"name": "lora", "r": 16},
        training={"batch_size": options.batch_size, "max_length": options.max_length, "samples": 0, "keep_best": False},
    )
    # A packed row holds several texts: as many rows as hold the same number of tokens keep the two sides comparable.
    packed = recipe.changed(**{"training.batch_size": packed_rows(recipe)})
    rounds = []
    for number in range(options.rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        row: dict[str, float] = {}
        for mine in order:
            made = ours(packed, options.steps, options.out.parent / ".run") if mine else plain(recipe, options.steps)
            row["ours" if mine else "plain"] = made["tokens_per_second"]
            gc.collect()
        row["ratio"] = row["ours"] / row["plain"]
        rounds.append(row)
        print(json.dumps({name: round(value, 2) for name, value in row.items()}), flush=True)
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    arguments = {key: str(value) for key, value in vars(options).items()}
    write_json(
        options.out, {"arguments": arguments, "rounds": rounds, "medians": medians, "environment": environment()}
    )
    print(f"median: {medians['plain']:.0f} -> {medians['ours']:.0f} useful tokens/s, {medians['ratio']:.2f}x")


def packed_rows(recipe: Recipe) -> int:
    """Packed rows that hold about as many padded positions as one batch of the plain side."""
    task, splits = prepare(recipe)
    task.bind(load_processor(recipe.model), load(recipe.model, recipe.task))
    lengths = [len(feature["input_ids"]) for feature in task.encode(splits.train)]
    size = recipe.training.batch_size
    padded = statistics.mean(max(lengths[i : i + size]) * size for i in range(0, len(lengths) - size + 1, size))
    return max(round(padded / task.max_length), 1)


if __name__ == "__main__":
    main()
