"""A base as a folder of safetensors: itself, or what a .gguf file or pickled weights are turned into."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapters_kit.artifacts.checkpoint import INDEX, SINGLE, read_index
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.side_files import side_files
from adapters_kit.errors import ShippingError

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@contextmanager
def as_checkpoint(base: Path, work: Path) -> Iterator[Path]:
    """A folder with safetensors weights: `base` itself, or a conversion of it written to `work`.

    A GGUF file is dequantized by transformers into the whole model in memory; pickled weights are read file by file.

    Raises:
        ShippingError: neither a model folder nor a .gguf file; or pickled weights that would run code.
    """
    if base.is_file():
        if base.suffix != ".gguf":
            raise ShippingError(f"{base} is neither a model folder nor a .gguf file.")
        yield convert_gguf(base, work)
        return
    stored = [name for name in (SINGLE, INDEX) if (base / name).is_file()]
    pickled = [name for name in (PICKLED, PICKLED_INDEX) if (base / name).is_file()]
    yield convert_pickled(base, work) if pickled and not stored else base


def convert_pickled(base: Path, folder: Path) -> Path:
    """The weights of a folder of `pytorch_model*.bin` as safetensors, with config and side files beside them.

    Raises:
        ShippingError: a pickle that needs to run code, a shard that is missing, something else than tensors.
    """
    folder.mkdir()
    index = base / PICKLED_INDEX
    files = sorted(set(read_index(index)[0].values())) if index.is_file() else [PICKLED]
    weight_map: dict[str, str] = {}
    for file in files:
        name = SINGLE if len(files) == 1 else file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = _load(base / file)
        write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    for path, name in [(base / "config.json", "config.json"), *side_files(base)]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return folder


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ShippingError(f"{path.name} is named by {PICKLED_INDEX}, and is not in {path.parent}. Fetch it again.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except pickle.UnpicklingError as error:
        raise ShippingError(
            f"{path} is a pickle that needs to run code to load, which could do anything. Load the model where you "
            "trust "
            "it and save it with save_pretrained, which writes safetensors."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ShippingError(f"{path} cannot be read: {str(error)[:200]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ShippingError(f"{path} does not hold a table of tensors.")
    seen: dict[tuple[Any, ...], str] = {}
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        # Tied parameters are one tensor under two names; safetensors holds it once, as save_pretrained would.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and seen.setdefault(place, name) != name:
            continue
        kept[name] = tensor
    return {name: tensor.clone() if _shares(tensor) else tensor for name, tensor in kept.items()}


def _shares(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of a larger storage, which safetensors refuses."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _mappable(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"  # the zip form that torch writes since 1.6


def convert_gguf(file: Path, folder: Path) -> Path:
    """Save a GGUF model as a transformers folder: float32 safetensors, config, tokenizer."""
    from adapters_kit.loading import load, load_processor

    model = load(file, "causal-lm", dtype="float32")
    # What transformers leaves behind marks the model as quantized, and it refuses to save.
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    load_processor(file).save_pretrained(folder)
    return folder
