"""Looking a method up by its name, and the table of all: those declared in the registry, then the rest of peft's."""

import dataclasses

from adapters_kit import registry
from adapters_kit.errors import UnknownNameError, did_you_mean
from adapters_kit.methods.of_peft import SPECIAL, Special
from adapters_kit.methods.targets import all_linears
from adapters_kit.peft_plugin import peft_methods
from adapters_kit.registry import Method


def find_method(name: str) -> Method:
    """The method called `name`: declared in the registry, or any of peft's under its own lower-case name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    wanted = registry.canonical(name)
    if wanted in registry.names():
        return registry.get(wanted)
    of_peft = {registry.canonical(other): other for other in _of_peft()}
    if wanted in of_peft:
        return _from_peft(of_peft[wanted])
    raise UnknownNameError(f"Unknown method {name!r}. {did_you_mean(wanted, [*registry.names(), *of_peft])}")


def table() -> list[Method]:
    """Every method, declared ones first, then the rest of peft's; each under the name that `wrap` takes."""
    declared = [registry.get(name) for name in registry.names()]
    # "prompt" is peft's prompt_tuning under a shorter name.
    shown = {method.name for method in declared} | {"prompt-tuning"}
    return declared + [_from_peft(name) for name in sorted(_of_peft()) if registry.canonical(name) not in shown]


def _of_peft() -> list[str]:
    """peft's names of its methods, without the types that stand behind several of ours ("bottleneck", "combined")."""
    ours = "adapters_kit."
    return [name for name, config in peft_methods().items() if not config.__module__.startswith(ours)]


def _from_peft(name: str) -> Method:
    config_class = peft_methods()[name]
    fields = {field.name for field in dataclasses.fields(config_class)}
    prompt = "num_virtual_tokens" in fields
    special = SPECIAL.get(name) or Special(
        prepare=all_linears if "target_modules" in fields else None,
        defaults={"num_virtual_tokens": 20} if prompt else {},
    )
    return Method(
        name=registry.canonical(name),
        config=f"{config_class.__module__}:{config_class.__name__}",
        trains="virtual tokens" if prompt else "see peft's documentation",
        paper="",
        mergeable=None,
        defaults=special.defaults,
        needs=special.needs,
        in_recipes=special.in_recipes,
        prepare=special.prepare,
    )
