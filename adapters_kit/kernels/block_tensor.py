"""A frozen weight that stays in the blocks of its GGUF file, and is unpacked where it is used.

To a model it is an ordinary parameter `(out, in)` of a float dtype. Linear layers, embeddings, peft's methods and
autograd need not know: a product unpacks some rows at a time and forgets them, and since what autograd keeps of a
frozen weight is this tensor, the backward pass unpacks again. Any other operation sees the whole weight unpacked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from adapters_kit.errors import ModelError
from adapters_kit.kernels.ggml import FORMATS, dequantize

AT_ONCE = 1 << 22  # weights unpacked at a time in a product: 16 MB in float32

aten = torch.ops.aten


class BlockTensor(torch.Tensor):
    """`(out, in)` weights in blocks; `(experts, out, in)` where a layer holds those of all experts.

    Attributes:
        raw: `(..., out, bytes)` uint8.
        kind: ggml's number of the type, a key of `ggml.FORMATS`.
        turned: shown with the last two dimensions the other way round, `(..., in, out)`.
    """

    raw: Tensor
    kind: int
    turned: bool

    @staticmethod
    def __new__(cls, raw: Tensor, kind: int, dtype: torch.dtype, turned: bool = False) -> "BlockTensor":
        """Over `raw`, which is not copied."""
        given = FORMATS[kind]
        *lead, rows, nbytes = raw.shape
        last = (rows, nbytes // given.nbytes * given.weights)
        made = torch.Tensor._make_wrapper_subclass(
            cls, (*lead, *(last[::-1] if turned else last)), dtype=dtype, device=raw.device, requires_grad=False
        )
        made.raw, made.kind, made.turned = raw, kind, turned
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype, bool]]:
        return ["raw"], (self.kind, self.dtype, self.turned)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], about: Any, size: Any, stride: Any) -> "BlockTensor":
        kind, dtype, turned = about
        return BlockTensor(inner["raw"], kind, dtype, turned)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        is_parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (self.raw, self.kind, self.dtype, self.turned, is_parameter)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BlockTensor({tuple(self.shape)}, {FORMATS[self.kind].name}, {self.dtype})"

    @property
    def format(self) -> str:
        """Name of the block format, such as "Q4_1"."""
        return FORMATS[self.kind].name

    @property
    def packed_bytes(self) -> int:
        """Memory of the weight."""
        return self.raw.nbytes

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain tensor of this shape, in `dtype` or its own."""
        whole = dequantize(self.raw, self.kind, dtype or self.dtype)
        return whole.transpose(-2, -1) if self.turned else whole

    def requires_grad_(self, requires_grad: bool = True) -> "BlockTensor":
        """As a tensor's; a parameter in blocks stays frozen: no optimizer could step to values that blocks can hold.

        Raises:
            ModelError: asked to train it.
        """
        if requires_grad and isinstance(self, torch.nn.Parameter):
            raise ModelError(
                f"A weight {tuple(self.shape)} lies in {self.format} blocks and cannot be trained as a whole (full "
                "fine-tuning, modules_to_save). Train an adapter on it, or the method 'blocks'; or load the model "
                'without quantize="keep".'
            )
        return super().requires_grad_(requires_grad)  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPECIAL:
            return _SPECIAL[func](*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], BlockTensor):
            raise ModelError(
                f"{func} would change a weight that lies in {args[0].format} blocks, and they cannot take any value. "
                'Load the model without quantize="keep" to change its weights; adapters merge into a file with '
                "adapters_kit.merge."
            )
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _rebuild(raw: Tensor, kind: int, dtype: torch.dtype, turned: bool, is_parameter: bool) -> Tensor:
    made = BlockTensor(raw, kind, dtype, turned)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made


def _plain(value: Any) -> Any:
    return value.unpack() if isinstance(value, BlockTensor) else value


def _same(tensor: BlockTensor, **_: Any) -> BlockTensor:
    return BlockTensor(tensor.raw, tensor.kind, tensor.dtype, tensor.turned)


def _clone(tensor: BlockTensor, **_: Any) -> BlockTensor:
    return BlockTensor(tensor.raw.clone(), tensor.kind, tensor.dtype, tensor.turned)


def _to(tensor: BlockTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
    dtype = dtype or tensor.dtype
    if not dtype.is_floating_point:
        return tensor.unpack().to(device=device, dtype=dtype)
    raw = tensor.raw if device is None else tensor.raw.to(device, non_blocking=kwargs.get("non_blocking", False))
    return BlockTensor(raw, tensor.kind, dtype, tensor.turned)


def _t(tensor: BlockTensor, *_: Any) -> BlockTensor:
    return BlockTensor(tensor.raw, tensor.kind, tensor.dtype, not tensor.turned)


def _transpose(tensor: BlockTensor, first: int, second: int) -> Tensor:
    first, second = first % tensor.ndim, second % tensor.ndim
    if first == second:
        return _same(tensor)
    return _t(tensor) if min(first, second) == tensor.ndim - 2 else tensor.unpack().transpose(first, second)


def _select(tensor: BlockTensor, dim: int, index: int) -> Tensor:
    if tensor.ndim < 3 or dim % tensor.ndim:
        return tensor.unpack().select(dim, index)
    return BlockTensor(tensor.raw[index], tensor.kind, tensor.dtype, tensor.turned)  # one expert


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Some rows, or the weights of some experts: only these are unpacked."""
    first, *others = map(_plain, indices)
    if not isinstance(tensor, BlockTensor) or others or first is None or (tensor.ndim == 2 and tensor.turned):
        return aten.index(_plain(tensor), [first, *others])
    return BlockTensor.unpack(BlockTensor(tensor.raw[first], tensor.kind, tensor.dtype, tensor.turned))


def _embedding(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Tensor:
    if not isinstance(weight, BlockTensor) or weight.turned:
        return aten.embedding(_plain(weight), _plain(indices))
    rows = weight.raw.index_select(0, indices.reshape(-1))
    return dequantize(rows, weight.kind, weight.dtype).view(*indices.shape, -1)


def _pieces(rows: int, width: int) -> list[slice]:
    """The rows of a stored weight in parts of about `AT_ONCE` values."""
    step = max(1, AT_ONCE // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """`x Wᵀ` and `dy W`: what a linear layer's two passes need, without the whole weight at once."""
    if not isinstance(right, BlockTensor) or isinstance(left, BlockTensor):
        return aten.mm(_plain(left), _plain(right))
    parts = _pieces(*(right.shape[::-1] if right.turned else right.shape))
    if len(parts) == 1:
        return aten.mm(left, right.unpack())
    if right.turned:
        out = left.new_empty(left.shape[0], right.shape[1])
        for part in parts:
            out[:, part] = left @ dequantize(right.raw[part], right.kind, right.dtype).t()
        return out
    total = left[:, parts[0]] @ dequantize(right.raw[parts[0]], right.kind, right.dtype)
    for part in parts[1:]:
        total.addmm_(left[:, part], dequantize(right.raw[part], right.kind, right.dtype))
    return total


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return torch.add(_mm(left, right) * alpha if alpha != 1 else _mm(left, right), bias, alpha=beta)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
}
