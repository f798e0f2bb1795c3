"""A `ModelMap` as a tree for people: equal blocks in one line with their count."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from adapters_kit.anatomy.parts import Block, Branch, Linear, ModelMap

ROLES = ["q", "k", "v", "qkv", "kv", "o", "gate", "up", "gate_up", "down", ""]


def render(amap: ModelMap, width: int = 120) -> str:
    """The map as plain text, lines no wider than `width` characters."""
    console = Console(width=width, color_system=None, force_terminal=False, file=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(tree(amap))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def tree(amap: ModelMap) -> Tree:
    """The map as a `rich` tree, for a terminal with colours."""
    root = Tree(_line((amap.model_class, "bold"), (_facts(amap.hidden_size, amap.key_value_heads), "dim")))
    for path in amap.embeddings:
        root.add(_line(("embeddings ", "cyan"), (path, "")))
    for stack, blocks in _stacks(amap.blocks):
        for alike in _alike(blocks):
            _add_blocks(root, stack, alike)
    for path in amap.head:
        output = amap.output_embeddings or ""
        below = output.startswith(path + ".")
        root.add(_line(("head ", "cyan"), (path, ""), (f"  (vocabulary: {output})" if below else "", "dim")))
    if amap.reason:
        root.add(_line(("note ", "yellow"), (amap.reason, "")))
    return root


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, overflow="fold")


def _facts(hidden: int | None, heads: int | None) -> str:
    facts = [f"hidden {hidden}" if hidden else "", f"{heads} key/value head{'s' * (heads != 1)}" if heads else ""]
    return "".join(f"  {fact}" for fact in facts if fact)


def _stacks(blocks: Iterable[Block]) -> Iterable[tuple[str, list[Block]]]:
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(block.stack, []).append(block)
    return stacks.items()


def _alike(blocks: list[Block]) -> list[list[Block]]:
    """Blocks that differ in nothing but their place, together; in the order of the first of each."""
    groups: dict[Any, list[Block]] = {}
    for block in blocks:
        groups.setdefault(_relative(replace(block, path="", index=0), block.path), []).append(block)
    return list(groups.values())


def _relative(value: Any, path: str) -> Any:
    """`value` as nested tuples, with paths below `path` (or beside it, at the same index) made independent of it."""
    if isinstance(value, str):
        if value == path or value.startswith(path + "."):
            return value.removeprefix(path)
        index = path.rpartition(".")[2]
        return ".".join("#" if part == index else part for part in value.split("."))
    if is_dataclass(value):
        return tuple(_relative(getattr(value, one.name), path) for one in fields(value))
    if isinstance(value, tuple):
        return tuple(_relative(one, path) for one in value)
    return value


def _add_blocks(root: Tree, stack: str, blocks: list[Block]) -> None:
    first = blocks[0]
    count = f"  {len(blocks)} × {first.kind}" if len(blocks) > 1 else f"  {first.kind}"
    repeats = f"  run {first.calls} times" if first.calls > 1 else "" if first.calls else "  not reached by the probe"
    title = _line(
        ("blocks ", "cyan"),
        (f"{stack}.{_ranges([block.index for block in blocks])}", "bold"),
        (count, "green"),
        (_facts(first.hidden_size, first.key_value_heads) + repeats, "dim"),
    )
    node = root.add(title)
    listed: set[str] = set()
    for branch in first.branches:
        below = node.add(_branch_line(first, branch))
        inside = [linear for linear in first.linears if linear.path in branch.linears]
        for linear in sorted(inside, key=lambda linear: ROLES.index(linear.role)):
            below.add(_linear_line(first, linear))
        for weight in first.experts:
            if weight.path in branch.experts:
                shape = " × ".join(map(str, weight.shape))
                below.add(_line(("experts ", "magenta"), (_short(first, weight.path), ""), (f"  {shape}", "dim")))
        listed |= {*branch.linears, *branch.experts}
    others = [linear for linear in first.linears if linear.path not in listed]
    if others:
        below = node.add(_line(("other linears", "magenta"))) if first.branches else node
        for linear in others:
            below.add(_linear_line(first, linear))


def _branch_line(block: Block, branch: Branch) -> Text:
    if branch.module is None:
        source = "(a raw operation, no module returns it)"
    else:
        source = _short(block, branch.inner or branch.module) + ("" if branch.index is None else f"[{branch.index}]")
    notes = ""
    if branch.branch_norm:
        notes += f"  → {_short(block, branch.branch_norm)} → added"
    if branch.norm:
        notes += f"  added → {_short(block, branch.norm)}"
    return _line((f"{branch.kind} ", "bold magenta"), (source, ""), (notes, "dim"))


def _linear_line(block: Block, linear: Linear) -> Text:
    kind = "" if linear.kind == "Linear" else f"  {linear.kind}"
    aside = "  weight read directly: an adapter here never runs" if linear.bypassed else ""
    return _line(
        (f"{linear.role or '·':<8}", "magenta"),
        (_short(block, linear.path), ""),
        (f"  {linear.in_features} → {linear.out_features}{kind}", "dim"),
        (aside, "yellow"),
    )


def _short(block: Block, path: str) -> str:
    """The path from the block on; a module beside the block keeps its full path."""
    if path == block.path:
        return path.rpartition(".")[0].rpartition(".")[2] or path
    return path.removeprefix(block.path + ".")


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "{0–2, 5}"; a single number as itself."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
