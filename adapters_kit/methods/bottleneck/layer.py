"""The bottleneck itself, and how it is attached to a module.

A module keeps its place and its class: the adapter is a child of it, `residual_adapter`, which a forward hook calls. So
paths inside an adapted attention or MLP stay what they were, other adapters can be put on its linears before or after,
and code that looks at the module's class or attributes sees no difference.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import get_activation

from adapters_kit.errors import AdapterError
from adapters_kit.methods.beside import BesideLayer, chosen_rows
from adapters_kit.methods.bottleneck.config import BottleneckConfig
from adapters_kit.methods.bottleneck.phm import PHMLinear, PHMRule

CHILD = "residual_adapter"
TAPS = "residual_taps"


class Bottleneck(nn.Module):
    """`A(z) = scaling · up(activation(down(z)))`, with optional norms around it.

    Args:
        width: hidden size of the model at this place.
        size: units of the bottleneck.
        config: everything else.
        reads: what z is. With b the tensor that A(z) is added to: "branch" is b, "residual" the stream x, "sum" b + x,
            "difference" b - x, "normed" the norm of b.
        in_norm: the module that carries the adapter is a norm, and b is the norm's input instead of its output.
        rule: the shared rule of Compacter's layers; None makes one for this adapter.
    """

    def __init__(
        self, width: int, size: int, config: BottleneckConfig, reads: str, in_norm: bool, rule: PHMRule | None = None
    ) -> None:
        super().__init__()
        self.reads, self.in_norm = reads, in_norm
        self.norm_before = nn.LayerNorm(width) if config.ln_before else nn.Identity()
        self.activation = get_activation(config.non_linearity.lower())
        self.down, self.up = self._projections(width, size, config, rule)
        self.norm_after = nn.LayerNorm(width) if config.ln_after else nn.Identity()
        self.norm_spans_residual = config.adapter_residual_before_ln
        self.gate = nn.Linear(width, 1) if config.gate else None
        self.stochastic_depth = config.stochastic_depth
        self.dropout = nn.Dropout(config.dropout)
        self.scaling: nn.Parameter | float
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(width if config.scaling == "channel" else 1))
        else:
            self.scaling = config.scaling
        self._initialize(config.init_weights)

    @staticmethod
    def _projections(
        width: int, size: int, config: BottleneckConfig, rule: PHMRule | None
    ) -> tuple[nn.Module, nn.Module]:
        if not config.phm_layer:
            return nn.Linear(width, size), nn.Linear(size, width)
        rank = config.phm_rank if config.factorized_phm_W else None
        options: dict[str, Any] = {"dim": config.phm_dim, "rank": rank, "bias": config.phm_bias}
        return (
            PHMLinear(width, size, rule or new_rule(config), **options),
            PHMLinear(size, width, rule or new_rule(config), **options),
        )

    @torch.no_grad()
    def _initialize(self, how: str) -> None:
        phm = isinstance(self.up, PHMLinear)
        if how in ("identity", "mam_adapter"):
            if phm:
                self.up.zero_()
            else:
                nn.init.zeros_(self.up.weight)
        elif not phm:  # Compacter keeps its own scheme for the factors
            for layer in (self.down, self.up):
                if how == "bert":
                    nn.init.normal_(layer.weight, std=0.02)
                else:
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        for layer in (self.down, self.up):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return next(self.parameters()).dtype

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, ..., width) -> the same, in the adapter's dtype; what is to be added to the stream."""
        update = self.scaled(z)
        return update if self.norm_spans_residual else self.norm_after(update)

    def scaled(self, z: torch.Tensor) -> torch.Tensor:
        """A(z) before the norm behind it: (batch, ..., width) -> the same, in the adapter's dtype."""
        update = self.up(self.activation(self.down(self.norm_before(z.to(self.dtype)))))
        if self.training and self.stochastic_depth:
            keep = 1 - self.stochastic_depth
            rows = torch.empty([len(update)] + [1] * (update.dim() - 1), dtype=update.dtype, device=update.device)
            update = update * rows.bernoulli_(keep) / keep
        if self.gate is not None:
            update = update * torch.sigmoid(self.gate(z.to(self.dtype)))
        return self.dropout(update * self.scaling)

    def added_to(self, base: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`base + A(z)` in base's dtype."""
        if self.norm_spans_residual:
            return self.norm_after(base + self(z)).to(base.dtype)
        return base + self(z).to(base.dtype)


def new_rule(config: BottleneckConfig) -> PHMRule:
    """The Aᵢ of a config, freshly drawn."""
    return PHMRule(
        config.phm_dim,
        factorized=config.factorized_phm_rule,
        learn=config.learn_phm,
        init=config.phm_c_init,
        init_range=config.phm_init_range,
    )


class Tap(nn.Module):
    """Holds the residual stream from where a branch leaves it to where the branch's adapter reads it.

    A module without parameters, owned by both ends, so that copies of the model and data-parallel replicas each get
    their own.

    Args:
        side, key: which argument or result of the module at the far end it takes.
    """

    def __init__(self, side: str, key: int | str | None) -> None:
        super().__init__()
        self.side, self.key = side, key
        self.value: torch.Tensor | None = None


class Taps(nn.ModuleList):
    """The taps at one module."""

    is_adapter_part = True  # what reads the model's structure leaves it out


class BottleneckLayer(BesideLayer):
    """The bottleneck adapters that one module of the base model carries.

    Args:
        device, dtype: of that module's weights.
        index: which part of the tuple that the module returns is adapted; None if it returns a tensor.
    """

    adapter_layer_names = ("bottleneck_net",)
    not_mergeable = "Bottleneck adapters are not linear, so no weight of the base model can take them in."

    def __init__(self, device: torch.device, dtype: torch.dtype, index: int | None) -> None:
        super().__init__()
        self.index = index
        # Follows the model when it moves, which a remembered device would not.
        self.register_buffer("place", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.bottleneck_net = nn.ModuleDict()
        self.tap: Tap | None = None

    def forward(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """What `module` gives instead of `output`, which it made from `args`; active adapters apply in order."""
        residual = None
        if self.tap is not None:
            residual, self.tap.value = self.tap.value, None
        if self.disable_adapters:
            return output
        if self.rows is not None:
            return self._mixed_batch(self.rows.of(len(output)), module, args, output, residual)
        return self._adapted(self.active_adapters, module, args, output, residual)

    def _adapted(
        self,
        names: Sequence[str],
        module: nn.Module,
        args: tuple,
        output: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        nets: list[Any] = [self.bottleneck_net[name] for name in names if name in self.bottleneck_net]
        for net in nets:
            if net.in_norm:
                args = (net.added_to(args[0], self._read(net, args[0], output, residual)), *args[1:])
                output = module.forward(*args)
        for net in nets:
            if not net.in_norm:
                output = net.added_to(output, self._read(net, output, output, residual))
        return output

    @staticmethod
    def _read(net: Bottleneck, base: torch.Tensor, output: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if net.reads == "branch":
            return base
        if net.reads == "normed":
            return output
        if residual is None:
            raise AdapterError(
                "This adapter reads the residual stream, but the module that the stream was expected at has not run. "
                "The model's forward differs from the one that the adapter was placed on."
            )
        if net.reads == "residual":
            return residual
        return base + residual if net.reads == "sum" else base - residual

    def _mixed_batch(
        self, names: list[str], module: nn.Module, args: tuple, output: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        mixed = output
        for name in dict.fromkeys(names):
            if name not in self.bottleneck_net:
                continue
            rows = chosen_rows(names, name, output.device)
            chosen = self._adapted(
                [name],
                module,
                tuple(arg[rows] if isinstance(arg, torch.Tensor) and len(arg) == len(output) else arg for arg in args),
                output[rows],
                None if residual is None else residual[rows],
            )
            mixed = mixed.index_copy(0, rows, chosen)
        return mixed

    def add(self, adapter_name: str, net: Bottleneck) -> None:
        """Put `net` here under the name of its adapter, on the device of the module that it stands beside."""
        self.bottleneck_net[adapter_name] = net
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.bottleneck_net:
            return
        net = self.bottleneck_net[adapter_name]
        if not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers())):
            net.to(device=device or self.place.device)


def attach(module: nn.Module, index: int | None, *around: nn.Module) -> BottleneckLayer:
    """The layer that `module` carries; a new one if it carries none.

    Args:
        index: which part of the tuple that `module` returns is adapted; None if it returns a tensor.
        around: modules to take device and dtype from, nearest first, if `module` has no weights.
    """
    if CHILD not in module._modules:
        module.add_module(CHILD, BottleneckLayer(*_place(module, *around), index))
        _hook_after(module)
    layer: Any = module._modules[CHILD]
    return layer


def tap_residual(layer: BottleneckLayer, source: nn.Module, side: str, key: int | str | None) -> None:
    """Let `layer` read the argument `key` of `source` (side "input") or part `key` of what it returns ("output")."""
    if layer.tap is not None:
        return
    layer.tap = Tap(side, key)
    if TAPS not in source._modules:
        source.add_module(TAPS, Taps())
    taps: Any = source._modules[TAPS]
    taps.append(layer.tap)
    if side == "output":
        _hook_after(source)
    elif _before not in source._forward_pre_hooks.values():
        source.register_forward_pre_hook(_before, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Take every bottleneck layer, tap and hook off `model`."""
    for module in list(model.modules()):
        for name in (CHILD, TAPS):
            module._modules.pop(name, None)
        for hooks, ours in ((module._forward_hooks, _after), (module._forward_pre_hooks, _before)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _place(*candidates: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the first parameter, dtype of the first that is floating: quantized weights are not."""
    parameters = [parameter for module in candidates for parameter in module.parameters()]
    floating = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    return parameters[0].device, next(floating, torch.get_default_dtype())


def _hook_after(module: nn.Module) -> None:
    if _after not in module._forward_hooks.values():
        module.register_forward_hook(_after)


# Hooks find the adapter through the module they are called with, never through a closure: copies, pickles and replicas
# of the model then use their own. One hook does both, so that taps see the adapted output whatever came first.


def _taps(module: nn.Module) -> Iterable[Any]:
    taps: Any = module._modules.get(TAPS, ())
    return taps


def _after(module: nn.Module, args: tuple, output: Any) -> Any:
    layer: Any = module._modules.get(CHILD)
    if layer is not None:
        adapted = layer(module, args, output if layer.index is None else output[layer.index])
        output = adapted if layer.index is None else (*output[: layer.index], adapted, *output[layer.index + 1 :])
    for tap in _taps(module):
        if tap.side == "output":
            tap.value = output if tap.key is None else output[tap.key]
    return output


def _before(module: nn.Module, args: tuple, kwargs: dict) -> None:
    for tap in _taps(module):
        if tap.side == "input":
            tap.value = args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key]
