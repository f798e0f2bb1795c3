"""One adapter matched with the stored tensors of its base: which of them change, which are new, which are copied.

Whatever can be refused without reading the weights is refused here, before anything is written.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from adapters_kit.anatomy import embeddings, output_embeddings
from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.artifacts.dtypes import STORED
from adapters_kit.artifacts.heap import Trimmer
from adapters_kit.errors import ShippingError
from adapters_kit.merging import deltas
from adapters_kit.merging.output import Layout, lay_out
from adapters_kit.merging.roundtrip import Rounding
from adapters_kit.merging.weightless import Origin, base_config, model_class, stored_form, stored_name, trace
from adapters_kit.merging.weights import BaseWeights

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """What one adapter does to its base.

    Attributes:
        attached: the adapter on a model without weights.
        weights: the base's parameters, as the merge starts from them.
        trained_on: how the base was quantized in training, None if it was not; `weights.rounding` differs from it
            where the merge goes into the original weights.
        written: parameters whose stored tensors change.
        added: parameters that get a new tensor -> its name.
        renamed: base tensor -> its name in the output, where that differs.
        dropped: base tensors that the trained model has no use for.
        untied: whether embedding and head stop sharing their weight.
        layout: of the output.
        notes: what a user should know.
    """

    adapter: Adapter
    attached: deltas.Attached
    weights: BaseWeights
    trained_on: Rounding | None
    written: frozenset[str]
    added: Mapping[str, str]
    renamed: Mapping[str, str]
    dropped: frozenset[str]
    untied: bool
    layout: Layout
    notes: tuple[str, ...] = ()

    @property
    def computed(self) -> set[str]:
        """Base tensors whose values change."""
        return {key for name in self.written for key in self.weights.origins[name].keys}

    def as_trained(self) -> "Update":
        """The same, read as the training saw it."""
        return replace(self, weights=replace(self.weights, rounding=self.trained_on))


def match(
    adapter: Adapter, checkpoint: Checkpoint, dtype: torch.dtype | None, rounding: Rounding | str | None, original: bool
) -> Update:
    """Match an adapter with the stored tensors of its base.

    Args:
        dtype: of the output's float tensors; None keeps each tensor's own, for a quantized base that of the training.
        rounding: how the base was quantized in training; a kind alone stands for what transformers does by default.
        original: merge into the original weights even if the training saw quantized ones.

    Raises:
        ShippingError: the adapter does not fit, or the base lacks parameters that the adapter does not bring along.
    """
    config = base_config(checkpoint.folder, adapter)
    if getattr(config, "quantization_config", None):
        raise ShippingError(
            f"{checkpoint.folder} holds quantized weights; an update cannot be added to them. Give the original "
            "16-bit or 32-bit model with base=."
        )
    kind = model_class(adapter, config)
    _check_class(adapter, kind, config, checkpoint)
    attached = deltas.attach(adapter, kind, config)
    bare = attached.bare
    notes: tuple[str, ...] = ()
    if isinstance(rounding, str):
        if rounding != "int8":
            notes = (
                f"Taken as {rounding} in blocks of 64 whose scales are quantized too (bnb_4bit_use_double_quant), as "
                "QLoRA has it. Without that the weights differ by the rounding of a scale: ak.record(folder, model) "
                "tells which it was.",
            )
        rounding = deltas.usual_rounding(rounding, bare, checkpoint)
    stored, unused = trace(bare, checkpoint.tensors)
    origins = dict(stored)
    for name, names in attached.tied.items():
        keeper = next((other for other in names if other in stored), None)
        if keeper is not None:
            origins.setdefault(name, stored[keeper])

    # 1. What the adapter gives: whole parameters, and the results of its units.
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in attached.replaced.items()}
    for unit in attached.units:
        shapes |= unit.shapes
    _check_complete(attached, origins, shapes, checkpoint)
    # 2. What has another size in the trained model than on the disk.
    resized = _resized(attached, stored, shapes, checkpoint)
    weights = BaseWeights(bare, checkpoint, origins, attached.replaced, None if original else rounding, resized)
    # 3. Tied parameters that still share a tensor, and those that part.
    split, shared = _split(adapter, attached, weights, stored, shapes)
    fresh = {name for name in shapes.keys() - shared if name not in origins}
    written = {name for name in (shapes.keys() | resized.keys()) - shared - split if name in origins}
    if weights.rounding is not None:  # the weights that the adapter leaves alone were rounded in training as well
        written |= {name for name in weights.rounded if name in origins}
    if rounding is not None and dtype is None:
        dtype = rounding.dtype
    added = {name: stored_name(bare, name) for name in sorted(fresh | split)}
    dropped, renamed = _other_head(attached, stored, unused)
    draft = Update(
        adapter, attached, weights, rounding, frozenset(written), added, renamed, dropped, bool(split), Layout({})
    )
    _check_formats(draft, checkpoint, dtype)
    sizes = {**resized, **shapes}
    layout = lay_out(
        checkpoint,
        dtype=dtype,
        computed=draft.computed,
        reshaped={origins[name].keys[0]: sizes[name] for name in written & sizes.keys() if not origins[name].converter},
        added={key: sizes.get(name) or tuple(bare.get_parameter(name).shape) for name, key in added.items()},
        renamed=renamed,
        dropped=dropped,
    )
    return replace(draft, layout=layout, notes=(*notes, *_told(bare, resized, shapes)))


def _check_class(adapter: Adapter, kind: type, config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse a base that is more than what was trained: a model with a vision part, of which that was the language."""
    made_of = getattr(kind, "config_class", None)
    if made_of is None or isinstance(config, made_of):
        return
    whole = ", ".join(config.architectures or [type(config).__name__])
    raise ShippingError(
        f"{adapter.folder} was trained on a {kind.__name__}, and {checkpoint.folder} holds a {whole}. If that is a "
        "part of it, save the part as it was trained, model.save_pretrained(PART), and merge with base=PART, "
        "force=True: the record names the tensors of the whole."
    )


def _told(bare: PreTrainedModel, resized: Shapes, shapes: Shapes) -> tuple[str, ...]:
    grown = sorted(resized.keys() - shapes.keys() - dict(bare.named_buffers()).keys())
    if not grown:
        return ()
    return (
        f"{', '.join(grown)} had {resized[grown[0]][0]} rows in training, and the adapter did not save the new ones: "
        "they "
        "hold the mean of the others, which is what transformers starts them with.",
    )


def _check_complete(
    attached: deltas.Attached, origins: Mapping[str, Origin], shapes: Shapes, checkpoint: Checkpoint
) -> None:
    parameters = attached.bare.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in parameters if parameter.is_meta}
    missing = names - origins.keys() - shapes.keys()
    missing |= {f"{unit.path}.{name}" for unit in attached.units for name in unit.wanted} - origins.keys()
    if missing:
        raise ShippingError(
            f"{len(missing)} parameters of {type(attached.bare).__name__} are neither in the base {checkpoint.folder} "
            "nor "
            f"in the adapter, such as {min(missing)!r}: they were random when the adapter was trained, and nobody "
            "saved "
            "them. Train again with them in modules_to_save, or give the right base with base=."
        )


def _words(bare: PreTrainedModel) -> int | None:
    """Size of the vocabulary in training."""
    return getattr(bare.config.get_text_config(), "vocab_size", None)


def _resized(attached: deltas.Attached, stored: Mapping[str, Origin], shapes: Shapes, checkpoint: Checkpoint) -> Shapes:
    """Vocabulary matrices that are stored with another number of rows, and buffers with an entry a word; every other
    difference of shape is refused."""
    bare, found = attached.bare, {}
    paths = [path for path in (*embeddings(bare), output_embeddings(bare)) if path]
    words = {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}
    beside = {name for name, buffer in bare.named_buffers() if buffer.dim()}  # BART's final_logits_bias: (1, words)
    inside = {f"{unit.path}.{name}": unit for unit in attached.units for name in unit.wanted}
    for name, origin in stored.items():
        if origin.converter is not None:
            continue
        given = name in shapes and name not in inside  # as a whole; what was tied to it keeps the base's values
        have = checkpoint.tensors[origin.keys[0]].shape
        want = tuple(bare.state_dict(keep_vars=True)[name].shape) if name not in shapes else shapes[name]
        if have == want or (given and name not in words):
            continue
        grown = name in words and have[1:] == want[1:]
        if not grown and not (name in beside and have[:-1] == want[:-1] and want[-1] == _words(bare)):
            raise ShippingError(
                f"{origin.keys[0]} has the shape {have} in {checkpoint.folder}, and {want} in the "
                f"{type(bare).__name__} of its config.json: they do not belong together."
            )
        for alias in attached.tied.get(name, (name,)):
            if not (given and alias in shapes):
                found[alias] = want
    return found


def _check_formats(update: Update, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Refuse to add an update to numbers of 8 bit: it would be rounded away."""
    coarse = [
        key
        for key in sorted(update.computed)
        if (kind := STORED[checkpoint.tensors[key].dtype]).itemsize == 1 or not kind.is_floating_point
    ]
    if coarse:
        raise ShippingError(
            f"{checkpoint.folder} stores {coarse[0]} as {checkpoint.tensors[coarse[0]].dtype}, in which an update is "
            "rounded away. Give the original 16-bit or 32-bit model with base=."
        )


def _other_head(
    attached: deltas.Attached, stored: Mapping[str, Origin], unused: Iterable[str]
) -> tuple[frozenset[str], dict[str, str]]:
    """(base tensors to leave out, base tensor -> new name) where the adapter was trained with another head than the
    base's: what is written then is what `save_pretrained` of the trained model would write."""
    bare = attached.bare
    own = type(bare).__name__
    if own in (attached.loaded.architectures or [own]):
        return frozenset(), {}
    full = {origin.keys[0]: name for name, origin in stored.items() if origin.converter is None}
    return frozenset(unused), {k: name for k, name in full.items() if name == f"{bare.base_model_prefix}.{k}"}


def _split(
    adapter: Adapter, attached: deltas.Attached, weights: BaseWeights, stored: Mapping[str, Origin], shapes: Shapes
) -> tuple[set[str], set[str]]:
    """Tied parameters: names that need a tensor of their own now, and names that still share another's.

    A parameter with several names (embedding and head) stays tied if all of them end up equal. Else each name gets its
    own tensor: adding the embedding's update to the head as well would be another model.
    """
    split: set[str] = set()
    shared: set[str] = set()
    for names in set(attached.tied.values()):
        changed = shapes.keys() & set(names)
        if not changed:
            continue
        keeper = next((name for name in names if name in stored), names[0])
        others = set(names) - {keeper}
        if changed == set(names) and _all_equal(adapter, attached, weights, names):
            shared |= others
        else:
            split |= others
    return split, shared


def _all_equal(adapter: Adapter, attached: deltas.Attached, weights: BaseWeights, names: tuple[str, ...]) -> bool:
    values = []
    merged_names: set[str] = set()
    for unit in attached.units:
        if set(unit.shapes) & set(names):
            merged = deltas.merge_unit(unit, adapter, weights)
            merged_names |= merged.keys()
            values += [value for name, value in merged.items() if name in names]
    values += [attached.replaced[name] for name in names if name in attached.replaced and name not in merged_names]
    return all(value.shape == values[0].shape and torch.equal(value, values[0]) for value in values)


def changed(update: Update) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the output, value) of every tensor that is not copied from the base; one unit after the other."""
    pending: dict[str, torch.Tensor] = {}
    attached, weights = update.attached, update.weights

    def ready(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in update.added:
                yield update.added[name], pending[name]
            origin = weights.origins.get(name)
            if name not in update.written or origin is None:
                continue
            needed = update.written & set(origin.parameters)
            if needed <= pending.keys():  # one stored tensor may hold several parameters (fused q, k and v)
                whole = {part: pending[part] if part in needed else weights(part) for part in origin.parameters}
                for key, value in stored_form(attached.bare, origin, whole).items():
                    yield update.renamed.get(key, key), value
                for part in needed:
                    del pending[part]

    in_units = {name for unit in attached.units for name in unit.shapes}
    whole = {name: tensor for name, tensor in attached.replaced.items() if name not in in_units}
    pending.update(whole)
    yield from ready(sorted(whole))
    trimmer = Trimmer()  # of every unit several copies were made and dropped, which else stay in the heap
    for unit in attached.units:
        merged = deltas.merge_unit(unit, update.adapter, weights)
        trimmer(4 * sum(value.numel() for value in merged.values()))
        pending.update(merged)
        yield from ready(list(merged))
        for name in merged.keys() - update.written:
            del pending[name]
    rest = (weights.rounded | weights.resized.keys()) - whole.keys() - in_units
    for name in sorted(update.written & rest):
        pending[name] = weights(name)
        yield from ready([name])
    for name in sorted(update.added.keys() - whole.keys() - in_units):
        yield update.added[name], weights(name)  # was tied to a weight that changed; keeps the old values
