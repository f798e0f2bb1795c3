"""train(): one recipe, one run folder. Hugging Face's Trainer does the training.

In the order of the text below: the place is taken, the recipe resolved, the rows read, the base scored, the adapter put
on, trained, scored, saved. From then on nothing can be lost: the adapter comes first, then its metrics, then what is
drawn from them, and only when all is there do the checkpoints go.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from rich.console import Console
from torch import nn

from adapters_kit import devices, system
from adapters_kit.artifacts.dtypes import name_of
from adapters_kit.artifacts.files import write_json, write_text
from adapters_kit.artifacts.proof import PROOF, Proof, make_proof, runner
from adapters_kit.artifacts.record import record_base
from adapters_kit.errors import TrainingError, WriteError
from adapters_kit.kernels.fuse import FuseReport, fuse_report
from adapters_kit.methods.starts import standing_still
from adapters_kit.names import check_name
from adapters_kit.pages.run_page import DETAILS, write_run_page
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import without_paths
from adapters_kit.tasks.base import Features
from adapters_kit.tasks.labels import tell_head
from adapters_kit.training import checkpoints, pictures
from adapters_kit.training.assembly import add_adapter, load_base
from adapters_kit.training.data import Splits
from adapters_kit.training.details import details, majority, write_confusion
from adapters_kit.training.inputs import Given, default_folder, recipe_from
from adapters_kit.training.judged import Judged
from adapters_kit.training.judged import told as judged_told
from adapters_kit.training.kept import Kept, check, choose
from adapters_kit.training.loop import AdapterTrainer, total_steps
from adapters_kit.training.out_of_memory import evaluated, lower_what, restart
from adapters_kit.training.resolve import filled_in, prepare, processes, resolve
from adapters_kit.training.resuming import begun, last_checkpoint, opened
from adapters_kit.training.run import Run, environment
from adapters_kit.training.run_card import advice, card
from adapters_kit.training.run_folder import Place, held
from adapters_kit.training.trackers import check_trackers


def train(
    recipe: Given,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Trains what the recipe describes and writes the run folder.

    The base model is scored on the held-out data before training, the adapter after it. Ctrl-C and SIGTERM end the step
    that is being made and save it.

    Args:
        recipe: a `Recipe`, the path of its YAML file or of a run folder, or a dict of its keys. In a dict, `data` may
            be rows in memory: a frame, a `datasets.Dataset`, a list of dicts; they are written to
            `rows-in-memory/HASH.parquet` beside the run folder.
        out: the run folder, made here, locked as long as the run is written. By default `runs/` and the name of the
            recipe or data file, as on the command line; a run folder given as the recipe is its own.
        resume: go on from the last checkpoint in `out`; the run ends as if it had never stopped. Starts from the
            beginning if there is no checkpoint yet; a finished run is opened.
        overwrite: replace a run that is in `out` already, once the new one is complete.
        quiet: print nothing.

    Raises:
        RecipeError, DataError, ModelError, UnknownNameError, MissingPackageError: before anything is written.
        TrainingError: a loss that is not finite, no memory left, or a folder that holds another run.
        WriteError: `out` cannot be written: no space, no permission, or another process writes there.
        KeyboardInterrupt: the run was stopped; what it had trained is saved.
    """
    out = Path(out) if out is not None else default_folder(recipe)
    check_name(out, WriteError)
    state = PartialState(**processes())
    console = Console(stderr=True, quiet=quiet or not state.is_main_process)
    return train_until(recipe_from(recipe, out.parent / "rows-in-memory"), out, None, resume, overwrite, console)


def train_until(asked: Recipe, out: Path, until: float | None, resume: bool, overwrite: bool, console: Console) -> Run:
    """As `train`; pauses after a part of the steps.

    Raises:
        Paused: it has come so far.
    """
    resolved = resolve(asked)
    check_trackers(resolved)
    with (
        system.writing(out, "What was saved so far is kept: resume=True goes on."),
        held(out, resume=resume, overwrite=overwrite) as place,
    ):
        if place.is_finished:
            return opened(out, asked, console)
        return Training(resolved, place, resume, console, until).run()


@dataclass
class _Base:
    """What the untrained model says: the tuned one is shown beside it."""

    results: list[Any]
    scores: dict[str, float]
    samples: list[dict[str, Any]]


class Training:
    """One run while it is made; `run` reads from top to bottom."""

    def __init__(
        self, recipe: Recipe, place: Place, resume: bool, console: Console, until: float | None = None
    ) -> None:
        self.until = until
        self.place, self.path, self.resume, self.console = place, place.path, resume, console
        self.tell: Callable[[str], None] = partial(console.print, highlight=False, soft_wrap=True, markup=False)
        self.main = PartialState().is_main_process
        self.task, self.splits = prepare(recipe)
        self.kept = Kept.read(recipe, self.task)
        self.judged = Judged.read(recipe, self.task, self.splits.test)
        self.model, self.processor = self.load(recipe)
        tell_head(self.model, self.task.labels or [], recipe.model, self.task.notes)
        recipe = filled_in(recipe, self.task)
        self.recipe = begun(self.path, recipe) if resume else recipe

    def load(self, recipe: Recipe) -> tuple[nn.Module, Any]:
        """The base model and its processor, bound to the task."""
        return load_base(recipe, self.task)

    def trainer(self, recipe: Recipe, train_features: Features, test_features: Features) -> AdapterTrainer:
        """The loop that trains."""
        return AdapterTrainer(
            self.model, self.task, recipe, train_features, test_features, self.processor, self.path, self.console
        )

    def run(self) -> Run:
        """Everything from the rows to the complete folder."""
        task = self.task
        train_features, test_features = self._encoded(self.splits)
        for features in (train_features, test_features):
            task.refer(self.model, features, _eval_batch(self.recipe))
        shown = self.splits.test.select(range(min(self.recipe.training.samples, len(self.splits.test))))
        # A training that is to pause ends with its loop: it may be the last that is seen of it.
        base = self._base(test_features, shown) if self.until is None else _Base([], {}, [])
        steps = total_steps(self.recipe, len(train_features))[0]
        self.model = add_adapter(self.model, self.recipe, steps, task, train_features)
        if told := check(self.recipe, self.model):
            task.notes.say(told)
        for note in task.notes.fresh():
            self.tell(note)
        trainable, total = self.model.get_nb_trainable_parameters()
        trainable -= standing_still(self.model)
        self.tell(f"{self.recipe.method.label}: {trainable:,} of {total:,} parameters are trained")
        fused = fuse_report(self.model)
        layers = str(fused) if fused.fused or fused.plain else ""
        if layers:
            self.tell(layers)
        self._begin(fused)

        trainer = _fit(self, train_features, test_features)
        self.recipe = recipe = trainer.recipe
        results, chosen = choose(trainer, self.tell)
        trainer.meter.share()
        metrics = {**self._scores(trainer, base, results, test_features), **self._costs(trainer, trainable, total)}
        metrics |= chosen  # under a budget
        metrics["advice"] = advice(
            metrics, task.metric, task.higher_is_better, majority(task, results, test_features), recipe
        )
        if self.kept is not None:
            self.tell(self.kept.told(metrics))
        for line in judged_told(metrics):
            self.tell(line)
        self._save(trainer, metrics)
        tuned = task.predict(trainer.model, shown, _eval_batch(recipe)) if len(shown) else []
        proof = self._proof(trainer.model)
        if self.main:
            samples = [{"base": b, "tuned": t} for b, t in zip(base.samples, tuned, strict=True)]
            self._describe(metrics, samples, layers, proof)
            self._draw(metrics, base, results, train_features, test_features)
            # Last of all: while they are there, resuming does all that follows training again.
            checkpoints.drop(self.path)
            self.place.publish()
        PartialState().wait_for_everyone()
        for line in metrics["advice"]:
            self.tell(line)
        return Run(self.place.out, metrics, recipe)

    def _scores(
        self, trainer: AdapterTrainer, base: _Base, results: list[Any], test_features: Features
    ) -> dict[str, Any]:
        """Before and after, on the held-out rows; the loss is the mean over training."""
        before = {f"base_{name}": value for name, value in base.scores.items()}
        after = self.task.score(results, test_features)
        if self.kept is not None:
            before |= {f"base_keep_{name}": value for name, value in self.kept.before.items()}
            after |= self.kept.scores(trainer.model_wrapped)
            after["keep_examples"] = self.kept.rows
        if self.judged is not None:
            after |= self.judged.compare(trainer.model)
        return {**before, **after, "train_loss": trainer.meter.mean_loss()}

    def _costs(self, trainer: AdapterTrainer, trainable: int, total: int) -> dict[str, Any]:
        """What was trained, on how much, how fast and in how many bytes; and what was done to the rows."""
        return {
            "trainable_params": trainable,
            "total_params": total,
            "train_examples": len(self.splits.train),
            "test_examples": len(self.splits.test),
            "steps": trainer.state.global_step,
            "train_seconds": round(trainer.meter.elapsed(), 3),
            "tokens_per_second": round(trainer.meter.rate(), 1),
            "peak_memory_bytes": trainer.meter.peak_bytes(),
            "notes": self.task.notes.sentences,
            "counts": self.task.notes.counts,
        }

    def _describe(
        self, metrics: dict[str, Any], samples: list[dict[str, Any]], layers: str, proof: Proof | None
    ) -> None:
        """Samples and the model card, which travels with the adapter, and its proof."""
        text = card(self.recipe, metrics, self.task.metric, samples, layers)
        write_text(self.path / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        write_text(self.path / "README.md", text)
        write_text(self.path / "adapter" / "README.md", text)
        if self.judged is not None:
            self.judged.write(self.path)
        if proof is not None:
            proof.write(self.path / "adapter")

    def _draw(
        self,
        metrics: dict[str, Any],
        base: _Base,
        results: list[Any],
        train_features: Features,
        test_features: Features,
    ) -> None:
        """Curves, the confusion matrix, the rows that went wrong, and the page of them all."""
        task = self.task
        if pictures.available():
            history = Run(self.path, metrics, self.recipe).history()
            pictures.curves(history, base.scores, task.metric, self.path / "curves.png")
        write_confusion(self.path, task, base.results, results, test_features)
        found = details(task, self.recipe, results, test_features, self.splits.test, train_features)
        write_json(self.path / DETAILS, found)
        self._write_page()

    def _proof(self, model: Any) -> Proof | None:
        """What base and tuned model say to a few prompts of ours. Every process asks: the model may be sharded."""
        if self.recipe.head != "causal-lm" or not hasattr(model, "disable_adapter"):
            return None
        tuned, training = runner(model), model.training

        def base(rows: list[list[int]], counts: list[int]) -> list[torch.Tensor]:
            with model.disable_adapter():
                return tuned(rows, counts)

        try:
            model.eval()
            return make_proof(tuned, base, self.task.processor, name_of(self.model.dtype))
        except Exception as error:  # a finished run is not lost for it
            self.tell(f"{PROOF} was not written: {type(error).__name__}: {error}")
            return None
        finally:
            model.train(training)

    def _write_page(self) -> None:
        """report.html. What goes wrong there costs nobody a finished run."""
        try:
            write_run_page(self.path, self.place.out)
        except Exception as error:
            self.tell(f"report.html was not written: {type(error).__name__}: {error}")

    def _encoded(self, splits: Splits) -> tuple[Features, Features]:
        """The rows as the model takes them; what was done to them is said."""
        with self.task.notes.about("training data"):
            train_features = self.task.training_features(self.task.encode(splits.train))
        with self.task.notes.about("held-out data"):
            test_features = self.task.encode(splits.test)
        self.tell(f"{self.recipe.model}: {len(splits.train):,} examples to train on, {len(splits.test):,} held out")
        for note in self.task.notes.fresh():
            self.tell(note)
        return train_features, test_features

    def _base(self, test_features: Features, shown: Dataset) -> _Base:
        """Scores the model before anything is put on it."""
        task = self.task
        results, self.recipe = evaluated(task, self.model, test_features, self.recipe, self.tell)
        scores, batch = task.score(results, test_features), _eval_batch(self.recipe)
        self.tell(f"base model: held-out {task.metric} {scores[task.metric]:.4f}")
        if self.kept is not None:
            self.kept.score_base(self.model, self.processor)
            for note in task.notes.fresh():
                self.tell(note)
        if self.judged is not None:
            self.judged.before = self.judged.ask(self.model)
        return _Base(results, scores, task.predict(self.model, shown, batch) if len(shown) else [])

    def _begin(self, fused: FuseReport) -> None:
        """From here on there is a run folder."""
        if self.main:
            write_text(self.path / "recipe.yaml", self.recipe.to_yaml())
            kernels = {"fused_layers": len(fused.fused), "plain_layers": fused.plain}
            write_json(self.path / "environment.json", {**environment(), **kernels})
        PartialState().wait_for_everyone()

    def _save(self, trainer: AdapterTrainer, metrics: dict[str, Any]) -> None:
        """The adapter, whole or not at all, then the metrics: a folder with metrics.json is a finished run."""
        unfinished, adapter = self.path / ".adapter.part", self.path / "adapter"
        trainer.save_model(str(unfinished))
        if self.main:
            (unfinished / "training_args.bin").unlink(missing_ok=True)
            self.task.write_beside(unfinished, trainer.model)
            # Which bytes the adapter was trained on: merging it into anything else is refused.
            record_base(unfinished, self.recipe.model, trainer.model, place=adapter)
            recipe_file = write_text(unfinished / "recipe.yaml", without_paths(self.recipe).to_yaml())
            for file in unfinished.iterdir():
                file.chmod(recipe_file.stat().st_mode)  # safetensors writes for the owner alone, whatever the umask
            shutil.rmtree(adapter, ignore_errors=True)
            os.rename(unfinished, adapter)
            write_json(self.path / "metrics.json", metrics)
        PartialState().wait_for_everyone()


def _eval_batch(recipe: Recipe) -> int:
    return recipe.training.eval_batch_size or 2 * recipe.training.batch_size


def _fit(job: Training, train_features: Features, test_features: Features) -> AdapterTrainer:
    """The training loop; with `auto_batch`, again at half the batch as long as memory runs out."""
    model, path, recipe = job.model, job.path, job.recipe
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoint = last_checkpoint(path, job.tell) if job.resume else None
    devices.forget_peak()
    if checkpoint is None and job.main:
        checkpoints.drop(path)
    while True:
        trainer = job.trainer(recipe, train_features, test_features)
        trainer.until = job.until
        trainer.budget = job.kept if recipe.training.keep_within is not None else None
        try:
            with trainer.interruption, devices.quick_float32(recipe.training.precision != "fp32"):
                trainer.go(checkpoint)
                if trainer.interruption.name:
                    _say_stopped(job, trainer)
                    raise KeyboardInterrupt(trainer.interruption.name)
            return trainer
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            size = recipe.training.batch_size
            if not recipe.training.auto_batch or size == 1:
                raise TrainingError(lower_what(recipe)) from error
        finally:
            trainer.screen.close()
        accumulation = recipe.training.gradient_accumulation * 2
        changes = {"training.batch_size": (size + 1) // 2, "training.gradient_accumulation": accumulation}
        recipe = recipe.changed(**changes)
        job.tell(f"out of memory: beginning again with {changes}")
        checkpoint = None
        if job.main:
            checkpoints.drop(path)  # those of another batch size count other steps
            write_text(path / "recipe.yaml", recipe.to_yaml())
        del trainer
        restart(model, start)


def _say_stopped(job: Training, trainer: AdapterTrainer) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    where = checkpoints.folder_of(job.path, step)
    old = "" if job.path == job.place.out else f" The old run in {job.place.out} is as it was."
    job.tell(f"Stopped at step {step} of {steps}, saved in {where}. resume=True (--resume) goes on from there.{old}")
