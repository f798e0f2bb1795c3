"""`adapters_kit.json`, the record beside an adapter: what it was trained on. Read here, as data that may lie.

A record only ever tells about the base and about labels. Keys that are not known are dropped, values of another kind
are refused, and nothing in it names code.

    format       1
    base         the base's hub id, or the last name of its folder or file
    revision     the commit of a hub id
    tensors      name -> sha256 of each stored tensor of the base; by file for .gguf and .bin files
    model_class  the transformers class that was trained
    config       what training changed in the base's config: labels, the kind of problem, the padding token
    dtype        of the base's floating weights while it was trained
    quantize     how bitsandbytes held its linears: type, blocksize, nested, modules; null if it did not
    tokenizer    sha256 of the tokenizer's main file
    versions     of the packages that wrote it
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError
from adapters_kit.quantization_table import QUANTIZATIONS

RECORD, FORMAT = "adapters_kit.json", 1
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
OURS = "_adapters_kit"
"""Attribute that marks a model as having gone through `load` or `wrap`: whatever saves it, its base is hashed."""


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 4096


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(name) and _text(one) for name, one in value.items())


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() and _text(one) for key, one in value.items())


def _config(value: Any) -> bool:
    return isinstance(value, dict) and all(check(value[key]) for key, check in CONFIG_KEYS.items() if key in value)


def _quantization(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("type") in QUANTIZATIONS
        and isinstance(value.get("modules"), list)
        and all(map(_text, value["modules"]))
        and value.get("blocksize", 64) in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        and isinstance(value.get("nested", True), bool)
    )


# What training changes in a config -> whether a value can be that.
CONFIG_KEYS: dict[str, Callable[[Any], bool]] = {
    "id2label": _labels,
    "label2id": lambda value: isinstance(value, dict) and all(map(_text, value)) and all(map(_whole, value.values())),
    "problem_type": lambda value: value is None or value in PROBLEMS,
    "pad_token_id": lambda value: value is None or _whole(value),
}
_KEYS: dict[str, Callable[[Any], bool]] = {
    "format": _whole,
    "base": _text,
    "revision": _text,
    "tensors": _texts,
    "model_class": lambda value: _text(value) and value.isidentifier(),
    "config": _config,
    "dtype": lambda value: _text(value) and value in DTYPES,
    "quantize": _quantization,
    "tokenizer": _text,
    "versions": _texts,
}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an adapter folder, without what is not known; empty where there is none.

    Raises:
        ShippingError: not JSON, a value of the wrong kind, or a record of a newer format.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    raw = read_json(path)
    wrong = [key for key, fits in _KEYS.items() if raw.get(key) is not None and not fits(raw[key])]
    if wrong:
        raise ShippingError(
            f"{path}: {wrong[0]} is {str(raw[wrong[0]])[:80]!r}, which no record holds. Write it again with "
            "ak.record(folder, model), or delete it and say base= when you merge."
        )
    if (raw.get("format") or FORMAT) > FORMAT:
        raise ShippingError(f"{path} is of format {raw['format']}, newer than this adapters_kit. Update adapters_kit.")
    if raw.get("quantize") and not raw.get("dtype"):
        raise ShippingError(f"{path} tells how the base was quantized and not from which dtype. Write it again.")
    record = {key: raw[key] for key in _KEYS if raw.get(key) is not None}
    if "config" in record:
        record["config"] = {key: raw["config"][key] for key in CONFIG_KEYS if key in raw["config"]}
    if "quantize" not in record and "quantize" in raw:
        record["quantize"] = None  # known not to have been
    return record


def name_classes_of(model: Any, folder: str | os.PathLike[str]) -> None:
    """Puts the class names of an adapter's record into `model.config`, which has only LABEL_0 … for as many classes.

    A record that cannot be read is no reason to refuse an adapter that is loaded already.
    """
    config: Any = getattr(model, "config", None)
    own = getattr(config, "id2label", None)
    try:
        told = read_record(Path(folder)).get("config", {}).get("id2label")
    except (ShippingError, OSError):
        return
    if not isinstance(own, dict) or not told or len(own) != len(told):
        return
    if all(name == f"LABEL_{number}" for number, name in own.items()):
        config.id2label = {int(number): name for number, name in told.items()}
        config.label2id = {name: number for number, name in config.id2label.items()}
