"""The config of several methods as one adapter, and the published combinations.

model = ak.wrap(model, ["lora", "prefix"], r=8, num_virtual_tokens=10)    # one adapter, trained and saved together
model = ak.wrap(model, "mam")                                             # a published combination
"""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.configs import build, fields, label
from adapters_kit.methods.together.config import CombinedConfig
from adapters_kit.registry import Method


def combine(model: nn.Module, methods: Sequence[str | PeftConfig], **options: Any) -> CombinedConfig:
    """The config of several methods as one adapter, each prepared for `model`. `wrap(model, [...])` uses it.

    Args:
        model: the base model; read, not changed.
        methods: short names or peft configs, each of another kind.
        **options: an option goes to the part that knows it. If several do, say which:
            `parts={"lora": {"target_modules": [...]}}`. `gate` and `modules_to_save` are the combination's own.

    Raises:
        UnknownNameError: a method or option that does not exist.
        AdapterError: an option that several parts know, or parts that cannot go together.
    """
    own = {name: options.pop(name) for name in ("gate", "modules_to_save", "task_type") if name in options}
    given = _tables(options.pop("parts", None) or {})
    named = {label(method): method for method in methods}
    if len(named) < len(methods):
        raise AdapterError(f"{list(map(label, methods))}: the same method twice. One adapter holds one of a kind.")
    stray = [name for name in given if name not in named]
    if stray:
        raise UnknownNameError(f"parts has {stray[0]!r}, which is not combined here. {did_you_mean(stray[0], named)}")
    known = {name: fields(method) for name, method in named.items()}
    sorted_out: dict[str, dict[str, Any]] = {name: dict(given.get(name, {})) for name in named}
    for option, value in options.items():
        takers = [name for name in named if option in known[name]]
        if not takers:
            every = set().union(*known.values())
            raise UnknownNameError(
                f"None of {', '.join(named)} has the option {option!r}. {did_you_mean(option, every)}"
            )
        if len(takers) > 1:
            raise AdapterError(
                f"{option!r} is an option of {' and '.join(takers)}. Say which: "
                f"parts={{{takers[0]!r}: {{{option!r}: {value!r}}}}}."
            )
        sorted_out[takers[0]][option] = value
    parts = {name: build(model, method, sorted_out[name]) for name, method in named.items()}
    return CombinedConfig(parts=parts, **own)


def _tables(parts: Any) -> dict[str, Mapping[str, Any]]:
    """`parts` as it has to be: a table of options for each method."""
    if not isinstance(parts, Mapping) or not all(isinstance(one, Mapping) for one in parts.values()):
        raise AdapterError(f"parts={parts!r} is no table of options for each method, such as {{'lora': {{'r': 8}}}}.")
    return dict(parts)


def _preset(
    name: str, trains: str, when: str, paper: str, parts: dict[str, dict[str, Any]], learning_rate: float, **own: Any
) -> Method:
    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        given = _tables(options.pop("parts", None) or {})
        stray = [label for label in given if label not in parts]
        if stray:
            raise UnknownNameError(f"{name} has no part {stray[0]!r}. {did_you_mean(stray[0], parts)}")
        merged = {label: {**defaults, **given.get(label, {})} for label, defaults in parts.items()}
        built = combine(model, list(parts), parts=merged, gate=options.get("gate", False))
        return {**options, "parts": built.parts}

    return Method(
        name=name,
        config="adapters_kit.methods.together.config:CombinedConfig",
        trains=trains,
        when=when,
        paper=paper,
        mergeable=False,
        defaults=own,
        learning_rate=learning_rate,
        prepare=prepare,
    )


MAM = _preset(
    "mam",
    "a prefix in attention and an MLP beside FFN",
    "where the papers that you compare with took it; lora or parallel alone did better in our table",
    "He et al. 2021, arXiv:2110.04366",
    {
        "prefix": {"num_virtual_tokens": 30},
        # Not scaled by the paper's 4, for the reason that `parallel` is not.
        "parallel": {"reduction_factor": 16, "bottleneck_dim": 512, "init_weights": "mam_adapter"},
    },
    learning_rate=1e-3,
)
UNIPELT = _preset(
    "unipelt",
    "a prefix, an MLP after FFN and LoRA, each behind a gate",
    "with few rows, when it is not known which of its three parts suits: gates find out",
    "Mao et al. 2022, arXiv:2110.07577",
    {"prefix": {"num_virtual_tokens": 10}, "pfeiffer": {"reduction_factor": 16}, "lora": {"r": 8, "lora_alpha": 16}},
    learning_rate=1e-3,
    gate=True,
)
