"""Weights into the model, by transformers, and quantized on the way without a second copy."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, GgufConfig, PreTrainedConfig, PreTrainedModel

from adapters_kit.artifacts.base_config import read_as_model
from adapters_kit.artifacts.source import Source
from adapters_kit.errors import ModelError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.loading.lazy import read_lazily
from adapters_kit.noise import without_load_report
from adapters_kit.quantization import check_kind, modules_to_leave
from adapters_kit.quantization_table import KINDS

Loaded = tuple[PreTrainedModel, dict[str, Any]]  # with transformers' account of missing and misfitting keys


def read(
    auto_class: Any,
    source: Source,
    config: PreTrainedConfig,
    saved_as: str | None,
    options: dict[str, Any],
) -> Loaded:
    """transformers' own loading: whatever is not quantized on the way."""
    if source.gguf_file:
        # Unpacked at once: packed GGUF blocks can be neither trained through nor saved.
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    elif saved_as in KINDS:
        check_kind(saved_as)
        _leave_fresh_linears(auto_class, source, config, options)
    return _from_pretrained(auto_class, source.location, source, {**options, "config": config})


def read_and_quantize(
    auto_class: Any,
    skeleton: PreTrainedModel,
    source: Source,
    config: PreTrainedConfig,
    options: dict[str, Any],
    plan: BitsAndBytesConfig,
) -> Loaded:
    """Tensor by tensor from the safetensors files, so that the 16-bit checkpoint is never in memory as a whole."""
    options = {**options, "config": config, "quantization_config": plan}
    revision = options.get("revision")
    files = source.safetensors_files(revision)
    if not files or needs_transformers(options):
        return _from_pretrained(type(skeleton), source.location, source, options)
    options.pop("revision", None)
    with read_lazily(files) as state_dict:
        model, info = _from_pretrained(type(skeleton), None, source, {**options, "state_dict": state_dict})
    # Without a location transformers skips these two.
    model.name_or_path = model.config._name_or_path = source.location
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.location, revision=revision)
        except OSError:
            model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, info


def read_gguf_and_quantize(
    auto_class: Any,
    skeleton: PreTrainedModel,
    source: Source,
    config: PreTrainedConfig,
    options: dict[str, Any],
    plan: BitsAndBytesConfig,
) -> Loaded:
    """The same from a GGUF file; the unquantized model where transformers has to unpack the file as a whole."""
    from adapters_kit.loading.gguf import read_gguf_lazily

    with read_gguf_lazily(os.path.join(source.location, source.gguf_file or ""), skeleton) as state_dict:
        if state_dict is None or needs_transformers(options):
            return read(auto_class, source, config, None, options)
        options = {key: value for key, value in options.items() if key != "gguf_file"}
        options |= {"config": config, "quantization_config": plan, "state_dict": state_dict}
        return _from_pretrained(type(skeleton), None, source, options)


def read_gguf_in_blocks(skeleton: PreTrainedModel, source: Source, options: dict[str, Any]) -> Loaded:
    """A GGUF file whose linears and embeddings stay in their blocks (`BlockTensor`); the rest is unpacked.

    Raises:
        ModelError: an architecture whose tensors transformers does not map one by one; a sharded or remote model.
    """
    from adapters_kit.loading.gguf import read_gguf_lazily

    if needs_transformers(options):
        raise ModelError(f'{source.name}: quantize="keep" works neither with sharding nor with remote code.')
    file = os.path.join(source.location, source.gguf_file or "")
    options = {key: value for key, value in options.items() if key != "gguf_file"}
    with read_gguf_lazily(file, skeleton, keep=True) as state_dict:
        options |= {"config": skeleton.config, "state_dict": state_dict}
        model, info = _from_pretrained(type(skeleton), None, source, options)
    for entry in model.parameters():
        if isinstance(entry, BlockTensor):
            entry.requires_grad = False
    return model, info


def needs_transformers(options: Mapping[str, Any]) -> bool:
    """Whether loading involves what only a plain `from_pretrained` does: sharding, code that comes with the model."""
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return sharded or bool(options.get("trust_remote_code"))


def _from_pretrained(model_class: Any, location: str | None, source: Source, options: Mapping[str, Any]) -> Loaded:
    # `load` looks at what is missing and at what has another shape.
    with read_as_model(source.name, ModelError), trusted(source), without_load_report():
        return model_class.from_pretrained(location, ignore_mismatched_sizes=True, output_loading_info=True, **options)


def _leave_fresh_linears(auto_class: Any, source: Source, config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Keep transformers from quantizing a new head of a checkpoint saved quantized: only what was saved so is so."""
    skeleton = meta_model(auto_class, config, options.get("trust_remote_code", False))
    files = source.safetensors_files(options.get("revision"))
    if not files:
        return
    with read_lazily(files) as state_dict:
        # A scale beside it tells a quantized weight.
        marks = (".SCB", ".weight.absmax")
        quantized = [key.removesuffix(mark) for key in state_dict for mark in marks if key.endswith(mark)]
    prefix = getattr(skeleton, "base_model_prefix", "")
    known = {*quantized, *(f"{prefix}.{path}" for path in quantized)}
    known |= {path.removeprefix(f"{prefix}.") for path in quantized}
    saved = [path for path, module in skeleton.named_modules() if path in known]
    plan = config.quantization_config
    if saved and isinstance(plan, dict):
        plan["llm_int8_skip_modules"] = sorted(
            {*(plan.get("llm_int8_skip_modules") or []), *modules_to_leave(skeleton, saved)}
        )


def meta_model(auto_class: Any, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model without memory for its weights."""
    with read_as_model(config.name_or_path or "the model", ModelError), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def trusted(source: Source) -> Iterator[None]:
    """Inside, transformers reads something that may need Python files of the model's own.

    Raises:
        ModelError: it does, and nobody said that they may run.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{source.name} needs the Python files that come with it, and they are not run unless you say so, since "
            "they can do all that you can. Read them, then give trust_remote_code=True."
        ) from error
