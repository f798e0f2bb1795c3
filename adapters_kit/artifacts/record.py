"""record_base(): what an adapter was trained on, written beside it as `adapters_kit.json`.

The sha256 of every tensor of the base, how it was quantized, and what training changed in its config.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from adapters_kit.anatomy import base_model
from adapters_kit.anatomy.structure import walk
from adapters_kit.artifacts.adapter import RECORD, read_config
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.identity import base_hashes
from adapters_kit.artifacts.source import locate
from adapters_kit.errors import ShippingError

FORMAT = 1
# What training a head changes in a config; everything else is the base's.
_CONFIG_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")


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
    return write_json(folder / RECORD, record, indent=1)


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
