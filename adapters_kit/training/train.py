"""train(): one recipe, one run folder. Hugging Face's Trainer does the training."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from torch import nn

from adapters_kit.artifacts.files import write_json, write_text
from adapters_kit.artifacts.record import record_base
from adapters_kit.errors import TrainingError
from adapters_kit.kernels.fuse import fuse_report
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task
from adapters_kit.tasks.metrics import confusion
from adapters_kit.training import pictures
from adapters_kit.training import run as report
from adapters_kit.training.callbacks import peak_memory
from adapters_kit.training.given import Given, recipe_from
from adapters_kit.training.loop import CHECKPOINTS, AdapterTrainer, check_trackers, total_steps
from adapters_kit.training.resolve import add_adapter, filled_in, load_base, prepare, processes
from adapters_kit.training.run import Run


def train(recipe: Given, out: str | Path, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> Run:
    """Trains what the recipe describes and writes the run folder.

    The base model is scored on the held-out data before training, the adapter after it.

    Args:
        recipe: a `Recipe`, the path of its YAML file, or a dict of its keys. In a dict, `data` may be rows in memory: a
            frame, a `datasets.Dataset`, a list of dicts; they are written to `data/HASH.parquet` beside the run folder.
        out: the run folder, made here.
        resume: go on from the last checkpoint in `out`; the run ends as if it had never stopped. Starts from the
            beginning if there is no checkpoint yet.
        overwrite: delete a run that is in `out` already.
        quiet: print nothing.

    Raises:
        RecipeError, DataError, ModelError, UnknownNameError, MissingPackageError: before anything is written.
        TrainingError: a loss that is not finite, no memory left, or a folder that holds another run.
    """
    out = Path(out)
    recipe = recipe_from(recipe, out.parent / "data")
    state = PartialState(**processes())
    console = Console(stderr=True, quiet=quiet or not state.is_main_process)
    _check_folder(out, resume, overwrite)
    check_trackers(recipe)
    task, splits = prepare(recipe)
    model, processor = load_base(recipe, task)
    recipe = filled_in(recipe, task)
    if resume:
        recipe = _begun_recipe(out, recipe)
    with task.notes.about("training data"):
        train_features = task.training_features(task.encode(splits.train))
    with task.notes.about("held-out data"):
        test_features = task.encode(splits.test)
    console.print(
        f"{recipe.model}: {len(splits.train):,} examples to train on, {len(splits.test):,} held out",
        highlight=False,
        soft_wrap=True,
    )
    for note in task.notes.fresh():
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    batch = recipe.training.eval_batch_size or 2 * recipe.training.batch_size
    base_results = task.run(model, test_features, batch)
    base = task.score(base_results, test_features)
    console.print(f"base model: held-out {task.metric} {base[task.metric]:.4f}", highlight=False, soft_wrap=True)
    shown = splits.test.select(range(min(recipe.training.samples, len(splits.test))))
    base_samples = task.predict(model, shown, batch) if len(shown) else []

    model = add_adapter(model, recipe, total_steps(recipe, len(train_features))[0])
    trainable, total = model.get_nb_trainable_parameters()
    console.print(
        f"{recipe.method.label}: {trainable:,} of {total:,} parameters are trained", highlight=False, soft_wrap=True
    )
    fused = fuse_report(model)
    layers = str(fused) if fused.fused or fused.plain else ""
    if layers:
        console.print(layers, highlight=False, soft_wrap=True)
    if PartialState().is_main_process:
        if overwrite and out.exists():
            shutil.rmtree(out)
        write_text(out / "recipe.yaml", recipe.to_yaml())
        kernels = {"fused_layers": len(fused.fused), "plain_layers": fused.plain}
        write_json(out / "environment.json", {**report.environment(), **kernels})
    PartialState().wait_for_everyone()

    trainer, seconds = _fit(model, task, recipe, train_features, test_features, processor, out, resume, console)
    recipe = trainer.recipe
    results = trainer.results_of_kept()
    metrics = {
        **{f"base_{name}": value for name, value in base.items()},
        **task.score(results, test_features),
        "train_loss": trainer.mean_loss,
        "trainable_params": trainable,
        "total_params": total,
        "train_examples": len(splits.train),
        "test_examples": len(splits.test),
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(trainer.meter.rate(), 1),
        "peak_memory_bytes": peak_memory(),
        "notes": task.notes.sentences,
        "counts": task.notes.counts,
    }
    tuned_samples = task.predict(trainer.model, shown, batch) if len(shown) else []
    trainer.save_model(str(out / "adapter"))
    ends = getattr(trainer.model, "generation_config", None) if task.generates else None
    if PartialState().is_main_process:
        samples = [{"base": before, "tuned": after} for before, after in zip(base_samples, tuned_samples, strict=True)]
        (out / "adapter" / "training_args.bin").unlink(missing_ok=True)
        if ends is not None:  # where its answers stop, for whoever generates with it
            write_json(out / "adapter" / "generation_config.json", ends.to_diff_dict())
        # Which bytes the adapter was trained on: merging it into anything else is refused.
        record_base(out / "adapter", recipe.model, trainer.model)
        if pictures.available():
            pictures.curves(Run(out, metrics, recipe).history(), base, task.metric, out / "curves.png")
        _write_confusion(out, task, base_results, results, test_features)
        write_text(out / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        card = report.card(recipe, metrics, task.metric, samples, layers)
        write_text(out / "README.md", card)
        write_text(out / "adapter" / "README.md", card)
        write_text(out / "adapter" / "recipe.yaml", recipe.to_yaml())
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        # Last of all: a folder with metrics.json is a finished run.
        write_json(out / "metrics.json", metrics)
    PartialState().wait_for_everyone()
    return Run(out, metrics, recipe)


def _write_confusion(out: Path, task: Task, base: list[Any], tuned: list[Any], features: Features) -> None:
    """Which class is taken for which, base beside tuned, for tasks with one class an example."""
    if task.labels is None or getattr(task, "problem", "single-label") != "single-label" or np.ndim(tuned[0]) != 1:
        return
    truth = [feature["labels"] for feature in features]
    before, after = (
        confusion([int(result.argmax()) for result in results], truth, len(task.labels)) for results in (base, tuned)
    )
    write_json(out / "confusion.json", {"labels": task.labels, "base": before, "tuned": after})
    if pictures.available():
        pictures.confusion(before, after, task.labels, out / "confusion.png")


def _fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    train_features: Features,
    test_features: Features,
    processor: Any,
    out: Path,
    resume: bool,
    console: Console,
) -> tuple[AdapterTrainer, float]:
    """The training loop; with `auto_batch`, again at half the batch as long as memory runs out."""
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    while True:
        trainer = AdapterTrainer(model, task, recipe, train_features, test_features, processor, out, console)
        begun = time.perf_counter()
        try:
            output = trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
            trainer.mean_loss = output.training_loss
            return trainer, time.perf_counter() - begun
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            size = recipe.training.batch_size
            if not recipe.training.auto_batch or size == 1:
                raise TrainingError(_lower_what(recipe)) from error
        finally:
            trainer.screen.close()
        accumulation = recipe.training.gradient_accumulation * 2
        changes = {"training.batch_size": (size + 1) // 2, "training.gradient_accumulation": accumulation}
        recipe = recipe.changed(**changes)
        console.print(f"out of memory: beginning again with {changes}", highlight=False, soft_wrap=True)
        resume = False
        if PartialState().is_main_process:
            # Checkpoints of another batch size count other steps.
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
            write_text(out / "recipe.yaml", recipe.to_yaml())
        del trainer
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if name in start:
                    parameter.copy_(start[name])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _lower_what(recipe: Recipe) -> str:
    training = recipe.training
    steps = [f"training.batch_size (now {training.batch_size}), raising gradient_accumulation to match"]
    steps.append(f"training.max_length (now {training.max_length})")
    advice = "Lower " + " or ".join(steps) + "; or set training.auto_batch: true"
    if not training.gradient_checkpointing:
        advice += ", training.gradient_checkpointing: true"
    if not recipe.quantize:
        advice += ", quantize: nf4"
    return f"Out of memory. {advice}."


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint. The Trainer writes trainer_state.json last: without it a checkpoint is torn."""
    found = []
    for folder in (out / CHECKPOINTS).glob("checkpoint-*"):
        try:
            found.append(
                (json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], str(folder))
            )
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    is_run = (out / "recipe.yaml").is_file()
    if not is_run:
        raise TrainingError(f"{out} exists and is not a run folder. Choose another `out`.")
    if (out / "metrics.json").is_file() and not overwrite:
        raise TrainingError(f"{out} holds a finished run. Choose another `out`, or give overwrite=True to replace it.")
    if not resume and not overwrite:
        raise TrainingError(
            f"{out} holds a run that has not finished: resume=True goes on, overwrite=True starts anew."
        )


def _begun_recipe(out: Path, recipe: Recipe) -> Recipe:
    """The recipe that the run in `out` was begun with; another one is refused: the result would be neither's."""
    if not (out / "recipe.yaml").is_file():
        return recipe
    begun = Recipe.read(out / "recipe.yaml")
    before, now = flat(begun.model_dump()), flat(recipe.model_dump())
    own = {"training.batch_size", "training.gradient_accumulation"} if recipe.training.auto_batch else set()
    changed = [key for key in {**before, **now} if key not in own and before.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise TrainingError(f"{out} was begun with another recipe, and resuming needs the same. Changed: {told}.")
    return begun


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields with dotted names."""
    found = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
