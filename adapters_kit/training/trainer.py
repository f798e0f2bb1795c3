"""train(): one recipe, one run folder. Hugging Face's Trainer does the training."""

from __future__ import annotations

import json
import logging
import math
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
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapters_kit.errors import TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.shipping.identity import record_base
from adapters_kit.tasks.base import Features, Task, autocast
from adapters_kit.tasks.metrics import confusion
from adapters_kit.training import pictures, report
from adapters_kit.training.callbacks import Meter, RankAllocation, Record, Screen, Steering, peak_memory
from adapters_kit.training.optimizers import build_optimizer
from adapters_kit.training.preparing import add_adapter, filled_in, load_base, precision, prepare
from adapters_kit.training.report import Run
from adapters_kit.training.sampling import OrderedByEpoch

CHECKPOINTS = "checkpoints"


def train(
    recipe: Recipe, out: str | Path, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Run:
    """Trains what the recipe describes and writes the run folder.

    The base model is scored on the held-out data before training, the adapter after it.

    Args:
        out: the run folder, made here.
        resume: go on from the last checkpoint in `out`; the run ends as if it had never stopped. Starts from the
            beginning if there is no checkpoint yet.
        overwrite: delete a run that is in `out` already.
        quiet: print nothing.

    Raises:
        RecipeError, DataError, ModelError, UnknownNameError: before anything is written.
        TrainingError: a loss that is not finite, no memory left, or a folder that holds another run.
    """
    out = Path(out)
    # Told here that there is no GPU: left to find out by itself, accelerate would not join the processes on CPUs.
    processes = PartialState(cpu=not torch.cuda.is_available())
    console = Console(stderr=True, quiet=quiet or not processes.is_main_process)
    _check_folder(out, resume, overwrite)
    task, splits = prepare(recipe)
    model, processor = load_base(recipe, task)
    recipe = filled_in(recipe, task)
    if resume:
        recipe = _begun_recipe(out, recipe)
    train_features = task.training_features(task.encode(splits.train))
    test_features = task.encode(splits.test)
    console.print(
        f"{recipe.model}: {len(splits.train):,} examples to train on, {len(splits.test):,} held out",
        highlight=False,
        soft_wrap=True,
    )
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
    if PartialState().is_main_process:
        if overwrite and out.exists():
            shutil.rmtree(out)
        report.write(out / "recipe.yaml", recipe.to_yaml())
        report.write_json(out / "environment.json", report.environment())
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
    }
    tuned_samples = task.predict(trainer.model, shown, batch) if len(shown) else []
    trainer.save_model(str(out / "adapter"))
    if PartialState().is_main_process:
        samples = [{"base": before, "tuned": after} for before, after in zip(base_samples, tuned_samples, strict=True)]
        (out / "adapter" / "training_args.bin").unlink(missing_ok=True)
        # Which bytes the adapter was trained on: merging it into anything else is refused.
        record_base(out / "adapter", recipe.model, trainer.model)
        if pictures.available():
            pictures.curves(Run(out, metrics, recipe).history(), base, task.metric, out / "curves.png")
        _write_confusion(out, task, base_results, results, test_features)
        report.write(out / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        card = report.card(recipe, metrics, task.metric, samples)
        report.write(out / "README.md", card)
        report.write(out / "adapter" / "README.md", card)
        report.write(out / "adapter" / "recipe.yaml", recipe.to_yaml())
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        # Last of all: a folder with metrics.json is a finished run.
        report.write_json(out / "metrics.json", metrics)
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
    report.write_json(out / "confusion.json", {"labels": task.labels, "base": before, "tuned": after})
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
            report.write(out / "recipe.yaml", recipe.to_yaml())
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


class AdapterTrainer(Trainer):
    """Trainer with the task's own evaluation, an order of examples that resumes exactly, and a check of every loss."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        train_features: Features,
        test_features: Features,
        processor: Any,
        out: Path,
        console: Console,
    ) -> None:
        self.task, self.recipe, self.test_features = task, recipe, test_features
        self.kept_results: dict[int, list[Any]] = {}
        self.mean_loss = float("nan")
        training = recipe.training
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        args = arguments(recipe, task, out, len(train_features))
        self.order = OrderedByEpoch(
            [task.length(feature) for feature in train_features],
            training.batch_size * args.world_size,
            training.seed,
            group=training.group_by_length,
        )
        self.meter = Meter()
        self.screen = Screen(self.meter, task.metric, console)
        callbacks = [
            Steering(self.order, training.save_every, training.early_stopping),
            self.meter,
            RankAllocation(),
            Record(out / "metrics.jsonl", self.meter),
            self.screen,
        ]
        super().__init__(
            model=model,
            args=args,
            data_collator=task.collate_training,
            train_dataset=train_features,
            eval_dataset=test_features,
            processing_class=processor,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Trainer takes every model whose forward has **kwargs for one that divides its loss by the items counted over
        # all devices and accumulated batches. BERT and many others ignore the count: their loss would come out
        # multiplied by the number of processes and of accumulation steps.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and divides_by_items(
            model, task.collate_training([train_features[0]])
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderedByEpoch:
        return self.order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            training = self.recipe.training
            self.optimizer = build_optimizer(
                model if model is not None else self.model,
                training.optimizer,
                training.learning_rate,
                training.weight_decay,
                lora_plus_ratio=training.lora_plus_ratio,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        inputs = dict(inputs)
        rows = inputs.pop("row")
        self.meter.count(inputs)
        outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = outcome[0] if return_outputs else outcome
        if not torch.isfinite(loss):
            numbers = ", ".join(str(row + 1) for row in sorted(set(rows.tolist())))
            raise TrainingError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}, on the training rows {numbers}. "
                f"Look at those rows, or lower training.learning_rate (now {self.args.learning_rate:g})"
                + (", or use bf16 instead of fp16." if self.args.fp16 else ".")
            )
        return outcome

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The task's metrics on the held-out part."""
        results = self.task.run(self.model_wrapped, self.test_features, self.args.eval_batch_size)
        scores = self.task.score(results, self.test_features)
        self.kept_results = {self.state.best_global_step: self.kept_results.get(self.state.best_global_step, [])}
        self.kept_results[self.state.global_step] = results
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def results_of_kept(self) -> list[Any]:
        """Predictions of the parameters that were kept: remembered from their evaluation, or made now."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        step = self.state.best_global_step if best else self.state.global_step
        found = self.kept_results.get(step)
        return found or self.task.run(self.model_wrapped, self.test_features, self.args.eval_batch_size)


@torch.no_grad()
def divides_by_items(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether the model's loss is the sum over the items divided by the `num_items_in_batch` that it is given."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "row"}
    was_training = model.training
    model.eval()
    try:
        with autocast(model, device):
            one, two = (model(**batch, num_items_in_batch=torch.tensor(n, device=device)).loss for n in (1, 2))
    except TypeError:
        return False
    finally:
        model.train(was_training)
    return bool(torch.isclose(one, 2 * two, rtol=1e-3)) and bool(one != 0)


def arguments(recipe: Recipe, task: Task, out: Path, examples: int) -> TrainingArguments:
    """The recipe's training part in Trainer's words."""
    training = recipe.training
    steps, steps_per_epoch = total_steps(recipe, examples)
    evaluate_every = max(math.ceil(steps_per_epoch / training.evals_per_epoch), 1) if training.evals_per_epoch else None
    # Fewer steps than one interval: still one evaluation, at the end.
    evaluate_every = min(evaluate_every, steps) if evaluate_every else None
    kind = precision(recipe)
    with_warmup = training.scheduler == "constant" and training.warmup > 0
    scheduler = "constant_with_warmup" if with_warmup else training.scheduler
    # Named only when asked for: the argument is being renamed and warns.
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size or 2 * training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every,
        save_strategy="steps" if evaluate_every else "no",
        save_steps=evaluate_every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(evaluate_every and training.keep_best),
        metric_for_best_model=task.metric,
        greater_is_better=task.higher_is_better,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=list(training.log_to) or "none",
        log_level="error",
        ddp_find_unused_parameters=False,
        **(checkpointing if training.gradient_checkpointing else {}),
    )


def total_steps(recipe: Recipe, examples: int) -> tuple[int, int]:
    """Optimizer steps of the whole run, and of one epoch."""
    training = recipe.training
    per_step = training.batch_size * PartialState().num_processes * training.gradient_accumulation
    per_epoch = math.ceil(examples / per_step)
    return training.max_steps or math.ceil(per_epoch * training.epochs), per_epoch


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint. The Trainer writes trainer_state.json last: without it a checkpoint is torn."""
    found = []
    for folder in (out / CHECKPOINTS).glob("checkpoint-*"):
        try:
            found.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], str(folder)))
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
