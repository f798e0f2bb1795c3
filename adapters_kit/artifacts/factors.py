"""What is known about LoRA files: how tensors are named, which two belong together, what scales them, and which factors
of a low rank come closest to an update."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters_kit.artifacts.adapter import Adapter, check_sizes
from adapters_kit.errors import ShippingError

# What peft puts before every path of the base model.
PREFIX = "base_model.model."
KEY = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?$"
)
# Initialisations that moved a part of the base weights into the adapter: B A is not the whole update then.
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def strip(name: str) -> str:
    """An adapter tensor's name without peft's prefix: it starts with a path of the base model."""
    return name.removeprefix(PREFIX)


@dataclass(frozen=True)
class Pair:
    """The two factors of one update, `B A` times a scale.

    Attributes:
        path: the module's dotted name in the base model.
        name_a, name_b: the tensors' names in the adapter.
        a: (r, in), or (r, rows) for an embedding.
        b: (out, r), or (width, r) for an embedding.
        embedding: whether the update is of an embedding, as `(B A)ᵀ`.
    """

    path: str
    name_a: str
    name_b: str
    a: torch.Tensor
    b: torch.Tensor
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]


def pairs(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Pair], dict[str, torch.Tensor]]:
    """The pairs of factors by path, in the order of their paths, and the tensors that are in no pair.

    Raises:
        ShippingError: a factor without its other half, or factors whose ranks differ.
    """
    sides: dict[str, dict[str, tuple[str, torch.Tensor, bool]]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        match = KEY.match(name)
        if match is None:
            rest[name] = tensor
        else:
            sides.setdefault(match["path"], {})[match["side"]] = name, tensor, bool(match["embedding"])
    found: dict[str, Pair] = {}
    for path, both in sorted(sides.items()):
        if both.keys() != {"A", "B"}:
            raise ShippingError(f"There is only one of lora_A and lora_B for {path!r}: the adapter is incomplete.")
        (name_a, a, embedding), (name_b, b, _) = both["A"], both["B"]
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise ShippingError(
                f"{path}: lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)} share no rank."
            )
        found[path] = Pair(path, name_a, name_b, a, b, embedding)
    return found, rest


def check_ranks(adapter: Adapter) -> None:
    """Compare the ranks that the config claims with the tensors: a scale is divided by the one, and peft would first
    allocate what it is told.

    Raises:
        ShippingError: naming the module.
    """
    config = adapter.config
    experts = getattr(config, "target_parameters", None)  # their factors hold every expert's rank
    for path, pair in pairs(adapter.weights)[0].items() if adapter.method == "lora" and not experts else ():
        if pair.rank != (rank := rank_of(config, path)):
            raise ShippingError(
                f"{adapter.folder}: the config says rank {rank} for {path}, and its lora_A has {pair.rank} rows. "
                "The files are of two adapters, or damaged."
            )
    check_sizes(adapter.folder, adapter.raw, adapter.weights)


def rank_of(config: Any, path: str) -> int:
    """The rank that peft gives the module at `path`.

    Args:
        config: peft's `LoraConfig`.
    """
    from peft.utils.other import get_pattern_key

    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)


def scaling(config: Any, path: str) -> float:
    """What peft multiplies B A with, for the module at `path`.

    Args:
        config: peft's `LoraConfig`.
    """
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    return scale_of(alpha, rank_of(config, path), config.use_rslora)


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / √r where the scale is rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / rank**0.5 if use_rslora else alpha / rank


def lower_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of `B A` of a lower rank, from the factors alone.

    Args:
        a: (r, in).
        b: (out, r).

    Returns:
        A (rank, in) and B (out, rank) in float32, and the share of the update's Frobenius norm that is lost.
    """
    qb, rb = torch.linalg.qr(b.double())  # (out, r), (r, r)
    qa, ra = torch.linalg.qr(a.double().T)  # (in, r), (r, r)
    small_a, small_b, lost = best_factors(rb @ ra.T, rank)
    return (small_a @ qa.T).float(), (qb @ small_b).float(), lost


def best_factors(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors of that rank that come closest to an update (Eckart and Young 1936).

    Args:
        update: (out, in).

    Returns:
        A (rank, in) and B (out, rank) in float64, each with the root of the singular values, and the share of the
        update's Frobenius norm that they miss.
    """
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]), (u[:, :rank] * root), missed(s, rank)


def missed(singular: torch.Tensor, rank: int) -> float:
    """The share of the Frobenius norm in the singular values after the first `rank`."""
    squares = singular.double().square()
    return (squares[rank:].sum() / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt().item()


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same factors with zeros up to `rank`: their product stays."""
    more = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(more, *a.shape[1:])]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)


def canonicalise(
    adapter: Adapter, rank: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, float]]:
    """The canonical form of a LoRA adapter: every scale in B, alpha = r, one rank for all.

    Args:
        rank: of the result; None takes the largest that the adapter has.

    Returns:
        The new `adapter_config.json`, the tensors in float32, and by module the share of the update that bringing it
        to that rank lost.

    Raises:
        ShippingError: the adapter is broken, or has no canonical form; says what to do instead.
    """
    config, instead = adapter.config, f"Instead: {ship_instead(adapter)}"
    _check_foldable(adapter)
    check_ranks(adapter)
    found, rest = pairs(adapter.weights)
    if not found:
        raise ShippingError(f"{adapter.folder} has no LoRA factors at all.")
    target = rank or max(pair.rank for pair in found.values())
    weights = {name: tensor for name, tensor in rest.items() if ".lora_B.bias" not in name}
    errors: dict[str, float] = {}
    for path, pair in found.items():
        a, b = pair.a.float(), pair.b.float()
        if a.ndim != 2 or b.ndim != 2:
            raise ShippingError(f"{path} is a convolution, for which servers have no common form. {instead}")
        scale = scaling(config, path)
        bias = pair.name_b.removesuffix("weight") + "bias"
        if bias in rest:
            weights[bias] = rest[bias].float() * scale
        b = b * scale
        if pair.rank > target:
            a, b, errors[path] = lower_rank(a, b, target)
        weights[pair.name_a], weights[pair.name_b] = padded(a, b, target)
    raw = dict(adapter.raw)
    raw |= {"r": target, "lora_alpha": target, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    raw |= {"init_lora_weights": True, "lora_dropout": 0.0, "inference_mode": True}
    if isinstance(raw.get("target_modules"), str):  # a regular expression, which not every server reads
        raw["target_modules"] = sorted(found)
    return raw, weights, errors


def ship_instead(adapter: Adapter) -> str:
    """The command that ships an adapter that a server does not take: a merge, or our own server where none can be."""
    if adapter.method == "blocks":
        return f"adapters-kit merge {adapter.folder} merged.gguf"
    from adapters_kit.peft_plugin import tuner_class  # a plain merge does without peft

    beside = hasattr(tuner_class(adapter.config.peft_type), "refuse_merge")  # no update of a weight
    if beside or adapter.config.is_prompt_learning:
        return f"adapters-kit serve {adapter.folder}"
    return f"adapters-kit merge {adapter.folder} merged/"


def _check_foldable(adapter: Adapter) -> None:
    config, where, instead = adapter.config, adapter.folder, f"Instead: {ship_instead(adapter)}"
    if adapter.method != "lora":
        raise ShippingError(f"{where} is a {adapter.method} adapter; only LoRA has a canonical form. {instead}")
    if config.use_dora:
        raise ShippingError(f"{where} uses DoRA, whose magnitudes do not fold into B. {instead}")
    if getattr(config, "target_parameters", None):
        raise ShippingError(f"{where} adapts fused experts, for which servers have no common form. {instead}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(RESIDUAL):
        raise ShippingError(
            f"{where} was initialised with {config.init_lora_weights!r}, so it does not sit on the original base. "
            f"{instead}"
        )
