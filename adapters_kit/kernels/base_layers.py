"""The frozen layers that LoRA sits on, as the fused node sees them: nn.Linear, Conv1D, bitsandbytes' 4 and 8 bit."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.projection import Quantized

_DENSE = (nn.Linear, Conv1D)
_LIKE_LINEAR = "_computes_as_linear"  # on a base layer: the class for which `settle` found that
_FOUR_BIT: tuple[type, ...] = ()
_EIGHT_BIT: tuple[type, ...] = ()
if is_bnb_available():
    import bitsandbytes as bnb

    _EIGHT_BIT = (bnb.nn.Linear8bitLt,)
    if is_bnb_4bit_available():
        _FOUR_BIT = (bnb.nn.Linear4bit,)


# A fake tensor is a plain one without data; memory.py counts bytes on them.
_PLAIN = (nn.Parameter, Tensor, FakeTensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is no DTensor and no other subclass with a mind of its own."""
    kind = type(tensor)
    return kind in _PLAIN or kind.__name__ in ("Params4bit", "Int8Params", "BlockTensor")


def settle(base: nn.Module) -> None:
    """Find out whether a model's own subclass of nn.Linear (Falcon's, ESMFold's) computes what nn.Linear does."""
    kind = type(base)
    if isinstance(base, nn.Linear) and kind not in (nn.Linear, *_FOUR_BIT, *_EIGHT_BIT):
        base.__dict__[_LIKE_LINEAR] = kind if _computes_as_linear(base) else None


def unsettle(base: nn.Module) -> None:
    """Undo `settle`."""
    base.__dict__.pop(_LIKE_LINEAR, None)


def _computes_as_linear(base: nn.Module) -> bool:
    """Tried on small random weights in float64, which shows a cast, a scale, a clipped or a random value."""
    tensors = {name for name, _ in [*base.named_parameters(), *base.named_buffers()]}
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    if not {"weight"} <= tensors <= {"weight", "bias"} or hooked or "forward" in base.__dict__:
        return False
    generator, was = torch.Generator().manual_seed(0), base.training

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    try:
        # memory.py plans with tensors that have no values; a layer may draw random numbers
        with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
            given = {"weight": draw(5, 3), **({"bias": draw(5)} if "bias" in tensors else {})}
            upstream = draw(2, 4, 5)
            for training in (True, False):
                for size in (1.0, 1e4):
                    x = (draw(2, 4, 3) * size).requires_grad_()
                    base.training = training
                    with torch.enable_grad():
                        y = functional_call(base, given, (x,))
                    expected = F.linear(x, given["weight"], given.get("bias"))
                    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11 * size)
                    (slope,) = torch.autograd.grad(y, x, upstream)
                    torch.testing.assert_close(slope, upstream @ given["weight"], rtol=1e-11, atol=1e-11)
    except Exception:  # whatever another kind of layer raises on these, or an AssertionError
        return False
    finally:
        base.training = was
    return True


def why_plain(base: nn.Module) -> str | None:
    """Why LoRA on this base cannot be fused; None if it can."""
    kind = type(base)
    if kind in _DENSE or base.__dict__.get(_LIKE_LINEAR) is kind:
        weight = base._parameters.get("weight")
        if weight is None:
            return "its base weight is not a parameter of its own"
        return None if weight.is_floating_point() else f"its base weight is {weight.dtype}"
    if kind in _FOUR_BIT:
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            return "its 4-bit weight is not quantized yet"
        if getattr(state, "packing_format_for_cpu", False):
            return "its 4-bit weight is packed for inference on the CPU"
        if tuple(state.shape) != (base.out_features, base.in_features):
            return "its 4-bit weight is stored transposed"
        return None
    if kind in _EIGHT_BIT:
        return "its 8-bit weight is quantized anew at every step" if base.state.has_fp16_weights else None
    return f"its base layer is a {kind.__name__}"


def compute_dtypes(base: nn.Module, x: Tensor) -> "tuple[torch.dtype, torch.dtype] | str":
    """The dtype to compute in and the dtype of the output, as the base layer chooses them; or why there is none."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if x.dtype == torch.float64:  # autocast leaves float64 alone
        autocast = None
    if type(base) in _FOUR_BIT:
        chosen = base.compute_dtype
        if not base.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
            chosen = x.dtype
        return chosen or x.dtype, x.dtype
    if type(base) in _EIGHT_BIT:
        return autocast or x.dtype, x.dtype
    if autocast is not None:
        return autocast, autocast
    weight = base._parameters["weight"]
    assert weight is not None  # `why_plain` has looked
    if x.dtype != weight.dtype:
        return f"its input is {x.dtype} and its weight {weight.dtype}"
    return x.dtype, x.dtype


def weight_and_bias(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """`(out, in)` weight, None if quantized, and bias."""
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(base) in _FOUR_BIT or type(base) in _EIGHT_BIT or isinstance(weight, BlockTensor):
        return None, bias
    assert weight is not None  # `why_plain` has looked
    return (weight.t() if type(base) is Conv1D else weight), bias


def quantized(base: nn.Module) -> Quantized | None:
    """How to multiply by a quantized weight; None for a plain one."""
    if type(base) in _FOUR_BIT:
        return Quantized(base, _dense_4bit(base))
    if type(base) in _EIGHT_BIT:
        return Quantized(base, _dense_8bit(base))
    weight = base._parameters["weight"]
    return Quantized(base, weight.unpack) if isinstance(weight, BlockTensor) else None


def _dense_4bit(base: Any) -> Any:
    def dense(dtype: torch.dtype) -> Tensor:
        weight = base.weight
        return bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).to(dtype)

    return dense


def _dense_8bit(base: Any) -> Any:
    def dense(dtype: torch.dtype) -> Tensor:
        rows, scales = base.state.CB, base.state.SCB
        if rows is None:
            rows, scales = base.weight.CB, base.weight.SCB
        return rows.to(dtype).mul_((scales / 127.0).unsqueeze(1))

    return dense
