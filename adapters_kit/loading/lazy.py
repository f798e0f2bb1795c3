"""Where a model is: what a name stands for, whether weights are there, and reading them one tensor at a time."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from adapters_kit.errors import MissingPackageError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.names import is_adapter_folder, looks_like_path
from adapters_kit.quantization import Trimmer

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")


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
        optional = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        single = cached_file(self.location, SAFE_WEIGHTS_NAME, revision=revision, **optional)
        if single is not None:
            return [single]
        index = cached_file(self.location, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **optional)
        if index is None:
            return []
        files, _ = get_checkpoint_shard_files(self.location, index, revision=revision)
        return list(files)


def find(name: str | os.PathLike) -> Source:
    """What `name` stands for. A path that exists wins over a hub id of the same spelling.

    Raises:
        UnknownNameError: it looks like a path and nothing is there.
    """
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
    return Source(text, text)


class _Tensor:
    """One tensor of a checkpoint, read when it is asked for: transformers' loader takes it in place of the tensor."""

    def __init__(self, part: Any, after_read: "Trimmer") -> None:
        self._part = part
        self._after_read = after_read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._part[index]
        self._after_read(tensor.nbytes)
        return tensor

    def __getattr__(self, name: str) -> Any:  # get_shape, get_dtype, ...
        return getattr(self._part, name)


@contextmanager
def read_lazily(files: list[str]) -> Iterator[dict[str, _Tensor]]:
    """A state dict whose tensors are read from `files` one at a time, each into memory of its own.

    transformers maps the files instead. The pages of a map count as resident and stay as long as any tensor points into
    it, which for a model quantized on the way is the whole 16-bit checkpoint beside the 4-bit result.
    """
    trimmer = Trimmer()
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt", device="cpu", backend="pread")) for file in files]
        yield {key: _Tensor(file.get_slice(key), trimmer) for file in opened for key in file.keys()}  # noqa: SIM118
    trimmer.now()


def _holds(folder: Path) -> str:
    files = sorted(entry.name for entry in folder.iterdir())
    return f"It holds: {', '.join(files[:12])}{' …' if len(files) > 12 else ''}." if files else "It is empty."
