"""Checkpoints of a run: which is the newest whole one, and what they hold beside what Trainer puts there.

A checkpoint is written into its place, file by file, so that a killed or full machine leaves a torn one. `seal` comes
last: a list of all files with their sizes and hashes. What the list does not confirm is not gone on from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.errors import TrainingError

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a run folder; it goes when the run is complete."""
SEAL, STATE, TRAINED, PROGRESS = "complete.json", "trainer_state.json", "trained.safetensors", "progress.json"


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint after so many optimizer steps lies, in Trainer's spelling."""
    return out / CHECKPOINTS / f"checkpoint-{step}"


def seal(folder: Path) -> None:
    """Confirms a checkpoint: every file with its size in bytes and its sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)] for path in files}
    write_json(folder / SEAL, listed)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole. Those of earlier versions have no seal: their last file is
    Trainer's own."""
    try:
        step = read_json(folder / STATE)["global_step"]
        if step != int(folder.name.rpartition("-")[2]):
            return f"{STATE} is of step {step}"
        if not (folder / SEAL).is_file():
            return "it was never completed" if (folder / TRAINED).exists() else None
        listed = read_json(folder / SEAL)
        if TRAINED not in listed:
            return f"{SEAL} does not list {TRAINED}"
        for name, (size, sha256) in listed.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
            if file_sha256(file) != sha256:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError) as error:  # ShippingError, of `read_json`, is a ValueError
        return f"its files cannot be read ({type(error).__name__}: {error})"
    return None


def newest(out: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run folder, and a sentence for every newer one that is damaged."""
    told: list[str] = []
    for folder in sorted((out / CHECKPOINTS).glob("checkpoint-*"), key=_step, reverse=True):
        wrong = damage(folder)
        if wrong is None:
            return folder, told
        told.append(f"{folder.name} is damaged: {wrong}; it is left out.")
    return None, told


def drop(out: Path) -> None:
    """Removes all checkpoints of a run folder."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


# What a method saves for its users is not always what it trains: p-tuning saves its encoder's output, AdaLoRA leaves
# out the ranks that it has pruned. To go on exactly, and to keep exactly what was scored, the numbers themselves are
# kept as well.


def save_trained(model: nn.Module, folder: Path) -> None:
    """The trained parameters as they are in the model, and what a method has learned beside them."""
    tensors = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    patterns: dict[str, Any] = {}
    for number, tuner in enumerate(_allocators(model)):
        for kind in _IMPORTANCE:
            known = getattr(tuner.rankallocator, kind, {})
            tensors |= {f"{number}.{kind}.{name}": tensor for name, tensor in known.items()}
        patterns[str(number)] = {name: config.rank_pattern for name, config in tuner.peft_config.items()}
    unshared = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_tensors(folder / TRAINED, unshared, rank_patterns=json.dumps(patterns))


def load_trained(model: nn.Module, folder: Path) -> bool:
    """Puts back what `save_trained` wrote; False where the checkpoint has none of it, as those of earlier versions.

    Raises:
        TrainingError: the checkpoint is of another model or method.
    """
    if not (folder / TRAINED).is_file():
        return False
    try:
        with safe_open(folder / TRAINED, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            patterns = json.loads(file.metadata()["rank_patterns"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise TrainingError(f"{folder / TRAINED} cannot be read: {error}") from error
    trained = {f"parameter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(trained.keys() ^ {name for name in saved if name.startswith("parameter.")})
    wrong += [name for name, p in trained.items() if name in saved and saved[name].shape != p.shape]
    if wrong:
        raise TrainingError(
            f"{folder} is a checkpoint of another model: {wrong[0].removeprefix('parameter.')} differs."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    for number, tuner in enumerate(_allocators(model)):
        for kind in _IMPORTANCE:
            start = f"{number}.{kind}."
            device = next(model.parameters()).device
            known = {name.removeprefix(start): saved[name].to(device) for name in saved if name.startswith(start)}
            setattr(tuner.rankallocator, kind, known)
        for name, pattern in patterns.get(str(number), {}).items():
            tuner.peft_config[name].rank_pattern = pattern
    return True


_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _allocators(model: nn.Module) -> Iterator[Any]:
    """The parts of a model that move rank between layers (AdaLoRA), in a fixed order."""
    return (module for module in model.modules() if hasattr(module, "rankallocator"))
