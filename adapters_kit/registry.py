"""From a short name ("lora") to a `Method`: how to build its peft config for a model.

A method is declared once, as a `Method`. Ours are listed in `BUILTIN` as `module:attribute` strings, so that the names
are known without importing torch. Third parties add theirs, without forking, through the entry-point group
`adapters_kit.methods`:

    [project.entry-points."adapters_kit.methods"]
    mymethod = "my_package.methods:MYMETHOD"      # a Method
"""

import ast
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from adapters_kit.errors import UnknownNameError, did_you_mean

GROUP = "adapters_kit.methods"

_LORA = "adapters_kit.methods.lora"
_PROMPT = "adapters_kit.methods.prompt"
_BOTTLENECK = "adapters_kit.methods.bottleneck.model"
BUILTIN: dict[str, str] = {
    "lora": f"{_LORA}:LORA",
    "rslora": f"{_LORA}:RSLORA",
    "dora": f"{_LORA}:DORA",
    "pissa": f"{_LORA}:PISSA",
    "olora": f"{_LORA}:OLORA",
    "loftq": f"{_LORA}:LOFTQ",
    "adalora": f"{_LORA}:ADALORA",
    "ia3": f"{_LORA}:IA3",
    "vera": f"{_LORA}:VERA",
    "oft": f"{_LORA}:OFT",
    "houlsby": f"{_BOTTLENECK}:HOULSBY",
    "pfeiffer": f"{_BOTTLENECK}:PFEIFFER",
    "parallel": f"{_BOTTLENECK}:PARALLEL",
    "adapterplus": f"{_BOTTLENECK}:ADAPTERPLUS",
    "compacter": f"{_BOTTLENECK}:COMPACTER",
    "compacter++": f"{_BOTTLENECK}:COMPACTER_PLUS_PLUS",
    "prompt": f"{_PROMPT}:PROMPT",
    "p-tuning": f"{_PROMPT}:P_TUNING",
    "prefix": "adapters_kit.methods.prefix.model:PREFIX",
    "blocks": "adapters_kit.methods.blocks.model:BLOCKS",
    "mam": "adapters_kit.methods.together.build:MAM",
    "unipelt": "adapters_kit.methods.together.build:UNIPELT",
}


@dataclass(frozen=True)
class Method:
    """One parameter-efficient method: a peft config class and the defaults that suit it.

    Attributes:
        name: short name, as given to `wrap`.
        config: the peft config class as `module:Class`; imported when first used.
        trains: what is trained, in a few words.
        paper: where the method was published, e.g. "Hu et al. 2021, arXiv:2106.09685".
        mergeable: whether the trained update folds into the base weights; None where peft alone knows.
        defaults: options of the config that differ from peft's own defaults.
        learning_rate: a good starting rate for AdamW.
        classifier_learning_rate: the same for tasks that generate no text, where it is another.
        when: when to use it, in a few words; its card in the documentation shows it.
        needs: what it asks for beyond any transformers model, in a few words; the table of methods shows it.
        in_recipes: whether `train` can do it from a recipe; where not, `wrap` and a training loop of your own can.
        base_dropout: probability of the base model's dropout layers while this method trains alone; None leaves them.
        prepare: `(model, options) -> options`, fills in what depends on the model (targets, widths). Called before
            anything is changed; raises an `AdapterError` for a model that the method does not suit.
    """

    name: str
    config: str
    trains: str
    paper: str
    mergeable: bool | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4
    classifier_learning_rate: float | None = None
    when: str = ""
    needs: str = ""
    in_recipes: bool = True
    base_dropout: float | None = None
    prepare: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None

    @property
    def config_class(self) -> type:
        """The peft config class (imports peft)."""
        return load_attribute(self.config)


def load_attribute(reference: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def _declared() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {entry.name: entry.load for entry in entry_points(group=GROUP)}
    # Ours come last: another package cannot silently replace what "lora" means.
    found.update({name: partial(load_attribute, reference) for name, reference in BUILTIN.items()})
    return found


def names() -> list[str]:
    """The short names of every declared method, sorted; imports nothing."""
    return sorted(_declared())


def canonical(name: str) -> str:
    """The spelling that all look-ups use: lower case, hyphens; "P_Tuning" means "p-tuning"."""
    return name.lower().replace("_", "-")


@cache
def known_names() -> list[str]:
    """Every name that `wrap` takes: the declared methods and peft's others; imports nothing."""
    return sorted({*names(), *peft_names()})


@cache
def peft_names() -> list[str]:
    """The names of peft's own methods in our spelling ("ln-tuning"), read from its source text.

    Importing peft imports torch, which takes seconds; a wrong recipe should be answered at once.
    """
    package = importlib.util.find_spec("peft")
    source = Path(package.origin).parent / "utils" / "peft_types.py" if package and package.origin else None
    if source is None or not source.is_file():
        return []
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    enum = next(node for node in classes if node.name == "PeftType")
    members = [node.targets[0] for node in enum.body if isinstance(node, ast.Assign)]
    return sorted(canonical(member.id) for member in members if isinstance(member, ast.Name))


@cache
def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        UnknownNameError: no such method, or an entry point that does not lead to a `Method`.
    """
    load = _declared().get(name)
    if load is None:
        raise UnknownNameError(f"Unknown method {name!r}. {did_you_mean(name, names())}")
    method = load()
    if not isinstance(method, Method):
        raise UnknownNameError(
            f"The entry point {name!r} of group {GROUP!r} leads to {method!r}, not to an adapters_kit.registry.Method."
        )
    return method
