"""Messages of bitsandbytes and transformers that say nothing to the user, left out. All others come through."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = {
    # Once for every int8 product in evaluation: thousands of lines.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast from",
    # At every model that is built from shapes, though nobody asked to shard it.
    "transformers.distributed.tensor_parallel": "The following layers were not sharded",
    # At every import of peft on a CPU with AVX512-bf16, about an inference kernel that adapters_kit turns off.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


class _StartsWith(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.start)


def quiet() -> None:
    """Install the filters; more than once does no harm."""
    # peft asks transformers for a property under its old name, once for every model that it wraps.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # It looks for a config.json inside the base, which a .gguf file cannot have.
    warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf ", UserWarning)
    for name, start in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _StartsWith) for known in logger.filters):
            logger.addFilter(_StartsWith(start))


@contextmanager
def without_vocabulary_guess() -> Iterator[None]:
    """Leaves out what peft says of a base whose config.json it cannot ask the hub for: it takes it as unchanged.

    For whoever loaded the base itself and changed none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        yield


@contextmanager
def without_load_report() -> Iterator[None]:
    """Leaves out transformers' table of weights that a checkpoint does not have, with its advice to train.

    For whoever looks at the missing weights itself: a new head is trained or comes with the adapter, and a body that
    misses weights is refused.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def no_report(record: logging.LogRecord) -> bool:
        return " LOAD REPORT" not in str(record.msg)

    logger.addFilter(no_report)
    try:
        yield
    finally:
        logger.removeFilter(no_report)
