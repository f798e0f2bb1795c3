"""Where the base model of an adapter lies on this machine: a folder, the hub cache, or a GGUF file."""

import os
from pathlib import Path

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.errors import ShippingError

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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

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


def locate_here(name: str | os.PathLike, revision: str | None = None) -> Path | None:
    """As `locate`, without the network: None where the model is not on this machine."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
    except Exception:  # not a hub id, or not in the cache
        return None


def base_of(adapter: Adapter, base: str | os.PathLike | None) -> Path:
    """The base of an adapter: `base` if given, else what the adapter's config says."""
    name = base if base is not None else adapter.base
    if name is None:
        raise ShippingError(f"{adapter.folder} does not say which model it was trained on. Say it with base=.")
    return locate(name, adapter.raw.get("revision"))
