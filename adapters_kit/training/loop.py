"""The training loop: Hugging Face's Trainer with the task's own evaluation, a fixed order and a check of every loss."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapters_kit import devices
from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import TrainingError
from adapters_kit.noise import without_vocabulary_guess
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task, autocast
from adapters_kit.training import checkpoints
from adapters_kit.training.augment import augment_of
from adapters_kit.training.callbacks import (
    Interruption,
    Meter,
    RankAllocation,
    Record,
    Screen,
    Steering,
    TensorBoard,
    token_count,
)
from adapters_kit.training.kept import Kept
from adapters_kit.training.optimizers import build_optimizer
from adapters_kit.training.out_of_memory import evaluated
from adapters_kit.training.resolve import processes
from adapters_kit.training.rungs import Rung
from adapters_kit.training.sampling import OrderedByEpoch, own_draws
from adapters_kit.training.sharding import prepare_shards, shard, wants_fsdp
from adapters_kit.training.trackers import OWN, trackers

TOKENS = "tokens"  # of a batch: how many it trains on


class AdapterTrainer(Trainer):
    """Trainer with the task's own evaluation, an order of examples that resumes exactly, and a check of every loss."""

    # Trainer's own, which it does not declare.
    model_accepts_loss_kwargs: bool
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

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
        *,
        durable: bool = True,
    ) -> None:
        """Everything the loop needs.

        Args:
            recipe: resolved.
            out: folder of checkpoints, `metrics.jsonl` and TensorBoard's files.
            durable: whether the last step is saved as a checkpoint too, so that nothing that comes after the training
                can lose it.
        """
        self.task, self.recipe, self.test_features, self.out = task, recipe, test_features, out
        self.kept_results: dict[int, list[Any]] = {}
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows and loss of each pass of the step
        self.budget: Kept | None = None  # scored at every evaluation, where it is to choose among them
        self.until: float | None = None  # the part of the steps after which it pauses
        training = recipe.training
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        args = arguments(recipe, task, out, len(train_features))
        self.order = OrderedByEpoch(
            task.lengths(train_features),
            training.batch_size * args.world_size,
            training.seed,
            group=training.group_by_length,
        )
        self.norms = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.meter = Meter()
        self.interruption = Interruption()
        self.screen = Screen(self.meter, task.metric, console)
        self.steering = Steering(self.order, training.save_every, training.early_stopping, durable)
        callbacks = [
            self.steering,
            self.interruption,
            self.meter,
            RankAllocation(),
            Record(out / "metrics.jsonl", self.meter),
            self.screen,
        ]
        if OWN in training.log_to:
            callbacks.append(TensorBoard(out / OWN))
        callbacks += trackers(recipe, self.screen.console)
        self.augment = augment_of(recipe, task, model)
        batch = task.collate_training([train_features[0]])
        if wants_fsdp():
            prepare_shards(model)
        sharded = wants_fsdp() or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        if args.world_size > 1 and not sharded:
            args.ddp_find_unused_parameters = leaves_some_out(model, batch, task)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=train_features,
            eval_dataset=test_features,
            processing_class=processor,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Trainer takes every model whose forward has **kwargs for one that divides its loss by the items counted over
        # all devices and accumulated batches. BERT and many others ignore the count: their loss would come out
        # multiplied by the number of processes and of accumulation steps.
        passes = self.model_accepts_loss_kwargs and not task.own_loss
        self.model_accepts_loss_kwargs = passes and divides_by_items(model, batch)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; and FSDP where accelerate would leave it out."""
        super().create_accelerator_and_postprocess()
        shard(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def go(self, checkpoint: Path | None) -> None:
        """Trains, from a checkpoint or from the start.

        Raises:
            Paused: it has come as far as `until`.
        """
        rung = Rung(self, self.until) if self.until is not None else None
        if rung is not None:
            self.add_callback(rung)
        if checkpoint is not None and (checkpoint / checkpoints.PROGRESS).is_file():
            self.meter.restore(json.loads((checkpoint / checkpoints.PROGRESS).read_text(encoding="utf-8")))
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if rung is not None:
            rung.close()

    def _run_epoch(self, *given: Any, **options: Any) -> None:
        # A run that was killed after its last step is over, though its epoch may not be: Trainer would make one more.
        if self.state.global_step >= self.state.max_steps or self.steering.is_out_of_patience(self.args, self.state):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderedByEpoch:
        return self.order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, made once."""
        if self.optimizer is None:
            training = self.recipe.training
            assert training.learning_rate is not None  # the recipe is resolved
            self.optimizer = build_optimizer(
                model if model is not None else self.model,
                training.optimizer,
                training.learning_rate,
                training.weight_decay,
                head_learning_rate=training.head_learning_rate,
                lora_plus_ratio=training.lora_plus_ratio,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss of one batch, on this process."""
        rows = (inputs := dict(inputs)).pop("row")
        self.meter.tokens += inputs.pop(TOKENS)
        self.norms.eval()  # no adapter holds their averages: with others, what was scored would not be shipped
        if self.task.own_loss:
            loss = self.task.loss(model, inputs)
            outcome = (loss, None) if return_outputs else loss
        else:
            outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = outcome[0] if return_outputs else outcome
        self.unread.append((rows, loss.detach()))
        return outcome

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; its loss is added up.

        Raises:
            TrainingError: a loss of the step is not finite; names the step and the rows.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.meter.add(loss)
        if self.accelerator.sync_gradients:
            self._read_losses()
        return loss

    def _read_losses(self) -> None:
        """Looks at the losses of all passes of a step: the one time that a step makes the host wait for the device."""
        passes, self.unread = self.unread, []
        for (rows, _), loss in zip(passes, torch.stack([loss.float() for _, loss in passes]).tolist(), strict=True):
            if not math.isfinite(loss):
                numbers = ", ".join(str(row + 1) for row in sorted(set(rows.tolist())))
                raise TrainingError(
                    f"The loss became {loss} at step {self.state.global_step + 1}, on the training rows {numbers}. "
                    f"Look at those rows, or lower training.learning_rate (now {self.args.learning_rate:g})"
                    + (", or use bf16 instead of fp16." if self.args.fp16 else ".")
                )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The task's metrics on the held-out part."""
        results = self.scored_now()
        scores = self.task.score(results, self.test_features)
        self.kept_results = {self.state.best_global_step: self.kept_results.get(self.state.best_global_step, [])}
        self.kept_results[self.state.global_step] = results
        if self.budget is not None:
            scores |= self.budget.scores(self.model_wrapped)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def scored_now(self) -> list[Any]:
        """Predictions for the held-out rows as the model is now."""
        self.check_finite()
        return self._results()

    def check_finite(self) -> None:
        """Raises TrainingError if the last step has left a number that is none: no later loss would tell."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"After step {self.state.global_step} the parameter {name} is no longer finite. Lower "
                    f"training.learning_rate (now {self.args.learning_rate:g})"
                    + (", or use bf16 instead of fp16." if self.args.fp16 else ".")
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Trainer's checkpoint, with the trained numbers themselves, with what adds up, and sealed at the end."""
        folder = checkpoints.folder_of(self.out, self.state.global_step)
        self.meter.share()
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # a torn one of the same step
            write_json(folder / checkpoints.PROGRESS, self.meter.state())
            unwrapped = self.accelerator.unwrap_model(self.model)
            if isinstance(unwrapped, PeftModel) and not self._is_sharded():
                checkpoints.save_trained(unwrapped, folder)
        PartialState().wait_for_everyone()
        with without_vocabulary_guess():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            checkpoints.seal(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model)
        if self._is_sharded() or not checkpoints.load_trained(unwrapped, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # By its step: the path that Trainer remembers is wrong once the run folder has been moved.
        folder = checkpoints.folder_of(self.out, self.state.best_global_step)
        self.state.best_model_checkpoint = str(folder)
        if self._is_sharded() or not checkpoints.load_trained(self.accelerator.unwrap_model(self.model), folder):
            super()._load_best_model()

    def _is_sharded(self) -> bool:
        """Whether the parameters are spread over processes, so that only Trainer can save and load them."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def results_of_kept(self) -> list[Any]:
        """Predictions of the parameters that were kept: remembered from their evaluation, or made now."""
        self.check_finite()
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        step = self.state.best_global_step if best else self.state.global_step
        found = self.kept_results.get(step)
        return found or self._results()

    def _results(self) -> list[Any]:
        results, self.recipe = evaluated(
            self.task, self.model_wrapped, self.test_features, self.recipe, self.screen.console.print
        )
        return results

    def collate(self, features: Features) -> dict[str, Any]:
        """The task's batch, and the number of its tokens: counted here, where reading them waits for no device."""
        with own_draws(features, self.recipe.training.seed, self.order.epoch):
            features = self.augment(features) if self.augment else features
            batch: dict[str, Any] = self.task.collate_training(features)
        return {**batch, TOKENS: token_count(batch)}


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


def leaves_some_out(model: nn.Module, batch: dict[str, torch.Tensor], task: Task) -> bool:
    """Whether a step may leave some of what is trained without a gradient, which DDP would wait for.

    A pooler that no head reads (BigBird), experts that no token is sent to, layers that are dropped at random.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    drops = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    if any("expert" in name for name in named) or any(getattr(model.config, key, 0) for key in drops):
        return True
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "row"}
    with torch.random.fork_rng(), torch.enable_grad(), autocast(model, device):
        gradients = torch.autograd.grad(task.loss(model, batch), list(named.values()), allow_unused=True)
    return any(gradient is None for gradient in gradients)


def arguments(recipe: Recipe, task: Task, out: Path, examples: int) -> TrainingArguments:
    """The recipe's training part in Trainer's words."""
    training = recipe.training
    steps, steps_per_epoch = total_steps(recipe, examples)
    evaluate_every = max(math.ceil(steps_per_epoch / training.evals_per_epoch), 1) if training.evals_per_epoch else None
    # Fewer steps than one interval: still one evaluation, at the end.
    evaluate_every = min(evaluate_every, steps) if evaluate_every else None
    kind = training.precision
    with_warmup = training.scheduler == "constant" and training.warmup > 0
    scheduler = "constant_with_warmup" if with_warmup else training.scheduler
    # transformers renamed the argument; the old name warns where the new one is known.
    names = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(out / checkpoints.CHECKPOINTS),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        neftune_noise_alpha=recipe.data.augment.neftune if recipe.data.augment else None,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        use_cpu=processes()["cpu"],
        ddp_backend=processes().get("backend"),
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every,
        save_strategy="steps" if evaluate_every else "no",
        save_steps=evaluate_every or 500,
        # Under a budget any of them may be the one that is kept.
        save_total_limit=2 if training.keep_within is None else None,
        load_best_model_at_end=bool(evaluate_every and training.keep_best),
        metric_for_best_model=task.metric,
        greater_is_better=task.higher_is_better,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=devices.pins(),
        accelerator_config={"non_blocking": devices.pins()},
        disable_tqdm=True,
        report_to="none",  # trackers are callbacks of ours
        run_name=out.name,
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
