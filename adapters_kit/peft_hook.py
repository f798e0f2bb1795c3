"""Makes our methods known to peft as soon as both packages are imported, whichever comes first, and free until then.

`import adapters_kit` must stay cheap, so it cannot import peft; and plain peft code that follows it must still find our
methods: `PeftModel.from_pretrained(base, folder)` looks the type of the adapter up in tables inside peft.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules which register a peft method when they are imported.
PLUGINS = (
    "adapters_kit.methods.bottleneck.model",
    "adapters_kit.methods.prefix.model",
    "adapters_kit.methods.blocks.model",
    "adapters_kit.methods.together.model",
)


def install() -> None:
    """Register now if peft is there, else once it is."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def register() -> None:
    """Import the plugins if peft is imported; not while a module of ours is half-way through its own imports.

    Any use of a public name calls this again afterwards.
    """
    half_way = any(
        name.startswith("adapters_kit.") and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
    )
    if "peft" in sys.modules and not half_way:
        for name in PLUGINS:
            importlib.import_module(name)
        record_saves()
        wrap_loading()


def record_saves() -> None:
    """From now on every `PeftModel.save_pretrained` (Trainer's, TRL's, `push_to_hub`'s …) leaves a record of the base
    beside the adapter: see `artifacts.record`. What peft itself writes stays as it is."""
    kind: Any = sys.modules["peft"].PeftModel
    saving = kind.save_pretrained
    if getattr(saving, "records", False):
        return

    @functools.wraps(saving)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        result = saving(self, save_directory, *args, **kwargs)
        given = inspect.signature(saving).bind(self, save_directory, *args, **kwargs).arguments
        if given.get("is_main_process", True):
            from adapters_kit.artifacts.record import record_saved

            for name in given.get("selected_adapters") or list(self.peft_config):
                record_saved(self, save_directory, name)
        return result

    recording: Any = save_pretrained
    recording.records = True
    kind.save_pretrained = recording


def wrap_loading() -> None:
    """From now on a model into which `PeftModel.from_pretrained` loads an adapter of ours names its classes as
    the record of the adapter does, where it knew them as LABEL_0 … only: a pipeline then answers with names.
    And `load_adapter` does not walk over the adapters that lie there already: see `kernels.aside`."""
    kind: Any = sys.modules["peft"].PeftModel
    loading = kind.load_adapter
    if getattr(loading, "names", False):
        return

    @functools.wraps(loading)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        from adapters_kit.artifacts.record_reader import name_classes_of
        from adapters_kit.kernels.aside import others_aside

        given = inspect.signature(loading).bind(self, model_id, *args, **kwargs).arguments
        with others_aside(self, given["adapter_name"]):
            result = loading(self, model_id, *args, **kwargs)
        name_classes_of(self, model_id)
        return result

    naming: Any = load_adapter
    naming.names = True
    kind.load_adapter = naming


class _PeftFinder(MetaPathFinder):
    """Lets Python find peft as always, and adds a step after its import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            register()

        loader.exec_module = execute_then_register
        return spec
