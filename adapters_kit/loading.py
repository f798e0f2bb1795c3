"""The base model, ready for a task, at 32, 16, 8 or 4 bit; and the tokenizer or image processor that fits it.

    model = load("HuggingFaceTB/SmolLM2-135M", quantize="nf4")
    model = load("models/minilm", task="text-classification", labels=["negative", "positive"])
    tokenizer = load_processor("models/minilm")

A model is named by a hub id, a local folder or the path of a .gguf file.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from adapters_kit.errors import MissingPackageError, ModelError, UnknownNameError, did_you_mean

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

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load(
    name: str | os.PathLike,
    task: str = "causal-lm",
    *,
    labels: Sequence[str] | None = None,
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model called `name` with the head of `task`, in eval mode.

    Args:
        name: hub id, local folder, or the path of a .gguf file (unpacked: its weights become ordinary tensors).
        task: one of `TASKS`.
        labels: class names, in the order of the head's outputs; kept in `model.config.id2label`. Without them the
            checkpoint's own stay. A head of another size than the checkpoint's starts anew.
        quantize: None, or "nf4", "fp4", "int8": the linears of the blocks in bitsandbytes' format.
        dtype: "float32", "bfloat16", "float16" (or a `torch.dtype`) for every float tensor; None keeps the
            checkpoint's own.
        device_map: as in transformers' `from_pretrained`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run modelling code that comes with the model.
        attn_implementation: as in transformers ("sdpa", "eager", ...).

    Raises:
        UnknownNameError: no such task, dtype, kind of quantization or local path.
        ModelError: no weights, weights that do not fit the config, a model that has no head for the task.
        MissingPackageError: bitsandbytes or gguf is absent.
    """
    if task not in TASKS:
        raise UnknownNameError(f"Unknown task {task!r}. {did_you_mean(task, TASKS)}")
    _check_labels(labels, task)
    source = find(name)
    source.check_weights()
    config = _read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    auto_class = _class_for(config, task, source)
    _set_labels(config, labels)
    options: dict[str, Any] = {
        "config": config,
        "dtype": "auto" if dtype is None else as_dtype(dtype),
        "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": labels is not None,
        "output_loading_info": True,
        **source.options(revision),
    }
    if device_map is not None:
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantize == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantize,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        )
        options["dtype"] = torch.bfloat16 if dtype is None else as_dtype(dtype)
    try:
        model, report = auto_class.from_pretrained(source.location, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Cannot load {source.name}: {error}") from error
    text = model.config.get_text_config()
    # Image models have no tokens at all.
    if task in LABELLED and getattr(text, "eos_token_id", None) is not None and text.pad_token_id is None:
        text.pad_token_id = _first(text.eos_token_id)
    model.fresh_modules = _fresh_modules(model, report)
    return model


def load_processor(name: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor, feature extractor or combined processor that goes with the model called `name`.

    A tokenizer without a padding token pads with its end-of-text token, so that batches work; the attention mask tells
    padding from text.

    Raises:
        UnknownNameError: no such local path.
        ModelError: the folder holds no processor files.
    """
    source = find(name)
    try:
        if source.gguf_file:
            _need_gguf()
            processor = transformers.AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
        else:
            processor = transformers.AutoProcessor.from_pretrained(
                source.location, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No tokenizer or processor for {source.name}: {_first_line(error)} Copy the processor files of the "
            "original model beside the weights, or name the model they come from."
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "pad_token", "") is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


@dataclass(frozen=True)
class Source:
    """Where a model is: a hub id, a folder, or a GGUF file inside a folder."""

    name: str
    location: str
    gguf_file: str | None = None
    local: bool = False

    def options(self, revision: str | None = None) -> dict[str, Any]:
        """What `from_pretrained` needs besides the location."""
        if self.gguf_file:
            from transformers import GgufConfig

            # Unpacked at once: packed GGUF blocks can be neither trained through nor saved.
            return {"gguf_file": self.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        return {} if revision is None else {"revision": revision}

    def check_weights(self) -> None:
        """Refuse a local folder that has no weights.

        Raises:
            ModelError: with what the folder does hold.
        """
        if not self.local or self.gguf_file:
            return
        folder = Path(self.location)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ModelError(
                f"{self.name} holds an adapter, not a model. Load the base model, then put the adapter on it: "
                f'ak.wrap(ak.load(base), "{self.name}").'
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"{self.name} is not a model folder: it has no config.json. {_holds(folder)}")
        if not any((folder / file).is_file() for file in _WEIGHTS) and not list(folder.glob("*.safetensors")):
            raise ModelError(
                f"{self.name} has a config.json but no weights ({' or '.join(_WEIGHTS[:2])}). {_holds(folder)} "
                "Download the weights again, or save the model there with save_pretrained."
            )


def find(name: str | os.PathLike) -> Source:
    """What `name` stands for. A path that exists wins over a hub id of the same spelling.

    Raises:
        UnknownNameError: it looks like a path and nothing is there.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnknownNameError(f"{text} is a file. A model is a folder, a .gguf file or a hub id.")
        return Source(text, str(path.parent), gguf_file=path.name, local=True)
    if path.is_dir():
        return Source(text, str(path), local=True)
    looks_like_path = isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_like_path or text.endswith(".gguf") or not text:
        beside = [entry.name for entry in path.parent.iterdir()] if text and path.parent.is_dir() else []
        where = f"in {path.parent}" if beside else f"({path.parent} is empty or does not exist)"
        raise UnknownNameError(
            f"No model at {text!r} {where}. {did_you_mean(path.name, beside) if beside else ''}".strip()
        )
    return Source(text, text)


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


def _check_labels(labels: Sequence[str] | None, task: str) -> None:
    if labels is None:
        return
    if task not in LABELLED:
        raise UnknownNameError(f"The task {task!r} has no labels; they belong to {', '.join(LABELLED)}.")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f'labels={labels!r}: give a list of names, such as ["negative", "positive"].')
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice or not labels:
        raise ModelError(
            f"labels={list(labels)!r}: " + (f"{twice[0]!r} is there twice." if twice else "the list is empty.")
        )


def _set_labels(config: PreTrainedConfig, labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    own = [config.id2label[index] for index in sorted(config.id2label)]
    # A head trained on these very classes has its own order of them: renaming its outputs would swap the classes.
    names = own if sorted(own) == sorted(labels) else list(labels)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}


def _fresh_modules(model: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    """The outermost modules of which the checkpoint held nothing (or nothing of the right shape): they are random.

    `wrap` trains and saves them with the adapter.
    """
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    found: list[str] = []
    for path, module in model.named_modules():
        keys = [f"{path}.{key}" for key, _ in module.named_parameters()]
        if path and keys and fresh.issuperset(keys) and not any(path.startswith(outer + ".") for outer in found):
            found.append(path)
    return found


def _read_config(source: Source, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file:
        _need_gguf()
        options["gguf_file"] = source.gguf_file
    elif revision is not None:
        options["revision"] = revision
    try:
        return AutoConfig.from_pretrained(source.location, **options)
    except (OSError, ValueError, KeyError) as error:
        hint = "" if source.local else " If it is a local folder, check the path."
        raise ModelError(f"Cannot read the config of {source.name}: {_first_line(error)}{hint}") from error


def _class_for(config: PreTrainedConfig, task: str, source: Source) -> Any:
    """The Auto class of `task`; refuses a model type that has no such head."""

    def fits(candidate: str) -> bool:
        auto_class = getattr(transformers, TASKS[candidate])
        return type(config) in auto_class._model_mapping or auto_class.__name__ in (
            getattr(config, "auto_map", None) or {}
        )

    if not fits(task):
        has = [candidate for candidate in TASKS if fits(candidate)]
        raise ModelError(
            f"{source.name} is a {config.model_type} model, which has no head for {task!r}. "
            + (f"It can do: {', '.join(has)}." if has else "None of the known tasks fits it.")
        )
    return getattr(transformers, TASKS[task])


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("Reading a .gguf file needs the package gguf: pip install gguf") from error


def _holds(folder: Path) -> str:
    files = sorted(entry.name for entry in folder.iterdir())
    return f"It holds: {', '.join(files[:12])}{' …' if len(files) > 12 else ''}." if files else "It is empty."


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
