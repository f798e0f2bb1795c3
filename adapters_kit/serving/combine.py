"""combine(): several LoRA adapters of one base into one, exactly where that is possible.

A weighted sum of updates is again a low-rank update: stacking the factors gives it without loss, with the ranks added.
peft's own `combination_type="linear"` adds the factors A and B instead, whose product has cross terms; and it leaves
DoRA's magnitudes out. TIES and DARE trim the updates; peft's own arithmetic does that here, on the updates themselves
in float32, and the result is brought back to factors by the singular value decomposition, whose loss is reported.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from adapters_kit.artifacts.factors import Pair, best_factors, canonicalise, lower_rank, padded, pairs
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.record_reader import RECORD
from adapters_kit.artifacts.source import portable_base
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError
from adapters_kit.merging.mixture import Mix
from adapters_kit.serving.export import ExportReport


def combine(
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ExportReport:
    """Write one LoRA adapter that stands for several; merge or serve it like any other.

    Args:
        adapters: adapter folders, all LoRA and all on the same base.
        out: the folder to write.
        weights: a factor for each adapter; None takes 1 for each.
        method: "sum", the exact weighted sum, whose rank is the sum of the ranks; "ties" (Yadav et al. 2023,
            arXiv:2306.01708) keeps each update's largest values and settles signs by vote; "dare" (Yu et al. 2023,
            arXiv:2311.03099) drops values at random and scales up the rest.
        density: share of values that "ties" and "dare" keep, above 0 and up to 1.
        rank: of the result; None keeps "sum" exact and gives the others the sum of the ranks.
        seed: of DARE's choice.
        overwrite: replace what `out` holds.

    Returns:
        A report: the rank, and by module what bringing the update to that rank lost.

    Raises:
        UnknownNameError: no such method.
        ShippingError: fewer than two adapters, different bases or shapes, or one that is not plain LoRA.
    """
    mix = Mix(method, density, seed)
    read = [read_adapter(folder) for folder in adapters]
    factors = [1.0] * len(read) if weights is None else [float(weight) for weight in weights]
    _check(read, factors)
    forms = [canonicalise(adapter) for adapter in read]
    config = dict(forms[0][0])
    tables = [_linears(form[1]) for form in forms]
    target = rank or sum(form[0]["r"] for form in forms)
    generator = mix.generator()
    result: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    paths = sorted({path for table in tables for path in table})
    for path in paths:
        found = [(table[path], factor) for table, factor in zip(tables, factors, strict=True) if path in table]
        a, b, lost = _joined(found, mix, target, generator)
        if lost is not None:
            errors[path] = lost
        first = found[0][0]
        result[first.name_a], result[first.name_b] = padded(a, b, target)
    # Full paths: what one adapter means by "proj" may be more modules than another was trained on.
    config |= {"r": target, "lora_alpha": target, "target_modules": paths}
    config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    config["base_model_name_or_path"] = portable_base(read[0].base, Path(out))
    with staged(Path(out), overwrite=overwrite, keep=[one.folder for one in read]) as stage:
        if read[0].record:
            write_json(stage / RECORD, read[0].record, indent=1)
        write_json(stage / CONFIG, config, sort_keys=True)
        write_tensors(stage / WEIGHTS, result)
        names = [describe(adapter.folder) for adapter in read]
        write_manifest(stage, {"adapters": names, "base": describe(read[0].base or "")})
    return ExportReport(Path(out), target, errors)


def _joined(
    found: list[tuple[Pair, float]], mix: Mix, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """A (≤ rank, in) and B (out, ≤ rank) of one module, and what of the update they lose; None where nothing is."""
    stacked_a = torch.cat([pair.a for pair, _ in found])  # (Σ r, in)
    stacked_b = torch.cat([pair.b * factor for pair, factor in found], dim=1)  # (out, Σ r)
    if mix.method != "sum":
        update = mix([pair.b @ pair.a for pair, _ in found], [factor for _, factor in found], generator)
        a, b, lost = best_factors(update, rank)
        return a.float(), b.float(), lost
    if stacked_a.shape[0] <= rank:
        return stacked_a, stacked_b, None
    return lower_rank(stacked_a, stacked_b, rank)


def _linears(tensors: dict[str, torch.Tensor]) -> dict[str, Pair]:
    """The pairs of factors by path; refuses what has no sum."""
    found, rest = pairs(tensors)
    odd = [*rest, *(pair.name_a for pair in found.values() if pair.embedding)]
    if odd:
        raise ShippingError(
            f"{odd[0]} is not a factor of a linear's update, so there is no sum for it. Merge one of the adapters "
            "into the base first."
        )
    return found


def _check(adapters: list[Adapter], factors: list[float]) -> None:
    if len(adapters) < 2:
        raise ShippingError("Combining takes two adapters or more.")
    if len(factors) != len(adapters):
        raise ShippingError(f"{len(factors)} weights for {len(adapters)} adapters: give one for each.")
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = first.record.get("tensors"), other.record.get("tensors")
        same = mine == theirs if mine and theirs else first.base == other.base
        if not same:
            raise ShippingError(
                f"{first.folder} was trained on {first.base}, {other.folder} on {other.base}: the updates of two bases "
                "do not add up."
            )
