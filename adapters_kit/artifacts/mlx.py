"""Adapters that MLX-LM wrote, as peft would have saved them: other names, factors the other way round.

MLX-LM adds `scale · (x A) B` with A (in, r) and B (r, out); peft `alpha / r · B (A x)` with A (r, in) and B (out, r).
Its DoRA scales rows as peft's does. Paths are those of the checkpoint in transformers' format; what MLX-LM builds
otherwise (experts in one tensor, an embedding that is tied) has no place in the model or is refused here.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adapters_kit.artifacts.checkpoint import open_file, read_header
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError
from adapters_kit.names import ADAPTER_CONFIG

FILE = "adapters.safetensors"
_KEYS = {"rank", "scale", "dropout", "keys"}
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
WAY_OUT = (
    "Merge it there: mlx_lm.fuse --model BASE --adapter-path {folder} --save-path MERGED --dequantize; the folder "
    "MERGED loads here as a model."
)


def is_mlx(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a folder with the `adapter_config.json` in `raw` is MLX-LM's, in the form that it has had since 2024."""
    return (
        "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw) and (folder / FILE).is_file()
    )


def as_peft(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `adapter_config.json` that peft would have written. Reads names and shapes, no tensor.

    Args:
        folder: MLX-LM's.
        raw: its `adapter_config.json`.

    Raises:
        ShippingError: what was trained is no LoRA of linears, or the scale is one of older versions.
    """
    options, kind = raw.get("lora_parameters"), raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or not isinstance(options, Mapping):
        raise _refuse(folder, f"fine_tune_type {kind!r} trains the weights themselves")
    strange = sorted(options.keys() - _KEYS)
    if strange:
        raise _refuse(folder, f"{', '.join(strange)} in lora_parameters meant another scale in other versions")
    rank, scale = options.get("rank"), options.get("scale")
    if type(rank) is not int or rank < 1 or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise _refuse(folder, f"rank {rank!r} and scale {scale!r} in lora_parameters are no numbers to compute with")
    stored = read_header(folder / FILE)[0]
    for name, tensor in stored.items():
        if name.rpartition(".")[2] not in _LEAVES or len(tensor.shape) > 2:
            raise _refuse(folder, f"{name} {tensor.shape} is no factor of one linear's update")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": raw.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": options.get("dropout") or 0.0,
        "use_dora": kind == "dora",
        "target_modules": sorted({name.rpartition(".")[0] for name in stored}),
        "inference_mode": True,
    }


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(peft's name, tensor) of every tensor of a folder that `as_peft` takes."""
    with open_file(folder / FILE) as file:
        for name in file.tensors:
            path, _, leaf = name.rpartition(".")
            yield f"base_model.model.{path}.{_LEAVES[leaf]}", file.read(name).t().contiguous()


def check_base(folder: Path, config: Any) -> None:
    """Refuse an adapter of MLX-LM on a base whose config has factors beside its weights.

    MLX-LM multiplies some of them into the weights as it loads them (Falcon H1's), and its file does not say which: an
    update of such a weight is another one here.

    Args:
        folder: of any adapter.
        config: the base's, of transformers or as JSON has it.

    Raises:
        ShippingError: naming the factor.
    """
    raw = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    if not is_mlx(folder, raw):
        return
    if _quantized(str(raw.get("model"))):
        warnings.warn(
            f"{folder} was trained by MLX-LM on {raw['model']}, whose weights MLX had quantized: on a base that was "
            f"not, it computes something near to what was trained, and not the same. {WAY_OUT.format(folder=folder)}",
            UserWarning,
            stacklevel=2,
        )
    table = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    parts = [table, *(part for part in table.values() if isinstance(part, Mapping))]
    for key, value in ((key, value) for part in parts for key, value in part.items()):
        factors = value if isinstance(value, list | tuple) else [value]
        if re.search(r"multipliers?$", str(key)) and any(one not in (None, 1) for one in factors):
            raise _refuse(folder, f"its base has {key}={value}, which MLX-LM may have multiplied into the weights")


def _quantized(base: str) -> bool:
    """Whether MLX-LM held a base in fewer bits: as its files say where they are here, else as such a base is named."""
    config = Path(base) / "config.json"
    if config.is_file():
        return "quantization" in read_json(config)
    return re.search(r"\d-?bit|mxfp|nvfp|dwq", base, re.IGNORECASE) is not None


def _refuse(folder: Path, what: str) -> ShippingError:
    return ShippingError(f"{folder} was written by MLX-LM, and {what}. {WAY_OUT.format(folder=folder)}")
