"""plan(): what a recipe will train, how much memory a step takes and whether it fits, before any weight is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.errors import RecipeError
from adapters_kit.kernels.cross_entropy import chunked_loss, plain_loss
from adapters_kit.kernels.recompute import recompute_cheap, recompute_nothing
from adapters_kit.loading import load_processor, skeleton
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import IGNORED, Features, Task
from adapters_kit.training.given import Given, recipe_from
from adapters_kit.training.memory import Memory, step_bytes
from adapters_kit.training.resolve import add_adapter, precision, prepare
from adapters_kit.training.sampling import OrderedByEpoch

GIB = 2**30
# What a CUDA context and the allocator's rounding take of a card, besides tensors.
CARD_RESERVE = int(0.75 * GIB)


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
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

    def __str__(self) -> str:
        lines = [f"{self.recipe.method.label} on {self.recipe.model} for {self.recipe.task}", ""]
        lines.append(f"trains {self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.2%}):")
        lines += [f"  {path:<60} {tensors:>4} tensors {count:>12,}" for path, (tensors, count) in self.groups.items()]
        lines += ["", f"memory of one step, {self.batch_size} x {self.max_length} tokens:"]
        lines += [f"  {name:<12} {size(getattr(self.memory, name)):>10}" for name in Memory.__dataclass_fields__]
        lines.append(f"  {'total':<12} {size(self.memory.total):>10}")
        lines += [f"  {name:<40} {size(bytes_)}" for name, bytes_ in self.variants.items()]
        if self.card is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            lines += ["", f"{verdict} on a card of {size(self.card)}"]
            lines.append(f"  largest batch at {self.max_length} tokens: {self.largest_batch or 'none'}")
            lines.append(f"  longest input at batch {self.batch_size}: {self.longest or 'none'}")
            lines += [f"  -> {text}" for text in self.advice]
        lines += ["", f"lengths in tokens ({self.padding:.1%} of the batches is padding):"]
        most = max((count for *_, count in self.lengths), default=1)
        lines += [
            f"  {low:>5}-{high:<5} {count:>7} {'#' * round(40 * count / most)}" for low, high, count in self.lengths
        ]
        if self.example:
            marked = " ".join(f"[{token}]" if counted else token for token, counted in self.example[:60])
            lines += ["", "one example, [tokens that the loss counts]:", f"  {marked}"]
        return "\n".join(lines)


def plan(recipe: Given, gpu: str | int | None = None) -> Plan:
    """Reads the data, the tokenizer and the model's config, no weights.

    Args:
        recipe: as for `train`: a `Recipe`, the path of its YAML file, or a dict of its keys.
        gpu: the card's memory, "24GB" or bytes; by default the first GPU of this machine, if there is one.
    """
    recipe = recipe_from(recipe)
    card = parse_size(gpu) if gpu is not None else _this_card()
    task, splits = prepare(recipe)
    bare = skeleton(recipe.model, recipe.task, labels=task.labels if TASKS[recipe.task].labelled else None)
    task.bind(load_processor(recipe.model), bare)
    features = task.training_features(task.encode(splits.train))
    batch_size = min(recipe.training.batch_size, len(features))
    training, dtype = recipe.training, DTYPES[precision(recipe)]
    bare.to(dtype)

    def build(**changes: Any) -> nn.Module:
        changed = recipe.changed(**{f"training.{name}": value for name, value in changes.items()})
        # How long the run is changes no size.
        return add_adapter(copy.deepcopy(bare), changed, steps=10_000)

    longest_rows = sorted(features, key=task.length)[-batch_size:]
    model = build()  # one for all sizes: to find out which layers are fused takes longer than to count
    groups, trainable, total = _groups(model)

    def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Memory, Memory]:
        """As the recipe says, and with checkpointing switched the other way."""
        options = {"dtype": dtype, "optimizer": training.optimizer, "quantize": recipe.quantize}
        ours, kept = step_bytes(model, batch, checkpointing=training.gradient_checkpointing, **options)
        other = kept.total if training.gradient_checkpointing else kept.checkpointed
        return ours, replace(ours, activations=other)

    batch = _batch(task, longest_rows)
    memory, switched = step(model, batch)
    longest = max(task.length(feature) for feature in longest_rows)
    variants = {_variant("gradient checkpointing", not training.gradient_checkpointing): switched.total}
    other = build(fuse=not training.fuse)
    variants[_variant("fused layers", not training.fuse)] = step(other, batch)[0].total
    switches = {"recompute": ("cheap recomputing", recompute_cheap, recompute_nothing)}
    if recipe.task == "causal-lm":
        switches["chunked_loss"] = ("chunked loss", chunked_loss, plain_loss)
    for name, (shown, on, off) in switches.items():
        now = bool(getattr(training, name))
        (off if now else on)(model)
        variants[_variant(shown, not now)] = step(model, batch)[0].total
        (on if now else off)(model)
    made = Plan(
        recipe=recipe,
        groups=groups,
        trainable=trainable,
        total=total,
        memory=memory,
        variants=variants,
        batch_size=batch_size,
        max_length=longest,
        padding=_padding(task, recipe, features),
        lengths=_histogram([task.length(feature) for feature in features]),
        example=_example(task, features[0]),
    )
    if card is None:
        return made
    room = card - CARD_RESERVE

    def resized(rows: int, length: int) -> int:
        if (rows, length) == (batch_size, longest):
            return memory.total
        return step(model, _stretched(task, longest_rows, rows, length))[0].total

    largest = _largest(lambda rows: resized(rows, longest), (batch_size, 16 * batch_size), room)
    top = min(task.longest, 4096)
    lengths = sorted({longest, top // 2, top} if longest not in (top // 2, top) else {top // 4, top // 2, top})
    by_length = "input_ids" in batch and lengths[0] > 1
    return replace(
        made,
        card=card,
        fits=memory.total <= room,
        largest_batch=largest,
        longest=_largest(lambda n: resized(batch_size, n), lengths, room, task.longest) if by_length else None,
        advice=[] if memory.total <= room else _advice(made, room),
    )


def _variant(what: str, on: bool) -> str:
    return f"{'with' if on else 'without'} {what}"


def _batch(task: Task, features: Features) -> dict[str, torch.Tensor]:
    """A batch without what the model would not be given, and without a mask that masks nothing."""
    batch = task.collate_training(features)
    batch.pop("row", None)
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]  # a full mask is dropped inside the model, but only if its values can be seen
    return batch


def _stretched(task: Task, features: Features, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of another size, made of the same examples repeated."""
    batch = _batch(task, [features[i % len(features)] for i in range(rows)])
    now = batch["input_ids"].shape[1] if "input_ids" in batch else None
    if now is None or now == length:
        return batch
    columns = torch.arange(length) % now
    return {k: v[:, columns] if v.ndim >= 2 and v.shape[1] == now else v for k, v in batch.items()}


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


def _padding(task: Task, recipe: Recipe, features: Features) -> float:
    lengths = [task.length(feature) for feature in features]
    size_, group = recipe.training.batch_size, recipe.training.group_by_length
    order = list(OrderedByEpoch(lengths, size_, recipe.training.seed, group=group))
    area = sum(
        max(lengths[i] for i in order[k : k + size_]) * len(order[k : k + size_]) for k in range(0, len(order), size_)
    )
    return 1 - sum(lengths) / area


def _histogram(lengths: Sequence[int], bins: int = 10) -> list[tuple[int, int, int]]:
    counts, edges = np.histogram(lengths, bins=min(bins, max(lengths) - min(lengths) + 1))
    bounds = [int(np.ceil(edge)) for edge in edges]
    return [
        (low, high - (index < len(counts) - 1), int(count))
        for index, (low, high, count) in enumerate(zip(bounds[:-1], bounds[1:], counts, strict=True))
    ]


def _example(task: Task, feature: dict[str, Any]) -> list[tuple[str, bool]]:
    if "input_ids" not in feature or not hasattr(task.processor, "convert_ids_to_tokens"):
        return []
    tokens = task.processor.convert_ids_to_tokens([int(i) for i in feature["input_ids"]])
    labels = feature.get("labels")
    per_token = labels is not None and np.ndim(labels) == 1 and len(labels) == len(tokens)
    return [(token, bool(per_token and labels[i] != IGNORED)) for i, token in enumerate(tokens)]


def _advice(plan: Plan, room: int) -> list[str]:
    training = plan.recipe.training
    settings = {
        "fused layers": "fuse: true",
        "chunked loss": "chunked_loss: true",
        "cheap recomputing": "recompute: cheap",
        "gradient checkpointing": "gradient_checkpointing: true",
    }
    found = []
    for what, setting in settings.items():
        total = plan.variants.get(_variant(what, True))
        if total is not None and total < plan.memory.total:
            found.append(f"training.{setting} takes {size(total)}{'' if total > room else ', which fits'}")
    if plan.recipe.quantize is None:
        found.append(f"quantize: nf4 takes about {size(round(plan.memory.weights * 0.72))} off the weights")
    if training.batch_size > 1:
        found.append("a smaller training.batch_size with training.gradient_accumulation raised to match")
    found.append("a smaller training.max_length")
    return found


def _this_card() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def parse_size(text: str | int) -> int:
    """Bytes: 24GB, 24GiB, 24 and 24g are all 24 * 2**30, as cards are sold; MB likewise.

    Raises:
        RecipeError: anything else.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm])?i?b?\s*", text.lower())
    if match is None:
        raise RecipeError([f"{text!r} is no amount of memory; write 24GB"], source="--gpu")
    return int(float(match[1]) * (2**20 if match[2] == "m" else GIB))


def size(number: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} B"
