"""GGUF files read one tensor at a time, under the names and in the layout that transformers' own mapping gives them.

transformers unpacks the whole file before the first weight is used: for a model that is quantized on the way, the
16-bit model beside the 4-bit result.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)

from adapters_kit.anatomy import blocks, embeddings
from adapters_kit.artifacts.base_config import check_config
from adapters_kit.artifacts.heap import Trimmer
from adapters_kit.errors import ModelError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.ggml import FORMATS

_log = logging.getLogger(__name__)

AT_ONCE = 1 << 20  # weights unpacked at a time; the package's own unpacking needs twice the result


# What a tokenizer is built from, one entry a token: nothing of it is in a model's config.
VOCABULARY = {f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")}


def read_config(location: str, name: str) -> PreTrainedConfig:
    """The config that transformers makes of the file called `name` in the folder `location`.

    Most of what transformers spends on it goes into the vocabulary, which is in no config: seconds, and again for the
    tokenizer. So it is shown a file that says the same without the vocabulary, and without the weights.

    Raises:
        ModelError: counts that no model has.
        OSError, ValueError, KeyError: as `AutoConfig.from_pretrained`.
    """
    metadata, tensors = read_gguf_metadata(os.path.join(location, name))
    counts = {key: value for key, value in metadata.items() if key not in VOCABULARY}
    check_config(counts, os.path.join(location, name), ModelError)
    if f"{metadata['general.architecture']}.vocab_size" not in metadata:  # counted from the vocabulary then
        return AutoConfig.from_pretrained(location, gguf_file=name, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        _write_small(os.path.join(folder, name), metadata, tensors)
        config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    config._name_or_path = location
    return config


def _write_small(file: str, metadata: dict[str, Any], tensors: tuple[str, ...]) -> None:
    """A GGUF file of the metadata, and of one number in place of each tensor: some configs depend on their names."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, metadata["general.architecture"])
    adders = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float64, list: writer.add_array}
    for key, value in metadata.items():
        if key != "general.architecture" and key not in VOCABULARY and value != []:
            adders.get(type(value), writer.add_int64)(key, value)
    for each in tensors:
        writer.add_tensor(each, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Stored(NamedTuple):
    """Where one tensor lies in the file."""

    name: str
    """As the file has it."""
    kind: Any
    """A `gguf.GGMLQuantizationType`."""
    dtype: np.dtype
    """Of what is stored."""
    shape: tuple[int, ...]
    """Of what is stored: bytes in the last dimension for packed kinds."""
    offset: int
    """Bytes from the beginning of the file."""


class GgufTensor:
    """One tensor of the model, unpacked in fp32 when it is asked for: transformers' loader takes it for a tensor."""

    def __init__(self, key: str, parts: list[Stored], file: str, convert: Any, trimmer: Trimmer) -> None:
        self._key, self._parts, self._file, self._convert, self._trimmer = key, parts, file, convert, trimmer

    def __getitem__(self, index: Any) -> torch.Tensor:
        made: dict[str, torch.Tensor] = {}
        for part in self._parts:
            done = self._convert(weights=_unpack(self._file, part), name=part.name, parsed_parameters={"tensors": made})
            if done.name is not None:  # else put there under its final name
                made[self._key] = torch.from_numpy(np.ascontiguousarray(done.weights))
        tensor = made[self._key]
        self._trimmer(tensor.nbytes)
        return tensor[index]


class Kept(NamedTuple):
    """A weight of the model that is rows of the file's tensors, at most in another order.

    Attributes:
        parts: where they lie: one tensor, or those that experts' fused weights are put together from, of one kind.
        shape: of the weight without its last dimension: `(out,)` or `(experts, out)`.
        order: row of the model -> row of the file (of all parts, one after the other), int64; None where they are the
            same.
    """

    parts: tuple[Stored, ...]
    shape: tuple[int, ...]
    order: np.ndarray | None

    @property
    def stored(self) -> Stored:
        """The tensor of the file, for a weight that is one."""
        return self.parts[0]

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Of the blocks as `read` gives them."""
        return (*self.shape, self.stored.shape[-1])

    def read(self, file: str) -> torch.Tensor:
        """The blocks as they are stored, rows in the model's order: `(out, bytes)` or `(experts, out, bytes)` uint8."""
        raw = np.concatenate(
            [np.fromfile(file, np.uint8, count=int(np.prod(part.shape)), offset=part.offset) for part in self.parts]
        ).reshape(-1, self.stored.shape[-1])
        return torch.from_numpy(raw if self.order is None else raw[self.order]).view(self.raw_shape)


class KeptTensor:
    """A weight that stays in its blocks, read when transformers' loader asks for it."""

    def __init__(self, kept: Kept, file: str) -> None:
        self._kept, self._file = kept, file

    def __getitem__(self, index: Any) -> BlockTensor:
        return BlockTensor(self._kept.read(self._file), int(self._kept.stored.kind), torch.float32)


def _kept(skeleton: nn.Module, key: str, parts: list[Stored], convert: Any) -> Kept | None:
    """How the weight called `key` can stay in its blocks; None if it cannot.

    What transformers does to the tensors on their way into the model is found by showing it numbered rows: it may order
    rows (llama.cpp interleaves those of q and k) and lay experts' weights together, since blocks lie within them, and
    nothing else.
    """
    path, _, name = key.rpartition(".")
    shape = tuple(skeleton.get_parameter(key).shape[:-1])
    in_a_layer = name == "weight" and type(skeleton.get_submodule(path)) in (nn.Linear, nn.Embedding)
    kinds = {(int(part.kind), part.shape[-1]) for part in parts}
    if len(kinds) > 1 or int(parts[0].kind) not in FORMATS or not (in_a_layer or len(shape) == 2):
        return None
    made: dict[str, torch.Tensor] = {}
    rows = 0
    for part in parts:
        count = int(np.prod(part.shape[:-1]))
        numbered = np.arange(rows, rows + count, dtype=np.float64)[:, None] + np.array([0.0, 0.5])
        rows += count
        try:
            done = convert(
                weights=numbered.reshape(*part.shape[:-1], 2), name=part.name, parsed_parameters={"tensors": made}
            )
        except (ValueError, IndexError, RuntimeError):  # needs the true width
            return None
    if made.keys() - {key} or (len(parts) > 1 and not made):
        return None
    shown = np.asarray(made.get(key, done.weights))
    if shown.shape != (*shape, 2) or not np.array_equal(shown[..., 1], shown[..., 0] + 0.5):
        return None
    order = shown[..., 0].astype(np.int64).reshape(-1)
    if not np.array_equal(np.sort(order), np.arange(rows)):
        return None
    return Kept(tuple(parts), shape, None if np.array_equal(order, np.arange(rows)) else order)


def kept_weights(file: str | os.PathLike, skeleton: nn.Module) -> dict[str, Kept]:
    """Name in the model -> the weight's place in the file, for all that `load(file, quantize="keep")` keeps packed.

    Raises:
        ModelError: an architecture whose tensors transformers does not map one by one.
    """
    parts, convert, named = _mapping(os.fspath(file), skeleton)
    if not named:
        raise _not_one_by_one(file)
    return _keepable(skeleton, parts, convert)


def lay_in_blocks(skeleton: nn.Module, file: str | os.PathLike, dtype: torch.dtype) -> int:
    """Give a model of shapes alone the weights that `load(file, quantize="keep")` leaves in their blocks.

    Args:
        skeleton: on the meta device. Its parameters are replaced, tied ones together.
        dtype: what the weights are unpacked to.

    Returns:
        How many weights that are.

    Raises:
        ModelError: as `kept_weights`.
    """
    packed: dict[int, nn.Parameter] = {}
    for key, kept in kept_weights(file, skeleton).items():
        raw = torch.empty(kept.raw_shape, dtype=torch.uint8, device="meta")
        made = BlockTensor(raw, int(kept.stored.kind), dtype)
        packed[id(skeleton.get_parameter(key))] = nn.Parameter(made, requires_grad=False)
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = packed.get(id(parameter), parameter)
    return len(packed)


def _keepable(skeleton: nn.Module, parts: dict[str, list[Stored]], convert: Any) -> dict[str, Kept]:
    found = {key: _kept(skeleton, key, each, convert) for key, each in parts.items()}
    return {key: kept for key, kept in found.items() if kept is not None}


def _tell_of_unpacked(file: str, parts: dict[str, list[Stored]]) -> None:
    """Whoever reads "keep" expects the file's size: say which packed tensors get larger all the same."""
    packed = {key: each for key, each in parts.items() if any(part.dtype == np.uint8 for part in each)}
    if packed:
        stored = sum(int(np.prod(part.shape)) for each in packed.values() for part in each)
        kinds = sorted({part.kind.name for each in packed.values() for part in each})
        _log.warning(
            'quantize="keep": %d tensors of %s are unpacked, such as %s (%s; %.1f MB in the file, several times that '
            "in memory): fused, turned round, or in a format that transformers %s does not read.",
            len(packed),
            os.path.basename(file),
            next(iter(packed)),
            ", ".join(kinds),
            stored / 1e6,
            transformers.__version__,
        )


def _not_one_by_one(file: str | os.PathLike) -> ModelError:
    return ModelError(
        f"{os.fspath(file)}: transformers maps this architecture's tensors to the model as a whole, not one by one, so "
        'they cannot stay in their blocks. Leave out quantize="keep", or take "nf4" or "int8".'
    )


@contextmanager
def read_gguf_lazily(
    file: str | os.PathLike, skeleton: nn.Module, keep: bool = False
) -> Iterator[dict[str, GgufTensor | KeptTensor] | None]:
    """A state dict for `skeleton` whose tensors are read from `file` one at a time.

    Args:
        keep: linears, embeddings and experts stay in their blocks, where they can (`BlockTensor`).

    None where transformers' mapping does not say, tensor by tensor, what the model's body is made of (gpt-oss), or has
    moved on to another one (Qwen3.5, LFM2): transformers has to read such files itself.
    """
    file = os.fspath(file)
    parts, convert, named = _mapping(file, skeleton)
    if not named and keep:
        raise _not_one_by_one(file)
    if not named:
        yield None
        return
    trimmer = Trimmer()
    table: dict[str, GgufTensor | KeptTensor] = {
        key: GgufTensor(key, each, file, convert, trimmer) for key, each in parts.items()
    }
    if keep:
        kept = _keepable(skeleton, parts, convert)
        _tell_of_unpacked(file, {key: each for key, each in parts.items() if key not in kept})
        table |= {key: KeptTensor(each, file) for key, each in kept.items()}
    yield table
    trimmer.now()


def _mapping(file: str, skeleton: nn.Module) -> tuple[dict[str, list[Stored]], Any, bool]:
    """Name in the model -> the tensors of the file that it is made of; how they are converted; whether that is all."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    architecture = read_field(reader, "general.architecture")[0]
    stored = [
        Stored(each.name, each.tensor_type, each.data.dtype, tuple(each.data.shape), int(each.data_offset))
        for each in reader.tensors
    ]
    del reader  # its map of the file would count as memory
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=skeleton.config.to_dict())
    names = get_gguf_hf_weights_map(skeleton, processor)
    parts: dict[str, list[Stored]] = {}
    for each in stored:
        # Parts of fused experts are named without their suffix.
        key = names.get(each.name) or names.get(each.name.removesuffix(".weight"))
        if key is not None:
            parts.setdefault(key, []).append(each)
    body = tuple(f"{path}." for path in (*blocks(skeleton), *embeddings(skeleton)))
    unnamed = [key for key in skeleton.state_dict() if key.startswith(body) and key not in parts]

    def convert(**options: Any) -> Any:
        return processor.process(tensor_key_mapping=names, **options)

    return parts, convert, not unnamed and not is_gguf_arch_supported(architecture)


def _unpack(file: str, part: Stored) -> np.ndarray:
    """The stored weights in fp32."""
    from gguf import dequantize

    raw = np.fromfile(file, part.dtype, count=int(np.prod(part.shape)), offset=part.offset)
    rows = raw.reshape(-1, part.shape[-1])
    width = dequantize(rows[:1], part.kind).shape[-1]
    out = np.empty((len(rows), width), np.float32)
    step = max(1, AT_ONCE // width)
    for first in range(0, len(rows), step):
        out[first : first + step] = dequantize(rows[first : first + step], part.kind)
    return out.reshape(*part.shape[:-1], width)
