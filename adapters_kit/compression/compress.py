"""compress(): an adapter at lower ranks, or without its lowest layers, with the score before and after beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters_kit.anatomy.structure import blocks
from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, Adapter, adapter_folder, read_adapter
from adapters_kit.artifacts.factors import strip
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.record_reader import RECORD
from adapters_kit.artifacts.side_files import copy_card, copy_processor
from adapters_kit.artifacts.source import base_of, portable_base
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError
from adapters_kit.inference.answers import scores_of
from adapters_kit.inference.subject import describe as recipe_of
from adapters_kit.merging.base_folder import as_checkpoint
from adapters_kit.merging.extract import ExtractReport, name_beside
from adapters_kit.merging.extract import compress as lower_ranks
from adapters_kit.merging.weightless import base_config, empty_model, model_class

Paths = str | os.PathLike[str]


@dataclass(frozen=True)
class CompressReport(ExtractReport):
    """What was written and what it scores; `print` it.

    Attributes:
        dropped: how many of the lowest layers are left without the adapter.
        bytes_before, bytes_after: of the adapter's weights.
        before, after: the scores, where a run or data were given.
    """

    dropped: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [super().__str__()] if self.ranks else []
        if self.dropped:
            lines.append(f"{self.path}: the {self.dropped} lowest layers have no adapter.")
        lines.append(f"{self.bytes_after / 2**20:,.3f} MB instead of {self.bytes_before / 2**20:,.3f} MB.")
        lines += [f"{name}: {value:.4g} -> {self.after[name]:.4g}" for name, value in self.before.items()]
        return "\n".join(lines)


def compress(
    folder: Paths,
    out: Paths | None = None,
    *,
    energy: float | None = 0.99,
    r: int | None = None,
    drop_layers: int = 0,
    base: Paths | None = None,
    data: Any = None,
    overwrite: bool = False,
) -> CompressReport:
    """A smaller adapter: a LoRA at the lowest rank that keeps what it learned, or one without its lowest layers.

    Args:
        folder: the adapter's folder, or a run, whose held-out rows are then scored before and after. What is no LoRA
            is converted on the way, which reads the base.
        out: the new folder; None takes the name of `folder` with `-small` behind it.
        energy: share of each update's squared norm to keep; None to go by `r` alone.
        r: the highest rank that a module may get; None takes the adapter's own.
        drop_layers: so many of the lowest layers of each stack are left without the adapter, as AdapterDrop does
            (Rücklé et al. 2021, arXiv 2010.11918): there the base runs as it is. Ranks stay as they are unless `r` is
            given. For LoRA, DoRA, bottlenecks and prefixes.
        base: the base model, for what has to be converted; None takes the one that the adapter names.
        data: rows to score before and after, as `evaluate` takes them; of an adapter that has no run.
        overwrite: replace what `out` holds, if it was written here.

    Returns:
        A report with ranks, errors, sizes and scores.

    Raises:
        ShippingError: an adapter that cannot be made smaller so; no layer would be left.
    """
    source = adapter_folder(folder)
    keys = {"model": os.fspath(base)} if base is not None else {}
    scored = data is not None or source != Path(folder)
    recipe = recipe_of(folder, **keys)[0] if scored else None
    target = Path(out) if out is not None else name_beside(source, "-small")
    options: dict[str, Any] = {"energy": energy, "r": r, "base": base, "overwrite": overwrite}
    if not drop_layers:
        made = lower_ranks(source, target, **options)
    elif r is None:
        _without_lowest(source, target, drop_layers, base, overwrite)
        made = ExtractReport(target, {}, {}, 0.0)
    else:
        with TemporaryDirectory(prefix="adapters_kit-") as work:
            _without_lowest(source, Path(work) / "adapter", drop_layers, base, False)
            options["base"] = base_of(read_adapter(source), base)
            made = lower_ranks(Path(work) / "adapter", target, **options)
    before = scores_of(recipe, source, data) if recipe is not None else {}
    after = scores_of(recipe, target, data) if recipe is not None else {}
    sizes = {"bytes_before": _size(source), "bytes_after": _size(target)}
    return CompressReport(
        target, made.ranks, made.errors, made.error, made.left, drop_layers, before=before, after=after, **sizes
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("adapter_model.*"))


def _without_lowest(folder: Path, target: Path, n: int, base: Paths | None, overwrite: bool) -> None:
    adapter = read_adapter(folder)
    source = base_of(adapter, base)
    low = _lowest(source, n)
    raw, weights = dict(adapter.raw), adapter.weights
    kept = {name: tensor for name, tensor in weights.items() if not _inside(strip(name), low)}
    if len(kept) == len(weights):
        raise ShippingError(f"{folder} has no adapter in the {n} lowest layers of its base: nothing to leave out.")
    raw |= _targets(adapter, low, kept)
    raw["base_model_name_or_path"] = portable_base(adapter.base, target)
    with staged(target, overwrite=overwrite, keep=[folder]) as stage:
        write_json(stage / CONFIG, raw, sort_keys=True)
        write_tensors(stage / WEIGHTS, kept)
        if adapter.record:
            write_json(stage / RECORD, adapter.record, indent=1)
        copy_processor(folder, stage)
        copy_card(folder, stage, changed=True)
        write_manifest(stage, {"adapter": describe(folder), "lowest_layers_without": n})


def _lowest(source: Path, n: int) -> tuple[str, ...]:
    """The paths of the lowest n layers of every stack of the base, each with a dot behind it."""
    with TemporaryDirectory(prefix="adapters_kit-") as work, as_checkpoint(source, Path(work) / "base") as place:
        config = base_config(place)
        paths = list(blocks(empty_model(model_class(None, config), config)))
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    least = min(map(len, stacks.values()), default=0)
    if type(n) is not int or not 0 < n < least:
        raise ShippingError(
            f"drop_layers={n!r}: the base has {least} layers, of which 1 to {least - 1} can go without."
        )
    return tuple(f".{path}." for own in stacks.values() for path in own[:n])


def _inside(name: str, low: tuple[str, ...]) -> bool:
    """Whether a parameter's or module's path lies in one of the layers, with a head's prefix before it or without."""
    padded = f".{name}."
    return any(layer in padded or padded.startswith(_bare(layer)) for layer in low)


def _bare(layer: str) -> str:
    """A layer's path without the backbone's name: an adapter on the model alone has none."""
    return "." + layer[1:].partition(".")[2]


def _targets(adapter: Adapter, low: tuple[str, ...], kept: dict[str, Any]) -> dict[str, Any]:
    """The options that say where the adapter is, without the layers that go."""
    raw, where = adapter.raw, {"layers_to_transform": None, "layers_pattern": None}
    kind = str(raw.get("peft_type"))
    if kind == "LORA" and not raw.get("target_parameters"):
        # Names such as q_proj stand for every layer: whole paths say which.
        paths = sorted({strip(name).partition(".lora_")[0] for name in kept if ".lora_" in name})
        if not paths:
            raise ShippingError(f"{adapter.folder} would have no adapter left.")
        return {**where, "target_modules": paths, "exclude_modules": None}
    table = {"BOTTLENECK": "sites", "PREFIX": "shapes"}.get(kind)
    if table is None or not raw.get(table):
        raise ShippingError(
            f"{adapter.folder} is {adapter.method}: drop_layers is for lora, dora, houlsby, pfeiffer and their kin, "
            "and prefix. Give its own targets without these layers when it is trained."
        )
    left = {path: site for path, site in raw[table].items() if not _inside(path, low)}
    if not left:
        raise ShippingError(f"{adapter.folder} would have no adapter left.")
    return {table: left, **({"target_modules": list(left)} if kind == "BOTTLENECK" else {})}
