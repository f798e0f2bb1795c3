"""A deep model cut down to the layers that differ: what one block needs, every other block of its kind needs too.

1. Two blocks are of one kind if their modules, plain attributes (dropout, window, scale) and parameters (shape, dtype,
   trained or not) are the same. Numbers that only say where a block stands (`layer_idx`) are no difference.
2. What happens to the first block of a kind may happen once: it makes what the others share (a mask, rotary angles),
   and the very first one reads an input that needs no gradient. From the second of a kind on nothing changes any more.
3. So a stack is cut behind the place where every kind that repeats has come twice. It is cut at its end and nowhere
   else, because models count their layers from the front (`config.layer_types[i]`).
4. The second block of a kind stands for itself and for those of its kind that were cut off.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapters_kit.anatomy.structure import base_model, blocks

_PLACE = re.compile(r"(^|_)(idx|index|layer_id|block_id|layer_number|layer_num)$")
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def shortened(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the stacks of `model` end where nothing new comes any more; afterwards they are whole again.

    Yields:
        Path of each block that is left -> how many blocks it stands for.
    """
    base = base_model(model)
    paths = list(blocks(base))
    stands_for = dict.fromkeys(paths, 1)
    lists = _lists_by_position(base)
    cut: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    try:
        for stack in dict.fromkeys(path.rpartition(".")[0] for path in paths):
            members = [path for path in paths if path.rpartition(".")[0] == stack]
            holder = base.get_submodule(stack)
            names = [path.rpartition(".")[2] for path in members]
            if not isinstance(holder, nn.ModuleList) or list(holder._modules) != names:
                continue  # something else stands between the blocks
            given = [values for values in lists if len(values) == len(members)]
            kinds = [
                (kind_of(holder[place]), tuple(str(values[place]) for values in given)) for place in range(len(members))
            ]
            kept = _prefix(kinds)
            if kept == len(members):
                continue
            for place, kind in enumerate(kinds[kept:], start=kept):
                second = [i for i in range(kept) if kinds[i] == kind][1]
                stands_for[members[second]] += 1
                del stands_for[members[place]]
            cut.append((holder, dict(holder._modules)))
            for name in names[kept:]:
                del holder._modules[name]
        yield stands_for
    finally:
        for holder, children in cut:
            holder._modules.clear()
            holder._modules.update(children)


def _prefix(kinds: list[Any]) -> int:
    """How many of `kinds`, from the front, hold each kind twice, or as often as it comes at all."""
    total, seen = Counter(kinds), Counter[Any]()
    missing = sum(min(2, count) for count in total.values())
    for place, kind in enumerate(kinds):
        if missing == 0:
            return place
        seen[kind] += 1
        missing -= seen[kind] <= 2
    return len(kinds)


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What tells a block from another, but for its place."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, value) for name, value in vars(module).items() if _tells(name, value)),
            tuple(
                (name, tensor.shape, tensor.dtype, tensor.requires_grad)
                for store in (module._parameters, module._buffers)
                for name, tensor in store.items()
                if tensor is not None
            ),
        )
        for path, module in block.named_modules()
    )


def _tells(name: str, value: Any) -> bool:
    plain = isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value))
    return plain and not _PLACE.search(name)


def _lists_by_position(base: nn.Module) -> list[list[Any]]:
    """Every list in the model's configuration: one as long as a stack may say something of each of its blocks."""
    found: list[list[Any]] = []

    def read(entries: Mapping[str, Any]) -> None:
        for value in entries.values():
            if isinstance(value, dict):
                read(value)
            elif isinstance(value, list | tuple) and value:
                found.append(list(value))

    config = getattr(base, "config", None)
    if config is not None:
        read(config.to_dict())
    return found
