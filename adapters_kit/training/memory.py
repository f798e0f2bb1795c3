"""How much memory a training step needs, without weights and without running it.

The model is built on the meta device, gets its adapter, is cut down to the blocks that differ, and runs once on fake
tensors: every operation is dispatched, none is computed. What autograd would keep for the backward pass is counted byte
by byte, each storage once. The count equals that of a real forward pass in the same dtype with the same kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from adapters_kit.anatomy import base_model, block_linears, blocks, fake, output_embeddings
from adapters_kit.anatomy.structure import unwrap
from adapters_kit.errors import UnknownNameError, did_you_mean
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.cross_entropy import chunk_bytes, is_chunked, tokens_at_once
from adapters_kit.quantization import KEEP
from adapters_kit.quantization_table import KINDS
from adapters_kit.training.gpu_rules import AllCount, GpuRules

Batch = dict[str, torch.Tensor]
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lora+", "lora-fa")
# bitsandbytes keeps the state of smaller tensors in fp32, and one fp32 scale for so many 8-bit entries.
_SMALLEST_8BIT = 4096
_BLOCK_8BIT = 256


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device.

    Attributes:
        weights: frozen parameters and buffers.
        adapter: trained parameters, fp32.
        gradients: of the trained parameters, fp32.
        optimizer: its state.
        activations: kept for the backward pass.
        working: at most needed on top for a moment: the gradient of the largest kept tensor and a copy, a quantized
            weight unpacked, or the pieces of the chunked loss.
        evaluation: needed while scoring, when there are neither gradients nor activations: the logits of a pass.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    evaluation: int = 0

    @property
    def total(self) -> int:
        """The most there is at one time."""
        step = self.gradients + self.activations + self.working
        return self.weights + self.adapter + self.optimizer + max(step, self.evaluation)


@dataclass
class Kept:
    """What autograd keeps of one forward pass, in bytes.

    Attributes:
        outside: what is kept of everything but the blocks and of what they share, each storage once.
        by_block: what each block keeps.
        block_inputs: the size of each block's input: all that gradient checkpointing keeps of it.
        largest: the largest single tensor.
        stands_for: for how many blocks of the whole model each one was counted (`anatomy.depth`); 1 where it is silent.
    """

    outside: int = 0
    by_block: dict[str, int] = field(default_factory=dict)
    block_inputs: dict[str, int] = field(default_factory=dict)
    largest: int = 0
    stands_for: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Everything."""
        return self.outside + self._all(self.by_block)

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: the blocks' inputs, one block at a time, and what lies outside the blocks."""
        return self.outside + self._all(self.block_inputs) + max(self.by_block.values(), default=0)

    def _all(self, by_block: dict[str, int]) -> int:
        return sum(bytes_ * self.stands_for.get(path, 1) for path, bytes_ in by_block.items())


def kept_for_backward(model: nn.Module, batch: Batch) -> Kept:
    """Runs the forward pass once and counts what autograd keeps of it, parameters and buffers left out.

    Works on a real model and on one of `fake`.
    """
    own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    base = base_model(model)
    found, inside = Kept(), [""]
    packed: dict[int, tuple[str, torch.Tensor]] = {}  # held, so that no storage's address is given away again
    given: Counter[int] = Counter()
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # a graph that held itself would never be freed, since no backward pass follows
        key = storage_of(tensor)
        if key not in own and key not in packed:
            packed[key] = inside[-1], tensor
        return tensor

    with ExitStack() as stack:
        for path in blocks(base):
            block = base.get_submodule(path)

            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                inside.append(path)
                hidden = args[0] if args else kwargs.get("hidden_states")
                if isinstance(hidden, torch.Tensor):
                    found.block_inputs[path] = hidden.untyped_storage().nbytes()
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                given.update({storage_of(tensor) for tensor in tensors})
                held.extend(tensors)

            def leave(*_: Any) -> None:
                inside.pop()

            first = block.register_forward_pre_hook(enter, with_kwargs=True)
            last = block.register_forward_hook(leave)
            stack.callback(first.remove)
            stack.callback(last.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        model(**batch)
    for key, (path, tensor) in packed.items():
        size = tensor.untyped_storage().nbytes()
        found.largest = max(found.largest, size)
        if path and given[key] < 2:
            found.by_block[path] = found.by_block.get(path, 0) + size
        else:  # what several blocks are given (rotary angles, a mask) is no block's own, whichever keeps it first
            found.outside += size
    return found


def kept_by_shapes(model: nn.Module, batch: Batch, dtype: torch.dtype, *, on_gpu: bool = False) -> Kept:
    """`kept_for_backward` of a model of shapes alone.

    Args:
        model: wrapped, on the meta device, in the dtype that it is to be held in; in training mode.
        batch: real tensors; only their shapes and dtypes matter.
        dtype: of the arithmetic; a 16-bit one runs under autocast, as training does.
        on_gpu: by the rules of CUDA's autocast and attention, not a CPU's.
    """
    with ExitStack() as stack:
        mode = stack.enter_context(fake(model))
        stack.enter_context(AllCount())
        stack.enter_context(torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32))
        if on_gpu:
            stack.enter_context(GpuRules(dtype))
        return kept_for_backward(model, {name: mode.from_tensor(tensor) for name, tensor in batch.items()})


def storage_of(tensor: torch.Tensor) -> int:
    """Tells tensors apart by the memory that they view; what lies in blocks, by its blocks."""
    tensor = tensor.raw if isinstance(tensor, BlockTensor) else tensor
    return tensor.untyped_storage()._cdata


def fixed_bytes(model: nn.Module, optimizer: str, quantize: str | None, linears: Iterable[str]) -> Memory:
    """Everything that does not depend on the batch.

    Args:
        model: wrapped, on any device (meta will do), in the dtype that it is to be held in.
        linears: paths in the base model of the layers that `quantize` is for. For "keep" the model has its weights in
            blocks already (`loading.gguf.lay_in_blocks`).
    """
    base = base_model(model)
    paths = linears if quantize in KINDS else ()
    quantized = {id(unwrap(base.get_submodule(path)).weight) for path in paths}
    weights = 0.0
    trained: list[int] = []
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, BlockTensor):
            weights += tensor.packed_bytes
        elif tensor.requires_grad and not (optimizer == "lora-fa" and "lora_A" in name):
            trained.append(tensor.numel())
        else:
            each = KINDS[str(quantize)].bytes_per_weight if id(tensor) in quantized else tensor.element_size()
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


class StepMemory:
    """A model in one setting, to be asked about batches.

    Args:
        model: wrapped, on the meta device, whole, in the dtype that it is to be held in; put into training mode.
        dtype, on_gpu: as for `kept_by_shapes`.
        checkpointing: with gradient checkpointing.
        optimizer: one of `OPTIMIZERS`.
        quantize: how the linears of the blocks are held; None for `dtype`.
        beside: bytes of other models that are held meanwhile, such as a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        checkpointing: bool,
        optimizer: str,
        quantize: str | None,
        on_gpu: bool = False,
        beside: int = 0,
    ) -> None:
        self.model, self.dtype, self.checkpointing = model.train(), dtype, checkpointing
        self.optimizer, self.quantize, self.on_gpu = optimizer, quantize, on_gpu
        base = base_model(model)
        self.linears = block_linears(base)
        self.quantizable = max((unwrap(base.get_submodule(path)).weight.numel() for path in self.linears), default=0)
        # Worked out now: later the model may be cut short.
        held = {kind: fixed_bytes(model, optimizer, kind, self.linears) for kind in dict.fromkeys([quantize, "nf4"])}
        self.fixed = {kind: replace(one, weights=one.weights + beside) for kind, one in held.items()}

    def kept(self, batch: Batch, stands_for: dict[str, int] | None = None) -> Kept:
        """What a forward pass on `batch` keeps, as the model is now; `stands_for` of `anatomy.depth.shortened`."""
        found = kept_by_shapes(self.model, batch, self.dtype, on_gpu=self.on_gpu)
        return replace(found, stands_for=stands_for or {})

    def of(self, batch: Batch, kept: Kept, *, checkpointing: bool | None = None, quantize: str | None = None) -> Memory:
        """The memory of a step.

        Args:
            kept: of a forward pass on `batch`.
            checkpointing, quantize: if not those of this setting; `quantize` may be "nf4".
        """
        checkpointing = self.checkpointing if checkpointing is None else checkpointing
        quantize = quantize or self.quantize
        unpacked = self.quantizable * self.dtype.itemsize if quantize else 0
        if quantize == KEEP and self.dtype != torch.float32:
            unpacked += 4 * self.quantizable  # blocks are unpacked in float32 and rounded
        loss, evaluation = 0, 0
        base = base_model(self.model)
        if output_embeddings(base) is not None and "labels" in batch and batch["labels"].ndim == 2:
            rows, length = batch["labels"].shape
            vocabulary = base.config.get_text_config().vocab_size
            # A few tokens' logits, the same in float32, and what is made of them: 12 bytes each in 16 bit too.
            evaluation = 12 * vocabulary * min(2 * rows * length, tokens_at_once(vocabulary, self.on_gpu))
            if is_chunked(self.model):
                loss = chunk_bytes(rows * length, vocabulary, gpu=self.on_gpu)
        return replace(
            self.fixed[quantize],
            activations=kept.checkpointed if checkpointing else kept.total,
            working=max(2 * kept.largest + unpacked, loss),
            evaluation=evaluation,
        )


def step_bytes(model: nn.Module, batch: Batch, **setting: Any) -> tuple[Memory, Kept]:
    """The memory of one training step on `batch`, and what it keeps; `setting` as for `StepMemory`."""
    asked = StepMemory(model, **setting)
    kept = asked.kept(batch)
    return asked.of(batch, kept), kept
