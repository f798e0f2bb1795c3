"""Where the base model of an adapter lies on this machine: a folder, the hub cache, or a GGUF file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from adapters_kit.errors import ShippingError
from adapters_kit.shipping.adapter import Adapter

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".ot"}


def locate(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder (or .gguf file) of a model.

    Args:
        name: local folder, .gguf file or hub id; a hub id is looked up in the cache first, then fetched.

    Raises:
        ShippingError: nothing of that name, here or on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        try:
            return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(str(name), revision=revision, allow_patterns=_WANTED))
    except HFValidationError:
        raise ShippingError(f"The base model {str(name)!r} does not exist. Say where it is with base=.") from None
    except Exception as error:
        raise ShippingError(
            f"The base model {str(name)!r} is neither a folder here nor in the hub cache, and fetching it failed: "
            f"{error}. Say where it is with base=."
        ) from error


def base_of(adapter: Adapter, base: str | os.PathLike | None) -> Path:
    """The base of an adapter: `base` if given, else what the adapter's config says."""
    name = base if base is not None else adapter.base
    if name is None:
        raise ShippingError(f"{adapter.folder} does not say which model it was trained on. Say it with base=.")
    return locate(name, getattr(adapter.config, "revision", None))


@contextmanager
def as_checkpoint(base: Path, work: Path) -> Iterator[Path]:
    """A folder with safetensors weights: `base` itself, or a conversion of it written to `work`.

    A GGUF file is dequantized by transformers into the whole model in memory; there is no streaming for it.
    """
    if base.is_dir():
        yield base
        return
    if base.suffix != ".gguf":
        raise ShippingError(f"{base} is neither a model folder nor a .gguf file.")
    yield convert_gguf(base, work)


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
