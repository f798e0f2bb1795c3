"""Which base an adapter sits on, down to the bytes.

`record_base` writes `adapters_kit.json` beside a freshly trained adapter: the sha256 of every tensor of its base, how
the base was quantized and what training changed in its config. `differences` compares a base with that record.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from adapters_kit.anatomy import base_model
from adapters_kit.anatomy.structure import walk
from adapters_kit.errors import ShippingError
from adapters_kit.shipping.adapter import RECORD, read_config, read_json
from adapters_kit.shipping.checkpoint import Checkpoint, open_checkpoint
from adapters_kit.shipping.source import locate
from adapters_kit.shipping.staging import file_sha256

FORMAT = 1
# What training a head changes in a config; everything else is the base's.
_CONFIG_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")


def hash_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> hex sha256 of its stored bytes. Reads everything once, in small pieces."""

    def digest(name: str) -> str:
        value = hashlib.sha256()
        for piece in checkpoint.chunks(name):
            value.update(piece)
        return value.hexdigest()

    for stored in checkpoint.tensors.values():
        checkpoint.descriptor(stored.file)  # opened here, so that the threads only read
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(checkpoint.tensors, pool.map(digest, checkpoint.tensors), strict=True))


def base_hashes(base: Path) -> dict[str, str]:
    """The hashes of a base: by tensor for safetensors; by file for a .gguf file or pickled weights."""
    if base.is_file():
        return {base.name: file_sha256(base)}
    pickles = sorted(base.glob("pytorch_model*.bin"))
    if pickles and not any(base.glob("model*.safetensors*")):
        return {path.name: file_sha256(path) for path in pickles}
    with open_checkpoint(base) as checkpoint:
        return hash_tensors(checkpoint)


def record_base(adapter: str | os.PathLike, base: str | os.PathLike | None = None, model: Any = None) -> Path:
    """Write `adapters_kit.json` into a saved adapter's folder.

    Args:
        adapter: the folder that `save_pretrained` wrote.
        base: the base model's folder, .gguf file or hub id; None takes the one that the adapter names.
        model: the trained model, wrapped or not: tells its class, its labels and how the base was quantized.

    Returns:
        The written file.

    Raises:
        ShippingError: no adapter there, or no such base.
    """
    folder = Path(adapter)
    name = base if base is not None else read_config(folder).base_model_name_or_path
    if not name:
        raise ShippingError(f"{folder} does not say which model it was trained on. Say it: record_base(folder, base).")
    source = locate(name)
    record: dict[str, Any] = {"format": FORMAT, "base": str(name), "tensors": base_hashes(source)}
    if model is not None:
        inner = base_model(model)
        record |= {
            "model_class": type(inner).__name__,
            "config": _config_changes(inner, source),
            "dtype": str(_float_dtype(inner)).removeprefix("torch."),
            "quantize": quantization(inner),
        }
    path = folder / RECORD
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def _config_changes(model: Any, source: Path) -> dict[str, Any]:
    now = model.config.to_dict()
    before = AutoConfig.from_pretrained(source).to_dict() if source.is_dir() else {}
    return {key: now[key] for key in _CONFIG_KEYS if key in now and now[key] != before.get(key)}


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model was loaded in: of its first floating parameter outside any adapter."""
    for _, module in walk(model):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def quantization(model: nn.Module) -> dict[str, Any] | None:
    """How bitsandbytes holds the model: settings and the paths of the quantized linears; None if nothing is."""
    modules: dict[str, list[str]] = {"4bit": [], "int8": []}
    settings: dict[str, Any] = {}
    for path, module in walk(model):
        kind = type(getattr(module, "weight", None)).__name__
        if kind == "Params4bit":
            weight = module.weight
            settings |= {"type": weight.quant_type, "blocksize": weight.blocksize, "nested": weight.compress_statistics}
            modules["4bit"].append(path)
        elif kind == "Int8Params":
            settings |= {"type": "int8"}
            modules["int8"].append(path)
    found = modules["4bit"] or modules["int8"]
    return settings | {"modules": found} if found else None


def differences(record: Mapping[str, Any], base: Path, checkpoint: Checkpoint | None = None) -> list[str]:
    """How a base differs from the one that an adapter was trained on; empty if it is the same or nothing is recorded.

    Args:
        record: `Adapter.record`.
        base: the base's folder or .gguf file.
        checkpoint: the base, if it is open already.
    """
    expected = record.get("tensors")
    if not isinstance(expected, Mapping) or not expected:
        return []
    found = hash_tensors(checkpoint) if checkpoint is not None else base_hashes(base)
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    lines = []
    for names, what in ((changed, "have other values"), (missing, "are missing"), (extra, "are new")):
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            lines.append(f"{len(names)} of {len(expected)} tensors {what}: {shown}")
    return lines


def check_base(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> None:
    """Refuse a base that is not the one that the adapter was trained on. Does nothing for an adapter without a record.

    Raises:
        ShippingError: tensors differ; the message says which.
    """
    folder = Path(adapter)
    if not (folder / RECORD).is_file():
        return
    record = read_json(folder / RECORD)
    source = locate(base if base is not None else record.get("base") or read_config(folder).base_model_name_or_path)
    found = differences(record, source)
    if found:
        raise wrong_base(folder, record, source, found)


def wrong_base(folder: Path, record: Mapping[str, Any], base: Path, found: list[str]) -> ShippingError:
    """The error for a base that differs from the recorded one."""
    return ShippingError(
        f"{base} is not the base that {folder} was trained on ({record.get('base')}): {'; '.join(found)}. Give the "
        "right model or revision with base=, or go on regardless with force=True."
    )
