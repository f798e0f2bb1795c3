"""Plain LoRA added to the stored tensors themselves, with neither transformers nor peft imported.

The common case needs no model: every update is B A times one scale, and sits on a stored matrix of the same name. What
is not beyond doubt from the files alone (other methods, patterns, embeddings, tied weights, heads, transposed or
renamed tensors, an incomplete adapter) is left to `plan`, which builds the model's skeleton.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.artifacts.dtypes import FLOATS
from adapters_kit.artifacts.factors import pairs, scale_of
from adapters_kit.artifacts.patterns import check_patterns
from adapters_kit.errors import ShippingError

# Options that do not change what is merged, or that are read here. Any other one has to be off.
_FREE = {
    "peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "none", [], {}, 0)
_FLOATS = {one.stored for one in FLOATS}
BLOCK = 1 << 17  # values; in float32, twice, they fit a core's second cache
_SHORTEST = 32  # rows


@dataclass(frozen=True)
class Direct:
    """A merge that needs no model.

    Attributes:
        scale: what B A is multiplied with.
        factors: stored tensor -> A (r, in) and B (out, r), as stored.
    """

    scale: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def changed(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """(stored tensor, its merged values in float32 in blocks of rows), in the order of the base's files.

        A block stays in a core's cache from reading to writing. All of them lie in the same memory: each is gone when
        the next is asked for.
        """
        blocks = {name: _row_blocks(*checkpoint.tensors[name].shape) for name in self.factors}
        size = max((stop - start) * a.shape[1] for name, (a, _) in self.factors.items() for start, stop in blocks[name])
        memory = _Memory(size)
        for name in checkpoint.tensors:
            if name in self.factors:
                yield name, self._blocks(checkpoint, name, blocks[name], memory)

    def _blocks(
        self, checkpoint: Checkpoint, name: str, blocks: list[tuple[int, int]], memory: "_Memory"
    ) -> Iterator[torch.Tensor]:
        stored, (a, b) = checkpoint.tensors[name], (factor.float() for factor in self.factors[name])
        # Multiplying by a power of two rounds nothing, so it may come before the product, where it is cheap.
        early = math.frexp(self.scale)[0] == 0.5
        b, width = b * self.scale if early else b, stored.shape[1] * stored.torch_dtype.itemsize
        for start, stop in blocks:
            raw, read, value, update = memory.views(stop - start, stored.shape[1], stored.torch_dtype)
            checkpoint.fill(name, raw, start * width)
            value.copy_(read)
            torch.mm(b[start:stop], a, out=update)
            yield value.add_(update if early else update.mul_(self.scale))


class _Memory:
    """What one block after the other is computed in. Views are made once for each shape: there are few."""

    def __init__(self, size: int) -> None:
        self.raw = np.empty(4 * size, dtype=np.uint8)
        self.values, self.updates = torch.empty(2, size)
        self.made: dict[tuple, tuple[memoryview, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def views(
        self, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[memoryview, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bytes to read into; the same as a tensor (rows, columns) of `dtype`; two such tensors in float32."""
        key = rows, columns, dtype
        if key not in self.made:
            raw = self.raw[: rows * columns * dtype.itemsize]
            floats = (memory[: rows * columns].view(rows, columns) for memory in (self.values, self.updates))
            self.made[key] = raw.data, torch.from_numpy(raw).view(dtype).view(rows, columns), *floats
        return self.made[key]


def _row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows in blocks of about `BLOCK` values. None is short: the product of a few rows is summed in another order."""
    step = max(_SHORTEST, BLOCK // max(columns, 1))
    starts = list(range(0, max(rows - _SHORTEST, 1), step))
    return list(zip(starts, [*starts[1:], rows], strict=True))


def find_direct(adapter: Adapter, checkpoint: Checkpoint, config: dict[str, Any]) -> Direct | None:
    """The merge of `adapter` without a model, None where only a model can tell.

    Args:
        config: the base's `config.json`.
    """
    raw = adapter.raw
    if adapter.method != "lora" or any(value not in _OFF for key, value in raw.items() if key not in _FREE):
        return None
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian") or adapter.record.get("quantize"):
        return None
    if config.get("quantization_config") or not _same_class(adapter, config) or _transposed(checkpoint):
        return None
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float) or isinstance(alpha, bool) or rank < 1:
        return None
    check_patterns(raw, [name.removesuffix(".weight") for name in checkpoint.tensors])
    factors = _factors(adapter, checkpoint, rank, _vocabulary(config))
    if factors is None or factors.keys() != _expected(raw.get("target_modules"), checkpoint):
        return None
    return Direct(scale_of(alpha, rank, bool(raw.get("use_rslora"))), factors)


def _same_class(adapter: Adapter, config: dict[str, Any]) -> bool:
    """Whether the adapter was trained on the class that the base's config names."""
    found = config.get("architectures")
    names = [str(name) for name in found] if isinstance(found, list) and found else [""]
    trained = {adapter.record.get("model_class"), (adapter.raw.get("auto_mapping") or {}).get("base_model_class")}
    task = adapter.raw.get("task_type")
    fits = task is None or (task == "CAUSAL_LM" and names[0].endswith(("ForCausalLM", "LMHeadModel")))
    return fits and len(names) == 1 and trained <= {None, names[0]}


def _transposed(checkpoint: Checkpoint) -> bool:
    """Whether the base stores linears as (in, out), like GPT-2: some bias is as long as its weight is wide."""
    for name, stored in checkpoint.tensors.items():
        bias = checkpoint.tensors.get(name.removesuffix("weight") + "bias")
        if name.endswith(".weight") and len(stored.shape) == 2 and bias is not None:
            rows, columns = stored.shape
            if rows != columns and bias.shape == (columns,):
                return True
    return False


def _vocabulary(config: dict[str, Any]) -> set[int]:
    """Sizes of vocabularies, unless tying is ruled out: a matrix with that many rows may be tied to another one."""
    if config.get("tie_word_embeddings") is False:
        return set()
    nested = [value for value in config.values() if isinstance(value, dict)]
    return {part["vocab_size"] for part in [config, *nested] if isinstance(part.get("vocab_size"), int)}


def _factors(
    adapter: Adapter, checkpoint: Checkpoint, rank: int, words: set[int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    try:
        found, rest = pairs(adapter.weights)
    except ShippingError:
        return None
    if rest:
        return None
    factors = {}
    for path, pair in found.items():
        name = f"{path}.weight"
        stored = checkpoint.tensors.get(name)
        if pair.embedding or stored is None or stored.dtype not in _FLOATS or len(stored.shape) != 2:
            return None
        rows, columns = stored.shape
        if rows in words or pair.a.shape != (rank, columns) or pair.b.shape != (rows, rank):
            return None
        factors[name] = pair.a, pair.b
    return factors


def _expected(targets: Any, checkpoint: Checkpoint) -> set[str]:
    """Stored matrices that the adapter's config targets."""
    paths = [name.removesuffix(".weight") for name, t in checkpoint.tensors.items() if len(t.shape) == 2]
    if isinstance(targets, str):
        found = [path for path in paths if re.fullmatch(targets, path)]
    else:
        names = tuple(f".{target}" for target in targets or ())
        found = [path for path in paths if f".{path}".endswith(names)]
    return {f"{path}.weight" for path in found}
