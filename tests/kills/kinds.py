"""What is interrupted: trainings, merges, exports, sweeps, comparisons, and what each must have made in the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters_kit as ak
from adapters_kit import registry
from adapters_kit.recipe import Recipe
from tests.kills.child import imported
from tests.support import gguf_files, small, stopping


@dataclass
class Kind:
    """One thing that can be interrupted.

    Attributes:
        name: what it is called in the report.
        call: does it, into the folder given; made again after an interruption.
        result: what has to be equal after the second call, from the folder.
        is_atomic: whether the folder is complete or absent at every moment.
        otherwise: tried where this one is refused.
        every: whether a full disk is tried at every write, not only as far as the time goes.
        suffix: of the result's name.
        is_alone: whether the call stays in one thread of one process, so that it can be forked at a write.
    """

    name: str
    call: Callable[[Path], Any]
    result: Callable[[Path], Any]
    is_atomic: bool = False
    otherwise: Kind | None = None
    every: bool = False
    suffix: str = ""
    is_alone: bool = True


def hashes(folder: Path) -> dict[str, str]:
    """File to sha256, of the weights in a folder, or of the one file."""
    if folder.is_file():
        return {"": hashlib.sha256(folder.read_bytes()).hexdigest()}
    kept = [path for path in folder.rglob("*") if path.suffix == ".safetensors" and "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kept)}


def _run(folder: Path) -> Any:
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    return hashes(folder), stopping.metrics(folder), hidden


def _sweep(folder: Path) -> Any:
    return hashes(folder), [row["accuracy"] for row in json.loads((folder / "sweep.json").read_text())]


def _comparison(folder: Path) -> Any:
    found = json.loads((folder / "comparison.json").read_text())
    return [(row["label"], row["score"]) for row in found["methods"]], (folder / "cells" / ".work").exists()


def _runs(folder: Path) -> Any:
    return [_run(path) for path in sorted(folder.iterdir()) if (path / "metrics.json").is_file()]


def kinds(work: Path) -> list[Kind]:
    """Everything that is tried; data, models and an adapter to merge are made in `work`."""
    data = work / "data"
    data.mkdir()
    small.write_jsonl(data / "train.jsonl", small.sentiment(12))
    small.write_jsonl(data / "test.jsonl", small.sentiment(4, seed=1))
    small.write_jsonl(work / "text.jsonl", [{"text": row["text"]} for row in small.sentiment(16)])
    training = {"max_steps": 3, "batch_size": 4, "learning_rate": 3e-3, "log_every": 1, "samples": 1, "save_every": 1}
    bert, llama = str(small.model("bert")), str(small.model("llama"))

    def recipe(method: Any, task: str = "text-classification", **options: Any) -> Recipe:
        where = {"model": bert, "data": str(data)}
        if task == "causal-lm":
            where = {"model": llama, "data": {"train": str(work / "text.jsonl"), "test_size": 4}}
        return Recipe(**where, task=task, method=method, training=training | options)

    def trained(method: str, *tasks: str, every: bool = False) -> Kind:
        def call(out: Path) -> Any:
            return ak.train(recipe(method, tasks[0]), out, quiet=True, resume=True)

        otherwise = trained(method, *tasks[1:]) if tasks[1:] else None
        return Kind(f"train {method} {tasks[0]}", call, _run, otherwise=otherwise, every=every)

    adapter = work / "adapter-run"
    imported(lambda: ak.train(recipe("lora"), adapter, quiet=True), work / "said")
    base, on_gguf = work / "base.gguf", work / "on-gguf"
    gguf_files.write("llama", base, "Q8_0")
    ak.wrap(ak.load(base, quantize="keep", dtype="float32"), "lora", init_lora_weights=False).save_pretrained(on_gguf)

    def whole(name: str, call: Callable[[Path], Any], suffix: str = "") -> Kind:
        return Kind(name, call, hashes, is_atomic=True, every=True, suffix=suffix)

    short = {"max_steps": 1, "samples": 0}

    def swept(out: Path) -> Any:
        return ak.sweep(recipe("lora", **short), out, learning_rates=[1e-3, 3e-3], quiet=True)

    def compared(out: Path) -> Any:
        return ak.compare(
            recipe("lora", **short), ["lora", "ia3"], 1, out=out, grid=None, validation_size=2, quiet=True
        )

    def many(out: Path) -> Any:
        return ak.train_many([recipe("lora", **short), recipe("ia3", **short)], out, quiet=True, resume=True)

    found = [
        whole("merge", lambda out: ak.merge(adapter / "adapter", out, overwrite=True)),
        whole("export hf", lambda out: ak.export(adapter / "adapter", out, canonical=True, overwrite=True)),
        whole("export gguf", lambda out: ak.export(on_gguf, out, format="gguf", overwrite=True)),
        whole("merge gguf", lambda out: ak.merge(on_gguf, out, base=base, overwrite=True), ".gguf"),
        Kind("sweep", swept, _sweep, every=True),
        Kind("compare", compared, _comparison, every=True, is_alone=False),
        Kind("train-many", many, _runs, every=True, is_alone=False),
        trained("lora", "causal-lm", every=True),
    ]
    return found + [trained(name, "text-classification", "causal-lm") for name in registry.known_names()]
