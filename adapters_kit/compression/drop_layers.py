"""drop_layers(): a base without some of its layers, as a folder of its own (Gromov et al. 2024, arXiv 2403.17887).

Layers in a row whose last output points where their first input did (angular distance) change the stream least. They
are left out; an adapter trained on what is left heals it. Weights go from file to file. What was written is run beside
the base with the same layers skipped, and appears only if it says the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from adapters_kit.anatomy.probe import probe_inputs
from adapters_kit.anatomy.structure import base_model, blocks
from adapters_kit.artifacts.adapter import CONFIG, adapter_folder
from adapters_kit.artifacts.base_config import read_base_config
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.side_files import write_side_files
from adapters_kit.artifacts.source import locate
from adapters_kit.artifacts.staging import staged
from adapters_kit.compression.shorter import fits, renamed, shorter_config
from adapters_kit.errors import ModelError, ShippingError
from adapters_kit.inference.subject import describe as recipe_of
from adapters_kit.inference.subject import load_subject, make_task
from adapters_kit.merging.base_folder import as_checkpoint
from adapters_kit.merging.extract import name_beside
from adapters_kit.merging.output import lay_out
from adapters_kit.merging.weightless import base_config, empty_model, model_class
from adapters_kit.merging.writer import write
from adapters_kit.tasks.base import Features, Task
from adapters_kit.training.resolve import rows_of

Paths = str | os.PathLike[str]
BATCH = 8


@dataclass(frozen=True)
class DropReport:
    """What was left out; `print` it.

    Attributes:
        path: the new base's folder.
        dropped: numbers of the layers that are not in it, from 0.
        layers: how many it has.
        bytes_before, bytes_after: of the weights.
        distances: number of the first layer of every row of that length -> the angular distance between its input and
            its last output, 0 (same direction) to 1 (opposite); empty where nothing was measured.
        difference: largest difference of an output from that of the base with these layers skipped.
        notes: what a user should know.
    """

    path: Path
    dropped: tuple[int, ...]
    layers: int
    bytes_before: int
    bytes_after: int
    distances: dict[int, float] = field(default_factory=dict)
    difference: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.dropped))
        moved = (
            f", which turn the stream by {self.distances[self.dropped[0]]:.3f} of half a turn" if self.distances else ""
        )
        lines = [
            f"{self.layers} layers in {self.path}, without {numbers} (counted from 0){moved}.",
            f"{self.bytes_after / 2**20:,.1f} MB instead of {self.bytes_before / 2**20:,.1f} MB.",
            f"Verified: as the base with these layers skipped, to {self.difference:.1e} of the largest output.",
            "Heal it: train an adapter on it, as on any base.",
        ]
        return "\n".join([*lines, *self.notes])


def drop_layers(
    model: Paths,
    n: int | None = None,
    out: Paths | None = None,
    *,
    data: Any = None,
    layers: Sequence[int] | None = None,
    max_rows: int = 256,
    overwrite: bool = False,
    **recipe_keys: Any,
) -> DropReport:
    """A base without `n` of its layers: those in a row that change what flows through them least, by `data`.

    Args:
        model: folder, .gguf file or hub id of a base. An adapter does not go along: merge it first.
        n: how many layers; left out where `layers` says which.
        out: the new folder; None takes the base's name with `-short` behind it.
        data: what `predict` takes, such as a file or a list of texts: neutral rows of the kind that the model is for.
            None takes the n layers before the last one, the paper's choice without data.
        layers: numbers of the layers to leave out, from 0, instead of a choice.
        max_rows: so many rows of `data` are looked at.
        overwrite: replace what `out` holds, if it was written here.
        **recipe_keys: as for `predict`; `task=` for a base that does not tell what it is for.

    Raises:
        ShippingError: nothing left, layers that are none, a base whose layers depend on their place or on each other.
        ModelError: an encoder-decoder or another model with several stacks.

    Example:
        >>> ak.drop_layers("HuggingFaceTB/SmolLM2-135M", 6, "short", data="texts.txt")  # doctest: +SKIP
    """
    if (adapter_folder(model) / CONFIG).is_file():
        raise ShippingError(f"{os.fspath(model)} is an adapter: merge it, and drop layers of what comes out.")
    if (n is None) == (layers is None):
        raise ShippingError("Say how many layers to leave out, n=…, or which, layers=[…].")
    if layers is not None and data is not None:
        raise ShippingError("data= chooses layers, and layers= says them: leave one of them out.")
    source = locate(model)
    target = Path(out) if out is not None else name_beside(source, "-short")
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="adapters_kit-")))
        place = stack.enter_context(as_checkpoint(source, work / "base"))
        raw, config = read_base_config(place), base_config(place)
        bare = empty_model(model_class(None, config), config)
        holder, whole = one_stack(bare, str(source))
        _check(n, layers, whole)
        distances = _distances(model, int(n or 0), data, max_rows, recipe_keys) if data is not None else {}
        gone = _chosen(n, layers, whole, distances)
        kept = [number for number in range(whole) if number not in gone]
        made = shorter_config(raw, bare, holder, kept)
        fits(bare, made, holder, kept, str(source))
        checkpoint = stack.enter_context(open_checkpoint(place))
        names, dropped = renamed(bare, checkpoint, holder, kept)
        layout = lay_out(checkpoint, dtype=None, computed=set(), renamed=names, dropped=dropped)
        expected = _outputs(place, holder, gone)
        with staged(target, overwrite=overwrite, keep=[source]) as stage:
            hashes = write(layout, checkpoint, [], stage)
            checkpoint.check_unchanged()
            notes = write_side_files(place, place, made, stage)
            difference = _compare(expected, _outputs(stage, holder, ()), str(source))
            about = {"base": describe(model), "dropped_layers": sorted(gone), "verified": difference}
            write_manifest(stage, about, hashes)
        after = sum(tensor.nbytes for tensors in layout.files.values() for tensor in tensors)
    return DropReport(
        target, tuple(sorted(gone)), len(kept), checkpoint.nbytes, after, distances, difference, tuple(notes)
    )


def one_stack(model: nn.Module, name: str) -> tuple[str, int]:
    """The path of the list of layers, and how many it holds.

    Raises:
        ModelError: none, or several.
    """
    paths = list(blocks(model))
    stacks = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    if len(stacks) != 1:
        found = f"{len(stacks)} of them ({', '.join(stacks[:4])})" if stacks else "none"
        raise ModelError(f"Layers are left out of a model with one stack of them; {name} has {found}.")
    holder = base_model(model).get_submodule(stacks[0])
    if not isinstance(holder, nn.ModuleList) or [path.rpartition(".")[2] for path in paths] != list(holder._modules):
        raise ModelError(f"The layers of {name} are no plain list ({stacks[0]}): none can be left out.")
    return stacks[0], len(paths)


def _check(n: int | None, layers: Sequence[int] | None, whole: int) -> None:
    if n is not None and (type(n) is not int or not 0 < n < whole):
        raise ShippingError(f"n={n!r}: of {whole} layers 1 to {whole - 1} can be left out.")
    odd = [number for number in layers or () if type(number) is not int or not 0 <= number < whole]
    if odd or (layers is not None and not 0 < len(set(layers)) < whole):
        what = (
            f"{odd[0]!r} is none of them" if odd else f"{sorted(set(layers or ()))} leaves nothing out, or nothing over"
        )
        raise ShippingError(f"layers: {whole} layers have the numbers 0 to {whole - 1}; {what}.")


def _chosen(n: int | None, layers: Sequence[int] | None, whole: int, distances: dict[int, float]) -> set[int]:
    if layers is not None:
        return set(layers)
    count = int(n or 0)
    first = min(distances, key=distances.__getitem__) if distances else max(whole - 1 - count, 0)
    return set(range(first, first + count))


def _distances(model: Paths, n: int, data: Any, most: int, keys: dict[str, Any]) -> dict[int, float]:
    """The mean angular distance over rows and tokens, for every place where n layers in a row may begin."""
    recipe, _ = recipe_of(model, **keys)
    if isinstance(data, list) and data and all(isinstance(row, str) for row in data):
        data = [{"text": text} for text in data]
    rows = rows_of(data)
    rows = rows.select(range(min(len(rows), most)))
    task = make_task(recipe, rows, answers=False)
    subject = load_subject(recipe, task, None, trained=False)
    # A task's head stands around a bare backbone, whose layers have a longer path there.
    layers = base_model(subject.model).get_submodule(one_stack(subject.model, os.fspath(model))[0])
    found: list[list[float]] = [[] for _ in range(len(layers) - n + 1)]

    def step(run: nn.Module, batch: dict[str, torch.Tensor]) -> list[None]:
        mask = batch.get("attention_mask")
        with _streams(layers) as streams:
            run(**{key: value for key, value in batch.items() if key != "labels"})
        for first, sums in enumerate(found):
            sums += _angles(streams[first], streams[first + n], mask)
        return [None] * len(next(iter(batch.values())))

    features = _features(task, rows)
    task.run(subject.model, features, BATCH, step)
    return {first: float(torch.tensor(sums).mean()) for first, sums in enumerate(found)}


def _features(task: Task, rows: Any) -> Features:
    return task.encode(rows, answers=False)


@contextmanager
def _streams(layers: Any) -> Iterator[list[torch.Tensor]]:
    """What each layer is given, and what the last one gives, in the order of the layers."""
    seen: dict[int, torch.Tensor] = {}

    def before(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen[number] = stream_of(args, kwargs)

        return hook

    def after(_: nn.Module, args: Any, out: Any) -> None:
        seen[len(layers)] = out if isinstance(out, torch.Tensor) else out[0]

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(after))
    found: list[torch.Tensor] = []
    try:
        yield found
        found += [seen[number] for number in range(len(layers) + 1)]
    finally:
        for handle in handles:
            handle.remove()


def stream_of(args: Any, kwargs: Any) -> torch.Tensor:
    """The tensor that a layer is called with first."""
    given = [*args, *([kwargs["hidden_states"]] if "hidden_states" in kwargs else [])]
    return next(value for value in given if isinstance(value, torch.Tensor))


def _angles(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> list[float]:
    """Angular distances of each token's vectors, as shares of half a turn."""
    if one.shape != other.shape:
        raise ModelError(f"A layer changes the shape of the stream, {tuple(one.shape)} to {tuple(other.shape)}.")
    cosine = nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).clamp(-1, 1)
    angles = cosine.arccos() / torch.pi
    if mask is not None and mask.shape == angles.shape:
        angles = angles[mask.bool()]
    return angles.flatten().tolist()


def _outputs(folder: Path, holder: str, skipped: Sequence[int] | set[int]) -> list[torch.Tensor]:
    """What the model of a folder says to a few inputs, in its own dtype; skipped layers hand on what they are given."""
    kind: Any = model_class(None, base_config(folder))
    model: Any = kind.from_pretrained(folder, dtype="auto").eval()
    layers = model.get_submodule(holder)

    def skip(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        given = stream_of(args, kwargs)
        return given if isinstance(out, torch.Tensor) else (given, *out[1:])

    for number in skipped:
        layers[number].register_forward_hook(skip, with_kwargs=True)
    found = []
    with torch.no_grad():
        for tokens in (5, 12):
            out = model(**probe_inputs(model, tokens))
            found.append(next(value for value in out.to_tuple() if isinstance(value, torch.Tensor)).float())
    return found


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor], name: str) -> float:
    worst = max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1e-9))
        for one, other in zip(expected, found, strict=True)
    )
    if not worst < 1e-3:
        raise ShippingError(
            f"Without these layers {name} is not what it is with them skipped (outputs differ by {worst:.1e} of the "
            "largest): its layers depend on their number or on each other. Nothing was written."
        )
    return worst
