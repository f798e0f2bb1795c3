"""Where a model is: what a name stands for, where it lies on this machine, whether weights are there."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import INDEX, SINGLE
from adapters_kit.artifacts.hub_ping import copy_without_hub
from adapters_kit.errors import MissingPackageError, ModelError, ShippingError, UnknownNameError, did_you_mean
from adapters_kit.names import check_name, is_adapter_folder, looks_like_path

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".ot"}

_SAY = "Say where it is: base=FOLDER to merge or export, model=FOLDER to ask or score."


def locate(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder (or .gguf file) of a model.

    Args:
        name: local folder, .gguf file or hub id; a hub id is looked up in the cache first, then fetched.

    Raises:
        ShippingError: nothing of that name, here or on the hub.
    """
    check_name(name, ShippingError)
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        kept = copy_without_hub(str(name), revision)
    except UnknownNameError as error:
        raise ShippingError(f"The base model: {error} {_SAY}") from error
    if kept is not None:
        return kept
    try:
        try:
            return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(str(name), revision=revision, allow_patterns=_WANTED))
    except HFValidationError:
        raise ShippingError(f"The base model {str(name)!r} does not exist. {_SAY}") from None
    except Exception as error:
        raise ShippingError(
            f"The base model {str(name)!r} is neither a folder here nor in the hub cache, and fetching it failed: "
            f"{error}. {_SAY}"
        ) from error


def locate_here(name: str | os.PathLike, revision: str | None = None) -> Path | None:
    """As `locate`, without the network: None where the model is not on this machine."""
    check_name(name, ShippingError)
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
    return locate(name, adapter.raw.get("revision") or adapter.record.get("revision"))


def portable_base(name: str | None, out: Path, *, here_first: bool = False) -> str | None:
    """How an adapter that is written to `out` is to name its base: a hub id as it is; a path of this machine from the
    adapter's folder on where they lie near each other, else its last name. Neither tells whose machine it is.

    Args:
        here_first: a base below the current folder by its path from there on: so plain transformers and peft, started
            in the same place, find it too.
    """
    if not name or not (looks_like_path(name) or Path(name).exists()):
        return name
    if here_first and Path(os.path.realpath(Path(name).expanduser())).is_relative_to(os.path.realpath(".")):
        return Path(os.path.relpath(Path(name).expanduser())).as_posix()
    here, there = Path(os.path.realpath(out)), Path(os.path.realpath(Path(name).expanduser()))
    together = Path(os.path.commonpath([here, there])) if here.anchor == there.anchor else None
    if together is None or together in (Path(there.anchor), Path.home().parent):
        return there.name
    return Path(os.path.relpath(there, here)).as_posix()


# What transformers reads weights from, in its order of preference.
_WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """A hub id, a folder, or a GGUF file inside a folder.

    Attributes:
        name: as the user wrote it.
        location: what transformers' `from_pretrained` takes.
        gguf_file: name of the file in `location`, if it is one.
        local: whether `location` is a folder on this machine.
    """

    name: str
    location: str
    gguf_file: str | None = None
    local: bool = False

    def options(self, revision: str | None = None) -> dict[str, Any]:
        """What `from_pretrained` of configs, models and tokenizers needs besides the location."""
        if self.gguf_file:
            try:
                import gguf  # noqa: F401
            except ImportError as error:
                raise MissingPackageError(
                    f"{self.name}: reading a .gguf file needs the package gguf: pip install gguf"
                ) from error
            return {"gguf_file": self.gguf_file}
        return {} if revision is None else {"revision": revision}

    def check_weights(self) -> None:
        """Refuse a local folder that has no weights.

        Raises:
            ModelError: with what the folder does hold.
        """
        if not self.local or self.gguf_file:
            return
        folder = Path(self.location)
        has_config = (folder / "config.json").is_file()
        if is_adapter_folder(folder) and not has_config:
            raise ModelError(
                f"{self.name} holds an adapter, not a model. Load the base model, then put the adapter on it: "
                f'ak.wrap(ak.load(base), "{self.name}").'
            )
        if not has_config:
            raise ModelError(f"{self.name} is not a model folder: it has no config.json. {_holds(folder)}")
        if not any((folder / file).is_file() for file in _WEIGHTS) and not list(folder.glob("*.safetensors")):
            raise ModelError(
                f"{self.name} has a config.json but no weights ({' or '.join(_WEIGHTS[:2])}). {_holds(folder)} "
                "Download the weights again, or save the model there with save_pretrained."
            )

    def safetensors_files(self, revision: str | None = None) -> list[str]:
        """The checkpoint's safetensors files, fetched if need be; empty if it has another format."""
        if self.gguf_file:
            return []
        from transformers.utils import cached_file
        from transformers.utils.hub import get_checkpoint_shard_files

        optional = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        single = cached_file(self.location, SINGLE, revision=revision, **optional)
        if single is not None:
            return [single]
        index = cached_file(self.location, INDEX, revision=revision, **optional)
        if index is None:
            return []
        files, _ = get_checkpoint_shard_files(self.location, index, revision=revision)
        return list(files)


def find(name: str | os.PathLike) -> Source:
    """What `name` stands for. A path that exists wins over a hub id of the same spelling.

    Raises:
        UnknownNameError: it looks like a path and nothing is there.
    """
    check_name(name, UnknownNameError)
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnknownNameError(f"{text} is a file. A model is a folder, a .gguf file or a hub id.")
        return Source(text, str(path.parent), gguf_file=path.name, local=True)
    if path.is_dir() and text:
        return Source(text, str(path), local=True)
    if looks_like_path(name) or text.endswith(".gguf") or not text:
        beside = sorted(entry.name for entry in path.parent.iterdir()) if text and path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else f"{path.parent} is empty or does not exist."
        raise UnknownNameError(f"No model at {text!r}. {hint}" if text else "The model has no name.")
    kept = copy_without_hub(text)
    return Source(text, text if kept is None else str(kept), local=kept is not None)


def _holds(folder: Path) -> str:
    files = sorted(entry.name for entry in folder.iterdir())
    return f"It holds: {', '.join(files[:12])}{' …' if len(files) > 12 else ''}." if files else "It is empty."
