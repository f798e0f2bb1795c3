"""Which modules a method trains: what the user named, checked; otherwise every linear of the blocks."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from adapters_kit.anatomy import block_linears, expert_parameters
from adapters_kit.errors import ModelError, UnknownNameError, did_you_mean

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
    if options.get("target_modules") is not None or options.get("target_parameters") is not None:
        return options
    linears = block_linears(model)
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no linear layers inside repeated blocks, so there is no default target. "
            "Name the modules yourself: target_modules=[...]."
        )
    return {**options, "target_modules": linears}


def all_linears_and_experts(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """As `all_linears`, and fused mixture-of-experts parameters through `target_parameters`."""
    if options.get("target_modules") is not None or options.get("target_parameters") is not None:
        return options
    experts = expert_parameters(model)
    options = all_linears(model, options)
    return {**options, "target_parameters": experts} if experts else options


def _endings(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
