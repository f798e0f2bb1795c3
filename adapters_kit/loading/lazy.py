"""A checkpoint's weights read one tensor at a time, for transformers' own loader."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open

from adapters_kit.artifacts.heap import Trimmer


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
