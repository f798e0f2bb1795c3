"""combine(): several LoRA adapters of one base into one, exactly where that is possible.

A weighted sum of updates is again a low-rank update: stacking the factors gives it without loss, with the ranks added.
peft's own `combination_type="linear"` adds the factors A and B instead, whose product has cross terms; and it leaves
DoRA's magnitudes out. TIES and DARE trim the updates; peft's own arithmetic does that here, on the updates themselves
in float32, and the result is brought back to factors by the singular value decomposition, whose loss is reported.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError
from adapters_kit.merging.merge import write_manifest
from adapters_kit.merging.mixing import Mix
from adapters_kit.serving.export import KEY, ExportReport, canonicalise


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
    pairs = [_pairs(form[1]) for form in forms]
    target = rank or sum(form[0]["r"] for form in forms)
    generator = mix.generator()
    result: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for path in sorted({path for table in pairs for path in table}):
        found = [(table[path], factor) for table, factor in zip(pairs, factors, strict=True) if path in table]
        (name_a, _), (name_b, _) = found[0][0]
        stacked_a = torch.cat([a for ((_, a), _), _ in found])
        stacked_b = torch.cat([b * factor for (_, (_, b)), factor in found], dim=1)
        if method == "sum" and stacked_a.shape[0] <= target:
            a, b = stacked_a, stacked_b
        else:
            update = stacked_b.double() @ stacked_a.double()
            if method != "sum":
                updates = [(b @ a) for ((_, a), (_, b)), _ in found]
                update = mix(updates, [factor for _, factor in found], generator).double()
            a, b, errors[path] = _factor(update, target)
        missing = target - a.shape[0]
        result[name_a] = torch.cat([a, a.new_zeros(missing, a.shape[1])]).contiguous()
        result[name_b] = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1).contiguous()
    # Full paths: what one adapter means by "proj" may be more modules than another was trained on.
    config |= {"r": target, "lora_alpha": target, "target_modules": sorted({p for table in pairs for p in table})}
    config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    with staged(Path(out), overwrite=overwrite) as stage:
        (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(result, stage / WEIGHTS, {"format": "pt"})
        os.chmod(stage / WEIGHTS, (stage / CONFIG).stat().st_mode & 0o777)
        write_manifest(stage, {"adapters": [str(adapter.folder) for adapter in read], "base": str(read[0].base)})
    return ExportReport(Path(out), target, errors)


Pair = tuple[tuple[str, torch.Tensor], tuple[str, torch.Tensor]]


def _pairs(tensors: dict[str, torch.Tensor]) -> dict[str, Pair]:
    """path -> ((name, A), (name, B)); refuses what has no sum."""
    sides: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = KEY.match(name)
        if not match or "embedding_" in name:
            raise ShippingError(
                f"{name} is not a factor of a linear's update, so there is no sum for it. Merge one of the adapters "
                "into the base first."
            )
        sides.setdefault(match["path"], {})[match["side"]] = (name, tensor)
    return {path: (found["A"], found["B"]) for path, found in sides.items()}


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


def _factor(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best factors of that rank, and the share of the update that they miss."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[:rank].sqrt()
    lost = (s[rank:].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)).sqrt().item()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), lost
