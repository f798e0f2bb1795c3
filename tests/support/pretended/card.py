"""The card's tensors and what is asked of it: every operation runs on the CPU, is checked and counted.

    import tests.support.pretended.card as pretended      first of all, before torch
    with pretended.Card() as card: model.to("cuda"); ...; card.waits

What a real card would refuse is refused: tensors of two devices in one operation. What would keep the host waiting is
counted with the line that asked. Numbers are those of a CPU, so that whole trainings can be compared with a CPU's.
"""

# ruff: noqa: E402
from tests.support.pretended import backend

backend.load()

import collections
import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

HERE = torch.device("cuda", 0)
aten = torch.ops.aten
# Nothing is launched for these: they only look at memory in another way, or take some.
NO_LAUNCH = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "split",
        "unsqueeze",
    ),
    *("squeeze", "detach", "alias", "as_strided", "split_with_sizes", "chunk", "unbind", "narrow", "_reshape_alias"),
    *("lift_fresh", "unfold", "diagonal", "view_as_real", "view_as_complex", "is_same_size", "empty", "empty_like"),
    *("new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "set_", "is_pinned", "record_stream"),
}
# The host needs the answer, and waits for all that was asked before.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
# These take tensors of two devices.
MOVES = {"_to_copy", "copy_", "to", "index", "index_put", "index_put_", "_index_put_impl_", "set_", "is_same_size"}


class OnCard(torch.Tensor):
    """A tensor that says it is on the card; `numbers` has its numbers."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnCard":
        like = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **like, device=HERE)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """As any tensor's."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.numbers = value.numbers  # type: ignore[attr-defined]

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the numbers are: tells what shares memory."""
        return self.numbers.untyped_storage()

    def storage(self) -> Any:
        """As `untyped_storage`."""
        return self.numbers.storage()

    def data_ptr(self) -> int:
        """As `untyped_storage`."""
        return self.numbers.data_ptr()

    def __repr__(self) -> str:
        return f"OnCard({self.numbers!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], _: Any, size: Any, stride: Any) -> "OnCard":
        return OnCard(inner["numbers"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnCard, (self.numbers,)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made: torch.Tensor = OnCard(self.numbers.detach().clone())
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """While it is on, "cuda" is a device. Counters of what was asked of it.

    Attributes:
        launches: by name of the operation.
        waits: (what, file:line): how often the host waited.
    """

    now: "Card | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Counts from zero."""
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()

    def __enter__(self) -> "Card":
        Card.now = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Card.now = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})


def execute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU, its results on the card where a card's would be."""
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    if not any(isinstance(tensor, OnCard) for tensor in tensors) and not _is_here(kwargs.get("device")):
        return func(*args, **kwargs)
    mine = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.ndim]
    if mine and others and name not in MOVES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    card = Card.now
    if card is not None:
        leaves = name == "_to_copy" and target is not None and target.type == "cpu"
        leaves |= name == "copy_" and not isinstance(args[0], OnCard)
        comes = not isinstance(args[0], OnCard) and bool(mine or target) if name == "_to_copy" else False
        comes |= name == "copy_" and not isinstance(args[1], OnCard)
        masks = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if name in WAITS or leaves or masks or (comes and not kwargs.get("non_blocking") and len(args) < 3):
            card.waits[("copy to the card" if comes else "copy to the CPU" if leaves else name, _asked_at())] += 1
        if name not in NO_LAUNCH:
            card.launches[name] += 1
    known = {id(tensor.numbers): tensor for tensor in mine}
    kwargs = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    kwargs.pop("non_blocking", None), kwargs.pop("pin_memory", None)
    args, kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, OnCard) else leaf, (args, kwargs))
    with torch._C._DisableAutocast() if hasattr(torch._C, "_DisableAutocast") else contextlib.nullcontext():
        out = _as_a_card_would(func, name, args, kwargs)
    if target is not None and target.type != HERE.type:
        return out
    if name == "copy_" and not isinstance(args[0], OnCard) and id(args[0]) not in known:
        return out
    return tree_map(lambda leaf: _wrapped(leaf, known), out)


def _as_a_card_would(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Operations that a CPU lacks, or makes in another way."""
    if func is aten.mm.dtype:
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
    if "generator" in kwargs:
        kwargs = {**kwargs, "generator": _twin(kwargs["generator"])}
    return func(*args, **kwargs)


def _twin(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is None or generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(generator.initial_seed())


def _wrapped(leaf: Any, known: dict[int, OnCard]) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, OnCard):
        return leaf
    found = known.get(id(leaf))
    if found is not None and found.shape == leaf.shape:
        return found
    return OnCard(leaf)


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == HERE.type


def _asked_at() -> str:
    """The line of this package, of transformers or of peft that a wait goes back to."""
    frame = sys._getframe(2)
    while frame.f_back is not None and ("/tests/support/" in (name := frame.f_code.co_filename) or "/torch/" in name):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.split('site-packages/')[-1].split('/adapters_kit/')[-1]}:{frame.f_lineno}"


def _moved(self: nn.Module, fn: Any, recurse: bool = True, made: dict | None = None) -> nn.Module:
    """`Module._apply` that makes new parameters: torch cannot give one that is there another kind of tensor."""
    made = {} if made is None else made
    for child in self.children() if recurse else ():
        _moved(child, fn, made=made)
    for store in (self._parameters, self._buffers):
        for name, tensor in store.items():
            if tensor is not None and id(tensor) not in made:
                made[id(tensor)] = tensor, _moved_one(tensor, fn)
            store[name] = None if tensor is None else made[id(tensor)][1]
    return self


def _moved_one(tensor: torch.Tensor, fn: Any) -> torch.Tensor:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        new = fn(tensor.detach())
        if new.device == tensor.device and new.dtype == tensor.dtype and new.data_ptr() == tensor.data_ptr():
            return tensor  # it is there already: an optimizer that has it goes on training it
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    # bitsandbytes' 4 bits: their class cannot be a tensor of the card's too.
    new = nn.Parameter(fn(tensor.data.as_subclass(torch.Tensor)), requires_grad=False)
    for key, value in vars(tensor).items():
        setattr(new, key, value)
    new.quant_state = _moved_state(state, fn)  # type: ignore[attr-defined]
    return new


def _moved_state(state: Any, fn: Any) -> Any:
    state = copy.copy(state)
    for key in ("absmax", "code", "offset"):
        if getattr(state, key, None) is not None:
            setattr(state, key, fn(getattr(state, key)))
    if state.state2 is not None:
        state.state2 = _moved_state(state.state2, fn)
    return state


@contextlib.contextmanager
def present() -> Iterator[Card]:
    """A machine with one card, for everything that asks torch."""
    changed: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name, None)))
        setattr(owner, name, value)

    cuda = torch.cuda
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_lazy_init": None,
        "synchronize": None, "empty_cache": None, "max_memory_allocated": 1 << 20, "memory_allocated": 1 << 20,
        "memory_reserved": 1 << 20, "max_memory_reserved": 1 << 20, "reset_peak_memory_stats": None,
        "mem_get_info": (20 << 30, 24 << 30), "is_bf16_supported": True, "get_device_name": "Pretended card",
        "get_device_capability": (8, 9), "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)], "set_rng_state_all": None, "manual_seed": None,
        "manual_seed_all": None, "set_device": None, "ipc_collect": None,
    }.items():  # fmt: skip
        for owner in (cuda, cuda.random, cuda.memory):
            if owner is cuda or hasattr(owner, name):
                put(owner, name, lambda *_, value=value, **__: value)
    put(cuda, "device", lambda *_: contextlib.nullcontext())
    put(cuda.amp.common, "amp_definitely_not_available", lambda: False)
    acc = torch.accelerator
    for name, value in {
        "max_memory_allocated": 1 << 20, "reset_peak_memory_stats": None, "empty_cache": None, "synchronize": None,
        "get_memory_info": (20 << 30, 24 << 30), "memory_allocated": 1 << 20, "memory_reserved": 1 << 20,
        "set_device_index": None,
    }.items():  # fmt: skip
        put(acc, name, lambda *_, value=value, **__: value)
    in_lists = torch.Tensor.tolist
    put(torch.Tensor, "tolist", lambda self: in_lists(self.cpu()))
    put(torch.Tensor, "pin_memory", lambda self, *_: self)
    lifts_only_from_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="cuda") is made on the CPU, and moved
    put(nn.Module, "_apply", _moved)
    from adapters_kit.kernels import base_layers

    put(base_layers, "_PLAIN", (*base_layers._PLAIN, OnCard))
    try:
        with Card() as card:
            yield card
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts_only_from_cpu)
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
