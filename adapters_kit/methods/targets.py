"""Which modules a method trains: what the user named, checked; otherwise every linear of the blocks."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from adapters_kit.anatomy import block_linears, expert_parameters
from adapters_kit.anatomy.bypass import bypassed
from adapters_kit.errors import ModelError, UnknownNameError, did_you_mean
from adapters_kit.peft_plugin import refused_by_peft, renamed_by_peft

# Words that peft itself expands; they name no module.
_PEFT_KEYWORDS = ("all-linear",)


def matches(target: str, paths: Iterable[str]) -> list[str]:
    """The paths that peft takes `target` to mean: the path itself or any path that ends with `.target`."""
    return [path for path in paths if path == target or path.endswith("." + target)]


def check_names(option: str, names: str | Iterable[str], paths: Iterable[str]) -> None:
    """Refuse names that match nothing; peft trains the rest silently when only some match.

    Args:
        option: the option's own name, for the message.
        names: a list of names or path endings, or one regular expression over full paths.
        paths: every path of the model that could be meant.

    Raises:
        UnknownNameError: a name or the expression matches nothing; lists the nearest paths.
    """
    paths = list(paths)
    if isinstance(names, str):
        if names in _PEFT_KEYWORDS:
            return
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise UnknownNameError(f"{option}={names!r} is not a regular expression: {error}.") from None
        if not any(pattern.fullmatch(path) for path in paths):
            raise UnknownNameError(
                f"{option}={names!r} matches no module as a regular expression over full paths. "
                f"{did_you_mean(names, _endings(paths))} For module names, pass a list: {option}=[{names!r}]."
            )
        return
    names = list(names)
    if not names:
        raise UnknownNameError(f"{option} is empty: nothing would be trained. Leave it out to use the default.")
    missing = [name for name in names if not matches(name, paths)]
    if missing:
        hints = " ".join(
            f"{name!r} matches no module. {did_you_mean(name, paths if '.' in name else _endings(paths))}"
            for name in missing
        )
        raise UnknownNameError(f"{option}={names!r}: {hints}")


def check_targets(model: nn.Module, options: dict[str, Any]) -> None:
    """Check every option of a peft config that names modules or parameters of `model`."""
    modules = [path for path, _ in model.named_modules() if path]
    for option in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        if options.get(option) is not None:
            check_names(option, options[option], modules)
    if options.get("target_parameters") is not None:
        check_names("target_parameters", options["target_parameters"], [path for path, _ in model.named_parameters()])
    for option in ("rank_pattern", "alpha_pattern"):
        _check_patterns(option, options.get(option) or (), [*modules, *(path for path, _ in model.named_parameters())])
    for option in ("trainable_token_indices", "token_indices"):
        _check_tokens(model, option, options.get(option) or ())


def _check_patterns(option: str, patterns: Iterable[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            hint = did_you_mean(pattern, paths if "." in pattern else _endings(paths))
            raise UnknownNameError(f"{option}: {pattern!r} matches no module. {hint}")


def _check_tokens(model: nn.Module, option: str, asked: Iterable[int] | Mapping[str, Iterable[int]]) -> None:
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a model of sound has no tokens
        return
    for tokens in asked.values() if isinstance(asked, Mapping) else (asked,):
        stray = next((token for token in tokens if not 0 <= token < rows), None)
        if stray is not None:
            raise UnknownNameError(f"{option}: there is no token {stray}. The model has tokens 0 to {rows - 1:,}.")


def in_layers(model: nn.Module, options: dict[str, Any], chosen: bool) -> dict[str, Any]:
    """`options` with the default targets of the layers in `layers_to_transform` alone.

    peft looks at layers only where it completes a name: targets with their full paths, as ours are, it trains in all.

    Args:
        chosen: whether the user named the targets; then they are checked and left as they are.

    Raises:
        UnknownNameError: layers that do not exist, or targets that lie in others.
    """
    layers = options.get("layers_to_transform")
    if layers is None:
        return options
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if not wanted:
        raise UnknownNameError("layers_to_transform is empty: nothing would be trained. Leave it out for all layers.")
    modules = [path for path, _ in model.named_modules()]
    numbers = {number for path in modules if (number := _layer(path, options)) is not None}
    for layer in sorted(wanted - numbers):
        there = f"{min(numbers)} to {max(numbers)}" if numbers else "none with a number"
        raise UnknownNameError(f"layers_to_transform: there is no layer {layer}. There are: {there}.")
    names = [*_listed(options, "target_modules"), *_listed(options, "target_parameters")]
    if chosen:
        whole = {*modules, *(path for path, _ in model.named_parameters())}
        for name in names:
            if name in whole and _layer(name, options) not in wanted:
                raise UnknownNameError(
                    f"{name!r} is a full path outside layers_to_transform={layers!r}, and would be trained all the "
                    "same. Leave one of the two out."
                )
        return options
    if not names:
        return options
    kept = {
        option: [name for name in _listed(options, option) if _layer(name, options) in wanted]
        for option in ("target_modules", "target_parameters", "feedforward_modules")
        if options.get(option) is not None
    }
    return {**options, **kept, "layers_to_transform": None, "layers_pattern": None}


def _listed(options: dict[str, Any], option: str) -> list[str]:
    value = options.get(option)
    return list(value) if value is not None and not isinstance(value, str) else []


def _layer(path: str, options: dict[str, Any]) -> int | None:
    """The number of the layer that a path leads through, as peft counts: the first, or that after `layers_pattern`."""
    patterns = options.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", f"{path}."):
            return int(found[1])
    return None


def all_linears(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with `target_modules` set to every linear of the blocks, unless the user chose targets."""
    return options if _chosen(options) else {**options, "target_modules": _linears(model)}


def lora_linears(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """As `all_linears`, for variants of LoRA that cannot act on bare parameters (DoRA, PiSSA, OLoRA, LoftQ)."""
    if _chosen(options):
        return options
    return {**options, "target_modules": [path for path in _linears(model) if not renamed_by_peft(model, path)]}


def lora_linears_and_experts(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """As `all_linears`, with fused mixture-of-experts parameters, and what peft takes for them, as bare parameters."""
    if _chosen(options):
        return options
    linears = _linears(model)
    modules = [path for path in linears if not renamed_by_peft(model, path)]
    parameters = expert_parameters(model) + [f"{path}.weight" for path in linears if path not in modules]
    return {**options, "target_modules": modules} | ({"target_parameters": parameters} if parameters else {})


def _chosen(options: dict[str, Any]) -> bool:
    return options.get("target_modules") is not None or options.get("target_parameters") is not None


def _linears(model: nn.Module) -> list[str]:
    linears = [path for path in block_linears(model) if not refused_by_peft(model, path)]
    never_called = bypassed(model, linears)
    linears = [path for path in linears if path not in never_called]
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no linear layers inside repeated blocks, so there is no default target. "
            "Name the modules yourself: target_modules=[...]."
        )
    return linears


def _endings(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
