"""adapters_kit: parameter-efficient fine-tuning of Hugging Face models, plugged into peft.

    import adapters_kit as ak
    model = ak.wrap(ak.load("path-or-hub-id", task="causal-lm"), "lora", r=16)

Names are imported when first used, so that `import adapters_kit` costs milliseconds.
"""

import importlib

from adapters_kit import peft_hook
from adapters_kit.noise import quiet

_HOME = {
    "AdapterError": "adapters_kit.errors",
    "BottleneckConfig": "adapters_kit.methods.bottleneck.model",
    "PrefixConfig": "adapters_kit.methods.prefix.model",
    "eject": "adapters_kit.methods.prefix.model",
    "from_peft_prefix": "adapters_kit.methods.prefix.peft_prefix",
    "to_peft_prefix": "adapters_kit.methods.prefix.peft_prefix",
    "CombinedConfig": "adapters_kit.methods.together.config",
    "activate": "adapters_kit.methods.together.build",
    "fold": "adapters_kit.methods.together.build",
    "stack": "adapters_kit.methods.together.build",
    "Recipe": "adapters_kit.recipe",
    "Run": "adapters_kit.training.run",
    "evaluate": "adapters_kit.inference",
    "predict": "adapters_kit.inference",
    "stream": "adapters_kit.inference",
    "Plan": "adapters_kit.training.plan",
    "plan": "adapters_kit.training.plan",
    "Comparison": "adapters_kit.comparison",
    "compare": "adapters_kit.comparison",
    "compare_runs": "adapters_kit.training.table",
    "sweep": "adapters_kit.training.table",
    "train": "adapters_kit.training.train",
    "load": "adapters_kit.loading",
    "load_processor": "adapters_kit.loading",
    "MergeReport": "adapters_kit.merging.merge",
    "merge": "adapters_kit.merging.merge",
    "check": "adapters_kit.serving.check",
    "export": "adapters_kit.serving.export",
    "combine": "adapters_kit.serving.combine",
    "load_cache": "adapters_kit.serving.kv_cache",
    "chunked_loss": "adapters_kit.kernels.cross_entropy",
    "fuse": "adapters_kit.kernels.fuse",
    "unfuse": "adapters_kit.kernels.fuse",
    "methods": "adapters_kit.methods",
    "wrap": "adapters_kit.wrapping",
    "map_model": "adapters_kit.anatomy",
}

__all__ = sorted([*_HOME, "__version__"])
__version__ = "0.1.0"

quiet()


def __getattr__(name: str):
    if name not in _HOME:
        from adapters_kit.errors import did_you_mean

        raise AttributeError(f"adapters_kit has no {name!r}. {did_you_mean(name, __all__)}")
    home = importlib.import_module(_HOME[name])
    peft_hook.register()
    # `methods` is a package that can be called; every other name lives in a module of another name.
    return home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return __all__


peft_hook.install()
