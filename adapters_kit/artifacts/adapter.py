"""An adapter folder as it lies on the disk: its peft config, its weights, the record of its base.

Nothing of the model is built here. What cannot be trusted is refused: unknown methods, pickles that carry code, damaged
files, values that are not finite.
"""

import ast
import dataclasses
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from adapters_kit.artifacts import foreign, mlx
from adapters_kit.artifacts.checkpoint import open_file
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.option_types import lora_types, types_of, unfit
from adapters_kit.artifacts.record_reader import read_record
from adapters_kit.artifacts.unread import PICKLE, WEIGHTS, check_all_read
from adapters_kit.errors import ShippingError, did_you_mean
from adapters_kit.names import ADAPTER_CONFIG, check_name
from adapters_kit.recipe_text import parse_yaml

CONFIG = ADAPTER_CONFIG


@dataclass
class Adapter:
    """What an adapter folder says.

    Attributes:
        raw: the parsed `adapter_config.json`.
        weights: name -> tensor, as stored.
        record: the checked `adapters_kit.json` (see `record_reader`), empty for an adapter trained elsewhere.
    """

    folder: Path
    raw: dict[str, Any]
    weights: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Any:
        """The peft config. Importing peft takes seconds, so this is left to those who need it."""
        return read_config(self.folder)

    @property
    def base(self) -> str | None:
        """The base model that the adapter's config names, as `named_base` finds it."""
        return named_base(self.folder, self.raw.get("base_model_name_or_path") or None)

    @property
    def method(self) -> str:
        """peft's name of the method, in lower case."""
        return str(self.raw.get("peft_type")).lower()


def adapter_folder(folder: str | os.PathLike[str]) -> Path:
    """The adapter in a folder: the folder itself, or `adapter` inside it where it is a run folder."""
    check_name(folder, ShippingError)
    folder = Path(folder)
    inside = folder / "adapter"
    return inside if not (folder / CONFIG).is_file() and (inside / CONFIG).is_file() else folder


def named_base(folder: Path, name: str | None) -> str | None:
    """The base that an adapter in `folder` names: a hub id or a path.

    What is shipped names a base on a disk without telling whose disk it is: by the path from the adapter's folder on,
    or by its last name alone. In a run folder the recipe beside the adapter knows where it lies.
    """
    if not name or not isinstance(name, str):
        return name
    check_name(name, ShippingError)
    if Path(name).is_absolute():
        return name
    recipe = folder.parent / "recipe.yaml"
    if folder.name == "adapter" and recipe.is_file():
        told = parse_yaml(recipe.read_text(encoding="utf-8", errors="replace"))[0].get("model")
        if isinstance(told, str) and Path(told).name == Path(name).name and Path(told).expanduser().exists():
            return told
    is_from_here = name.startswith("..") or not Path(name).expanduser().exists()
    return os.path.normpath(folder / name) if is_from_here and (folder / name).exists() else name


def read_config(folder: Path) -> Any:
    """The peft config of an adapter folder; its base is where `named_base` finds it.

    Raises:
        ShippingError: no adapter there, or a method that this installation does not know.
    """
    from peft import PeftConfig

    from adapters_kit.peft_plugin import peft_methods

    folder = adapter_folder(folder)
    raw = read_raw(folder)
    kind = raw.get("peft_type")
    if str(kind).lower() not in peft_methods():
        _register_ours()
    if str(kind).lower() not in peft_methods():
        hint = did_you_mean(str(kind), (name.upper() for name in peft_methods()))
        raise ShippingError(
            f"{folder / CONFIG} is of type {kind!r}, which is not known here. {hint} "
            "If another package provides it, install that package."
        )
    check_fields(folder, raw)
    check_options(folder, raw)
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**raw))
    except Exception as error:  # peft raises whatever the fields provoke
        raise ShippingError(f"{folder / CONFIG} is not a usable peft config: {error}") from error
    config.base_model_name_or_path = named_base(folder, config.base_model_name_or_path)  # peft looks into its config
    return config


def check_options(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse options that the installed peft would leave out with a warning.

    Args:
        raw: the config, of a method that is known here.

    Raises:
        ShippingError: naming them.
    """
    import peft

    from adapters_kit.peft_plugin import peft_methods

    known = {one.name for one in dataclasses.fields(peft_methods()[str(raw.get("peft_type")).lower()])}
    strange = foreign.not_known(raw, known)
    if strange:
        raise ShippingError(foreign.upgrade(folder / CONFIG, raw, strange, peft.__version__))


def read_raw(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder as peft writes it, not looked into; MLX-LM's is translated.

    Raises:
        ShippingError: no adapter there, or one of another tool: which, and what to do.
    """
    if not (folder / CONFIG).is_file():
        if not folder.exists():
            raise ShippingError(f"There is no {folder}.")
        hint = " It looks like a whole model." if (folder / "config.json").is_file() else ""
        told = foreign.told(folder, {})
        raise ShippingError(told or f"No {CONFIG} in {folder}, so it is not an adapter folder.{hint}")
    raw = read_json(folder / CONFIG)
    if mlx.is_mlx(folder, raw):
        return mlx.as_peft(folder, raw)
    if (told := foreign.told(folder, raw)) is not None:
        raise ShippingError(told)
    raw.pop("runtime_config", None)  # about the run that wrote it
    for key in ("rank_pattern", "alpha_pattern", "loftq_config"):
        if raw.get(key, ...) is None:  # some tools write null for an empty table
            raw.pop(key, None)
    return raw


def _register_ours() -> None:
    """Methods from outside peft become known to it when the module of their config is imported."""
    from adapters_kit import registry

    for name in registry.names():
        _ = registry.get(name).config_class


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors, checked finite.

    Raises:
        ShippingError: no weights, damaged weights, a pickle that would run code, NaN or infinite values; or weights
            in other files of the folder, which would be lost.
    """
    folder = adapter_folder(folder)
    read = {WEIGHTS if (folder / WEIGHTS).is_file() else PICKLE}
    if (folder / CONFIG).is_file() and mlx.is_mlx(folder, read_json(folder / CONFIG)):
        read = {mlx.FILE, *(path.name for path in folder.glob(f"[0-9]*_{mlx.FILE}"))}  # and as it was before
        weights = dict(mlx.weights(folder))
    elif read == {WEIGHTS}:
        with open_file(folder / WEIGHTS) as file:
            weights = {name: file.read(name) for name in file.tensors}
    elif (folder / PICKLE).is_file():
        weights = _read_pickle(folder / PICKLE)
    elif (told := foreign.told(folder, {})) is not None:
        raise ShippingError(told)
    else:
        raise ShippingError(f"Neither {WEIGHTS} nor {PICKLE} in {folder}: the adapter has no weights.")
    check_all_read(folder, read, weights)
    weights = foreign.unnamed(weights)
    empty = [name for name, tensor in weights.items() if not tensor.numel()]
    if empty:
        raise ShippingError(
            f"{len(empty)} of {len(weights)} tensors in {folder} are empty, such as {empty[0]!r}: under DeepSpeed's "
            "ZeRO-3 each process holds a part, and the file was written without gathering them. Save it again with "
            "stage3_gather_16bit_weights_on_model_save, or get the weights with zero_to_fp32.py."
        )
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if broken:
        raise ShippingError(
            f"{len(broken)} of {len(weights)} tensors in {folder} hold NaN or infinite values, such as {broken[0]!r}. "
            "The training diverged; take an earlier checkpoint."
        )
    return weights


# Below this, a sum of squares in float32 leaves no value that does not fit; halved, since summing rounds.
_BOUNDS = {
    torch.float16: 0.5 * torch.finfo(torch.float16).max ** 2,
    torch.bfloat16: 0.5 * torch.finfo(torch.float32).max,
    torch.float32: 0.5 * torch.finfo(torch.float32).max,
}


def surely_fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the sum of the squares, a pass as fast as reading, shows that every value is finite in `dtype`.

    NaN and infinity do not pass, nor do some huge values that would fit: ask `is_finite` about those.
    """
    if value.dtype != torch.float32 or not value.is_contiguous() or dtype not in _BOUNDS:
        return False
    flat = value.view(-1)
    return torch.dot(flat, flat).item() < _BOUNDS[dtype]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite; one pass without a temporary (the extremes pass on NaN)."""
    if not tensor.numel() or surely_fits(tensor, tensor.dtype):
        return True
    low, high = (tensor if tensor.dtype.itemsize > 1 else tensor.float()).aminmax()
    return bool(low.isfinite() & high.isfinite())


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ShippingError(
            f"{path} is a pickle that needs to run code to load, which could do anything. Load it where you trust it "
            f"and save it as {WEIGHTS}."
        ) from error
    except Exception as error:
        raise ShippingError(f"{path} cannot be read: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ShippingError(f"{path} does not hold a table of tensors.")
    return weights


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Everything an adapter folder says, its config not looked into yet; see `read_weights` for what is refused.

    Args:
        folder: an adapter folder, or a run folder with one inside.
    """
    folder = adapter_folder(folder)
    raw = read_raw(folder)
    if str(raw.get("peft_type")).lower() != "lora":
        read_config(folder)  # an unknown method is told before anything about its weights
    check_fields(folder, raw)
    return Adapter(folder, raw, _tidy(folder, read_weights(folder)), read_record(folder))


_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")


def check_fields(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse values of another type than the config of the method has there, and numbers that nothing computes with.

    Args:
        raw: the config. Of a method that is not known here, only what all methods have is looked at.

    Raises:
        ShippingError: naming the key.
    """

    def refuse(key: str, wanted: str) -> NoReturn:
        raise ShippingError(f"{folder / CONFIG}: {key} is {repr(raw[key])[:80]}; it has to be {wanted}.")

    if not isinstance(raw.get("peft_type"), str | None):
        refuse("peft_type", "the name of a method")
    for key in _NAMES:
        value = raw.get(key)
        listed = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
        if value is not None and not isinstance(value, str) and not listed:
            refuse(key, "a list of names")
    if "r" in raw and str(raw.get("peft_type")).lower() == "lora" and (type(raw["r"]) is not int or raw["r"] < 1):
        refuse("r", "a whole number, 1 or more")
    if (found := unfit(_types(raw), raw)) is not None:
        refuse(*found)
    parts = raw.get("parts")  # of several methods together
    for part in parts.values() if isinstance(parts, Mapping) else ():
        if isinstance(part, Mapping):
            check_fields(folder, part)


def _types(raw: Mapping[str, Any]) -> dict[str, ast.expr]:
    kind = str(raw.get("peft_type")).lower()
    if kind == "lora":  # the merge of a plain LoRA needs no peft
        return lora_types()
    from adapters_kit.peft_plugin import peft_methods

    return types_of(peft_methods().get(kind, object))


# Whole numbers of a config that are no sizes: how long it was trained, seeds, scales, which tokens.
_NO_SIZES = re.compile(
    r"seed|_key$|alpha|total_step|^t(init|final)$|deltaT|warmup|interval|tokens?_id|_index|lambda|version"
)
_SMALL = 4096  # a size up to this takes no memory worth a word, whatever the file holds


def check_sizes(folder: Path, raw: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse sizes that no tensor of the file is long enough for: peft would first allocate what it is told.

    Raises:
        ShippingError: naming the key.
    """
    for value in raw.values():  # the parts of several methods together
        for part in (one for one in (value if isinstance(value, list) else ()) if isinstance(one, dict)):
            check_sizes(folder, part, weights)
    claimed = [(key, value) for key, value in raw.items() if type(value) is int and not _NO_SIZES.search(key)]
    pattern = raw.get("rank_pattern")
    claimed += [("rank_pattern", rank) for rank in (pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((max(tensor.shape, default=0) for tensor in weights.values()), default=0)
    for key, value in claimed:
        if type(value) is int and value > max(largest, _SMALL):
            raise ShippingError(f"{folder / CONFIG}: {key} is {value:,}, and no tensor is longer than {largest:,}.")
    # Virtual tokens of all layers are one table, as large as the product of what the config says.
    names = ("num_virtual_tokens", "num_layers", "token_dim")
    tokens, layers, dim = (value if type(value := raw.get(key)) is int else 1 for key in names)
    held = sum(tensor.numel() for tensor in weights.values())
    wanted = tokens * dim * (layers if "PREFIX" in str(raw.get("peft_type")).upper() else 1)
    if tokens > 1 and wanted > 8 * max(held, _SMALL):
        raise ShippingError(
            f"{folder / CONFIG}: num_virtual_tokens {tokens:,}, token_dim {dim:,} and num_layers {layers:,} are "
            f"{wanted:,} numbers or more, and the file holds {held:,}."
        )


def _tidy(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without what peft saves twice: of an embedding in `modules_to_save` whose model was resized it writes
    `X.weight`, `X.modules_to_save.weight` and `X.original_module.weight`, and reads the first."""
    result = dict(weights)
    for name in weights:
        path, _, leaf = name.rpartition(".modules_to_save.")
        plain = f"{path}.{leaf}"
        if not path or plain not in weights:
            continue
        if not torch.equal(weights[name], weights[plain]):
            raise ShippingError(f"{folder}: {name} and {plain} are one tensor saved twice, and differ. Save it again.")
        del result[name]
        result.pop(f"{path}.original_module.{leaf}", None)
    return result


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """As `open_adapter`; refuses a config that peft cannot use, too (see `read_config`)."""
    config = read_config(Path(folder))
    adapter = open_adapter(folder)
    adapter.config = config
    return adapter
