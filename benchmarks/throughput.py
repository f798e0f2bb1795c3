"""Useful tokens a second: packing, fused LoRA and chunked loss beside peft with the Trainer's defaults.

    python benchmarks/throughput.py                       # SmolLM2-135M on movie reviews: about five minutes, two cores
    python benchmarks/throughput.py --steps 3 --rounds 1  # a quick look

The same LoRA on the same real texts of different length, in turn, round by round, so that a machine that slows down
slows all. A useful token is one that is not padding. Both sides run the same number of steps with about as many
positions in each (so that neither profits from a larger batch), and one clock times both: from the end of the first
step to the end of the last. Written to results/throughput.json: every round, how much of the batches was padding, the
medians, and the median of each contestant's round-by-round ratios to peft.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapters_kit.recipe import Recipe
from adapters_kit.training.loop import AdapterTrainer
from adapters_kit.training.preparing import DTYPES, add_adapter, filled_in, load_base, prepare
from adapters_kit.training.report import environment, write_json


class Clock(TrainerCallback):
    """Seconds and useful tokens from the end of the first step to the end of the last."""

    def __init__(self, tokens: Callable[[], int]) -> None:
        self.tokens, self.marks = tokens, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time(), self.tokens()))

    def result(self) -> dict[str, float]:
        seconds, cpu, tokens = (last - first for first, last in zip(self.marks[0], self.marks[-1], strict=True))
        return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu, "tokens": tokens}


class Plain(Trainer):
    """The Trainer as it is, counting the tokens that it trains on."""

    useful = positions = 0

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
        self.useful += int(inputs["attention_mask"].sum())
        self.positions += inputs["attention_mask"].numel()
        return super().training_step(model, inputs, *more)


def plain(recipe: Recipe, base: nn.Module, task: Any, features: Any, steps: int) -> dict[str, float]:
    """peft's LoRA on the same layers, the Trainer's random order and fp32, padding to the longest of the batch."""
    torch.manual_seed(0)
    settings = {"training.fuse": False, "training.chunked_loss": False}
    wrapped = add_adapter(copy.deepcopy(base), recipe.changed(**settings), steps)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=recipe.training.batch_size,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: tensor for name, tensor in task.collate(rows).items() if name != "row"}

        trainer = Plain(model=wrapped, args=args, train_dataset=features, data_collator=collate)
        clock = Clock(lambda: trainer.useful)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {**clock.result(), "padding": 1 - trainer.useful / trainer.positions}


def ours(recipe: Recipe, base: nn.Module, task: Any, features: Any, steps: int) -> dict[str, float]:
    """The trainer that `train` uses, with packing; the recipe's precision."""
    packed = task.training_features(features)
    wrapped = add_adapter(copy.deepcopy(base).to(DTYPES[recipe.training.precision]), recipe, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(
            wrapped, task, recipe, packed, features[:1], task.processor, Path(folder), Console(quiet=True)
        )
        clock = Clock(lambda: trainer.meter.tokens)
        trainer.add_callback(clock)
        trainer.train()
    positions = steps * recipe.training.batch_size * task.max_length
    return {**clock.result(), "padding": 1 - trainer.meter.tokens / positions}


def rows_of_equal_size(task: Any, features: Any, batch_size: int) -> int:
    """Packed rows that hold about as many positions as a padded batch of `batch_size` examples in random order."""
    draw = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [task.length(features[i]) for i in draw]
    size = batch_size
    padded = [max(lengths[i : i + size]) * size for i in range(0, len(lengths) - size + 1, size)]
    return max(round(statistics.mean(padded) / task.max_length), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M of examples/assets.py")
    parser.add_argument("--data", help="texts, with a column `text`; default: the movie reviews of examples/assets.py")
    parser.add_argument("--batch-size", type=int, default=8, help="of the plain side; 8 is the Trainer's default")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "throughput.json")
    options = parser.parse_args()
    import assets

    needed = options.batch_size * options.max_length * options.steps
    recipe = Recipe(
        model=options.model or str(assets.smollm2()),
        task="causal-lm",
        data={"train": options.data or str(assets.reviews()), "columns": {"text": "text"}, "limit": needed},
        method={"name": "lora", "r": 16},
        training={"batch_size": options.batch_size, "max_length": options.max_length, "max_steps": options.steps},
    ).changed(**{"training.precision": "fp32", "training.evals_per_epoch": 0, "training.log_every": 1000})
    task, splits = prepare(recipe)
    base, _ = load_base(recipe, task)
    recipe = filled_in(recipe, task)
    features = task.encode(splits.train)
    rows = rows_of_equal_size(task, features, options.batch_size)
    packed = recipe.changed(**{"training.packing": True, "training.batch_size": rows})
    half = packed.changed(**{"training.precision": "bf16"})
    contestants = {"peft": (plain, recipe), "ours": (ours, packed), "ours, bf16": (ours, half)}
    rounds = []
    for number in range(options.rounds):
        names = list(contestants)
        shift = number % len(names)
        row = {}
        for name in names[shift:] + names[:shift]:
            run, given = contestants[name]
            task.recipe = given
            row[name] = run(given, base, task, features, options.steps)
            gc.collect()
        rounds.append(row)
        print(json.dumps({name: round(result["tokens_per_second"], 1) for name, result in row.items()}), flush=True)

    def median(name: str, key: str, to: str | None = None) -> float:
        return statistics.median(row[name][key] / (row[to][key] if to else 1) for row in rounds)

    result = {
        name: {
            "tokens_per_second": median(name, "tokens_per_second"),
            "ratio": median(name, "tokens_per_second", "peft"),
            "cpu_ratio": median(name, "tokens_per_cpu_second", "peft"),
            "padding": median(name, "padding"),
        }
        for name in contestants
    }
    arguments = {key: str(value) for key, value in vars(options).items()}
    write_json(options.out, {"arguments": arguments, "result": result, "rounds": rounds, "environment": environment()})
    for name, found in result.items():
        print(
            f"{name:<12}{found['tokens_per_second']:8.1f} useful tokens/s {found['ratio']:6.2f}x "
            f"(CPU time {found['cpu_ratio']:.2f}x), {found['padding']:.0%} padding"
        )


if __name__ == "__main__":
    main()
