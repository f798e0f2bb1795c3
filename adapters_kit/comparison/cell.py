"""One cell of a comparison: one method, one learning rate, one seed, trained once and scored once."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from torch import nn

from adapters_kit import devices, system
from adapters_kit.artifacts.record import record_base
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.merging.into_gguf import GgufReport
from adapters_kit.merging.merge import merge
from adapters_kit.methods import find_method
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training import data
from adapters_kit.training.assembly import add_adapter, load_base, set_dropout
from adapters_kit.training.callbacks import peak_memory
from adapters_kit.training.loop import AdapterTrainer, total_steps
from adapters_kit.training.many.hall import Guest
from adapters_kit.training.resolve import filled_in, prepare, resolve

FULL, BASE = "full", "base"
OF_A_PROCESS = ("seconds", "cpu_seconds", "tokens_per_second", "peak_bytes")
"""What a cell costs, as far as only a process of its own tells."""


@dataclass(frozen=True)
class Cell:
    """What one training depends on.

    Attributes:
        recipe: all fields of the recipe, so that a default that moves is another cell; its own seed draws the rows, so
            that all cells see the same ones.
        kind: "adapter" trains the recipe's method, "full" every parameter, "base" nothing.
        learning_rate: peak.
        seed: of new parameters, the order of the examples and dropout.
        part: "validation" scores on rows set aside from the training data, "test" on the held-out data.
        validation_size: rows set aside, a fraction (below 1) or a number.
        merges: whether the trained adapter is merged as well, and the merged model compared with it.
        depends: digests of the data, the model, the method's options and the library versions.
    """

    recipe: Mapping[str, Any]
    kind: str
    learning_rate: float | None
    seed: int
    part: str
    validation_size: float
    merges: bool
    depends: Mapping[str, str]

    @property
    def key(self) -> str:
        """A hash of everything above: equal keys, equal results. Rates count with three digits: 1e-3 is 3e-3 / 3."""
        fields = asdict(self) | {"learning_rate": None if self.learning_rate is None else f"{self.learning_rate:.3g}"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:20]


def depends_on(recipe: Recipe, rows: Mapping[str, Dataset], config: Any) -> dict[str, str]:
    """Digests of what a result depends on beside the recipe: rows, weights, the method's options, versions."""
    return {
        "rows": digest_of_rows(rows),
        "model": digest_of_model(recipe.model),
        "method": digest_of_options(config),
        **{name: version(name) for name in ("adapters-kit", "torch", "transformers", "peft")},
    }


def digest_of_rows(parts: Mapping[str, Dataset]) -> str:
    """Of every row, in order, and of which part it is in."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(name.encode())
        for row in part:
            digest.update(repr(row).encode())
    return digest.hexdigest()


def digest_of_options(config: Any) -> str:
    """Of a peft config with all defaults filled in; None (nothing trained, or everything) has one too."""
    options = config.to_dict() if config is not None else {}
    plain = {name: sorted(map(str, value)) if isinstance(value, set) else value for name, value in options.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_model(name: str) -> str:
    """Of the files of a local model; a hub id stands for itself."""
    path = Path(name)
    if not path.exists():
        return name
    digest = hashlib.sha256()
    kinds = {".safetensors", ".bin", ".gguf", ".json", ".model"}
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in kinds):
        digest.update(file.name.encode() + bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def rows_of(recipe: Recipe, validation_size: float) -> tuple[Task, dict[str, Dataset]]:
    """The task, and the recipe's rows in three parts: train, validation (taken from the training rows) and test."""
    task, splits = prepare(recipe)
    both = data.split(
        splits.train, validation_size, recipe.training.seed, task.strata(splits.train), groups=task.groups(splits.train)
    )
    return task, {"train": both.train, "validation": both.test, "test": splits.test}


def run_cell(cell: Cell, work: Path | None = None, guest: Guest | None = None) -> dict[str, Any]:
    """Trains and scores; returns the scores and what they cost.

    Args:
        work: where what is only needed meanwhile is written; by default with other temporary files.
        guest: of the pass in which it goes with others. What one of them takes of it nobody can tell: time, speed and
            memory are None.

    Returns:
        scores: the task's metrics. For a kind other than "base" also: trainable and total parameters; adapter_bytes
        (saved size of what was trained); seconds of training and of CPU time; tokens_per_second; steps; peak_bytes
        (most memory above what the imports take; of the GPU where there is one); optimizer_bytes; merge (difference of
        the merged model and its rounding floor), or None.
    """
    recipe = Recipe(**cell.recipe)
    before = _resident()
    task, rows = rows_of(recipe, cell.validation_size)
    seeded = resolve(recipe.changed(**{"training.seed": cell.seed, "training.learning_rate": cell.learning_rate}))
    # Weights in 16 bits lose updates that are smaller than their last digit: full fine-tuning holds fp32 weights and
    # computes in the recipe's precision under autocast, as is usual.
    precise = {"training.precision": "fp32"} if cell.kind == FULL else {}
    load = load_base if guest is None else guest.load
    model, processor = load(seeded.changed(**precise), task)
    seeded = filled_in(seeded, task)
    scored = task.encode(rows[cell.part])
    batch = seeded.training.eval_batch_size or 2 * seeded.training.batch_size
    task.refer(model, scored, batch)
    if cell.kind == BASE:
        return {"scores": task.score(task.run(model, scored, batch), scored)}
    train_features = task.training_features(task.encode(rows["train"]))
    task.refer(model, train_features, batch)
    validation = scored if cell.part == "validation" else task.encode(rows["validation"])
    if validation is not scored:
        task.refer(model, validation, batch)
    if cell.kind == FULL:
        torch.manual_seed(cell.seed)
        model.requires_grad_(True)
        set_dropout(model, recipe.training.base_dropout)  # the method's own default is not for this
    else:
        model = add_adapter(model, seeded, total_steps(seeded, len(train_features))[0])
    with tempfile.TemporaryDirectory(prefix="adapters_kit_cell_", dir=work) as folder:
        out = Path(folder)
        quiet = Console(stderr=True, quiet=True)
        looped = AdapterTrainer if guest is None else guest.trainer
        trainer = looped(model, task, seeded, train_features, validation, processor, out, quiet, durable=False)
        wall, busy = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - busy}
        trainer.screen.close()
        peak = peak_memory() - before
        tuned = trainer.results_of_kept() if cell.part == "validation" else task.run(trainer.model, scored, batch)
        result = {
            "scores": task.score(tuned, scored),
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total_params": _total(model),
            "adapter_bytes": _saved_bytes(model),
            **seconds,
            "tokens_per_second": trainer.meter.rate(),
            "steps": trainer.state.global_step,
            "peak_bytes": peak,
            "optimizer_bytes": _state_bytes(trainer.optimizer),
            "merge": _merged(model, seeded, out) if cell.merges else None,
        }
        return result if guest is None else result | dict.fromkeys(OF_A_PROCESS)


def _merged(model: nn.Module, recipe: Recipe, out: Path) -> dict[str, float] | None:
    """Difference between the merged model and base + adapter, and what rounding alone makes; None where none merges.

    Of what blocks store, the difference is that of the written .gguf file, in nats a token, beside the base's.
    """
    name = recipe.method.name
    if not isinstance(name, str) or find_method(name).mergeable is not True:
        return None
    model.save_pretrained(out / "adapter")
    record_base(out / "adapter", recipe.model, model)
    if name == "blocks":
        written = merge(out / "adapter", out / "merged.gguf", base=recipe.model)
        assert isinstance(written, GgufReport) and written.kl is not None and written.kl_base is not None
        return {"kl": written.kl, "kl_base": written.kl_base}
    check = getattr(merge(out / "adapter", out / "merged", base=recipe.model), "check", None)
    return None if check is None else {"largest": check.largest, "floor": check.floor_largest}


def _total(model: nn.Module) -> int:
    return model.get_nb_trainable_parameters()[1] if isinstance(model, PeftModel) else model.num_parameters()


def _saved_bytes(model: nn.Module) -> int:
    saved = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else dict(model.named_parameters())
    return sum(tensor.nbytes for tensor in saved.values())


def _state_bytes(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)
    return sum(t.nbytes for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def _resident() -> int:
    """Bytes that this process holds before its work: what peak memory is counted from."""
    return 0 if devices.accelerator() is not None else system.resident_memory()
