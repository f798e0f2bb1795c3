"""What happens beside the training loop: progress on the screen, metrics.jsonl, early stopping, checkpoints, order."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters_kit import devices, system
from adapters_kit.artifacts.files import write_text
from adapters_kit.training.sampling import OrderedByEpoch


def peak_memory() -> int:
    """Bytes: the most that torch held on the accelerator since training began; without one, the most that this process
    ever occupied."""
    held = devices.peak_memory()
    return system.peak_memory() if held is None else held


def token_count(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch on the CPU, padding left out; a picture or a recording counts for one."""
    if (sound := batch.get("input_values", batch.get("input_features"))) is not None:
        return len(sound)
    if (mask := batch.get("attention_mask")) is not None:
        return int(mask.sum())
    if (places := batch.get("position_ids")) is not None:
        # Packed: padding stands at 0 and nothing follows it; an example has one token at 1 for its token at 0.
        return int((places > 0).sum() + (places == 1).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(batch["pixel_values"])


class Steering(TrainerCallback):
    """Sets the epoch of the order, extra checkpoints, and stops when evaluations no longer get better."""

    def __init__(
        self, sampler: OrderedByEpoch, save_every: int | None, patience: int | None, saves_last: bool = True
    ) -> None:
        self.sampler, self.save_every, self.patience, self.saves_last = sampler, save_every, patience, saves_last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """transformers makes the embeddings ask for a gradient where activations are recomputed. Our way of recomputing
        does not need that, and every block below the lowest adapted one would run twice, and backward, for nothing."""
        if args.gradient_checkpointing and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The order becomes that of the epoch."""
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for a checkpoint where one is due."""
        last = self.saves_last and state.global_step >= state.max_steps
        if last or (self.save_every and state.global_step % self.save_every == 0):
            control.should_save = True
        if control.should_save:
            # Logged losses are means since the last line; a line at every checkpoint makes a resumed run's lines equal.
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops where `patience` evaluations in a row were no better."""
        if self.is_out_of_patience(args, state):
            control.should_training_stop = True

    def is_out_of_patience(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        if self.patience is None:
            return False
        key = f"eval_{args.metric_for_best_model}"
        scores = [line[key] for line in state.log_history if key in line]
        if not scores:
            return False
        best = max(scores) if args.greater_is_better else min(scores)
        return len(scores) - 1 - scores.index(best) >= self.patience


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM: the step that is being made ends, and is saved. A second one ends the process at once.

    In a run of several processes the signal reaches each at another step, where no common checkpoint can be made: there
    it ends the run as usual, and the last checkpoint holds.

    Attributes:
        name: of the signal that came, "SIGINT"; None as long as none has.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        alone = PartialState().num_processes == 1
        if alone and threading.current_thread() is threading.main_thread():
            kinds = [getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name)]
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.name is not None:
            raise KeyboardInterrupt(self.name)
        self.name = signal.Signals(number).name

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops after this step, and saves it, if a signal has come."""
        if self.name is not None:
            control.should_save = control.should_training_stop = True


class Record(TrainerCallback):
    """Writes `metrics.jsonl`: one line a log, one an evaluation. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path, self.meter = path, meter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begins the file, or drops the lines that follow the checkpoint."""
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step(line) <= state.global_step]
        write_text(self.path, "".join(kept))  # written beside, then renamed: killed here, the old lines are still there

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """Adds a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        if "loss" in logs:
            line["tokens_per_second"] = round(self.meter.rate(), 1)
            line["memory_bytes"] = peak_memory()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where a crash has left something else."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")


class Meter(TrainerCallback):
    """What adds up over a run, and goes on adding up when it is resumed: a checkpoint holds `state()`.

    Attributes:
        tokens: trained on, padding left out.
        seconds: spent training, evaluations left out.
        loss: sum of the losses of all optimizer steps.
        steps: their number.
        peak: most memory in bytes, of earlier processes too.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.loss = 0.0
        self.steps = 0
        self.peak = 0
        self._since: float | None = None
        self._begun = time.perf_counter()
        self._earlier = 0.0  # seconds of the processes that this one goes on from
        self._losses: list[torch.Tensor] = []  # of the steps since they were last added up

    def add(self, loss: torch.Tensor) -> None:
        """The loss of one forward pass, divided by the number of passes to a step; read from the device later."""
        self._losses.append(loss.detach())
        if len(self._losses) == 256:
            self._add_up()

    def elapsed(self) -> float:
        """Seconds since training began, those before a resume included."""
        return self._earlier + time.perf_counter() - self._begun

    def peak_bytes(self) -> int:
        """The most memory that the run ever took, those processes included that it was resumed from."""
        return max(self.peak, peak_memory())

    def mean_loss(self) -> float:
        """The mean of the losses of all optimizer steps; NaN before the first."""
        self._add_up()
        return self.loss / self.steps if self.steps else float("nan")

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        self._add_up()
        self.rate()
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loss": self.loss,
            "steps": self.steps,
            "peak_bytes": self.peak_bytes(),
            "elapsed": self.elapsed(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what a checkpoint holds."""
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.loss, self.steps, self.peak = state["loss"], state["steps"], state["peak_bytes"]
        self._earlier, self._begun = state["elapsed"], time.perf_counter()

    def share(self) -> None:
        """Makes the sum of the losses the mean over all processes; every process calls it."""
        self._add_up()
        if PartialState().num_processes > 1:
            device = PartialState().device
            total = reduce(torch.tensor(self.loss, dtype=torch.float32, device=device), "mean")
            self.loss = float(total)

    def _add_up(self) -> None:
        # One after the other: the sum does not depend on when it is made, so that a resumed run's is the same.
        for loss in torch.stack(self._losses).tolist() if self._losses else ():
            self.loss += loss
        self._losses = []

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
        """The clock runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Counts the step; the clock stands while something else follows it."""
        self.steps += 1
        if control.should_evaluate or control.should_save or control.should_log:
            self._pause()
            self._add_up()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock stands."""
        self._pause()


class RankAllocation(TrainerCallback):
    """AdaLoRA moves rank between layers by their gradients: after each optimizer step, before these are cleared."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Lets AdaLoRA prune."""
        allocate = getattr(getattr(extract_model_from_parallel(model), "base_model", None), "update_and_allocate", None)
        if allocate is not None:
            allocate(state.global_step)


class TensorBoard(TrainerCallback):
    """Writes the metrics for TensorBoard, and nothing else: transformers' own callback also writes every argument,
    paths included, and TensorBoard puts the name of the machine into the name of the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the file."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote after its last checkpoint is taken back.
            self.writer = SummaryWriter(self.folder, purge_step=state.global_step + 1 if state.global_step else None)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """Adds the numbers of a log, evaluations apart from training."""
        for name, value in (logs or {}).items() if self.writer is not None else ():
            if isinstance(value, int | float):
                part, name = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                self.writer.add_scalar(f"{part}/{name}", value, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the file, and takes the name of the machine out of its name."""
        if self.writer is None:
            return
        self.writer.close()
        self.writer = None
        host = f".{socket.gethostname()}."
        for file in self.folder.glob("events.out.tfevents.*"):
            if host in file.name:
                file.rename(file.with_name(file.name.replace(host, ".local.")))


class Screen(TrainerCallback):
    """Live progress: time left, loss, learning rate, tokens a second, memory; plain lines when not a terminal."""

    def __init__(self, meter: Meter, metric: str, console: Console | None = None) -> None:
        self.meter, self.metric = meter, metric
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.begun, self.first = 0.0, 0
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draws the bar, on a terminal."""
        if not state.is_world_process_zero:
            return
        self.begun, self.first = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
            self.bar.start()
            self.job = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step, note=self._note(state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """Prints scores; losses where there is no bar."""
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
        """Gives the terminal back."""
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
