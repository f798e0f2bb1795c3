"""A base as a folder of safetensors: itself, or what a .gguf file unpacks to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_kit.errors import ShippingError


@contextmanager
def as_checkpoint(base: Path, work: Path) -> Iterator[Path]:
    """A folder with safetensors weights: `base` itself, or a conversion of it written to `work`.

    A GGUF file is dequantized by transformers into the whole model in memory; there is no streaming for it.
    """
    if base.is_dir():
        yield base
        return
    if base.suffix != ".gguf":
        raise ShippingError(f"{base} is neither a model folder nor a .gguf file.")
    yield convert_gguf(base, work)


def convert_gguf(file: Path, folder: Path) -> Path:
    """Save a GGUF model as a transformers folder: float32 safetensors, config, tokenizer."""
    from adapters_kit.loading import load, load_processor

    model = load(file, "causal-lm", dtype="float32")
    # What transformers leaves behind marks the model as quantized, and it refuses to save.
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    load_processor(file).save_pretrained(folder)
    return folder
