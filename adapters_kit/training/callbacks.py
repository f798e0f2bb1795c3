"""What happens beside the training loop: progress on the screen, metrics.jsonl, early stopping, checkpoints, order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters_kit import system
from adapters_kit.training.sampling import OrderedByEpoch


def peak_memory() -> int:
    """Bytes: the most that torch held on the GPU; without one, the most that this process ever occupied."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return system.peak_memory()


class Steering(TrainerCallback):
    """Sets the epoch of the order, extra checkpoints, and stops when evaluations no longer get better."""

    def __init__(self, sampler: OrderedByEpoch, save_every: int | None, patience: int | None) -> None:
        self.sampler, self.save_every, self.patience = sampler, save_every, patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """transformers makes the embeddings ask for a gradient where activations are recomputed. Our way of recomputing
        does not need that, and every block below the lowest adapted one would run twice, and backward, for nothing."""
        if args.gradient_checkpointing and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.save_every and state.global_step % self.save_every == 0:
            control.should_save = True
        if control.should_save:
            # Logged losses are means since the last line; a line at every checkpoint makes a resumed run's lines equal.
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.patience is None:
            return
        key = f"eval_{args.metric_for_best_model}"
        scores = [line[key] for line in state.log_history if key in line]
        best = max(scores) if args.greater_is_better else min(scores)
        if len(scores) - 1 - scores.index(best) >= self.patience:
            control.should_training_stop = True


class Record(TrainerCallback):
    """Writes `metrics.jsonl`: one line a log, one an evaluation. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path, self.meter = path, meter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        if "loss" in logs:
            line["tokens_per_second"] = round(self.meter.rate(), 1)
            line["memory_bytes"] = peak_memory()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Meter(TrainerCallback):
    """Counts tokens, padding left out, and the seconds spent training, evaluations left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._since: float | None = None

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Adds a batch that is about to be trained on."""
        mask = batch.get("attention_mask")
        if mask is not None and mask.device.type == "cpu":
            self.tokens += int(mask.sum())
        elif (places := batch.get("position_ids")) is not None and places.device.type == "cpu":
            # Packed: padding stands at 0 and nothing follows it; an example has one token at 1 for its token at 0.
            self.tokens += int((places > 0).sum() + (places == 1).sum())
        elif (first := batch.get("input_ids", batch.get("pixel_values"))) is not None:
            # On a GPU reading the mask would wait for the device: padding is counted there.
            self.tokens += first.numel() if first.ndim == 2 else len(first)

    def rate(self) -> float:
        """Tokens a second of training, on this process."""
        self._pause()
        self._since = time.perf_counter()
        return self.tokens / self.seconds if self.seconds else 0.0

    def _pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._pause()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pause()


class RankAllocation(TrainerCallback):
    """AdaLoRA moves rank between layers by their gradients: after each optimizer step, before these are cleared."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner = getattr(extract_model_from_parallel(model), "base_model", None)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)


class Screen(TrainerCallback):
    """Live progress: time left, loss, learning rate, tokens a second, memory; plain lines when not a terminal."""

    def __init__(self, meter: Meter, metric: str, console: Console | None = None) -> None:
        self.meter, self.metric = meter, metric
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.begun, self.first = 0.0, 0
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.begun, self.first = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
            self.bar.start()
            self.job = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step, note=self._note(state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or not self.begun:
            return
        self.last.update(logs)
        score = logs.get(f"eval_{self.metric}")
        if score is not None:
            self.console.print(
                f"step {state.global_step}: held-out {self.metric} {score:.4f}", highlight=False, soft_wrap=True
            )
        elif "loss" in logs and self.bar is None:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {self._note(state)}", highlight=False, soft_wrap=True
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back; also called when the run stops with an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _note(self, state: TrainerState) -> str:
        done = state.global_step - self.first
        spent = time.perf_counter() - self.begun
        left = spent / done * (state.max_steps - state.global_step) if done else 0.0
        parts = [f"ETA {duration(left)}"]
        if "loss" in self.last:
            parts += [f"loss {self.last['loss']:.4f}", f"lr {self.last['learning_rate']:.2e}"]
        if self.meter.tokens:
            parts.append(f"{self.meter.rate():,.0f} tok/s")
        return "  ".join([*parts, f"{peak_memory() / 2**30:.2f} GiB"])


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
