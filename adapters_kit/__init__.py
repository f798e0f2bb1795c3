"""adapters_kit: parameter-efficient fine-tuning of Hugging Face models, plugged into peft.

    import adapters_kit as ak
    model = ak.wrap(ak.load("path-or-hub-id", task="causal-lm"), "lora", r=16)

Names are imported when first used, so that `import adapters_kit` costs milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from adapters_kit import peft_hook
from adapters_kit.noise import quiet

if TYPE_CHECKING:  # the same names for editors and type checkers; a test holds the two lists together
    from adapters_kit.anatomy import map_model as map_model
    from adapters_kit.artifacts.record import record as record
    from adapters_kit.comparison import Comparison as Comparison
    from adapters_kit.comparison import compare as compare
    from adapters_kit.comparison.search import Search as Search
    from adapters_kit.comparison.search import search as search
    from adapters_kit.compression.compress import compress as compress
    from adapters_kit.compression.drop_layers import drop_layers as drop_layers
    from adapters_kit.errors import AdapterError as AdapterError
    from adapters_kit.inference import evaluate as evaluate
    from adapters_kit.inference import predict as predict
    from adapters_kit.inference import stream as stream
    from adapters_kit.inference.harness import harness as harness
    from adapters_kit.kernels.cross_entropy import chunked_loss as chunked_loss
    from adapters_kit.kernels.fuse import fuse as fuse
    from adapters_kit.kernels.fuse import unfuse as unfuse
    from adapters_kit.loading import load as load
    from adapters_kit.loading import load_processor as load_processor
    from adapters_kit.merging.extract import convert as convert
    from adapters_kit.merging.extract import extract as extract
    from adapters_kit.merging.merge import MergeReport as MergeReport
    from adapters_kit.merging.merge import merge as merge
    from adapters_kit.methods import table as methods  # noqa: F401 - exported under this name
    from adapters_kit.methods.bottleneck.model import BottleneckConfig as BottleneckConfig
    from adapters_kit.methods.prefix.model import PrefixConfig as PrefixConfig
    from adapters_kit.methods.prefix.model import eject as eject
    from adapters_kit.methods.prefix.peft_prefix import from_peft_prefix as from_peft_prefix
    from adapters_kit.methods.prefix.peft_prefix import to_peft_prefix as to_peft_prefix
    from adapters_kit.methods.together.config import CombinedConfig as CombinedConfig
    from adapters_kit.methods.together.live import activate as activate
    from adapters_kit.methods.together.live import fold as fold
    from adapters_kit.methods.together.live import stack as stack
    from adapters_kit.recipe import Recipe as Recipe
    from adapters_kit.serving.check import check as check
    from adapters_kit.serving.combine import combine as combine
    from adapters_kit.serving.export import export as export
    from adapters_kit.serving.hub import Pushed as Pushed
    from adapters_kit.serving.hub import pull as pull
    from adapters_kit.serving.hub import push as push
    from adapters_kit.serving.kv_cache import load_cache as load_cache
    from adapters_kit.serving.prove import ProofReport as ProofReport
    from adapters_kit.serving.prove import prove as prove
    from adapters_kit.training.many.train_many import train_many as train_many
    from adapters_kit.training.plan import Plan as Plan
    from adapters_kit.training.plan import plan as plan
    from adapters_kit.training.run import Run as Run
    from adapters_kit.training.sweep import sweep as sweep
    from adapters_kit.training.table import compare_runs as compare_runs
    from adapters_kit.training.train import train as train
    from adapters_kit.wrapping import wrap as wrap

_HOME = {
    "AdapterError": "adapters_kit.errors",
    "record": "adapters_kit.artifacts.record",
    "BottleneckConfig": "adapters_kit.methods.bottleneck.model",
    "PrefixConfig": "adapters_kit.methods.prefix.model",
    "eject": "adapters_kit.methods.prefix.model",
    "from_peft_prefix": "adapters_kit.methods.prefix.peft_prefix",
    "to_peft_prefix": "adapters_kit.methods.prefix.peft_prefix",
    "CombinedConfig": "adapters_kit.methods.together.config",
    "activate": "adapters_kit.methods.together.live",
    "fold": "adapters_kit.methods.together.live",
    "stack": "adapters_kit.methods.together.live",
    "Recipe": "adapters_kit.recipe",
    "Run": "adapters_kit.training.run",
    "evaluate": "adapters_kit.inference",
    "predict": "adapters_kit.inference",
    "stream": "adapters_kit.inference",
    "harness": "adapters_kit.inference.harness",
    "Plan": "adapters_kit.training.plan",
    "plan": "adapters_kit.training.plan",
    "Comparison": "adapters_kit.comparison",
    "compare": "adapters_kit.comparison",
    "Search": "adapters_kit.comparison.search",
    "search": "adapters_kit.comparison.search",
    "compare_runs": "adapters_kit.training.table",
    "sweep": "adapters_kit.training.sweep",
    "train": "adapters_kit.training.train",
    "train_many": "adapters_kit.training.many.train_many",
    "load": "adapters_kit.loading",
    "load_processor": "adapters_kit.loading",
    "drop_layers": "adapters_kit.compression.drop_layers",
    "compress": "adapters_kit.compression.compress",
    "convert": "adapters_kit.merging.extract",
    "extract": "adapters_kit.merging.extract",
    "MergeReport": "adapters_kit.merging.merge",
    "merge": "adapters_kit.merging.merge",
    "check": "adapters_kit.serving.check",
    "export": "adapters_kit.serving.export",
    "combine": "adapters_kit.serving.combine",
    "prove": "adapters_kit.serving.prove",
    "ProofReport": "adapters_kit.serving.prove",
    "push": "adapters_kit.serving.hub",
    "pull": "adapters_kit.serving.hub",
    "Pushed": "adapters_kit.serving.hub",
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


def __getattr__(name: str) -> Any:
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
