"""Which modules a method trains: what the user named, checked; otherwise every linear of the blocks."""

import re
from collections.abc import Iterable
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
