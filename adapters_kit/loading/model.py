"""load(): a base model with the head of a task.

model = load("HuggingFaceTB/SmolLM2-135M", quantize="nf4")
model = load("models/minilm", task="text-classification", labels=["negative", "positive"])
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from adapters_kit.anatomy import blocks, embeddings
from adapters_kit.errors import ModelError, UnknownNameError, did_you_mean
from adapters_kit.loading.source import Source, find, read_lazily
from adapters_kit.quantization import (
    KINDS,
    bnb_config,
    check_device,
    check_kind,
    check_sizes,
    keep_layout,
    modules_to_leave,
    quantizable,
    quantize_in_place,
)

_log = logging.getLogger(__name__)

# Task -> the transformers class that puts the fitting head on a body.
TASKS: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}
LABELLED = ("text-classification", "token-classification", "image-classification")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load(
    name: str | os.PathLike,
    task: str = "causal-lm",
    *,
    labels: Sequence[str] | None = None,
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    compute_dtype: str | torch.dtype | None = None,
    double_quant: bool = True,
    quant_storage: str | torch.dtype | None = None,
    skip: Sequence[str] = (),
    norms_fp32: bool = False,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model called `name` with the head of `task`, in eval mode.

    Modules that the checkpoint does not have, such as a new classifier, start at random. Their paths are in the
    returned model's `fresh_modules`; `wrap` trains and saves them with the adapter.

    Args:
        name: hub id, local folder, or the path of a .gguf file (unpacked: its weights become ordinary tensors).
        task: one of `TASKS`.
        labels: class names, in the order of the head's outputs; kept in `model.config.id2label`. Without them the
            checkpoint's own stay. A head of another size than the checkpoint's starts anew.
        quantize: None, or "nf4", "fp4", "int8": the linears of the blocks in bitsandbytes' format. Head, embeddings,
            norms and routers stay in `dtype`. A checkpoint saved quantized needs no `quantize`.
        dtype: "float32", "bfloat16", "float16" (or a `torch.dtype`) for what is not quantized. None: the checkpoint's
            own; bfloat16 with `quantize`; float32 for quantized GGUF files.
        compute_dtype: of matrix products with 4-bit weights; None: `dtype`.
        double_quant: quantize the scales of 4-bit blocks too (0.37 bit less per weight).
        quant_storage: what 4-bit weights are stored as. FSDP2 shards them if it equals `dtype`; it cannot shard int8.
            None: uint8.
        skip: linears of the blocks to leave unquantized: paths, or their ends ("down_proj").
        norms_fp32: keep the weights of norms (1-D parameters of the blocks) in float32.
        device_map: as in transformers' `from_pretrained`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run modelling code that comes with the model.
        attn_implementation: as in transformers ("sdpa", "eager", ...).

    Raises:
        UnknownNameError: no such task, dtype, kind of quantization, module to skip or local path.
        ModelError: no weights, weights that do not fit the config, a model that has no head for the task, sizes that
            bitsandbytes cannot quantize.
        MissingPackageError: bitsandbytes or gguf is absent, too old or broken.
    """
    if task not in TASKS:
        raise UnknownNameError(f"Unknown task {task!r}. {did_you_mean(task, TASKS)}")
    _check_labels(labels, task)
    if quantize is not None:
        check_kind(quantize)
    elif skip:
        raise UnknownNameError(f"skip={list(skip)!r} needs quantize=, one of {', '.join(KINDS)}.")
    source = find(name)
    source.check_weights()
    config = _read_config(source, revision, trust_remote_code)
    auto_class = _class_for(config, task, source)
    _set_labels(config, labels)
    if task == "question-answering":
        config.num_labels = 2  # a start and an end, whatever the checkpoint classified before
    saved_as = _saved_kind(config)
    if quantize is not None and saved_as is not None:
        if quantize != saved_as:
            raise ModelError(
                f"{source.name} is already quantized ({saved_as}); quantize={quantize!r} cannot be applied on top. "
                "Leave quantize out, or load the unquantized model."
            )
        quantize = None
    wanted_dtype = as_dtype(dtype) if dtype is not None else torch.bfloat16 if quantize else None
    options: dict[str, Any] = {
        "dtype": wanted_dtype or "auto",
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        **source.options(revision),
    }
    options = {key: value for key, value in options.items() if value is not None}
    if quantize is None:
        model, info = _read(auto_class, source, config, saved_as, labels, options)
    else:
        skeleton = _skeleton(auto_class, config, trust_remote_code)
        wanted = quantizable(skeleton, skip)
        check_device(quantize, _device_type(device_map))
        check_sizes(skeleton, wanted, quantize, _device_type(device_map))
        plan = bnb_config(
            quantize,
            compute_dtype=as_dtype(compute_dtype) if compute_dtype is not None else wanted_dtype,
            double_quant=double_quant,
            quant_storage=as_dtype(quant_storage) if quant_storage is not None else torch.uint8,
            skip=modules_to_leave(skeleton, wanted),
        )
        if source.gguf_file:
            model, info = _read(auto_class, source, config, None, labels, options)
            quantize_in_place(model, wanted, plan)
        else:
            options["quantization_config"] = plan
            model, info = _read_and_quantize(type(skeleton), source, config, labels, options, revision)
    _check_complete(model, info, source, labels)
    _finish(model, source, task, norms_fp32)
    return model


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype for a name such as "bf16".

    Raises:
        UnknownNameError: not a float dtype that models are loaded in.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise UnknownNameError(f"Unknown dtype {str(dtype)!r}. {did_you_mean(str(dtype), DTYPES)}")


def _read(auto_class, source, config, saved_as, labels, options):
    """transformers' own loading: whatever is not quantized on the way."""
    if source.gguf_file:
        from transformers import GgufConfig

        # Unpacked at once: packed GGUF blocks can be neither trained through nor saved.
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    elif saved_as in KINDS:
        check_kind(saved_as)
        _leave_fresh_linears(auto_class, source, config, options)
    return _from_pretrained(auto_class, source.location, source, labels, {**options, "config": config})


def _read_and_quantize(model_class, source, config, labels, options, revision):
    """Tensor by tensor from the safetensors files, so that the 16-bit checkpoint is never in memory as a whole."""
    files = source.safetensors_files(revision)
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not files or sharded or options.get("trust_remote_code"):
        return _from_pretrained(model_class, source.location, source, labels, {**options, "config": config})
    options.pop("revision", None)
    with read_lazily(files) as state_dict:
        model, info = _from_pretrained(
            model_class, None, source, labels, {**options, "config": config, "state_dict": state_dict}
        )
    # Without a location transformers skips these two.
    model.name_or_path = model.config._name_or_path = source.location
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.location, revision=revision)
        except OSError:
            model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, info


def _from_pretrained(model_class, location, source, labels, options):
    try:
        return model_class.from_pretrained(
            location, ignore_mismatched_sizes=labels is not None, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Cannot load {source.name}: {_gist(error)}") from error


def _leave_fresh_linears(auto_class, source, config, options) -> None:
    """Keep transformers from quantizing a new head of a checkpoint saved quantized: only what was saved so is so."""
    skeleton = _skeleton(auto_class, config, options.get("trust_remote_code", False))
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


def _check_complete(model, info, source: Source, labels) -> None:
    """Refuse a body at random; remember which modules are new."""
    bad = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    body = tuple(f"{path}." for path in (*blocks(model), *embeddings(model)))
    for keys, what in ((missing, "are not in the checkpoint"), (bad, "have another shape than the config says")):
        inside = [key for key in keys if key.startswith(body)]
        if inside:
            raise ModelError(
                f"{len(inside)} tensors of {source.name} {what} ({', '.join(inside[:3])}"
                f"{', …' if len(inside) > 3 else ''}): the weights do not belong to this config.json."
            )
    fresh = dict.fromkeys(key.rpartition(".")[0] for key in sorted({*missing, *bad}))
    model.fresh_modules = [path for path in fresh if path]


def _finish(model, source: Source, task: str, norms_fp32: bool) -> None:
    keep_layout(model)
    # The way back from a quantized checkpoint to its saved form does not exist in transformers, and is not needed: the
    # state dict has that form already. Left in, saving fails.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            entry
            for entry in conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(entry, "operations", ()))
        ]
    if source.gguf_file:
        model.name_or_path = model.config._name_or_path = os.path.join(source.location, source.gguf_file)
    text = model.config.get_text_config()
    if task in LABELLED and getattr(text, "pad_token_id", 0) is None:
        # Classifiers over decoders find the last token that is not padding.
        eos = text.eos_token_id
        text.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if norms_fp32:
        inside, more = tuple(f"{path}." for path in blocks(model)), 0
        for path, parameter in model.named_parameters():
            if path.startswith(inside) and parameter.ndim == 1 and "norm" in path.rpartition(".")[0].lower():
                more += parameter.numel() * (4 - parameter.element_size())
                parameter.data = parameter.data.float()
        _log.warning("norms_fp32: the norms of the blocks take %.2f MB more", more / 1e6)


def _check_labels(labels: Sequence[str] | None, task: str) -> None:
    if labels is None:
        return
    if task not in LABELLED:
        raise UnknownNameError(f"The task {task!r} has no labels; they belong to {', '.join(LABELLED)}.")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f'labels={labels!r}: give a list of names, such as ["negative", "positive"].')
    if not labels:
        raise ModelError("labels=[]: the list is empty.")
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise ModelError(f"labels={list(labels)!r}: {twice[0]!r} is there twice.")


def _set_labels(config: PreTrainedConfig, labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    own = [config.id2label[index] for index in sorted(config.id2label)]
    # A head trained on these very classes has its own order of them: renaming its outputs would swap the classes.
    names = own if sorted(own) == sorted(labels) else list(labels)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}


def _read_config(source: Source, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    options = source.options(revision)
    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        hint = "" if source.local else " If it is a local folder, check the path."
        raise ModelError(f"Cannot read the config of {source.name}: {_gist(error)}{hint}") from error


def _class_for(config: PreTrainedConfig, task: str, source: Source) -> Any:
    """The Auto class of `task`; refuses a model type that has no such head."""

    def fits(candidate: str) -> bool:
        auto_class = getattr(transformers, TASKS[candidate])
        remote = getattr(config, "auto_map", None) or {}
        return type(config) in auto_class._model_mapping or auto_class.__name__ in remote

    if not fits(task):
        has = [candidate for candidate in TASKS if fits(candidate)]
        raise ModelError(
            f"{source.name} is a {config.model_type} model, which has no head for {task!r}. "
            + (f"It can do: {', '.join(has)}." if has else "None of the known tasks fits it.")
        )
    return getattr(transformers, TASKS[task])


def skeleton(name: str | os.PathLike, task: str | None = None, *, labels: Sequence[str] | None = None):
    """The model that `load` would return, on the meta device: shapes without weights, from the config alone.

    Without a task, the class that the checkpoint was saved as.
    """
    source = find(name)
    config = _read_config(source, None, False)
    _set_labels(config, labels)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    if task is None and own is not None:
        with torch.device("meta"):
            return own._from_config(config)
    return _skeleton(_class_for(config, task or "causal-lm", source), config, False)


def _skeleton(auto_class, config, trust_remote_code: bool) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def _saved_kind(config: PreTrainedConfig) -> str | None:
    """How the checkpoint was saved: one of `KINDS`, another method's name, or None for unquantized."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if saved.get("load_in_8bit"):
        return "int8"
    if saved.get("load_in_4bit"):
        return saved.get("bnb_4bit_quant_type", "fp4")
    return str(saved.get("quant_method", "unknown"))


def _device_type(device_map: Any) -> str:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if all(place in ("cpu", torch.device("cpu")) for place in places) or not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type


def _gist(error: BaseException) -> str:
    """What a library's long message says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
