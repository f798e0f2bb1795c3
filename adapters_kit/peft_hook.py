"""Makes our methods known to peft as soon as both packages are imported, whichever comes first, and free until then.

`import adapters_kit` must stay cheap, so it cannot import peft; and plain peft code that follows it must still find our
methods: `PeftModel.from_pretrained(base, folder)` looks the type of the adapter up in tables inside peft.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules which register a peft method when they are imported.
PLUGINS = ("adapters_kit.methods.bottleneck", "adapters_kit.methods.prefix")


def install() -> None:
    """Register now if peft is there, else once it is."""
    if _ready("peft"):
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def register() -> None:
    """Import the plugins, unless a module of ours is half-way through its own imports; it is called again after that."""
    ours = [name for name in sys.modules if name.startswith("adapters_kit.")]
    if _ready("peft") and all(_ready(name) for name in ours):
        for name in PLUGINS:
            importlib.import_module(name)


def _ready(name: str) -> bool:
    """Whether the module is imported to the end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _PeftFinder(MetaPathFinder):
    """Lets Python find peft as always, and adds a step after its import."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            module.__spec__._initializing = False
            register()

        spec.loader.exec_module = execute_then_register
        return spec
