"""What a GPU would keep for the backward pass, asked of tensors that have no values and are said to be on the CPU.

torch has a list of operations for each kind of device that autocast makes in float32; CUDA's is the longer one (torch's
documentation, "CUDA Ops that can autocast to float32"). Attention by `scaled_dot_product_attention` keeps no matrix of
probabilities there, with dropout neither. A build of torch without CUDA has no tensors that would show it, and the
answer should not depend on where it is asked: so it is worked out here, on any machine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_IN_FLOAT32 = {
    *("pow", "__pow__", "__rpow__", "float_power", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal"),
    *("rsqrt", "tan", "sinh", "cosh", "acos", "asin", "erfinv", "cumsum", "cumprod", "prod", "sum", "norm", "renorm"),
    *("dist", "cdist", "pdist", "cosine_similarity", "softplus", "softmax", "softmin", "log_softmax", "__rdiv__"),
    *("__rtruediv__", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "kl_div", "l1_loss", "mse_loss"),
    *("smooth_l1_loss", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "hinge_embedding_loss"),
}
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_HALF = (torch.bfloat16, torch.float16)


class GpuRules(TorchFunctionMode):
    """Inside, operations take the dtypes that CUDA's autocast gives them, and attention keeps what its kernels keep.

    Args:
        dtype: autocast's; float32 stands for no autocast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.autocast = dtype in _HALF

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
            return func(**{**given, "dropout_p": 0.0})  # with dropout a CPU keeps the probabilities and their mask
        if self.autocast and getattr(func, "__name__", "") in _IN_FLOAT32 and "dtype" not in kwargs:
            args = [_in_float32(value) for value in args]
            kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


class AllCount(TorchFunctionMode):
    """Inside, everything counts as different from zero: the most that there can be, where no values are known."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.nonzero, Tensor.nonzero) and not kwargs and isinstance(args[0], FakeTensor):
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor):  # DETR asks whether all is finite
            return True
        return func(*args, **(kwargs or {}))


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
