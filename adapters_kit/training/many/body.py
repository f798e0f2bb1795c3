"""The body of the model as all trainings share it: one forward over the rows of all, each adapter on its own rows.

    host       a copy of the modules of the bare base, whose frozen tensors are the base's own
    Joint      stands in the host where some training has put a layer around a module (LoRA, IA³, a trained copy)
    Hooks      on a host module where some training hooks its own (bottleneck adapters)
    PerRows    dropout of the base model: each training's rows are dropped as its own generator says

Adapter layers stay in the models of their trainings, which switch, save and evaluate them. Here they are only called,
with the rows that are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from adapters_kit.anatomy import base_model
from adapters_kit.kernels.dropout import draw_seeds
from adapters_kit.kernels.joint_linear import joint_linear
from adapters_kit.methods.beside import BesideLayer
from adapters_kit.training.many.layout import Layout, UnjoinableError
from adapters_kit.training.many.seat import Seat


def bodies(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost parts of a model that are transformers models themselves, by path: all but heads and losses."""
    found: dict[str, nn.Module] = {}
    for path, module in base_model(model).named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and isinstance(module, PreTrainedModel) and not inside:
            found[path] = module
    return found


class Now:
    """What goes through a body at the moment."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.seats: Sequence[Seat] = ()
        self.inside = False  # one training's own layer is running

    def each(self, own: Mapping[Seat, Any], other: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`call(module, *its arguments)` for every training, its generators in place; results joined.

        Args:
            own: the modules of trainings that have one here; `other` is that of all others.
        """
        assert self.layout is not None

        def one(seat: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.seats[seat].random.here():
                return call(own.get(self.seats[seat], other), *args, **kwargs)

        outer, self.inside = self.inside, True
        try:
            return self.layout.map(one, *args, **kwargs)
        finally:
            self.inside = outer

    def at_once(self, own: Mapping[Seat, nn.Module], x: Any) -> Tensor | None:
        """What LoRA layers around one base layer give, in one node; None where they have to run one by one."""
        assert self.layout is not None
        placed = self.layout.places(x) if len(self.seats) > 1 else None
        layers = [own.get(seat) for seat in self.seats]
        if placed is None or not all(layer is None or isinstance(layer, LoraLayer) for layer in layers):
            return None

        def seed(number: int) -> Tensor:
            with self.seats[number].random.here():
                return draw_seeds(1)

        tokens, places = placed
        y = joint_linear(layers, x if x.ndim == 3 else x.view(self.layout.total, tokens, -1), places, seed)
        return None if y is None else y.view(*x.shape[:-1], y.shape[-1])


class Joint(nn.Module):
    """Stands for one module of the base and for what the trainings have put around it."""

    def __init__(self, base: nn.Module, now: Now) -> None:
        super().__init__()
        self.base = base
        # In __dict__: they are parts of other models.
        self.__dict__["own"], self.__dict__["now"] = {}, now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layers of all trainings give, each for its rows."""
        own, now = self.__dict__["own"], self.__dict__["now"]
        if not any(seat in own for seat in now.seats):
            return self.base(*args, **kwargs)
        if len(args) == 1 and not kwargs and (output := now.at_once(own, args[0])) is not None:
            return output
        return now.each(own, self.base, _call, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class Hooks:
    """Runs the hooks that trainings have set on their own copies of a module."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.own: dict[Seat, nn.Module] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the host's module."""

        def call(own: Any, *args: Any, **kwargs: Any) -> None:
            for key, hook in own._forward_pre_hooks.items() if own is not None else ():
                named = key in own._forward_pre_hooks_with_kwargs
                changed: Any = hook(own, args, kwargs) if named else hook(own, args)
                if changed is not None:
                    raise UnjoinableError(f"a hook changes what {type(module).__name__} is given")

        if any(seat in self.own for seat in self.now.seats):
            self.now.each(self.own, None, call, *args, **kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of the host's module."""

        def call(own: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for key, hook in own._forward_hooks.items() if own is not None else ():
                named = key in own._forward_hooks_with_kwargs
                changed: Any = hook(own, args, kwargs, output) if named else hook(own, args, output)
                output = output if changed is None else changed
            return output

        if not any(seat in self.own for seat in self.now.seats):
            return output
        return self.now.each(self.own, None, call, output, args, kwargs)


class PerRows(TorchFunctionMode):
    """While it is on, random zeros in the base model are drawn for each training's rows from its own generator."""

    def __init__(self, now: Now) -> None:
        super().__init__()
        self.now = now

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """`func`, row by row where it draws."""
        kwargs = kwargs or {}
        if not self.now.inside and self.now.layout is not None and _draws(func, args, kwargs):
            return self.now.each({}, None, lambda _, *a, **k: func(*a, **k), *args, **kwargs)
        return func(*args, **kwargs)


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is F.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if func in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return bool(p) and bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))
    return False


class Body:
    """One body of the base, for all trainings whose base dropout is the same.

    Args:
        host: a copy of it without adapters, in training mode; changed here.
    """

    def __init__(self, host: PreTrainedModel) -> None:
        self.host = host
        self.now = Now()
        self.hooks: dict[str, Hooks] = {}
        text = host.config.get_text_config()
        self.pad_token = getattr(text, "pad_token_id", None) or 0
        self.taken = _numbers(host.config.to_dict()) | {size for one in host.parameters() for size in one.shape}
        width, heads = getattr(text, "hidden_size", 0), getattr(text, "num_attention_heads", None)
        self.taken |= {width // heads} if isinstance(heads, int) and heads else set()

    def add(self, seat: Seat, own: nn.Module) -> None:
        """Lets the layers that a training has put into its copy of this body take part."""
        self._add(seat, self.host, own, "")

    def _add(self, seat: Seat, host: nn.Module, own: nn.Module, path: str) -> None:
        self._add_hooks(seat, host, own, path)
        for name, theirs in own._modules.items():
            ours = host._modules.get(name)
            if theirs is None or ours is None:
                continue  # a hook's own layer, which the hook calls
            if is_wrapper(theirs):
                if not isinstance(ours, Joint):
                    ours = host._modules[name] = Joint(ours, self.now)
                ours.__dict__["own"][seat] = theirs
            else:
                self._add(seat, ours.base if isinstance(ours, Joint) else ours, theirs, f"{path}.{name}")

    def _add_hooks(self, seat: Seat, host: nn.Module, own: nn.Module, path: str) -> None:
        known = self.hooks.get(path)
        if known is None:
            if not (len(own._forward_hooks) > len(host._forward_hooks) or len(own._forward_pre_hooks)):
                return
            if host._forward_hooks or host._forward_pre_hooks:
                raise UnjoinableError(f"the base model has hooks of its own at {path.lstrip('.')}")
            known = self.hooks[path] = Hooks(self.now)
            host.register_forward_pre_hook(known.before, with_kwargs=True)
            host.register_forward_hook(known.after, with_kwargs=True)
        if own._forward_hooks or own._forward_pre_hooks:
            known.own[seat] = own

    def remove(self, seat: Seat) -> None:
        """Lets go of a training that has ended."""
        for hooks in self.hooks.values():
            hooks.own.pop(seat, None)
        for module in self.host.modules():
            if isinstance(module, Joint):
                module.__dict__["own"].pop(seat, None)

    def run(self, seats: Sequence[Seat], calls: Sequence[Mapping[str, Any]]) -> tuple[Layout, list[Any]]:
        """One forward over the rows of all; what the body gives each."""
        self.now.layout = layout = Layout(calls, self.taken, self.pad_token)
        self.now.seats = seats
        try:
            with PerRows(self.now):
                output = self.host(**layout.join_call(calls))
            return layout, layout.parts(_without_caches(output))
        finally:
            self.now.layout, self.now.seats = None, ()


def is_wrapper(module: nn.Module) -> bool:
    """Whether an adapter has put it in the place of a module of the base."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return True
    return isinstance(module, BaseTunerLayer) and not isinstance(module, BesideLayer)


def _without_caches(output: Any) -> Any:
    """Training needs no keys and values of the past, and they have no rows that could be told apart."""
    if isinstance(output, Mapping):
        kept = {key: value for key, value in output.items() if not key.endswith("past_key_values")}
        return type(output)(**kept)
    return output


def _numbers(value: Any) -> set[int]:
    if isinstance(value, dict):
        return set().union(*map(_numbers, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_numbers, value)) if value else set()
    return {value} if isinstance(value, int) else set()
