"""The order of a merge from what a caller asked for, checked before anything of a model is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters_kit.artifacts.adapter import Adapter, open_adapter
from adapters_kit.artifacts.dtypes import as_dtype
from adapters_kit.errors import ShippingError
from adapters_kit.merging.job import Order
from adapters_kit.quantization_table import QUANTIZATIONS

Paths = str | os.PathLike[str]


def order_of(
    adapter: Paths | Sequence[Paths],
    weights: Sequence[float] | None,
    method: str,
    density: float,
    seed: int,
    base: Paths | None,
    quantized: str | None,
    dtype: str | torch.dtype | None,
    quantize: str | None,
    verify: str,
) -> Order:
    """The arguments of `merge`, which has the same names for them.

    Raises:
        ShippingError: they contradict each other, or what an adapter's record says.
    """
    if verify not in {"sample", "full", "off"}:
        raise ShippingError(f"verify={verify!r}: choose 'sample', 'full' or 'off'.")
    for name, kind in (("quantize", quantize), ("quantized", quantized)):
        if kind is not None and kind not in QUANTIZATIONS:
            raise ShippingError(f"{name}={kind!r}: choose {', '.join(map(repr, QUANTIZATIONS))} or None.")
    if quantized is not None and base == "original":
        raise ShippingError("quantized= says which rounding to repeat, and base='original' to repeat none: give one.")
    target = None if dtype is None else as_dtype(dtype)
    if isinstance(adapter, str | os.PathLike):
        if weights is not None or method != "sum":
            given = "weights" if weights is not None else f"method={method!r}"
            raise ShippingError(f"{given} is for several adapters: merge([first, second], out, weights=[0.5, 0.5]).")
        read = open_adapter(Path(adapter))
        return Order((read,), (1.0,), None, target, *_rounding(read, base == "original", quantized))
    from adapters_kit.merging.mixture import Mix

    adapters = tuple(open_adapter(Path(one)) for one in adapter)
    factors = (1.0,) * len(adapters) if weights is None else tuple(float(weight) for weight in weights)
    if not adapters or len(factors) != len(adapters):
        raise ShippingError(f"{len(factors)} weights for {len(adapters)} adapters: give one for each.")
    if quantize is not None or quantized is not None or base == "original":
        raise ShippingError(
            "Several adapters merge into the base as it is stored: leave out quantize=, quantized= and 'original'."
        )
    on_rounded = next((one for one in adapters if one.record.get("quantize")), None)
    if on_rounded is not None:
        raise ShippingError(
            f"{on_rounded.folder} was trained on a quantized base, so there is no sum with others. Merge it alone."
        )
    return Order(adapters, factors, Mix(method, density, seed), target)


def check_one_for_gguf(order: Order, out: Path, given: list[str]) -> None:
    """Refuses several adapters, and any of the options `given` that mean nothing for a .gguf file."""
    if len(order.adapters) > 1:
        raise ShippingError(
            f"{out.name}: a .gguf file takes in one adapter, and these are {len(order.adapters)}. Combine them first: "
            f"combine([{', '.join(repr(str(one.folder)) for one in order.adapters)}], 'combined')."
        )
    if given:
        raise ShippingError(f"{given[0]}=: {out.name} keeps the kinds of its base's tensors. Leave it out.")


def _rounding(adapter: Adapter, original: bool, quantized: str | None) -> tuple[Any, bool]:
    """(how the base was quantized in training, whether to merge into the original weights all the same)."""
    settings = adapter.record.get("quantize")
    if not settings:
        known = "quantize" in adapter.record
        if known and quantized is not None:
            raise ShippingError(
                f"quantized={quantized!r}: the record of {adapter.folder} says that its base was not quantized."
            )
        return quantized, False
    if quantized is not None and quantized != settings["type"]:
        raise ShippingError(
            f"quantized={quantized!r}: the record of {adapter.folder} says {settings['type']!r}. Leave it out."
        )
    from adapters_kit.merging.roundtrip import Rounding

    return Rounding.of(adapter.record), original
