"""Where the adapters of a `BottleneckConfig` sit in a model, and what each of them reads."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from adapters_kit import anatomy
from adapters_kit.anatomy.parts import Branch
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.methods.bottleneck.config import BottleneckConfig

# The kinds of branches, and the option that switches each on.
OPTION_OF = {"attention": "mh_adapter", "cross-attention": "cross_adapter", "ffn": "output_adapter"}


def find_sites(model: nn.Module, config: BottleneckConfig) -> dict[str, dict[str, Any]]:
    """The modules that carry adapters, found with one probe forward.

    Returns:
        full path of the module -> a dict that fits into JSON:
        `role` ("attention", "cross-attention", "ffn"), `layer` (counted from 0, a decoder's after the encoder's),
        `width` (hidden size), `index` (of the branch in the tuple that the module returns, or None), `reads` and
        `in_norm` (see `Bottleneck`), and `residual` (where the stream is read: path, side, key), None if it is not.

    Raises:
        ModelError: the model writes nothing into a residual stream, or not in a way that these options can use.
        UnknownNameError: `layers`, `leave_out`, `target_modules` or `exclude_modules` name what is not there.
    """
    found = anatomy.map_model(model)
    if found.reason is not None:
        raise ModelError(f"{found.model_class} has no place for bottleneck adapters: {found.reason}")
    branches = [
        (number, branch)
        for number, block in enumerate(found.blocks)
        for branch in block.branches
        if branch.kind in OPTION_OF
    ]
    _check_layers(config, len(found.blocks))
    wanted = [(number, branch) for number, branch in branches if getattr(config, OPTION_OF[branch.kind])]
    if not wanted:
        here = sorted({OPTION_OF[branch.kind] for _, branch in branches})
        raise ModelError(
            f"{found.model_class} has none of the branches that these options adapt. Switch on {' or '.join(here)}."
        )
    left = _filtered(config, [(number, branch, place(branch, config, found.model_class)) for number, branch in wanted])
    return {path: {"role": branch.kind, "layer": number, **site} for number, branch, (path, site) in left}


def place(branch: Branch, config: BottleneckConfig, model_class: str) -> tuple[str, dict[str, Any]]:
    """The module that carries the adapter of one branch, and how; the equations are in config.py."""
    path, index, in_norm = branch.module, branch.index, False
    after_norm = not config.is_parallel and config.original_ln_before
    if config.is_parallel:
        reads = "residual"
    elif not after_norm:
        reads = "branch"
    elif branch.norm is None:
        reads = "sum"
    else:
        path, index = branch.norm, None
        in_norm = config.original_ln_after
        reads = "normed" if in_norm else "branch"
    if branch.branch_norm is not None and config.before_output_norm and path == branch.module:
        path, index, in_norm = branch.branch_norm, None, True
    if path is None:
        # The branch is a bare tensor operation: it can be reached only through the norm of its sum with the stream.
        if branch.norm is None:
            raise ModelError(f"{model_class} adds a {branch.kind} branch that no module returns, and no norm follows.")
        path, index, in_norm = branch.norm, None, True
        reads = "difference" if reads == "branch" else reads
    residual = None
    if reads in ("residual", "sum", "difference"):
        if branch.residual is None or not branch.aligned:
            why = "no module sees it" if branch.residual is None else f"{path} works on another arrangement of it"
            raise ModelError(
                f"These options read the residual stream beside {path}, but in {model_class} {why}. "
                "Serial adapters (houlsby) need no access to it."
            )
        residual = {"path": branch.residual.path, "side": branch.residual.side, "key": branch.residual.key}
    site = {"width": branch.width, "index": index, "reads": reads, "in_norm": in_norm, "residual": residual}
    return path, site


def _check_layers(config: BottleneckConfig, count: int) -> None:
    for option in ("layers", "leave_out"):
        beyond = [number for number in getattr(config, option) or () if not 0 <= number < count]
        if beyond:
            raise UnknownNameError(f"{option} has {beyond}, but the model's {count} layers are 0 to {count - 1}.")
    left = set(range(count) if config.layers is None else config.layers) - set(config.leave_out)
    if not left:
        raise AdapterError(f"layers={config.layers} and leave_out={config.leave_out} leave no layer to adapt.")


def _filtered(config: BottleneckConfig, places: list[tuple[int, Branch, tuple[str, Any]]]) -> list:
    """The places that layers, leave_out, target_modules and exclude_modules leave."""
    names = {path: {path, branch.module or path} for _, branch, (path, _) in places}
    included, excluded = (
        _matching(option, getattr(config, option), names) for option in ("target_modules", "exclude_modules")
    )
    left = [
        (number, branch, (path, site))
        for number, branch, (path, site) in places
        if (config.layers is None or number in config.layers)
        and number not in config.leave_out
        and (included is None or path in included)
        and (excluded is None or path not in excluded)
    ]
    if not left:
        raise AdapterError(
            f"No branch is left: layers={config.layers}, leave_out={config.leave_out}, "
            f"target_modules={config.target_modules!r} and exclude_modules={config.exclude_modules!r} leave nothing."
        )
    return left


def _matching(option: str, wanted: str | Iterable[str] | None, names: dict[str, set[str]]) -> set[str] | None:
    """The keys of `names` one of whose names the user's filter matches; None without a filter."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise UnknownNameError(f"{option}={wanted!r} is not a regular expression: {error}.") from None
        found = {path for path, known in names.items() if any(pattern.fullmatch(name) for name in known)}
        missing = [] if found else [wanted]
    else:
        by_name = {
            name: {path for path, known in names.items() if any(f".{one}".endswith(f".{name}") for one in known)}
            for name in wanted
        }
        found = set().union(*by_name.values())
        missing = [name for name, paths in by_name.items() if not paths]
    if missing:
        known = sorted(set().union(*names.values()))
        raise UnknownNameError(
            f"{option}={wanted!r}: {missing[0]!r} matches no branch that writes into the residual stream, which is "
            f"where bottleneck adapters sit. {did_you_mean(missing[0], known)}"
        )
    return found
