"""peft's own methods that are not declared in the registry: the defaults that fit a model, and what some ask for.

Most need nothing but linears to act on. Some have sizes that must divide a layer's, or be smaller; peft's defaults suit
wide models only, so that a size which the user leaves open is fitted here. A few need what no default can give.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adapters_kit.anatomy import blocks
from adapters_kit.errors import AdapterError, ModelError
from adapters_kit.methods.targets import all_linears, matches

Prepare = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Special:
    """What one of peft's methods needs beyond linears to act on.

    Attributes:
        prepare: as `Method.prepare`; None leaves everything to peft.
        defaults: as `Method.defaults`.
        needs: as `Method.needs`.
        in_recipes: as `Method.in_recipes`.
    """

    prepare: Prepare | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    in_recipes: bool = True


def _shapes(model: nn.Module, names: str | Iterable[str]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every target; of those named by an expression none, as peft alone reads it."""
    if isinstance(names, str):
        return []
    layers = dict(model.named_modules())
    found = [layers[path] for name in names for path in matches(name, layers)]
    sizes = [(getattr(layer, "in_features", None), getattr(layer, "out_features", None)) for layer in found]
    return [
        (into, out) if into and out else (layer.weight.shape[0], layer.weight.shape[1])  # Conv1D: (inputs, outputs)
        for (into, out), layer in zip(sizes, found, strict=True)
        if (into and out) or getattr(getattr(layer, "weight", None), "ndim", 0) == 2
    ]


Size = Callable[[list[tuple[int, int]]], int]


def _fitted(option: str, size: Size) -> Prepare:
    """A `prepare` that sets `option`, where the user left it open, to what the shapes of the targets allow."""

    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        options = all_linears(model, options)
        shapes = _shapes(model, options.get("target_modules") or [])
        if options.get(option) is None and shapes:
            options = {**options, option: size(shapes)}
        return options

    return prepare


def _divides_widths(most: int) -> Size:
    return lambda shapes: _divisor(math.gcd(*(size for shape in shapes for size in shape)), most)


def _divides_outputs(most: int) -> Size:
    return lambda shapes: _divisor(math.gcd(*(out for _, out in shapes)), most)


def _divisor(number: int, most: int) -> int:
    return max(part for part in range(1, min(number, most) + 1) if number % part == 0)


def _weights(most: int) -> Size:
    """No more than the smallest target has."""
    return lambda shapes: min(most, *(into * out for into, out in shapes))


def _rank(most: int) -> Size:
    """The rank whose LoRA would be no larger than the smallest target."""
    return lambda shapes: max(1, min(most, *(into * out // (into + out) for into, out in shapes)))


def _norms(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Every normalisation of the model: peft knows their names for a few architectures only."""
    if options.get("target_modules") is not None:
        return options
    found = [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    ]
    if not found:
        raise ModelError(f"{type(model).__name__} has no normalisation with weights to train. Use 'lora'.")
    return {**options, "target_modules": found}


def _top_layers(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Adapter: ten tokens in all but the two lowest blocks, as in the paper (30 of 32)."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"adapter_len": 10, "adapter_layers": max(len(blocks(model)) - 2, 1), **given}


def _asking(method: str, option: str, example: str, reason: str) -> Prepare:
    """A `prepare` for methods with an option that nothing but the user can give."""

    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        if not options.get(option):
            raise AdapterError(f"{method} {reason} Give {option}, such as {option}={example}.")
        return options

    return prepare


_TASK_IDS = "task_ids with every batch: a loop of your own"

SPECIAL: dict[str, Special] = {
    "c3a": Special(_fitted("block_size", _divides_widths(256))),
    "vblora": Special(_fitted("vector_length", _divides_widths(256))),
    "road": Special(_fitted("group_size", _divides_outputs(64))),
    "shira": Special(_fitted("r", _rank(32))),
    "waveft": Special(_fitted("n_frequency", _weights(2592))),
    "fourierft": Special(_fitted("n_frequency", _weights(1000))),
    "ln_tuning": Special(_norms),
    "adaption_prompt": Special(_top_layers, needs="a LLaMA, Mistral or GPT-2 model"),
    "shadow": Special(needs="a decoder"),
    "trainable_tokens": Special(
        _asking("trainable-tokens", "token_indices", "[128, 129]", "trains the embeddings of single tokens."),
        needs="token_indices",
    ),
    "poly": Special(all_linears, needs=_TASK_IDS, in_recipes=False),
    "multitask_prompt_tuning": Special(defaults={"num_virtual_tokens": 20}, needs=_TASK_IDS, in_recipes=False),
    "xlora": Special(
        _asking("xlora", "adapters", '{"a": "runs/a/adapter"}', "mixes LoRA adapters that are there already."),
        needs="saved adapters to mix, and model.config.use_cache = False: a loop of your own",
        in_recipes=False,
    ),
    "cpt": Special(
        _asking("cpt", "cpt_token_ids", "[5, 6, 7]", "tunes the tokens of a context that you write."),
        needs="a causal LM, a context (cpt_token_ids) and input_type_mask with every batch: a loop of your own",
        in_recipes=False,
    ),
}
