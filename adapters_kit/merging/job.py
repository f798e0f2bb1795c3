"""What a merge will write, whole before the first byte is: where each tensor goes and what computes it.

There are three ways to a job, and one from it. Plain LoRA on a plain checkpoint needs no model at all. Any other
adapter is attached to a model without weights. Several adapters are several of these, whose updates become one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.errors import ShippingError
from adapters_kit.merging.output import Layout, lay_out
from adapters_kit.merging.plain_lora import Direct, find_direct
from adapters_kit.merging.writer import Values

# Building the model's skeleton imports transformers and peft, which takes longer than a plain merge.
if TYPE_CHECKING:
    from adapters_kit.merging.mixture import Mix
    from adapters_kit.merging.roundtrip import Rounding
    from adapters_kit.merging.update import Update

Changed = Iterable[tuple[str, Values]]


@dataclass(frozen=True)
class Order:
    """What a user asked for.

    Attributes:
        adapters: one or several.
        factors: one for each.
        mix: how several become one; None for one.
        dtype: of the output's float tensors, None for each tensor's own.
        rounding: how the base was quantized in training (or just the kind), None if it was not.
        original: merge into the original weights although the training saw quantized ones.
    """

    adapters: tuple[Adapter, ...]
    factors: tuple[float, ...]
    mix: "Mix | None" = None
    dtype: torch.dtype | None = None
    rounding: "Rounding | str | None" = None
    original: bool = False


@dataclass(frozen=True)
class Job:
    """A merge, planned.

    Attributes:
        layout: of the weight files.
        changed: gives (name in the output, value) of every tensor that is not copied; may be called again.
        architecture: the transformers class that loads the result.
        config: the result's `config.json`.
        added, dropped: tensors that the base did not have, and those of it that are left out.
        updates: the adapters on a model without weights; none for plain LoRA, which needs no model.
        notes: what a user should know.
    """

    layout: Layout
    changed: Callable[[], Changed]
    architecture: str
    config: dict[str, Any]
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    updates: "tuple[Update, ...]" = ()
    notes: tuple[str, ...] = field(default=())


def plan(order: Order, checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Job:
    """The job of an order.

    Args:
        raw: the base's `config.json`.

    Raises:
        ShippingError: an adapter does not fit, or cannot be merged.
    """
    if order.mix is not None:
        return _several(order, order.mix, checkpoint, raw)
    adapter = order.adapters[0]
    plain = not order.original and order.rounding is None
    direct = find_direct(adapter, checkpoint, dict(raw)) if plain else None
    return _direct(order, direct, checkpoint, raw) if direct is not None else on_model(order, checkpoint, raw)


def _direct(order: Order, direct: Direct, checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Job:
    changes = dict(order.adapters[0].record.get("config") or {})
    return Job(
        lay_out(checkpoint, dtype=order.dtype, computed=set(direct.factors)),
        lambda: direct.changed(checkpoint),
        raw["architectures"][0],
        _config(raw, changes, order.dtype),
    )


def on_model(order: Order, checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Job:
    """The job of one adapter, attached to a model without weights: what verification needs, too."""
    from adapters_kit.merging.update import changed, match

    update = match(order.adapters[0], checkpoint, order.dtype, order.rounding, order.original)
    return Job(
        update.layout,
        lambda: changed(update),
        type(update.attached.bare).__name__,
        _config(raw, _config_changes(update, raw), order.dtype),
        tuple(sorted(update.added.values())),
        tuple(sorted(update.dropped)),
        (update,),
        update.notes,
    )


def _several(order: Order, mix: "Mix", checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Job:
    from adapters_kit.merging.mixture import changed_sum
    from adapters_kit.merging.update import match

    updates = tuple(match(one, checkpoint, order.dtype, None, False) for one in order.adapters)
    for update in updates:
        whole = update.added or update.attached.replaced or update.weights.resized
        copies = any(unit.copy is not None for unit in update.attached.units)
        if whole or copies or any(update.weights.origins[name].converter for name in update.written):
            raise ShippingError(
                f"{update.adapter.folder} does more than add to stored matrices (a trained head, resized embeddings, "
                "converted experts), so there is no sum with others. Merge it alone."
            )
    named = zip(order.adapters, order.factors, strict=True)
    parts = ", ".join(f"{factor:g} × {one.folder.name}" for one, factor in named)
    return Job(
        lay_out(checkpoint, dtype=order.dtype, computed={key for one in updates for key in one.computed}),
        lambda: changed_sum(updates, order.factors, mix),
        type(updates[0].attached.bare).__name__,
        _config(raw, dict(order.adapters[0].record.get("config") or {}), order.dtype),
        updates=updates,
        notes=(f"{mix} of {parts}.",),
    )


def _config(raw: Mapping[str, Any], changes: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config.json, changed only where the trained model differs."""
    result = {**raw, **changes}
    if dtype is not None:
        result["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
    return result


def _config_changes(update: "Update", raw: Mapping[str, Any]) -> dict[str, Any]:
    """Where the trained model's config differs from the base's, `raw`."""
    old, new = update.attached.loaded, update.attached.bare.config
    changes = dict(update.adapter.record.get("config") or {})
    name = type(update.attached.bare).__name__
    if name not in (raw.get("architectures") or [name]):
        changes["architectures"] = [name]
    if old.num_labels != new.num_labels:
        changes |= {"id2label": {str(k): v for k, v in new.id2label.items()}, "label2id": new.label2id}
    nested = raw.get("text_config")
    text: dict[str, Any] | None = dict(nested) if isinstance(nested, dict) else None
    words = getattr(new.get_text_config(), "vocab_size", None)
    if words != getattr(old.get_text_config(), "vocab_size", None):
        (changes if text is None else text)["vocab_size"] = words
    if update.untied:
        changes["tie_word_embeddings"] = False
        if text is not None and "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    return changes if text is None else changes | {"text_config": text}
