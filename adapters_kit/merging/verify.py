"""Merged against base + adapter: both run on the same inputs, block by block, weights read when they are needed.

The yardstick is measured, not guessed: the merged model is run once more with every changed weight moved by up to half
a unit in its last place. What that does to the outputs is the rounding floor; a right merge differs by about as much.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from adapters_kit.anatomy import blocks, expert_parameters, probe_inputs, routers
from adapters_kit.anatomy.rescaling import keep_weights
from adapters_kit.artifacts.checkpoint import Checkpoint, open_checkpoint
from adapters_kit.artifacts.dtypes import STORED
from adapters_kit.artifacts.heap import Trimmer
from adapters_kit.errors import ShippingError, gist
from adapters_kit.merging.deltas import Unit, empty_unit, fill_unit, tied_names
from adapters_kit.merging.output import Layout
from adapters_kit.merging.update import Update
from adapters_kit.merging.weightless import (
    Origin,
    base_config,
    empty_model,
    fill,
    hollow,
    is_hollow,
    read_parameter,
    trace,
)
from adapters_kit.merging.writer import Values

ROWS, TOKENS = 2, 16
_TRIM = 1 << 26  # bytes of dropped weights after which memory goes back to the system
# The largest of thousands of differences varies from draw to draw; a wrong merge is off by orders of magnitude.
MARGIN = 8.0
# A class for each of a few rows moves as one number does: one draw of the floor may happen to be near zero.
_FEW, _DRAWS = 1000, 5
# Float32 arithmetic in another order costs about this many units in the last place, whatever the weights' dtype.
ARITHMETIC = 8.0


_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Comparison:
    """Differences between two sets of outputs, beside those that rounding alone makes.

    Attributes:
        largest, mean: absolute difference of the outputs (logits, where the model has them).
        kl: mean Kullback–Leibler divergence of the predicted distributions, in nats; None without logits.
        floor_largest, floor_mean, floor_kl: the same, between the merged model and itself with the changed weights
            moved at random within half a unit in the last place.
        dtype: of the changed weights.
        values: number of outputs compared.
        routed: whether the model has routers.
    """

    largest: float
    mean: float
    kl: float | None
    floor_largest: float
    floor_mean: float
    floor_kl: float | None
    dtype: str
    values: int
    routed: bool = False

    @property
    def passed(self) -> bool:
        """Within the margin. A router may send a token elsewhere for the last bit of a weight, so that single outputs
        of a mixture of experts jump; there the mean decides."""
        within = self.mean <= MARGIN * self.floor_mean
        return within and (self.routed or self.largest <= MARGIN * self.floor_largest)

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL {self.kl:.1e} ({self.floor_kl:.1e})"
        return (
            f"Merged against base + adapter, {self.values} outputs: largest difference {self.largest:.1e} (rounding "
            f"floor of {self.dtype}: {self.floor_largest:.1e}), mean {self.mean:.1e} ({self.floor_mean:.1e}){kl}: "
            + ("same function." if self.passed else "NOT the same function.")
        )


Outputs = dict[str, torch.Tensor]


def compare(update: Update, merged: Path, batches: int = 2) -> tuple[Comparison, list[str]]:
    """Run base + adapter and the folder `merged` on the same inputs.

    Returns:
        The differences, and what to tell the user about them.

    Raises:
        ShippingError: the outputs differ by more than rounding explains, or the merged folder is incomplete.
        CannotRun: there are no outputs to compare.
    """
    bare, notes = update.attached.bare, []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = base_config(merged)
        kind = type(bare)
        touched = set(update.written) | update.added.keys()
        with open_checkpoint(merged) as checkpoint:
            with _stored(empty_model(kind, config), checkpoint, set()) as model:
                inputs = [vary(model, index) for index in range(batches)]
                got = [_run(model, batch) for batch in inputs]
            floors = []
            for _ in range(_DRAWS if sum(one.numel() for outputs in got for one in outputs.values()) < _FEW else 1):
                with _stored(empty_model(kind, config), checkpoint, touched) as model:
                    floors.append(_difference(got, [_run(model, batch) for batch in inputs]))
            dtypes = [stored.dtype for stored in checkpoint.tensors.values()]
        expected = _outputs(update, inputs)
        largest, mean, kl, values = _difference(expected, got)
        floor_kl = None if kl is None else max(found for _, _, found, _ in floors if found is not None)
        floor = max(one for one, *_ in floors), max(one for _, one, *_ in floors), floor_kl
        usual = max(set(dtypes), key=dtypes.count)
        routed = bool(routers(bare) or expert_parameters(bare))
        result = Comparison(largest, mean, kl, *floor, dtype=usual, values=values, routed=routed)
        if update.trained_on is not None and update.weights.rounding is None:
            drift = _difference(_outputs(update.as_trained(), inputs), got)
            notes.append(
                f"Warning: merged into the original weights, but the adapter was trained on {update.trained_on.kind} "
                "ones. "
                f"The result is not the trained model: outputs differ by up to {_words(drift)}."
            )
    if not result.passed:
        raise ShippingError(f"The merged model is not the trained one. {result} Nothing was written.")
    return result, notes


def drift(update: Update) -> str:
    """How far base + adapter on the weights that `update` starts from is from the same on the original ones, in words;
    of an adapter that was trained on the one and is merged into the other."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = [vary(update.attached.model, 0)]
        original = replace(update, weights=replace(update.weights, rounding=None))
        rounded, plain = _outputs(update.as_trained(), inputs), _outputs(original, inputs)
        return _words(_difference(rounded, plain))


def _outputs(update: Update, inputs: list[Outputs]) -> list[Outputs]:
    with reference(update) as model:
        return [_run(model, batch) for batch in inputs]


def _words(difference: tuple[float, float, float | None, int]) -> str:
    largest, mean, kl, _ = difference
    return f"{largest:.1e}, mean {mean:.1e}" + ("" if kl is None else f", KL {kl:.1e}")


def recheck(base: Checkpoint, layout: Layout, changed: Iterable[tuple[str, Values]], merged: Path) -> None:
    """Read every tensor of `merged` again: copied ones are the base's to the byte, others what `changed` computes.

    Raises:
        ShippingError: a tensor is not what was to be written.
    """
    with open_checkpoint(merged) as checkpoint, torch.no_grad():
        for name, value in changed:
            stored = checkpoint.read(name)
            # Blocks of rows all lie in the same memory, so each is cast before the next is asked for.
            parts = [value] if isinstance(value, torch.Tensor) else value
            whole = torch.cat([part.to(stored.dtype, copy=True).reshape(-1) for part in parts])
            if not torch.equal(stored.reshape(-1), whole):
                raise ShippingError(f"{name} was not written as it was computed. Nothing was written; check the disk.")
        for _, tensor in layout.tensors().values():
            if tensor.origin is not None:
                expected = base.read(tensor.origin).to(STORED[tensor.dtype])
                stored = checkpoint.read(tensor.name)
                if not torch.equal(stored.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)):
                    raise ShippingError(f"{tensor.name} is not the base's. Nothing was written; check the disk.")


class CannotRun(ShippingError):
    """A model that does not run on inputs that are made up: it wants a picture of its own size, or tokens that stand
    for one."""


def _run(model: nn.Module, batch: Outputs) -> Outputs:
    try:
        output = model(**batch, return_dict=True)
    except ShippingError:
        raise
    except Exception as error:  # whatever a model's own code trips over
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        raise CannotRun(
            f"{type(inner).__name__} does not run on inputs that are made up here ({gist(error)[:160]})."
        ) from error
    tensors = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
    logits = {key: value.float() for key, value in tensors.items() if "logits" in key}
    return logits or dict(list({key: value.float() for key, value in tensors.items()}.items())[:1])


def vary(model: nn.Module, seed: int) -> Outputs:
    """Inputs that the model runs on: `ROWS` rows of random tokens, pixels or sound."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, longest) if longest > 0 else TOKENS  # XLNet says -1: no limit
    smallest = probe_inputs(base, tokens)
    pool = probe_inputs(base, 200)
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in smallest.items():
        rows = tensor.repeat(ROWS, *[1] * (tensor.ndim - 1)).cpu()
        if tensor.is_floating_point():
            rows = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        elif name.endswith("input_ids"):
            drawn = pool[name][0, torch.randint(0, 199, rows.shape, generator=generator)]
            rows[:, :-1] = drawn[:, :-1]  # the last one may be an end mark that a classifier looks for
        result[name] = rows
    return result


def _difference(expected: list[Outputs], got: list[Outputs]) -> tuple[float, float, float | None, int]:
    largest, total, count, divergences = 0.0, 0.0, 0, []
    for one, other in zip(expected, got, strict=True):
        for key in one:
            gap = (one[key].double() - other[key].double()).abs()
            if not torch.isfinite(gap).all():
                raise ShippingError(f"The outputs ({key}) are not finite: the base or the adapter is broken.")
            largest, total, count = max(largest, gap.max().item()), total + gap.sum().item(), count + gap.numel()
            if "logits" in key:
                p, q = one[key].double().log_softmax(-1), other[key].double().log_softmax(-1)
                divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
    kl = sum(divergences) / len(divergences) if divergences else None
    return largest, total / count, kl, count


@contextmanager
def reference(update: Update) -> Iterator[nn.Module]:
    """Base + adapter, not merged, in float32."""
    attached, weights = update.attached, update.weights
    inside = tuple(unit.path + "." for unit in attached.units)
    plain = {
        name: module
        for name, module in attached.owners.items()
        if not name.startswith(inside) and _is_empty(module, name)
    }
    for name, buffer in attached.bare.named_buffers():
        if name in weights.origins:
            attached.owners[name]._buffers[name.rpartition(".")[2]] = weights(name).to(buffer.dtype)

    def put(names: Iterable[str]) -> None:
        for group in _shared(names, weights.origins):
            value = weights(group[0]).float()
            for name in group:
                fill(plain[name], {name.rpartition(".")[2]: value})

    def drop(names: Iterable[str]) -> None:
        for name in names:
            leaf = name.rpartition(".")[2]
            fill(plain[name], {leaf: hollow(plain[name].get_parameter(leaf).shape)})

    wanted = {unit.path: unit.wanted for unit in attached.units}

    def put_unit(unit: Unit) -> None:
        fill_unit(unit, update.adapter, weights)

    with _by_block(
        attached.base,
        list(blocks(attached.bare)),
        plain,
        put,
        drop,
        {unit.path: unit for unit in attached.units},
        put_unit,
        lambda unit: empty_unit(unit, wanted[unit.path]),
    ):
        yield attached.model


def _is_empty(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name.rpartition(".")[2])
    return parameter is not None and is_hollow(parameter)


@contextmanager
def _stored(model: nn.Module, checkpoint: Any, moved: set[str]) -> Iterator[nn.Module]:
    """The model of a checkpoint in float32; parameters in `moved` are shifted within half a unit in the last place."""
    origins, unused = trace(model, checkpoint.tensors)
    for name, group in tied_names(model).items():
        keeper = next((other for other in group if other in origins), None)
        if keeper is not None:
            origins.setdefault(name, origins[keeper])
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    missing = names - origins.keys()
    # What no reader asks for: buffers of older versions, and what the class says to ignore (DeepSeek's extra layer).
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS]
    unused = [name for name in unused if not any(re.search(pattern, name) for pattern in ignored)]
    if missing or unused:
        raise ShippingError(f"The merged folder is incomplete or has strangers: {sorted(missing)[:3]}, {unused[:3]}.")
    for name, buffer in list(model.named_buffers()):
        if name in origins:
            fill(model, {name: read_parameter(model, origins[name], checkpoint.read)[name].to(buffer.dtype)})

    def read(group: list[str]) -> torch.Tensor:
        origin = origins[group[0]]
        made = read_parameter(model, origin, checkpoint.read)
        tensor = made[group[0]] if group[0] in made else made[origin.parameters[0]]
        return move(tensor) if moved & set(group) else tensor.float()

    def put(some: Iterable[str]) -> None:
        for group in _shared(some, origins):
            fill(model, dict.fromkeys(group, read(group)))

    def drop(some: Iterable[str]) -> None:
        for name in some:
            fill(model, {name: torch.empty_like(model.get_parameter(name), device="meta")})

    with _by_block(model, list(blocks(model)), names, put, drop):
        yield model


def _shared(names: Iterable[str], origins: Mapping[str, Origin]) -> list[list[str]]:
    """Names in groups that are one parameter (a tied head and its embedding), to be in memory once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        own = origins[name].parameters
        groups.setdefault(name if name in own else own[0], []).append(name)
    return list(groups.values())


def move(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, every value moved by up to half the distance to its neighbour in the tensor's dtype."""
    spacing = max(torch.finfo(tensor.dtype).eps, ARITHMETIC * torch.finfo(torch.float32).eps)
    value = tensor.float()
    unit = spacing * torch.exp2(torch.frexp(value).exponent.float() - 1)
    return value + (torch.rand_like(value) - 0.5) * unit


@contextmanager
def _by_block(
    model: nn.Module,
    paths: list[str],
    plain: Iterable[str],
    put: Callable[[Iterable[str]], None],
    drop: Callable[[Iterable[str]], None],
    units: dict[str, Unit] | None = None,
    put_unit: Callable[[Unit], None] = lambda unit: None,
    drop_unit: Callable[[Unit], None] = lambda unit: None,
) -> Iterator[None]:
    """Weights of a block lie in memory only while it runs; all others during the whole forward."""
    units = units or {}
    keep_weights(model)  # weights that come and go cannot be rewritten in place

    def home(name: str) -> str:
        return next((path for path in paths if name.startswith(path + ".") or name == path), "")

    groups: dict[str, tuple[list[str], list[Unit]]] = {path: ([], []) for path in ["", *paths]}
    for name in plain:
        groups[home(name)][0].append(name)
    for path, unit in units.items():
        groups[home(path)][1].append(unit)

    def enter(path: str) -> None:
        put(groups[path][0])
        for unit in groups[path][1]:
            put_unit(unit)

    trimmer = Trimmer(_TRIM)

    def leave(path: str) -> None:
        drop(groups[path][0])
        for unit in groups[path][1]:
            drop_unit(unit)
        trimmer(4 * sum(parameter.numel() for parameter in model.get_submodule(path).parameters()))

    hooks = []
    for path in paths:
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path)))
        hooks.append(module.register_forward_hook(lambda *_, path=path: leave(path), always_call=True))
    enter("")
    try:
        yield
    finally:
        leave("")
        for hook in hooks:
            hook.remove()
