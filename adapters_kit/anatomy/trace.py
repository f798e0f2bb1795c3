"""Follows the residual stream through one forward.

Every tensor that the probe meets carries a note of what it is: a value of the residual stream (`State`), the result of
a branch (the chain of modules that returned it), or neither. Module hooks say which module made a tensor; a
`TorchFunctionMode` sees the additions in between. An addition of a branch to the stream is a `Write`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.overrides import TorchFunctionMode

from adapters_kit.anatomy.parts import Tap
from adapters_kit.anatomy.structure import base_model, is_attention, is_linear, own_parts, walk

_TENSOR = torch.Tensor
ADDITIONS = {torch.add, _TENSOR.add, _TENSOR.add_, _TENSOR.__add__, _TENSOR.__radd__, _TENSOR.__iadd__}
# What leaves a value of the stream, or of a branch, the same up to scale, dtype and arrangement.
SCALINGS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__"}
ARRANGEMENTS = {
    *("to", "type", "type_as", "float", "half", "bfloat16", "clone", "contiguous", "detach", "clamp", "nan_to_num"),
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "roll", "rearrange"),
    *("transpose", "permute", "swapaxes", "movedim", "__getitem__", "dropout", "dropout_", "where", "masked_fill"),
}
KEEPING = SCALINGS | ARRANGEMENTS


@dataclass(eq=False, slots=True)
class State:
    """One value of the residual stream, however it is cast or reshaped."""

    made_by: "Write | None" = None
    """The addition that it comes from; None for what enters the first block."""
    norms: list[tuple[str, "State"]] = field(default_factory=list)
    """Norms that read it, and what they made of it."""
    taps: list[tuple[int, Tap, torch.Size]] = field(default_factory=list)
    """Where it was seen: (time, place, shape there)."""
    borders: bool = False
    """Whether it enters or leaves a block."""
    residual_of: "list[Write]" = field(default_factory=list)
    """The additions that it was the residual of."""


@dataclass(frozen=True, slots=True)
class Link:
    """A module that returned a branch: its path, the place in the returned tuple, the shape there."""

    path: str
    index: int | None
    """The place in the returned tuple; None where a tensor was returned."""
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class Chain:
    """The modules that returned one branch, innermost first.

    `normed` is the chain below a norm that ends the branch; `through` all modules that worked on it since the stream.
    """

    links: tuple[Link, ...]
    """The modules with what each returned, innermost first."""
    normed: "Chain | None" = None
    through: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Note:
    """What a tensor is: a value of the stream, or the end of branches; and which modules it went through since."""

    state: State | None = None
    """The value of the stream that the tensor is; None for others."""
    chains: tuple[Chain, ...] = ()
    """The branches that end in it."""
    through: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Write:
    """One addition to the stream."""

    block: str
    """Path of the block in which it happened."""
    chain: Chain | None
    """The modules that returned the branch; None where none did."""
    through: frozenset[str]
    """Modules that the branch went through since the stream."""
    running: frozenset[str]
    """Modules of the block that were running."""
    shape: torch.Size
    """Of the branch."""
    residual: State
    """The value that was added to."""
    result: State
    """The value that came out."""
    time: int
    """How many operations went before it."""


NOTHING = Note()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not own_parts(module)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, _TENSOR):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _outputs(output: Any) -> list[tuple[int | None, torch.Tensor]]:
    """The floating-point tensors that a module returns, each with its place."""
    found: Iterable[tuple[int | None, Any]] = ()
    if isinstance(output, _TENSOR):
        found = [(None, output)]
    elif isinstance(output, Mapping):
        found = enumerate(output.values())
    elif isinstance(output, list | tuple):
        found = enumerate(output)
    return [(place, item) for place, item in found if isinstance(item, _TENSOR) and item.is_floating_point()]


class Trace(TorchFunctionMode):
    """The notes on all tensors of one forward, and the writes found.

    Attributes:
        writes: additions to the stream, in order.
        calls: how often each module ran.
        order: the time of each module's first return.
        upstream: for each linear, the modules that its input went through since the stream.
        activated: linears whose output went straight into an activation function.
        fed: attention modules that were given states of another sequence.
    """

    def __init__(self, modules: dict[str, nn.Module], blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.modules, self.blocks = modules, blocks
        inside = tuple(path + "." for path in blocks)
        self.inside = {path for path in modules if path in blocks or path.startswith(inside)}
        self._around = {path for path in modules if any(block.startswith(path + ".") for block in blocks)}
        self.writes: list[Write] = []
        self.calls: Counter[str] = Counter()
        self.order: dict[str, int] = {}
        self.upstream: dict[str, frozenset[str]] = {}
        self.activated: set[str] = set()
        self.fed: set[str] = set()
        self.norms = {path for path, module in modules.items() if _is_norm(module)}
        self._notes: dict[int, Note] = {}
        self._alive: list[torch.Tensor] = []  # ids stay unique while the tensors live
        self._open: list[str] = []
        self._time = 0

    def note(self, tensor: Any) -> Note:
        """What is known of `tensor`; `NOTHING` of a value that is none or was not met."""
        return self._notes.get(id(tensor), NOTHING) if isinstance(tensor, _TENSOR) else NOTHING

    def _write_note(self, tensor: torch.Tensor, note: Note) -> None:
        self._notes[id(tensor)] = note
        self._alive.append(tensor)

    # functions

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if not self._open:
            return output
        name = getattr(function, "__name__", "")
        inputs = [tensor for value in (*args, *kwargs.values()) for tensor in _tensors(value)]
        if name == "__setitem__":
            self._write_note(args[0], Note(through=self._through(inputs)))
        elif isinstance(output, _TENSOR):
            same = [one for one in inputs if one.shape == output.shape]
            if function in ADDITIONS and len(inputs) == len(same) == 2:
                self._add(inputs[0], inputs[1], output)
            elif not (name in KEEPING and any(output is one for one in inputs)):
                self._pass_on(name, inputs, output)
        else:
            through = self._through(inputs)
            for part in _tensors(output):
                if not any(part is one for one in inputs):
                    self._write_note(part, Note(through=through))
        return output

    def _through(self, tensors: list[torch.Tensor]) -> frozenset[str]:
        return frozenset().union(*(self.note(tensor).through for tensor in tensors))

    def _pass_on(self, name: str, inputs: list[torch.Tensor], output: torch.Tensor) -> None:
        kept = NOTHING
        full = [one for one in inputs if one.numel() == output.numel()]
        # A product of two full tensors is a gate, which makes something new.
        if name in ARRANGEMENTS or (name in SCALINGS and len(full) == 1):
            kept = next((self.note(one) for one in full if self.note(one) is not NOTHING), NOTHING)
        if kept.state is not None:
            self._write_note(output, kept)
        else:
            self._write_note(output, Note(chains=kept.chains, through=self._through(inputs)))

    def _add(self, left: torch.Tensor, right: torch.Tensor, output: torch.Tensor) -> None:
        notes = self.note(left), self.note(right)
        states = [note.state for note in notes if note.state is not None]
        through = notes[0].through | notes[1].through
        if len(states) != 1:
            self._write_note(output, Note(chains=notes[0].chains + notes[1].chains, through=through))
            return
        branch = notes[1] if notes[0].state is not None else notes[0]
        residual, result = states[0], State()
        block = next((path for path in reversed(self._open) if path in self.blocks), "")
        running = frozenset(self._open) & self.inside - self.blocks.keys()
        for chain in branch.chains or (None,):
            seen = chain.through if chain else branch.through
            write = Write(block, chain, seen, running, output.shape, residual, result, self._time)
            result.made_by = write
            residual.residual_of.append(write)
            self.writes.append(write)
        self._write_note(output, Note(state=result))

    # modules

    def enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A module begins: its inputs that are values of the stream become taps."""
        self._time += 1
        self.calls[path] += 1
        given = [(key, value) for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, _TENSOR)]
        if path in self.blocks:
            self._enter_block(given)
        self._open.append(path)
        if path not in self.inside and not _is_norm(module):
            return
        for key, value in given:
            state = self.note(value).state
            if state is not None:
                state.taps.append((self._time, Tap(path, "input", key), value.shape))
        if is_attention(module) and "key_value_states" in (key for key, _ in given):
            self.fed.add(path)

    def _enter_block(self, given: list[tuple[int | str, torch.Tensor]]) -> None:
        values = [value for _, value in given if value.is_floating_point() and value.ndim > 1]
        for value in values:
            # Reformer's blocks take two streams of one shape; the first argument is a stream in every other model.
            if value.shape == values[0].shape and self.note(value).state is None and not self.note(value).chains:
                self._write_note(value, Note(state=State()))
        entering = self.note(values[0]).state if values else None
        if entering is not None:
            entering.borders = True

    def leave(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A module ends: what it returns is a value of the stream behind a norm, or a link of a branch."""
        self._time += 1
        self.order.setdefault(path, self._time)
        self._open.pop()
        source = next((value for value in (*args, *kwargs.values()) if isinstance(value, _TENSOR)), None)
        before = self.note(source)
        if is_linear(module):
            self.upstream[path] = before.through
        for place, tensor in _outputs(output):
            note = self.note(tensor)
            if _is_norm(module) and before.state is not None:
                after = State()
                before.state.norms.append((path, after))
                after.taps.append((self._time, Tap(path, "output", place), tensor.shape))
                self._write_note(tensor, Note(state=after))
            elif path in self.inside:
                self._returned(path, module, place, tensor, note, before, tensor is source)
            elif note.state is not None and path in self._around:
                note.state.borders = True

    def _returned(
        self,
        path: str,
        module: nn.Module,
        place: int | None,
        tensor: torch.Tensor,
        note: Note,
        before: Note,
        same: bool,
    ) -> None:
        """A module of a block returned `tensor`."""
        if note.state is not None:  # the residual addition is inside, or nothing happened
            note.state.borders |= path in self.blocks
            if not same:
                note.state.taps.append((self._time, Tap(path, "output", place), tensor.shape))
            return
        link = Link(path, place, tensor.shape)
        through = note.through | before.through | {path}
        if same or own_parts(module):
            # Dropout in eval mode returns its input; a container returns what a part of it made.
            if len(note.chains) == 1:
                chain = Chain((*note.chains[0].links, link), note.chains[0].normed, through)
            else:
                chain = Chain((link,), None, through)
        elif _is_norm(module) and len(before.chains) == 1:
            chain = Chain((link,), before.chains[0], through)
        else:
            chain = Chain((link,), None, through)
            if not any(True for _ in module.parameters()) and len(before.chains) == 1:
                self.activated.add(before.chains[0].links[-1].path)
        self._write_note(tensor, Note(chains=(chain,), through=through))


def trace(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Mapping[str, Any], prefix: str = "") -> Trace:
    """Runs `model(**inputs)` once in eval mode without gradients, adapters switched off, and follows the stream.

    Everything (training flags, adapters, random state, hooks) is put back. `prefix` is the path of `model` in the model
    that `blocks` belong to.
    """
    base = base_model(model)
    modules = {".".join(filter(None, [prefix, path])): module for path, module in walk(base)}
    found = Trace(modules, {path: module for path, module in blocks.items() if path in modules})
    with ExitStack() as stack:
        stack.enter_context(_quiet(base))
        for path, module in modules.items():
            if path == prefix:
                continue
            before = module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: found.enter(path, module, args, kwargs), with_kwargs=True
            )
            after = module.register_forward_hook(
                lambda module, args, kwargs, output, path=path: found.leave(path, module, args, kwargs, output),
                with_kwargs=True,
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(found)
        base(**inputs)
    return found


@contextmanager
def _quiet(base: nn.Module) -> Iterator[None]:
    """Eval mode, adapters off, and the random state as it was afterwards."""
    device = next(base.parameters()).device
    training = {module: module.training for module in base.modules()}
    # Switching a merged layer off would unmerge it: it computes without its adapter's modules already.
    adapted = [
        module
        for module in base.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not getattr(module, "merged", False)
        and not module._disable_adapters
    ]
    own = {} if device.type in ("cpu", "meta") else {"device_type": device.type}
    with torch.random.fork_rng(devices=[device] if own else [], **own):
        try:
            for module in training:
                # In eval mode bitsandbytes' 4-bit linears repack their weights for the CPU, for good.
                module.training = is_linear(module) and hasattr(module, "quant_state")
            for module in adapted:
                module._disable_adapters = True
            yield
        finally:
            for module, was in training.items():
                module.training = was
            for module in adapted:
                module._disable_adapters = False
