"""How much memory a training step needs, without weights and without running it.

The model is built on the meta device, gets its adapter, and runs once on fake tensors: every operation is dispatched,
none is computed. What autograd would keep for the backward pass is counted byte by byte, each storage once. The count
equals that of a real forward pass in the same dtype with the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from adapters_kit.anatomy import block_linears, blocks, fake
from adapters_kit.errors import UnknownNameError, did_you_mean

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lora+", "lora-fa")
# bitsandbytes keeps the state of smaller tensors in fp32, and one fp32 scale for so many 8-bit entries.
_SMALLEST_8BIT = 4096
_BLOCK_8BIT = 256
# Bytes a weight: 4 bits and, for each 64 weights, a scale of 8 bits that shares an fp32 scale with 255 others.
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device.

    Attributes:
        weights: frozen parameters and buffers.
        adapter: trained parameters, fp32.
        gradients: of the trained parameters, fp32.
        optimizer: its state.
        activations: kept for the backward pass.
        working: at most needed on top for a moment: the gradient of the largest kept tensor and a copy.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass
class Kept:
    """What autograd keeps of one forward pass, in bytes.

    Attributes:
        total: everything, each storage once.
        by_block: what each block keeps.
        block_inputs: the size of each block's input: all that gradient checkpointing keeps of it.
        largest: the largest single tensor.
    """

    total: int = 0
    by_block: dict[str, int] = field(default_factory=dict)
    block_inputs: dict[str, int] = field(default_factory=dict)
    largest: int = 0

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: the blocks' inputs, one block at a time, and what lies outside the blocks."""
        if not self.by_block:
            return self.total
        outside = self.total - sum(self.by_block.values())
        return outside + sum(self.block_inputs.values()) + max(self.by_block.values())


def kept_for_backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Kept:
    """Runs the forward pass once and counts what autograd keeps of it, parameters and buffers left out.

    Works on a real model and on one of `fake`.
    """
    own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, alive, inside = Kept(), {}, [""]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # a graph that held itself would never be freed, since no backward pass follows
        key = storage_of(tensor)
        if key not in own and key not in alive:
            size = tensor.untyped_storage().nbytes()
            alive[key] = tensor  # held, so that its storage's address is not given away again
            found.total += size
            found.largest = max(found.largest, size)
            if inside[-1]:
                found.by_block[inside[-1]] = found.by_block.get(inside[-1], 0) + size
        return tensor

    with ExitStack() as stack:
        for path in blocks(base):
            block = base.get_submodule(path)

            def enter(module: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
                inside.append(path)
                hidden = args[0] if args else kwargs.get("hidden_states")
                if isinstance(hidden, torch.Tensor):
                    found.block_inputs[path] = hidden.untyped_storage().nbytes()

            first = block.register_forward_pre_hook(enter, with_kwargs=True)
            last = block.register_forward_hook(lambda *_: inside.pop() and None)
            stack.callback(first.remove)
            stack.callback(last.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        model(**batch)
    return found


def storage_of(tensor: torch.Tensor) -> int:
    """Tells tensors apart by the memory that they view."""
    return tensor.untyped_storage()._cdata


def fixed_bytes(model: nn.Module, optimizer: str, quantize: str | None, linears: Iterable[str]) -> Memory:
    """Everything that does not depend on the batch.

    Args:
        model: wrapped, on any device (meta will do), in the dtype that it is to be held in.
        linears: paths in the base model of the layers that `quantize` is for.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = set()
    if quantize:
        for path in linears:
            layer = base.get_submodule(path)
            layer = getattr(layer, "base_layer", layer)
            quantized.add(id(layer.weight))
    weights, trained = 0.0, []
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.requires_grad and not (optimizer == "lora-fa" and "lora_A" in name):
            trained.append(tensor.numel())
        else:
            each = QUANTIZED_BYTES[quantize] if id(tensor) in quantized else tensor.element_size()
            weights += tensor.numel() * each
    return Memory(round(weights), 4 * sum(trained), 4 * sum(trained), state_bytes(optimizer, trained), 0, 0)


def state_bytes(name: str, sizes: Iterable[int], *, on_gpu: bool = True) -> int:
    """Bytes that the optimizer's state takes.

    Args:
        name: one of `OPTIMIZERS`.
        sizes: number of elements of each tensor that is trained; for "lora-fa" those of the B matrices (its A are
            frozen), for everything else those with `requires_grad`. Moments of fp32 parameters are assumed.
        on_gpu: leave out what a paged optimizer can move away from the GPU, which is all of it for large tensors.
    """
    if name not in OPTIMIZERS:
        raise UnknownNameError(f"Unknown optimizer {name!r}. {did_you_mean(name, OPTIMIZERS)}")
    total = 0
    for size in sizes:
        if name.startswith("paged") and on_gpu and size >= 100_000:
            continue
        if name.endswith("8bit") and size >= _SMALLEST_8BIT:
            total += 2 * size + 2 * 4 * -(-size // _BLOCK_8BIT)
        else:
            total += 8 * size
    return total


def step_bytes(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    optimizer: str,
    quantize: str | None,
) -> tuple[Memory, Kept]:
    """The memory of one training step on `batch`.

    Args:
        model: wrapped, on the meta device, in the dtype that it is to be held in; put into training mode.
        batch: real tensors; only their shapes and dtypes matter.
        dtype: of the arithmetic; a 16-bit one runs under autocast, as training does.
    """
    model.train()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linears = [path.removesuffix(".base_layer") for path in block_linears(base)]
    fixed = fixed_bytes(model, optimizer, quantize, linears)
    with fake(model) as mode, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        kept = kept_for_backward(model, {name: mode.from_tensor(tensor) for name, tensor in batch.items()})
    activations = kept.checkpointed if checkpointing else kept.total
    return replace(fixed, activations=activations, working=2 * kept.largest), kept
