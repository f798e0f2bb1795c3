"""load(): a base model with the head of a task.

model = load("HuggingFaceTB/SmolLM2-135M", quantize="nf4")
model = load("models/minilm", task="text-classification", labels=["negative", "positive"])
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from adapters_kit.anatomy import blocks, embeddings, expert_parameters
from adapters_kit.artifacts.base_config import check_config
from adapters_kit.artifacts.dtypes import as_dtype
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.record_reader import OURS
from adapters_kit.artifacts.source import Source, find
from adapters_kit.errors import ModelError, UnknownNameError, did_you_mean, gist
from adapters_kit.loading.gguf_header import check_header
from adapters_kit.loading.reader import (
    meta_model,
    needs_transformers,
    read,
    read_and_quantize,
    read_gguf_and_quantize,
    read_gguf_in_blocks,
    trusted,
)
from adapters_kit.loading.room import check_room, stored_bytes
from adapters_kit.quantization import (
    KEEP,
    bnb_config,
    check_device,
    check_kind,
    check_sizes,
    keep_layout,
    modules_to_leave,
    quantizable,
    quantize_in_place,
)
from adapters_kit.quantization_table import KINDS
from adapters_kit.task_table import TASKS, labelled

_log = logging.getLogger(__name__)
_GENERATION = "generation_config.json"


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
    returned model's `fresh_modules`; `wrap` trains and saves them with the adapter. The names that the checkpoint gave
    the outputs of its head are in `saved_labels`.

    Args:
        name: hub id, local folder, or the path of a .gguf file (unpacked: its weights become ordinary tensors).
        task: one of `task_table.TASKS`.
        labels: class names, in the order of the head's outputs; kept in `model.config.id2label`. Without them the
            checkpoint's own stay. A head of another size than the checkpoint's starts anew.
        quantize: None, "keep", "nf4", "fp4" or "int8". "keep": the linears and embeddings of a .gguf file stay in its
            blocks, in about the file's memory, and are unpacked product by product. The others: the linears of the
            blocks in bitsandbytes' format; head, embeddings, norms, routers and fused mixture-of-experts weights (a
            warning tells their size) stay in `dtype`. A checkpoint saved quantized needs no `quantize`.
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
            bitsandbytes cannot quantize, float16 on a CPU that cannot compute in it.
        MissingPackageError: bitsandbytes or gguf is absent, too old or broken.
    """
    # Longer than a screen: what is refused before reading, what is read, what is mended after; one thing after another.
    if task not in TASKS:
        raise UnknownNameError(f"Unknown task {task!r}. {did_you_mean(task, TASKS)}")
    _check_labels(labels, task)
    if quantize is not None and quantize != KEEP:
        check_kind(quantize)
    elif skip:
        raise UnknownNameError(f"skip={list(skip)!r} needs quantize=, one of {', '.join(KINDS)}.")
    source = find(name)
    source.check_weights()
    if quantize == KEEP:
        file_in_blocks(source)
    config = _read_config(source, revision, trust_remote_code)
    _check_padding(config, source)
    auto_class = _class_for(config, task, source)
    saved_labels = _set_labels(config, task, labels)
    saved_as = _saved_kind(config)
    if quantize is not None and saved_as is not None:
        if quantize != saved_as:
            raise ModelError(
                f"{source.name} is already quantized ({saved_as}); quantize={quantize!r} cannot be applied on top. "
                "Leave quantize out, or load the unquantized model."
            )
        quantize = None
    wanted_dtype = as_dtype(dtype) if dtype is not None else torch.bfloat16 if quantize else None
    as_saved = getattr(config, "dtype", None)
    _check_half([wanted_dtype or as_saved, as_dtype(compute_dtype) if compute_dtype else None], device_map)
    options: dict[str, Any] = {
        "dtype": wanted_dtype or "auto",
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        **source.options(revision),
    }
    options = {key: value for key, value in options.items() if value is not None}
    skeleton = None
    if quantize or not needs_transformers(options):
        skeleton = meta_model(auto_class, config, trust_remote_code)
        check_room(skeleton, stored_bytes(source), source.name, ModelError)
    if quantize is None:
        model, info = read(auto_class, source, config, saved_as, options)
    elif quantize == KEEP:
        assert skeleton is not None
        model, info = read_gguf_in_blocks(skeleton, source, options)
    else:
        assert skeleton is not None and wanted_dtype is not None  # with quantize= they are
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
        _tell_of_experts(skeleton, quantize, wanted_dtype)
        how = read_gguf_and_quantize if source.gguf_file else read_and_quantize
        model, info = how(auto_class, skeleton, source, config, options, plan)
        if not getattr(model, "is_quantized", False):
            quantize_in_place(model, wanted, plan)
    _check_complete(model, info, source, labels)
    model.saved_labels = saved_labels
    _finish(model, source, task, norms_fp32)
    return model


def _check_half(dtypes: list[Any], device_map: Any) -> None:
    """Refuse fp16 on a CPU whose torch has no such products. Tried, not assumed."""
    if torch.float16 not in dtypes or _device_type(device_map) != "cpu":
        return
    try:
        _half_product()
    except RuntimeError as error:
        raise ModelError(
            f"torch {torch.__version__} cannot multiply in float16 on this CPU ({gist(error)}). Load with "
            "dtype='bf16', of the same size, or dtype='fp32'."
        ) from error


def _half_product() -> torch.Tensor:
    return torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)


def _tell_of_experts(skeleton: PreTrainedModel, quantize: str, dtype: torch.dtype) -> None:
    """Fused experts are no linear layers, and most of a mixture's weights: whoever reads "nf4" expects them smaller."""
    experts = expert_parameters(skeleton)
    if experts:
        mb = sum(skeleton.get_parameter(path).numel() for path in experts) * dtype.itemsize / 1e6
        _log.warning(
            "quantize=%r: the experts stay in %s, %.1f MB in %d fused tensors such as %s, since bitsandbytes packs "
            "linear layers only. Where they do not fit, spread them: device_map='auto'.",
            quantize,
            str(dtype).removeprefix("torch."),
            mb,
            len(experts),
            experts[0],
        )


def _check_complete(
    model: PreTrainedModel, info: Mapping[str, Any], source: Source, labels: Sequence[str] | None
) -> None:
    """Refuse a body at random; remember which modules are new."""
    bad = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    tables = embeddings(model)
    if labels is not None and model.main_input_name == "pixel_values":
        # A table of the classes themselves (RT-DETR's) is new with them.
        rows = {path: getattr(model.get_submodule(path), "num_embeddings", 0) for path in tables}
        tables = [path for path in tables if rows[path] - len(labels) not in (0, 1)]
    body = tuple(f"{path}." for path in (*blocks(model), *tables))
    for keys, what in ((missing, "are not in the checkpoint"), (bad, "have another shape than the config says")):
        inside = [key for key in keys if key.startswith(body)]
        if keys is bad and labels is None:
            inside = bad  # nobody asked for another head
        if inside:
            raise ModelError(
                f"{len(inside)} tensors of {source.name} {what} ({', '.join(inside[:3])}"
                f"{', …' if len(inside) > 3 else ''}): the weights do not belong to this config.json."
            )
    fresh = dict.fromkeys(key.rpartition(".")[0] for key in sorted({*missing, *bad}))
    model.fresh_modules = [path for path in fresh if path]


def _finish(model: PreTrainedModel, source: Source, task: str, norms_fp32: bool) -> None:
    setattr(model, OURS, True)
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
    if TASKS[task].labelled and getattr(text, "pad_token_id", 0) is None:
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
    if not TASKS[task].labelled:
        raise UnknownNameError(f"The task {task!r} has no labels; they belong to {', '.join(labelled())}.")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f'labels={labels!r}: give a list of names, such as ["negative", "positive"].')
    if not labels:
        raise ModelError("labels=[]: the list is empty.")
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise ModelError(f"labels={list(labels)!r}: {twice[0]!r} is there twice.")


def _set_labels(config: PreTrainedConfig, task: str | None, labels: Sequence[str] | None) -> list[str]:
    """Names the outputs; returns what the checkpoint called its own."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if task == "question-answering":
        config.num_labels = 2  # a start and an end, whatever the checkpoint classified before
    if labels is None:
        return own
    # A head trained on these very classes has its own order of them: renaming its outputs would swap the classes.
    names, places = list(labels), {_spelled_alike(label): place for place, label in enumerate(own)}
    if len(places) == len(own) and sorted(places) == sorted(map(_spelled_alike, labels)):
        names.sort(key=lambda label: places[_spelled_alike(label)])
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    return own


def _spelled_alike(label: str) -> str:
    return label.strip().casefold()


def _read_config(source: Source, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    options = source.options(revision)
    try:
        if source.gguf_file:
            from adapters_kit.loading.gguf import read_config

            check_header(Path(source.location) / source.gguf_file)
            return read_config(source.location, source.gguf_file)
        raw, _ = PreTrainedConfig.get_config_dict(source.location, **options)
        check_config(raw, f"The config of {source.name}", ModelError)
        if source.local and (Path(source.location) / _GENERATION).is_file():
            read_json(Path(source.location) / _GENERATION)  # transformers would go on without a damaged one
        with trusted(source):
            return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers and gguf raise whatever the fields of a damaged file provoke
        hint = "" if source.local else " If it is a local folder, check the path."
        raise ModelError(f"Cannot read the config of {source.name}: {gist(error)}{hint}") from error


def _check_padding(config: PreTrainedConfig, source: Source) -> None:
    """Refuse a padding token behind the vocabulary: torch makes no table of embeddings with it."""
    text = config.get_text_config()
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and size > 0 and not -size <= pad < size:
        raise ModelError(
            f"pad_token_id is {pad} in the config.json of {source.name}, which has the tokens 0 to {size - 1:,}. Set "
            "it there to one of them: the tokenizer's padding token, or that of the end of a text."
        )


def _class_for(config: PreTrainedConfig, task: str, source: Source) -> Any:
    """The Auto class of `task`; refuses a model type that has no such head."""

    remote = getattr(config, "auto_map", None) or {}

    def fitting(candidate: str) -> Any:
        classes = [getattr(transformers, name) for name in TASKS[candidate].auto_classes]
        return next((one for one in classes if type(config) in one._model_mapping or one.__name__ in remote), None)

    found = fitting(task)
    if found is None:
        has = [candidate for candidate in TASKS if fitting(candidate) is not None]
        raise ModelError(
            f"{source.name} is a {config.model_type} model, which has no head for {task!r}. "
            + (f"It can do: {', '.join(has)}." if has else "None of the known tasks fits it.")
        )
    return found


def skeleton(name: str | os.PathLike, task: str | None = None, *, labels: Sequence[str] | None = None) -> Any:
    """The model that `load` would return, on the meta device: shapes without weights, from the config alone.

    Without a task, the class that the checkpoint was saved as.
    """
    source = find(name)
    config = _read_config(source, None, False)
    _set_labels(config, task, labels)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    if task is None and own is not None:
        with torch.device("meta"):
            return own._from_config(config)
    return meta_model(_class_for(config, task or "causal-lm", source), config, False)


def file_in_blocks(source: Source) -> str:
    """The path of the .gguf file whose blocks `quantize="keep"` keeps.

    Raises:
        ModelError: the model is no such file.
    """
    if not source.gguf_file:
        raise ModelError(
            f'quantize="keep" keeps the weights of a .gguf file in their blocks, and {source.name} is none. '
            f"For this model choose one of {', '.join(KINDS)}."
        )
    return os.path.join(source.location, source.gguf_file)


def _saved_kind(config: PreTrainedConfig) -> str | None:
    """How the checkpoint was saved: one of `KINDS`, another method's name, or None for unquantized."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    known = next((name for name, kind in KINDS.items() if kind.is_saved_as(saved)), None)
    method = str(saved.get("quant_method", "unknown"))
    # transformers would go on as if the weights were not quantized.
    if known is None and not {method, f"{method}_4bit"} & AUTO_QUANTIZATION_CONFIG_MAPPING.keys():
        hint = did_you_mean(method, AUTO_QUANTIZATION_CONFIG_MAPPING)
        raise ModelError(f"The config says that the weights are quantized by {method!r}, which is not known. {hint}")
    return known or method


def _device_type(device_map: Any) -> str:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or all(place in ("cpu", torch.device("cpu")) for place in places):
        return "cpu"
    return accelerator.type
