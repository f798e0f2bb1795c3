"""Useful tokens a second: packing, fused LoRA and chunked loss beside peft with the Trainer's defaults.

    python benchmarks/throughput.py                                # SmolLM2-135M: about fifteen minutes, two cores
    python benchmarks/throughput.py --data reviews --steps 3 --rounds 1 --out /tmp/look.json  # a quick look

What decides is how much the lengths of the texts differ, so there are two sets of real texts. `docstrings`: those of
Python's own standard library, a line or a page each, as documents, chats and instructions are. `reviews`: single
sentences from film reviews, which hardly differ.

What both sides share: the base model, loaded once; the texts, cut at the same length; LoRA of one rank on the same
layers, with peft's default of no dropout; the number of steps, and about as many positions (tokens and padding) in
each, so that neither profits from a larger batch; AdamW; one clock, from the end of the first step to the end of the
last. A useful token is one that is not padding. What differs:

    peft    transformers' Trainer with its defaults: 8 examples in random order, padded to the longest of them, all of
            the logits, no checkpointing, the weights in the dtype of the contestant's name
    ours    what `train` does with `training.packing`: rows of `--max-length` tokens that hold several examples, fused
            LoRA layers, the loss in chunks

`bf16` is the dtype that `from_pretrained` gives SmolLM2's own checkpoint, `fp32` what `train` chooses on a CPU. The
contestants take turns, round by round, so that a machine that slows down slows all; each round draws other batches.
Written to results/throughput.json: every round; tokens over seconds of all rounds together; the ratios to peft in the
same dtype and to the faster of both; the padding of the batches that were timed and of the whole epoch in random order.
"""

import argparse
import ast
import copy
import gc
import json
import random
import statistics
import sysconfig
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

from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.artifacts.files import write_json
from adapters_kit.recipe import Recipe
from adapters_kit.training.assembly import add_adapter, load_base
from adapters_kit.training.loop import AdapterTrainer
from adapters_kit.training.resolve import filled_in, prepare, resolve

CONTESTANTS = ("peft fp32", "peft bf16", "ours fp32", "ours bf16")


class Clock(TrainerCallback):
    """Seconds, CPU seconds, useful tokens and positions from the end of the first step to the end of the last."""

    def __init__(self, counts: Callable[[], tuple[int, int]]) -> None:
        self.counts, self.marks = counts, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time(), *self.counts()))

    def result(self) -> dict[str, float]:
        names = ("seconds", "cpu_seconds", "tokens", "positions")
        return {name: b - a for name, a, b in zip(names, self.marks[0], self.marks[-1], strict=True)}


class Plain(Trainer):
    """The Trainer as it is, counting the tokens that it trains on."""

    useful = positions = 0

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
        self.useful += int(inputs["attention_mask"].sum())
        self.positions += inputs["attention_mask"].numel()
        return super().training_step(model, inputs, *more)


def plain(recipe: Recipe, base: nn.Module, task: Any, features: Any) -> dict[str, float]:
    """peft's LoRA on the same layers; the Trainer's random order, padding to the longest of the batch."""
    settings = {"training.fuse": False, "training.chunked_loss": False}
    wrapped = add_adapter(base, recipe.changed(**settings), recipe.training.max_steps)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.training.max_steps,
            per_device_train_batch_size=recipe.training.batch_size,
            seed=recipe.training.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: tensor for name, tensor in task.collate(rows).items() if name != "row"}

        trainer = Plain(model=wrapped, args=args, train_dataset=features, data_collator=collate)
        clock = Clock(lambda: (trainer.useful, trainer.positions))
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.result()


def ours(recipe: Recipe, base: nn.Module, task: Any, features: Any) -> dict[str, float]:
    """The trainer that `train` uses, with packing."""
    recipe = recipe.changed(**{"training.packing": True, "training.batch_size": rows_of_equal_size(task, features)})
    task.recipe = recipe
    packed = task.training_features(features)
    wrapped = add_adapter(base, recipe, recipe.training.max_steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(
            wrapped, task, recipe, packed, features[:1], task.processor, Path(folder), Console(quiet=True)
        )
        row = recipe.training.batch_size * task.max_length
        clock = Clock(lambda: (trainer.meter.tokens, trainer.state.global_step * row))
        trainer.add_callback(clock)
        trainer.train()
    return clock.result()


def padded(task: Any, features: Any) -> tuple[float, float]:
    """Positions of a batch in random order, padded to its longest, and the part of them that is padding."""
    draw = random.Random(0).sample(range(len(features)), len(features))
    lengths = [task.length(features[i]) for i in draw]
    size = task.recipe.training.batch_size
    batches = [lengths[i : i + size] for i in range(0, len(lengths) - size + 1, size)]
    area = sum(max(batch) * size for batch in batches)
    return area / len(batches), 1 - sum(map(sum, batches)) / area


def rows_of_equal_size(task: Any, features: Any) -> int:
    """Packed rows that hold about as many positions as a padded batch in random order."""
    return max(round(padded(task, features)[0] / task.max_length), 1)


def docstrings(out: Path) -> Path:
    """The docstrings of Python's standard library, one a row."""
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and text.strip():
                        file.write(json.dumps({"text": text}) + "\n")
    return out


def race(recipe: Recipe, bases: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
    """All contestants, round by round, on one set of texts."""
    recipe = resolve(recipe)
    task, splits = prepare(recipe)
    some = next(iter(bases.values()))
    task.bind(bases["processor"], some)
    recipe = filled_in(recipe, task)
    task.recipe = recipe
    features = task.encode(splits.train)
    positions, padding = padded(task, features)
    done: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        shift = number % len(CONTESTANTS)
        row = {}
        for name in CONTESTANTS[shift:] + CONTESTANTS[:shift]:
            who, dtype = name.split()
            given = recipe.changed(**{"training.seed": number, "training.precision": dtype})
            task.recipe = given
            row[name] = {"peft": plain, "ours": ours}[who](given, copy.deepcopy(bases[dtype]), task, features)
            gc.collect()
        done.append(row)
        print(json.dumps({name: round(r["tokens"] / r["seconds"], 1) for name, r in row.items()}), flush=True)

    def total(name: str, key: str) -> float:
        return sum(row[name][key] for row in done)

    result: dict[str, Any] = {}
    for name in CONTESTANTS:
        tokens = total(name, "tokens")
        result[name] = {
            "tokens_per_second": tokens / total(name, "seconds"),
            "tokens_per_cpu_second": tokens / total(name, "cpu_seconds"),
            "seconds_per_1000_positions": 1000 * total(name, "seconds") / total(name, "positions"),
            "padding": 1 - tokens / total(name, "positions"),
        }
    for key, ratio in (("tokens_per_second", "ratio"), ("tokens_per_cpu_second", "cpu_ratio")):
        fastest = max(result[name][key] for name in CONTESTANTS if name.startswith("peft"))
        for name, found in result.items():
            found[ratio] = found[key] / result[f"peft {name.split()[1]}"][key]
            found[f"{ratio}_to_fastest"] = found[key] / fastest
    lengths = [task.length(feature) for feature in features]
    texts = {"examples": len(lengths), "mean": statistics.mean(lengths), "spread": statistics.pstdev(lengths)}
    texts |= {"median": statistics.median(lengths), "positions": positions, "padding": padding}
    return {"result": result, "texts": texts, "rounds": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M of examples/assets.py")
    parser.add_argument("--data", nargs="+", default=["docstrings", "reviews"], help="those two, or files with texts")
    parser.add_argument("--batch-size", type=int, default=8, help="of the plain side; 8 is the Trainer's default")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "throughput.json")
    options = parser.parse_args()
    import assets

    with tempfile.TemporaryDirectory() as folder:
        known = {"docstrings": lambda: docstrings(Path(folder) / "docstrings.jsonl"), "reviews": assets.reviews}
        recipes = {
            name: Recipe(
                model=options.model or str(assets.smollm2()),
                task="causal-lm",
                data={"train": str(known.get(name, lambda name=name: name)()), "columns": {"text": "text"}},
                method={"name": "lora", "r": 16},
                training={"batch_size": options.batch_size, "max_length": options.max_length, "evals_per_epoch": 0},
            ).changed(**{"training.max_steps": options.steps, "training.log_every": 1000, "training.precision": "fp32"})
            for name in options.data
        }
        first = next(iter(recipes.values()))
        base, processor = load_base(resolve(first), prepare(first)[0])
        bases: dict[str, Any] = {dtype: copy.deepcopy(base).to(DTYPES[dtype]) for dtype in ("fp32", "bf16")}
        bases["processor"] = processor
        found = {}
        for name, recipe in recipes.items():
            print(name, flush=True)
            found[name] = race(recipe, bases, options.rounds)
    arguments = {key: str(value) for key, value in vars(options).items()}
    write_json(options.out, {"arguments": arguments, "environment": common.environment(), "texts": found})
    for name, part in found.items():
        print(f"{name}: {part['texts']['padding']:.0%} of batches in random order is padding")
        for who, numbers in part["result"].items():
            print(
                f"  {who:<10}{numbers['tokens_per_second']:8.1f} useful tokens/s  {numbers['ratio']:5.2f}x "
                f"(CPU time {numbers['cpu_ratio']:.2f}x; to the faster peft {numbers['ratio_to_fastest']:.2f}x), "
                f"{numbers['padding']:.0%} padding, {numbers['seconds_per_1000_positions']:.2f} s a 1000 positions"
            )


if __name__ == "__main__":
    main()
