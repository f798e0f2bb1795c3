"""What an adapter was trained on, written beside it: see `record_reader` for what a record holds.

`peft_hook` calls `record_saved` after every `save_pretrained`; `record` is for adapters that another tool saved.
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_kit.artifacts.adapter import CONFIG, read_config, read_raw
from adapters_kit.artifacts.dtypes import name_of
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.identity import base_hashes
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.manifest import describe
from adapters_kit.artifacts.record_reader import CONFIG_KEYS, FORMAT, OURS, RECORD
from adapters_kit.artifacts.source import locate, locate_here, portable_base
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.errors import AdapterError, ShippingError
from adapters_kit.names import check_name

_log = logging.getLogger(__name__)
_PACKAGES = ("adapters-kit", "peft", "transformers", "torch", "bitsandbytes")
# The file that a tokenizer is mainly made of, the first that is there.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def record(folder: str | os.PathLike, model: Any, *, base: str | os.PathLike | None = None) -> Path:
    """Add to a saved adapter the record of what it was trained on, as `merge` and `wrap` read it.

    Args:
        folder: the adapter's folder, saved by any tool.
        model: the base model as it was trained on, loaded (quantized, if it was), wrapped or not; or its folder, .gguf
            file or hub id, which then counts as not quantized.
        base: the base's folder, .gguf file or hub id; None takes the one that the model was loaded from.

    Returns:
        The written file.

    Raises:
        ShippingError: no adapter there, or no such base.

    Example:
        >>> model = ak.load("meta-llama/Llama-3.2-1B", quantize="nf4")
        >>> ak.record("lora-from-elsewhere/", model)
    """
    if isinstance(model, str | os.PathLike):
        return record_base(folder, model)
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    return record_base(folder, base if base is not None else named or None, model)


def record_base(
    adapter: str | os.PathLike,
    base: str | os.PathLike | None = None,
    model: Any = None,
    *,
    hashes: bool = True,
    place: Path | None = None,
) -> Path:
    """Write the record into a saved adapter's folder.

    Args:
        adapter: the folder that `save_pretrained` wrote.
        base: the base model's folder, .gguf file or hub id; None takes the one that the adapter names.
        model: the trained model, wrapped or not: tells its class, its labels and how the base was quantized. Without
            it the base counts as not quantized.
        hashes: read the base's weights for their sha256.
        place: where the folder is going to stand: its config then names the base from there (see `portable_base`),
            and tells nobody whose disk it lies on.

    Returns:
        The written file.

    Raises:
        ShippingError: no adapter there, or no such base.
    """
    check_name(adapter, ShippingError)
    folder = Path(adapter)
    if not (folder / CONFIG).is_file():
        read_raw(folder)  # refuses it
    name = base if base is not None else read_config(folder).base_model_name_or_path
    if not name:
        raise ShippingError(f"{folder} does not say which model it was trained on. Say it: ak.record(folder, base).")
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    source = locate(name, revision) if hashes else locate_here(name, revision)
    content: dict[str, Any] = {"format": FORMAT, "base": describe(name), "quantize": None}
    if revision:
        content["revision"] = revision
    if hashes and source is not None:
        content["tensors"] = base_hashes(source)
    if model is not None:
        content |= _about(model, source)
    digest = _tokenizer_hash(folder) or (_tokenizer_hash(source) if source is not None else None)
    if digest:
        content["tokenizer"] = digest
    content["versions"] = {name: found for name in _PACKAGES if (found := _version(name))}
    if place is not None:
        for file in folder.rglob(CONFIG):  # several where each of several methods has a part
            named = {"base_model_name_or_path": portable_base(os.fspath(name), place, here_first=True)}
            write_json(file, read_json(file) | named, sort_keys=True)
    return write_json(folder / RECORD, content, indent=1)


def record_saved(model: Any, folder: str | os.PathLike, adapter_name: str) -> None:
    """The record of what `save_pretrained` has just written; a failure is told and stops nobody from saving.

    The tensors of the base are hashed for models that went through `load` or `wrap`; of others only what the model
    itself tells is noted, which costs nothing.
    """
    place = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        return  # built in memory: there is nothing to merge into
    ours = bool(getattr(model.get_base_model(), OURS, False))
    try:
        record_base(place, name, model, hashes=ours and _has_weights(name, model))
    except (AdapterError, OSError) as error:
        _log.warning("%s was saved without a record of its base: %s", place, error)


def _has_weights(name: str, model: Any) -> bool:
    source = locate_here(name, getattr(model.config, "_commit_hash", None))
    return source is not None and (source.is_file() or any(source.glob("*.safetensors")) or any(source.glob("*.bin")))


def _about(model: Any, source: Path | None) -> dict[str, Any]:
    from adapters_kit.anatomy import base_model

    inner = base_model(model)
    return {
        "model_class": type(inner).__name__,
        "config": _config_changes(inner, source),
        "dtype": name_of(_float_dtype(inner)),
        "quantize": quantization(inner),
    }


def _config_changes(model: Any, source: Path | None) -> dict[str, Any]:
    from transformers import AutoConfig

    now = model.config.to_dict()
    readable = source is not None and source.is_dir() and (source / "config.json").is_file()
    # The class of a model with Python files of its own is here already; nothing is to be run for this.
    kind = type(model.config) if type(model.config).__module__.startswith("transformers_modules") else AutoConfig
    before = kind.from_pretrained(source, trust_remote_code=False).to_dict() if readable else {}
    return {key: now[key] for key in CONFIG_KEYS if key in now and now[key] != before.get(key)}


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model was loaded in: of its first floating parameter outside any adapter."""
    from adapters_kit.anatomy.structure import walk

    for _, module in walk(model):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def quantization(model: nn.Module) -> dict[str, Any] | None:
    """How bitsandbytes holds the model: settings and the paths of the quantized linears; None if nothing is."""
    from adapters_kit.anatomy.structure import walk

    modules: dict[str, list[str]] = {"4bit": [], "int8": []}
    settings: dict[str, Any] = {}
    for path, module in walk(model):
        weight: Any = getattr(module, "weight", None)
        kind = type(weight).__name__
        if kind == "Params4bit":
            settings |= {"type": weight.quant_type, "blocksize": weight.blocksize, "nested": weight.compress_statistics}
            modules["4bit"].append(path)
        elif kind == "Int8Params":
            settings |= {"type": "int8"}
            modules["int8"].append(path)
    found = modules["4bit"] or modules["int8"]
    return settings | {"modules": found} if found else None


def _tokenizer_hash(folder: Path) -> str | None:
    found = next((folder / name for name in _TOKENIZER if (folder / name).is_file()), None) if folder.is_dir() else None
    return None if found is None else file_sha256(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
