"""plan(): what a recipe will train, how much memory a step takes and whether it fits, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters_kit import devices
from adapters_kit.anatomy.depth import shortened
from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.artifacts.source import find
from adapters_kit.errors import AdapterError, RecipeError
from adapters_kit.kernels.cross_entropy import chunked_loss, plain_loss
from adapters_kit.kernels.fuse import fuse, unfuse
from adapters_kit.kernels.recompute import recompute_cheap, recompute_nothing
from adapters_kit.loading import skeleton
from adapters_kit.loading.gguf import lay_in_blocks
from adapters_kit.loading.model import file_in_blocks
from adapters_kit.pages.html import pre
from adapters_kit.quantization import KEEP
from adapters_kit.recipe import Recipe
from adapters_kit.training.assembly import add_adapter
from adapters_kit.training.batches import Batches, FromData, FromLength, histogram
from adapters_kit.training.inputs import Given, recipe_from
from adapters_kit.training.memory import Batch, Kept, Memory, StepMemory
from adapters_kit.training.resolve import resolve

GIB = 2**30
# What a CUDA context takes of a card, and what the allocator cannot use of what is not weights: its pieces do not fit.
CARD_RESERVE = int(0.75 * GIB)
FRAGMENTS = 0.04


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        recipe: with its precision written out.
        groups: trained parameters by path (layer numbers written as *): tensors, parameters.
        trainable, total: parameters.
        memory: of one step on the longest batch, as the recipe says.
        variants: total bytes of that step if one thing were changed.
        batch_size, max_length: of that batch.
        padding: part of all batches that is padding, in the order that training will use.
        lengths: histogram of the examples' lengths in tokens: (from, to, examples).
        example: one tokenised example: (token, whether the loss counts it).
        card: bytes of the GPU asked about, or None.
        fits: whether `memory` fits on it, or None.
        largest_batch: that fits at this length (0: none), or None without a card.
        longest: the longest length that fits at this batch size, or None.
        advice: what to change if it does not fit, best first.
    """

    recipe: Recipe
    groups: dict[str, tuple[int, int]]
    trainable: int
    total: int
    memory: Memory
    variants: dict[str, int]
    batch_size: int
    max_length: int
    padding: float
    lengths: list[tuple[int, int, int]]
    example: list[tuple[str, bool]]
    card: int | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    longest: int | None = None
    advice: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """For a notebook."""
        return pre(str(self))

    def __str__(self) -> str:
        held = f"in {self.recipe.training.precision}"
        if self.recipe.quantize:
            held = f"with weights in {self.recipe.quantize}, computed {held}"
        lines = [f"{self.recipe.method.label} on {self.recipe.model} for {self.recipe.task}, {held}"]
        if self.card is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            lines += ["", f"{verdict} on a card of {size(self.card)}: a step takes {size(self.memory.total)}"]
            lines.append(f"  largest batch at {self.max_length} tokens: {self.largest_batch or 'none'}")
            lines.append(f"  longest input at batch {self.batch_size}: {self.longest or 'none'}")
            lines += [f"  -> {text}" for text in self.advice]
        lines += ["", f"memory of one step, {self.batch_size} x {self.max_length} tokens:"]
        lines += [f"  {name:<12} {size(getattr(self.memory, name)):>10}" for name in Memory.__dataclass_fields__]
        lines.append(f"  {'at most':<12} {size(self.memory.total):>10}")
        lines += [f"  {name:<40} {size(bytes_)}" for name, bytes_ in self.variants.items()]
        lines += ["", f"trains {self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.2%}):"]
        lines += [f"  {path:<60} {tensors:>4} tensors {count:>12,}" for path, (tensors, count) in self.groups.items()]
        if self.lengths:
            lines += ["", f"lengths in tokens ({self.padding:.1%} of the batches is padding):"]
            most = max(count for *_, count in self.lengths)
            lines += [
                f"  {low:>5}-{high:<5} {count:>7} {'#' * round(40 * count / most)}" for low, high, count in self.lengths
            ]
        if self.example:
            marked = " ".join(f"[{token}]" if counted else token for token, counted in self.example[:60])
            lines += ["", "one example, [tokens that the loss counts]:", f"  {marked}"]
        return "\n".join(lines)


def plan(recipe: Given, gpu: str | int | None = None, *, length: int | None = None) -> Plan:
    """Reads the data, the tokenizer and the model's config, no weights.

    Args:
        recipe: as for `train`: a `Recipe`, the path of its YAML file, or a dict of its keys.
        gpu: the card's memory, "24GB" or bytes; by default what is free on the first GPU of this machine, if there is
            one. With a card named, `precision: auto` is bf16 as on a card, and the rules of CUDA's autocast hold.
        length: plan for inputs of so many tokens: neither data nor a tokenizer is read, and `data` may be left out.

    Raises:
        RecipeError: an amount of memory or a length that is none.
        ModelError, DataError: as training would.
    """
    if length is not None and isinstance(recipe, Mapping):
        recipe = {"data": "-", **recipe}  # not read
    recipe = recipe_from(recipe)
    card = devices.free_memory() if gpu is None else parse_size(gpu)
    named = gpu is not None and recipe.training.precision == "auto"
    recipe = resolve(recipe.changed(**{"training.precision": "bf16"}) if named else recipe, trains=False)
    batches: Batches = FromData(recipe) if length is None else FromLength(recipe, length)
    training, dtype = recipe.training, DTYPES[recipe.training.precision]
    batches.bare.to(dtype)
    if recipe.quantize == KEEP:
        lay_in_blocks(batches.bare, file_in_blocks(find(recipe.model)), dtype)
    model = _wrapped(batches.bare, recipe)
    groups, trainable, total = _groups(model)
    asked = StepMemory(
        model,
        dtype=dtype,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        quantize=recipe.quantize,
        on_gpu=card is not None,
        beside=_teacher(recipe, 2 if card is not None else 4),
    )
    made: dict[str, Any] = {
        "recipe": recipe,
        "groups": groups,
        "trainable": trainable,
        "total": total,
        "batch_size": batches.rows,
        "max_length": batches.length,
        "padding": batches.padding,
        "lengths": histogram(batches.lengths),
        "example": batches.example,
        "card": card,
    }
    try:
        with shortened(model) as stands_for:
            counted = _counted(recipe, model, asked, batches, card, stands_for)
    except Exception:  # whatever a model raises that counts its layers in a way of its own
        counted = _counted(recipe, model, asked, batches, card, {})
    if counted.get("fits") is False and dtype == torch.float32:
        half = plan(recipe.changed(**{"training.precision": "bf16"}), card, length=length)
        text = f"training.precision: bf16 takes {size(half.memory.total)}"
        counted["advice"].insert(0, f"{text}, which fits" if half.fits else text)
    return Plan(**made, **counted)


def _teacher(recipe: Recipe, each: int) -> int:
    """Bytes of the model that `objective: distill` learns from, at `each` a parameter; 0 where nobody teaches."""
    if recipe.objective is None or recipe.objective.name != "distill":
        return 0
    teacher = skeleton(recipe.objective.teacher or recipe.model, recipe.task)
    return each * sum(parameter.numel() for parameter in teacher.parameters())


def _wrapped(bare: nn.Module, recipe: Recipe) -> nn.Module:
    """With the recipe's adapter, not fused: which layers can be is found out later, on fewer of them."""
    recipe = recipe.changed(**{"training.fuse": False})
    steps = 10_000  # how long the run is changes no size
    try:
        with torch.device("meta"):  # starting values are of no interest, and take seconds
            return add_adapter(bare, recipe, steps)
    except AdapterError:  # a method that looks at them (a prefix that starts from words); the model is as it was
        return add_adapter(bare, recipe, steps)


def _counted(
    recipe: Recipe,
    model: nn.Module,
    asked: StepMemory,
    batches: Batches,
    card: int | None,
    stands_for: dict[str, int],
) -> dict[str, Any]:
    """The fields of a `Plan` that a forward pass on shapes tells.

    Args:
        model: not fused; whole, or as short as `stands_for` says.
    """
    training, rows, length = recipe.training, batches.rows, batches.length
    if training.fuse:
        fuse(model)

    def step(rows: int, length: int) -> Memory:
        batch = batches.batch(rows, length)
        return asked.of(batch, asked.kept(batch, stands_for))

    batch = batches.batch(rows, length)
    kept = asked.kept(batch, stands_for)
    memory = asked.of(batch, kept)
    switched = asked.of(batch, kept, checkpointing=not training.gradient_checkpointing)
    variants = {_variant("gradient checkpointing", not training.gradient_checkpointing): switched.total}
    switches: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
        "fuse": ("fused layers", fuse, unfuse),
        "recompute": ("cheap recomputing", recompute_cheap, recompute_nothing),
    }
    if recipe.task == "causal-lm":
        switches["chunked_loss"] = ("chunked loss", chunked_loss, plain_loss)
    for name, (shown, on, off) in switches.items():
        now = bool(getattr(training, name))
        (off if now else on)(model)
        variants[_variant(shown, not now)] = step(rows, length).total
        (on if now else off)(model)
    found: dict[str, Any] = {"memory": memory, "variants": variants}
    if card is None:
        return found
    known = {(rows, length): memory}

    def needed(rows: int, length: int) -> int:
        if (rows, length) not in known:
            known[rows, length] = step(rows, length)
        return room_needed(known[rows, length])

    largest = _largest(lambda rows: needed(rows, length), (rows, 16 * rows), card)
    longest = None
    if length > 1:
        top = min(batches.longest, 4096)
        points = sorted({length, top // 2, top} if length not in (top // 2, top) else {top // 4, top // 2, top})
        longest = _largest(lambda n: needed(rows, n), points, card, batches.longest)
    fits = room_needed(memory) <= card
    advice = [] if fits else _advice(recipe, asked, batch, kept, card, variants, largest, longest)
    return {**found, "fits": fits, "largest_batch": largest, "longest": longest, "advice": advice}


def room_needed(memory: Memory) -> int:
    """Bytes that a card has to have for a step: what it takes, what the allocator wastes, and the CUDA context."""
    moving = memory.total - memory.weights - memory.adapter - memory.optimizer
    return memory.total + round(FRAGMENTS * moving) + CARD_RESERVE


def _variant(what: str, on: bool) -> str:
    return f"{'with' if on else 'without'} {what}"


def _largest(cost: Callable[[int], int], points: Sequence[int], room: int, most: int = 1 << 24) -> int:
    """The largest whole number up to `most` whose cost is within `room`; 0 if there is none.

    Bytes are a polynomial in the rows (straight) and in the length (attention masks grow with its square), but for a
    bend where the pieces of the chunked loss are full. So: the polynomial through `points`, then through the places
    where it led.
    """
    known = {point: cost(point) for point in points}
    for _ in range(3):
        recent = list(known)[-len(points) :]
        curve = np.polynomial.Polynomial.fit(recent, [known[point] for point in recent], len(points) - 1)
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if curve(middle) <= room else (low, middle)
        if max(low, 1) in known:
            break
        known[max(low, 1)] = cost(max(low, 1))
    return max((number for number, bytes_ in known.items() if bytes_ <= room), default=0)


def _groups(model: nn.Module) -> tuple[dict[str, tuple[int, int]], int, int]:
    groups: dict[str, tuple[int, int]] = {}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            path = re.sub(r"\.\d+(?=\.)", ".*", name.removeprefix("base_model.model."))
            tensors, count = groups.get(path, (0, 0))
            groups[path] = (tensors + 1, count + parameter.numel())
    return groups, sum(count for _, count in groups.values()), total


def _advice(
    recipe: Recipe,
    asked: StepMemory,
    batch: Batch,
    kept: Kept,
    card: int,
    variants: dict[str, int],
    largest: int,
    longest: int | None,
) -> list[str]:
    """What to change, each with the bytes that are left then: what fits by itself comes first."""
    training, now = recipe.training, asked.of(batch, kept)
    totals = {
        f"training.{setting}": variants.get(_variant(what, True))
        for what, setting in {
            "fused layers": "fuse: true",
            "chunked loss": "chunked_loss: true",
            "cheap recomputing": "recompute: cheap",
            "gradient checkpointing": "gradient_checkpointing: true",
        }.items()
    }
    if recipe.quantize is None:
        totals["quantize: nf4"] = asked.of(batch, kept, quantize="nf4").total
        both = asked.of(batch, kept, quantize="nf4", checkpointing=True).total
        totals["quantize: nf4 and training.gradient_checkpointing: true"] = both
    spare = card - (room_needed(now) - now.total)
    ordered = sorted((total, text) for text, total in totals.items() if total is not None and total < now.total)
    fitting = [f"{text} takes {size(total)}, which fits" for total, text in ordered[::-1] if total <= spare]
    short = [f"{text} takes {size(total)}" for total, text in ordered if total > spare]
    if 0 < largest < training.batch_size:
        more = -(-training.batch_size * training.gradient_accumulation // largest)
        fitting.append(f"training.batch_size: {largest} fits, with training.gradient_accumulation: {more}")
    if longest:
        fitting.append(f"training.max_length: {longest} fits")
    return fitting + short or ["a smaller model"]


def parse_size(text: str | int) -> int:
    """Bytes: 24GB, 24GiB, 24 and 24g are all 24 * 2**30, as cards are sold; MB likewise. 2**20 and more are bytes.

    Raises:
        RecipeError: anything else.
    """
    if isinstance(text, int) and text >= 2**20:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm])?i?b?\s*", str(text).lower())
    if match is None or not float(match[1]):
        raise RecipeError([f"{text!r} is no amount of memory; write 24GB"], source="--gpu")
    return int(float(match[1]) * (2**20 if match[2] == "m" else GIB))


def size(number: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} B"
