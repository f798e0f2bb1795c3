"""The plan of an output checkpoint, made before a byte is written: which tensor goes where, from what."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters_kit.artifacts.checkpoint import INDEX, SINGLE, Checkpoint, build_header
from adapters_kit.artifacts.dtypes import CODES, STORED
from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import ShippingError


@dataclass
class Tensor:
    """One tensor of the output.

    Attributes:
        origin: the base tensor that is copied (or cast) into it; None if it is computed.
        at: byte position in its file, set by `lay_out`.
    """

    name: str
    """As it is stored."""
    dtype: str
    """As the header spells it, e.g. "BF16"."""
    shape: tuple[int, ...]
    """As it is stored."""
    origin: str | None = None
    at: int = 0

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * STORED[self.dtype].itemsize


@dataclass
class Layout:
    """Output files: name -> tensors in the order of their bytes."""

    files: dict[str, list[Tensor]]
    headers: dict[str, bytes] = field(default_factory=dict)
    """File name -> its header, set by `lay_out`."""

    def tensors(self) -> dict[str, tuple[str, Tensor]]:
        """Tensor name -> its file and place."""
        return {tensor.name: (file, tensor) for file, tensors in self.files.items() for tensor in tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(len(self.headers[file]) + sum(t.nbytes for t in tensors) for file, tensors in self.files.items())


def cast_name(stored: str, dtype: torch.dtype | None) -> str:
    """The dtype name of a tensor stored as `stored` when the model is cast to `dtype` (integers keep theirs)."""
    plain = STORED[stored].is_floating_point and STORED[stored].itemsize > 1
    return CODES[dtype] if dtype is not None and plain else stored


def lay_out(
    base: Checkpoint,
    *,
    dtype: torch.dtype | None,
    computed: set[str],
    reshaped: Mapping[str, tuple[int, ...]] | None = None,
    added: Mapping[str, tuple[int, ...]] | None = None,
    renamed: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
) -> Layout:
    """The same shards as the base's, with the same tensors in the same order.

    Args:
        dtype: cast every float tensor to this; None keeps each as it is.
        computed: base tensors whose values change.
        reshaped: new shapes of base tensors (a resized vocabulary).
        added: new tensors with their shapes; they go to the end of the last shard.
        renamed: base name -> name in the output.
        dropped: base tensors that the trained model has no use for.
    """
    reshaped, renamed = reshaped or {}, renamed or {}
    files: dict[str, list[Tensor]] = {file: [] for file in base.files}
    for name, stored in base.tensors.items():
        if name not in dropped:
            shape = tuple(reshaped.get(name, stored.shape))
            origin = None if name in computed else name
            tensor = Tensor(renamed.get(name, name), cast_name(stored.dtype, dtype), shape, origin)
            files[stored.file.name].append(tensor)
    files = {file: tensors for file, tensors in files.items() if tensors}
    floats = [
        tensor.dtype for tensors in files.values() for tensor in tensors if STORED[tensor.dtype].is_floating_point
    ]
    if not floats:
        raise ShippingError(f"No float tensors in {base.folder}: nothing to merge into.")
    usual = max(set(floats), key=floats.count)
    last = files[list(files)[-1]]
    last += [Tensor(name, usual, tuple(shape)) for name, shape in (added or {}).items()]
    layout = Layout(files)
    for file, tensors in files.items():
        table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        if len(table) != len(tensors):
            raise ShippingError(f"Two tensors of {file} would have the same name; the base mixes two naming schemes.")
        layout.headers[file] = build_header(table, {"format": "pt"} | base.metadata[file])
        position = len(layout.headers[file])
        for tensor in tensors:
            tensor.at = position
            position += tensor.nbytes
    return layout


def write_index(layout: Layout, base: Checkpoint, folder: Path) -> None:
    """The shard index with true byte counts, where the base has one."""
    if base.index is None and list(layout.files) == [SINGLE]:
        return
    tensors = layout.tensors()
    parameters = sum(torch.Size(tensor.shape).numel() for _, tensor in tensors.values())
    index = {
        "metadata": (base.index or {})
        | {"total_size": sum(tensor.nbytes for _, tensor in tensors.values())}
        | ({"total_parameters": parameters} if "total_parameters" in (base.index or {}) else {}),
        "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
    }
    write_json(folder / INDEX, index)
