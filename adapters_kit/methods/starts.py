"""Where LoRA starts (`training.init`): from the weights, from what flows through them, or from a first gradient.

The starting factors are peft's own. What peft does with the base is not done: PiSSA, OLoRA, CorDA and LoRA-GA start
with B0 A0 other than 0, for which peft takes the product out of the weights, and rounds them anew. Here the adapter has
twice the rank, A = [A; A0] and B = [B, -B0], and its second half stands still. The base is not touched, whatever it is
held in; what is saved is a plain LoRA, which merges exactly and resumes as any other.

    wrapped = wrap(model, "lora", fuse=False, **doubled(kind, options))
    begin(wrapped, kind, batches, loss)
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_kit.artifacts.factors import best_factors
from adapters_kit.errors import AdapterError
from adapters_kit.kernels.base_layers import quantized, weight_and_bias

FROM_DATA = ("eva", "corda", "lora-ga")
"""Starts that look at rows."""
TAKEN_OUT = ("corda", "lora-ga", "pissa", "olora")
"""Starts other than 0, which are taken out again by a half of the adapter that stands still."""
_PASSES = 40  # over the rows, for EVA to settle

Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def doubled(kind: str | None, options: dict[str, Any], rank: int = 16) -> dict[str, Any]:
    """The options of a LoRA method that hold a start: twice the rank, at the same scale, where it is to be taken out.

    Args:
        kind: of the start; None leaves the options as they are.
        options: the user's.
        rank: where they name none.

    Raises:
        AdapterError: a start given twice.
    """
    if kind is None:
        return options
    if options.get("init_lora_weights", True) is not True:
        raise AdapterError(
            f"method.init_lora_weights: {options['init_lora_weights']!r} and training.init: {kind} are two starts: "
            "leave one out."
        )
    if kind not in TAKEN_OUT:
        return options
    rank = options.get("r", rank)
    # Split from the weights, factors have their full size: scale 1, as the papers have it.
    alpha = options.get("lora_alpha", 2 * rank if kind == "lora-ga" else rank)
    grown = math.sqrt(2) if options.get("use_rslora") else 2
    patterns = {
        name: {path: value * factor for path, value in options[name].items()}
        for name, factor in (("rank_pattern", 2), ("alpha_pattern", grown))
        if options.get(name)
    }
    return {**options, "r": 2 * rank, "lora_alpha": alpha * grown, **patterns}


@dataclass(frozen=True)
class _Layer:
    """One adapted linear.

    Attributes:
        path: its name in the wrapped model.
        module: peft's layer.
        rank: of the start.
    """

    path: str
    module: Any
    rank: int

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def scale(self) -> float:
        return float(self.module.scaling[self.module.active_adapters[0]])

    def weight(self) -> torch.Tensor:
        """What it multiplies by, (out, in) float32, a copy."""
        packed = quantized(self.base)
        weight = packed.dense(torch.float32) if packed is not None else weight_and_bias(self.base)[0]
        assert weight is not None
        return weight.detach().to(torch.float32, copy=True)


def begin(
    model: nn.Module,
    kind: str,
    batches: Sequence[Batch] = (),
    loss: Loss | None = None,
    plain: nn.Module | None = None,
) -> str:
    """Puts a start into the fresh LoRA of a wrapped model. The function that the model computes stays, but for LoftQ.

    Args:
        model: wrapped with the options of `doubled`, not fused.
        kind: of the start.
        batches: rows to look at, for those of `FROM_DATA`.
        loss: of a batch.
        plain: the base in full precision, for LoftQ.

    Returns:
        What was done, as a sentence.

    Raises:
        AdapterError: a model or a rank that the start does not suit.
    """
    layers = list(_layers(model, kind))
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    if kind == "eva":
        found = _eva(model, layers, batches, loss)
    elif kind == "loftq":
        assert plain is not None
        found = _loftq(layers, plain)
    else:
        given: dict[str, Any] = _corda(model, layers, batches, loss) if kind == "corda" else {}
        given = _gradients(model, layers, batches, loss) if kind == "lora-ga" else given
        found = {one.path: _split(one, kind, given.get(one.path)) for one in layers}
    for one in layers:
        _fill(one, *found[one.path], taken_out=kind in TAKEN_OUT)
    rows = f" from {sum(len(next(iter(batch.values()))) for batch in batches):,} training rows" if batches else ""
    text = f"{len(layers):,} LoRA layers start by {kind}{rows}"
    if kind in TAKEN_OUT:
        text += (
            f". The adapter has rank {2 * layers[0].rank}: the start and its negative, which stands still and leaves "
            "the base as it is"
        )
    return f"{text}."


def standing_still(model: nn.Module) -> int:
    """Numbers among the trained parameters that a start holds in place."""
    return sum(getattr(parameter, "held", 0) for parameter in model.parameters())


def _layers(model: nn.Module, kind: str) -> Iterator[_Layer]:
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base, name = module.get_base_layer(), module.active_adapters[0]
        if name not in module.lora_A or not isinstance(base, nn.Linear | Conv1D):
            raise AdapterError(
                f"training.init: {kind} starts linear layers, and {path.removeprefix('base_model.model.')} is a "
                f"{type(base).__name__}. Name the linears: method.target_modules."
            )
        rank = module.r[name] // (2 if kind in TAKEN_OUT else 1)
        smallest = min(module.in_features, module.out_features) // (2 if kind == "lora-ga" else 1)
        if rank > smallest:
            raise AdapterError(
                f"training.init: {kind} has no {rank} directions in {path.removeprefix('base_model.model.')} "
                f"({module.in_features} x {module.out_features}): set method.r to {smallest} at most."
            )
        if kind in ("corda", "lora-ga") and quantized(base) is not None:
            raise AdapterError(
                f"training.init: {kind} needs weights in 16 bits or more, and this base is quantized. Leave quantize "
                "out, or take eva, pissa, olora or loftq."
            )
        yield _Layer(path, module, rank)


def _split(one: _Layer, kind: str, given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A0 and B0 as peft finds them, on a layer of its own that is thrown away."""
    weight = one.weight()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    more: dict[str, Any] = {}
    if kind == "corda":
        layer.eigens = given
        more = {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="ipm")}
    elif kind == "lora-ga":
        layer._peft_loraga_grad = given
        more = {"lora_ga_config": peft.LoraGAConfig()}
    holder = nn.Module()
    holder.layer = layer
    config = peft.LoraConfig(
        r=one.rank,
        lora_alpha=one.scale * one.rank,
        target_modules=["layer"],
        init_lora_weights=kind.replace("-", "_"),
        **more,
    )
    peft.inject_adapter_in_model(config, holder)
    made = holder.get_submodule("layer")
    return made.lora_A["default"].weight.detach(), made.lora_B["default"].weight.detach()


def _corda(model: nn.Module, layers: Sequence[_Layer], batches: Sequence[Batch], loss: Loss | None) -> dict[str, Any]:
    """What each layer's weights do to what comes in, as peft decomposes it."""
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

    sums = {one.path: torch.zeros((), device=one.base.weight.device) for one in layers}

    def add(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
            rows = inputs[0].detach().float().flatten(0, -2)
            rows = rows / rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            sums[path] = sums[path] + rows.T @ rows / sum(len(next(iter(batch.values()))) for batch in batches)

        return hook

    with _hooked(layers, add):
        _run(model, batches, loss)
    found = {}
    for one in layers:
        weight = one.weight()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.covariance_matrix = _reached(one, sums.pop(one.path))
        whole = collect_eigens_for_layer(layer, None)
        u, v = (part[:, : one.rank].clone().to(weight.device) for part in (whole.U_WC, whole.V_WC))
        found[one.path] = CordaEigens(S_WC=whole.S_WC[: one.rank].clone(), U_WC=u, V_WC=v)
    return found


def _gradients(
    model: nn.Module, layers: Sequence[_Layer], batches: Sequence[Batch], loss: Loss | None
) -> dict[str, torch.Tensor]:
    """The loss's gradient in each weight, (out, in), as peft estimates it."""
    assert loss is not None
    names = [f"{one.path}.base_layer" for one in layers]
    config = peft.LoraConfig(target_modules=names, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step() -> None:
        for batch in batches:
            loss(model, batch).backward()

    with warnings.catch_warnings():  # of hooks on the first layer, whose input needs no gradient
        warnings.simplefilter("ignore", UserWarning)
        peft.tuners.lora.loraga.preprocess_loraga(model, config, step)
    found = {}
    for one in layers:
        gradient = one.base.__dict__.pop("_peft_loraga_grad", None)
        gradient = gradient.T if gradient is not None and isinstance(one.base, Conv1D) else gradient
        found[one.path] = _reached(one, gradient)
    return found


def _reached(one: _Layer, value: torch.Tensor | None) -> torch.Tensor:
    """What was measured at a layer.

    Raises:
        AdapterError: the rows never came through it.
    """
    if value is None or not value.ndim or not bool(value.isfinite().all()) or not bool(value.any()):
        raise AdapterError(
            f"training.init: no training row told anything of {one.path.removeprefix('base_model.model.')}, so that it "
            "cannot start from them. Leave it out of method.target_modules, or take pissa."
        )
    return value


def _eva(
    model: nn.Module, layers: Sequence[_Layer], batches: Sequence[Batch], loss: Loss | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """A: the directions in which what comes in varies most; every layer has the same rank. B is 0."""
    few = f"training.init: eva found no settled directions in {_PASSES} passes over the training rows"

    class Passes:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[Batch]:
            for _ in range(_PASSES):
                yield from batches
            raise AdapterError(f"{few}: give more or longer rows, a larger training.batch_size, or a lower method.r.")

    def rows(layer_input: Any, model_input: Any, name: str) -> torch.Tensor:
        value = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        flat, mask = value.flatten(0, -2), model_input.get("attention_mask")
        alike = mask is not None and mask.ndim == 2 and mask.shape == value.shape[:-1]
        return flat[mask.flatten().bool()] if alike else flat

    config = peft.LoraConfig(
        r=layers[0].rank,
        rank_pattern={one.path.removeprefix("base_model.model."): one.rank for one in layers},
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # "skipping SVD", of a batch of fewer tokens than the rank
        try:
            found = peft.tuners.lora.eva.get_eva_state_dict(
                model,
                Passes(),
                config,
                forward_fn=loss,
                prepare_model_inputs_fn=lambda batch, _: batch,
                prepare_layer_inputs_fn=rows,
                show_progress_bar=False,
            )
        except (ValueError, IndexError, torch.linalg.LinAlgError) as error:
            raise AdapterError(f"training.init: eva cannot start from these rows: {error}") from error
    return {one.path: (_reached(one, found.get(one.path)), None) for one in layers}


def _loftq(layers: Sequence[_Layer], plain: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The factors that come closest to what quantizing has taken from each weight."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for one in layers:
        module: Any = plain.get_submodule(one.path.removeprefix("base_model.model."))
        whole = module.weight.detach().float().to(one.base.weight.device)
        lost = (whole.T if isinstance(module, Conv1D) else whole) - one.weight()
        a, b, _ = best_factors(lost / one.scale, one.rank)
        found[one.path] = a, b
    return found


def _fill(one: _Layer, a: torch.Tensor, b: torch.Tensor | None, *, taken_out: bool) -> None:
    name, rank = one.module.active_adapters[0], one.rank
    weights = one.module.lora_A[name].weight, one.module.lora_B[name].weight
    with torch.no_grad():
        weights[0].copy_(torch.cat([a, a]) if taken_out else a)
        if b is not None:
            weights[1].copy_(torch.cat([b, -b], dim=1) if taken_out else b)
    if taken_out:
        weights[0].register_hook(lambda gradient: _upper(gradient, rank))
        weights[1].register_hook(lambda gradient: _upper(gradient.T, rank).T)
        for weight in weights:
            weight.held = weight.numel() // 2


def _upper(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """A gradient whose rows behind `rank` are 0."""
    return torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])


@contextlib.contextmanager
def _hooked(layers: Sequence[_Layer], make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [one.module.register_forward_hook(make(one.path)) for one in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> None:
    """The forward passes alone, without dropout."""
    assert loss is not None
    was = model.training
    model.eval()
    for batch in batches:
        loss(model, batch)
    model.train(was)
