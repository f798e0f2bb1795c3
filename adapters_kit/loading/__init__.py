"""The base model, ready for a task, at 32, 16, 8 or 4 bit; and the tokenizer or image processor that fits it."""

from adapters_kit.artifacts.dtypes import DTYPES, as_dtype
from adapters_kit.artifacts.source import Source, find
from adapters_kit.loading.model import load, skeleton
from adapters_kit.loading.processor import load_processor

__all__ = ["DTYPES", "Source", "as_dtype", "find", "load", "load_processor", "skeleton"]
