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

KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")
# Options that do not change what is merged, or that are read here. Any other one has to be off.
_FREE = {
    "peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
_OFF = (None, False, "none", [], {}, 0)
_FLOATS = {"F32", "BF16", "F16"}


@dataclass(frozen=True)
class Direct:
    """A merge that needs no model.

    Attributes:
        scale: what B A is multiplied with.
        factors: stored tensor -> A (r, in) and B (out, r), as stored.
    """

    scale: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def changed(self, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        """(stored tensor, merged value in float32), in the order of the base's files.

        Every value lies in the same memory and is gone when the next is asked for: the allocator would keep what a
        fresh tensor for each took.
        """
        stored = [checkpoint.tensors[name] for name in self.factors]
        raw = np.empty(max(place.nbytes for place in stored), dtype=np.uint8)
        values, updates = torch.empty(2, max(math.prod(place.shape) for place in stored))
        for name, place in checkpoint.tensors.items():
            if name in self.factors:
                a, b = (factor.float() for factor in self.factors[name])
                count = math.prod(place.shape)
                value, update = values[:count].view(place.shape), updates[:count].view(place.shape)
                value.copy_(checkpoint.read(name, raw))
                value += torch.mm(b, a, out=update).mul_(self.scale)
                yield name, value


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
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return None
    factors = _pairs(adapter, checkpoint, rank, _vocabulary(config))
    if factors is None or factors.keys() != _expected(raw.get("target_modules"), checkpoint):
        return None
    return Direct(alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank, factors)


def _same_class(adapter: Adapter, config: dict[str, Any]) -> bool:
    """Whether the adapter was trained on the class that the base's config names."""
    names = config.get("architectures") or [""]
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


def _pairs(
    adapter: Adapter, checkpoint: Checkpoint, rank: int, words: set[int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.weights.items():
        match = KEY.match(key)
        if not match:
            return None
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    factors = {}
    for path, found in sides.items():
        name = f"{path}.weight"
        stored = checkpoint.tensors.get(name)
        if found.keys() != {"A", "B"} or stored is None or stored.dtype not in _FLOATS or len(stored.shape) != 2:
            return None
        rows, columns = stored.shape
        if rows in words or found["A"].shape != (rank, columns) or found["B"].shape != (rows, rank):
            return None
        factors[name] = found["A"], found["B"]
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
