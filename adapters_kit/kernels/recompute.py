"""Recompute what costs little and takes much room: an MLP's activation × gate, and norms that work in float32.

    down(act(gate(x)) · up(x))     keeps gate, up, act(gate) and the product; two of the four follow from the others
    RMSNorm in 16 bit              keeps a float32 copy of its input; the input itself is enough

No architecture is known by name: a gated MLP is a module with two linears of one shape, a third that takes their output
back, and an activation. The activation answers with a stand-in that waits for the multiplication; put to any other use,
it is the activation's value.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2CLS

from adapters_kit.anatomy.structure import is_linear, linear_shape, unwrap
from adapters_kit.kernels.stand_in import StandIn

_ACTIVATIONS = (
    *(kind for kind in (item[0] if isinstance(item, tuple) else item for item in ACT2CLS.values())),
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
)


@dataclass(frozen=True)
class RecomputeReport:
    """How many gated MLPs and norms keep less now."""

    gates: int
    """Gated MLPs that keep neither the activation nor the product with the gate."""
    norms: int

    def __str__(self) -> str:
        return f"recomputed in the backward pass: {self.gates} activations × gate, {self.norms} norms"


class GatedProduct(torch.autograd.Function):
    """`act(gate) · up`, both of one shape; keeps these two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        """The product, of the shape of both."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate and up, from the activation's value computed again."""
        gate, up = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            if not again:
                gate = gate.detach().requires_grad_()
            value = ctx.act(gate)
            d_gate = None
            if ctx.needs_input_grad[0]:
                (d_gate,) = torch.autograd.grad(
                    value, gate, grad * up if again else grad * up.detach(), create_graph=again
                )
        d_up = None
        if ctx.needs_input_grad[1]:
            d_up = grad * (value if again else value.detach())
        return d_gate, d_up, None


class PendingActivation(StandIn):
    """The value of an activation that is expected to be multiplied."""

    def __init__(self, gate: Tensor, act: nn.Module) -> None:
        self.gate, self.act = gate, act

    def make(self) -> Tensor:
        """The value, as the activation computes it."""
        return self.act(self.gate)

    def __mul__(self, up: Any) -> Tensor:
        alike = isinstance(up, Tensor) and up.shape == self.gate.shape and up.dtype == self.gate.dtype
        if not alike or not torch.is_grad_enabled():
            return self.make() * up
        product = GatedProduct.apply(self.gate, up, self.act)
        product._made_of = (self.gate, up, self.act)  # the fused down-projection keeps these, not the product
        return product

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__) and len(args) == 2 and not kwargs:
            pending, other = args if isinstance(args[0], PendingActivation) else args[::-1]
            if not isinstance(other, PendingActivation):
                return pending * other
        return super().__torch_function__(func, types, args, kwargs)


class GatedActivation(nn.Module):
    """Stands before the activation of a gated MLP; holds no parameters."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate: Tensor) -> "Tensor | PendingActivation":
        """The activation's value, or a stand-in for it while a backward pass is to follow.

        The compiler gets the value: it chooses by itself what to compute again, and sees no stand-in as a tensor.
        """
        waits = torch.is_grad_enabled() and gate.requires_grad and not torch.compiler.is_compiling()
        return PendingActivation(gate, self.act) if waits else self.act(gate)


class RecomputedForward:
    """A norm's forward, run again in the backward pass."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The norm of `x`; in 16 bit only `x` is kept of it."""
        run = type(self.norm).forward
        half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
        if not torch.is_grad_enabled() or not half or torch.compiler.is_compiling():
            return run(self.norm, x, *args, **kwargs)
        return checkpoint(run, self.norm, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute_cheap(model: nn.Module) -> RecomputeReport:
    """Keep less for the backward pass wherever computing it again is a few elementwise operations.

    Numbers do not change. Costs a few per cent of a step; saves most together with `fuse`, whose down-projection then
    does not keep its input either. Calling it again is harmless; `recompute_nothing` undoes it.
    """
    for module in list(model.modules()):
        if isinstance(module, GatedActivation) or isinstance(module.__dict__.get("forward"), RecomputedForward):
            continue
        if _is_fp32_norm(module):
            module.forward = RecomputedForward(module)
            continue
        name = _gated_activation(module)
        if name is not None:
            setattr(module, name, GatedActivation(getattr(module, name)))
    gates = sum(isinstance(module, GatedActivation) for module in model.modules())
    norms = sum(isinstance(module.__dict__.get("forward"), RecomputedForward) for module in model.modules())
    return RecomputeReport(gates, norms)


def recompute_nothing(model: nn.Module) -> None:
    """Undo `recompute_cheap`."""
    for module in list(model.modules()):
        if isinstance(module.__dict__.get("forward"), RecomputedForward):
            del module.forward
        for name, child in list(module.named_children()):
            if isinstance(child, GatedActivation):
                setattr(module, name, child.act)


def _is_fp32_norm(module: nn.Module) -> bool:
    """A norm written in Python. torch's own keep their input in its dtype already."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return False
    tensors = [*module.parameters(), *module.buffers()]
    if any(True for _ in module.children()) or "forward" in module.__dict__ or len(tensors) > 1:
        return False
    return all(tensor.dim() == 1 and not tensor.requires_grad for tensor in tensors)


def _gated_activation(module: nn.Module) -> str | None:
    """The name of the activation, if `module` looks like a gated MLP."""
    shapes = [linear_shape(unwrap(child)) for child in module.children() if is_linear(unwrap(child))]
    twins = {shape for shape in shapes if shapes.count(shape) >= 2}
    if not any((wide, narrow) in shapes for narrow, wide in twins):
        return None
    names = [name for name, child in module.named_children() if type(child) in _ACTIVATIONS]
    return names[0] if len(names) == 1 else None
