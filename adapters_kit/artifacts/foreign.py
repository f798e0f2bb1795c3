"""Adapter folders that other tools wrote: which tool, and what to do where its format is not peft's.

Unsloth, axolotl, LLaMA-Factory, TRL, ms-swift and torchtune's Hugging Face checkpointer write peft's format, which is
read as it is; MLX-LM's is translated (`mlx`). Nothing is computed from a format that cannot be proved from its files.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters_kit.artifacts import mlx
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.unread import PEFTS, tensor_names, weight_files
from adapters_kit.errors import ShippingError
from adapters_kit.names import ADAPTER_CONFIG

Value = TypeVar("Value")
_NAMED = re.compile(
    r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!(?:weight|bias)$)([^.]+)(?=\.(?:weight|bias)$|$)"
)
_FACTOR = re.compile(r"\.lora_(A|B)\b")
_WRAPPERS = re.compile(r"^module\.(?=base_model\.)|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Written by ms-swift beside peft's own options; about its training only.
_OF_TRAINING = frozenset({"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "runtime_config"})
_OFF: tuple[Any, ...] = (None, False, "", [], {}, 0)
_SETUP, _FUSION = "adapter_setup.json", "adapter_fusion_config.json"  # AdapterHub's
_CHECKPOINT = re.compile(r"(checkpoint|step|epoch|global_step|iter)[-_]?\d+")


@dataclass(frozen=True)
class _Format:
    """A format that is not peft's.

    Attributes:
        files: patterns of files that only this tool writes.
        keys: keys of an `adapter_config.json` that only it has.
        text: what it is and what to do; `{folder}` and `{file}` are filled in.
    """

    files: tuple[str, ...]
    keys: tuple[str, ...]
    text: str


_FORMATS = (
    _Format(
        ("adapters.safetensors", "adapters.npz", "[0-9]*_adapters.safetensors"),
        ("lora_parameters", "fine_tune_type"),
        "{folder} was written by MLX-LM or a tool like it, in a format of its own. " + mlx.WAY_OUT,
    ),
    _Format(
        ("adapter_[0-9]*.pt", "adapter_model.pt", "*/adapter_[0-9]*.pt", "epoch_*/adapter_model.pt"),
        (),
        "{folder} holds torchtune's own format ({file}). torchtune writes peft's where the recipe's checkpointer is "
        "FullModelHFCheckpointer. Of a Llama or a Mistral, what is here converts there: "
        "torchtune.models.convert_weights.tune_to_peft_adapter_weights(torch.load('{file}'), num_heads=…, "
        "num_kv_heads=…, dim=…) with the numbers of the base's config.json; save that as adapter_model.safetensors, "
        "beside an adapter_config.json of peft's LoraConfig with the recipe's rank and alpha.",
    ),
    _Format(
        ("lit_model*lora*", "iter-*ckpt.lora", "lit-llama*lora*"),
        (),
        "{folder} was written by LitGPT ({file}). Merge it there: litgpt merge_lora {folder}, then litgpt "
        "convert_from_litgpt {folder} OUT; rename OUT/model.pth to pytorch_model.bin and put the base's config.json "
        "and tokenizer beside it: OUT loads here as a model.",
    ),
    _Format(
        ("lit_model*adapter*",),
        (),
        "{folder} was written by LitGPT ({file}), whose adapters have no file format in peft. Train it again here, for "
        "example with the method 'adaption_prompt' or 'lora'.",
    ),
    _Format(
        (),
        ("delta_type",),
        "{folder} was written by OpenDelta, whose modules have no equal in peft. Train it again here, for example with "
        "the method 'lora' or 'houlsby'.",
    ),
    _Format(
        ("lora_model_state*.pdparams", "prefix_model_state*.pdparams", "*.pdparams"),
        (),
        "{folder} was written by PaddleNLP ({file}). Merge it there (its merge_lora_params.py) and save the result for "
        "transformers, which loads here as a model.",
    ),
    _Format(
        ("pytorch_lora_weights.*",),
        (),
        "{folder} was written by diffusers ({file}) for a model that makes images; such models are not for here.",
    ),
    _Format(
        ("*.nemo", "weights/.metadata", "model_weights/metadata.json"),
        (),
        "{folder} was written by NeMo ({file}). Export it there, to peft's format or merged for transformers, and take "
        "what that writes.",
    ),
    _Format(
        ("*.lora.h5", "*.weights.h5"),
        (),
        "{folder} was written by Keras ({file}). Merge it there and export the model to transformers' format, which "
        "loads here as a model.",
    ),
    _Format(
        ("*.distcp", "*/*.distcp", ".metadata"),
        (),
        "{folder} is a checkpoint of FSDP in shards ({file}), and no adapter. Write one where it was trained: "
        "fsdp_state_dict_type: FULL_STATE_DICT (or accelerate merge-weights), then model.save_pretrained(OUT).",
    ),
    _Format(
        ("*_model_states.pt", "*/*_model_states.pt", "zero_to_fp32.py"),
        (),
        "{folder} is a checkpoint of DeepSpeed ({file}), and no adapter. Write one where it was trained: "
        "python zero_to_fp32.py {folder} OUT gives the weights; load them into the peft model and call "
        "model.save_pretrained(OUT).",
    ),
    _Format(
        ("adapter_model-*-of-*", "adapter_model.*.index.json"),
        (),
        "{folder} holds an adapter in several files ({file}), which peft does not read. Join them: read each with "
        "safetensors.torch.load_file and write all into one adapter_model.safetensors.",
    ),
    _Format(
        ("*.gguf",),
        (),
        "{folder} holds {file}, which is llama.cpp's form. A model is named by its file; an adapter in that form is "
        "for llama.cpp alone: take the folder that it was made from.",
    ),
    _Format(
        ("lora.ckpt", "*lora*.ckpt", "*lora*.pt", "*lora*.pth", "ggml-adapter-model.*"),
        (),
        "{folder} holds {file} of a tool that cannot be told, and no peft adapter. Load it with the code that wrote it "
        "and save the model there with peft's save_pretrained, or merge it there.",
    ),
)


def told(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What an adapter folder is, if it is in the format of another tool, and what to do; None for peft's.

    Args:
        raw: its `adapter_config.json`; empty if it has none.
    """
    if folder.is_file():
        return f"{folder} is a file. An adapter is a folder with {ADAPTER_CONFIG} and its weights: name the folder."
    if any((folder / name).is_file() for name in PEFTS) and ("peft_type" in raw or not raw):
        return None
    if not raw and (several := _several(folder)) is not None:
        return several
    if isinstance(raw.get("config"), dict) and "peft_type" not in raw:
        return (
            f"{folder} was written by AdapterHub's adapters. wrap(model, folder) reads it; for all else convert it "
            f"first: adapters-kit convert {folder} BASE OUT --task TASK, which writes it as a peft adapter."
        )
    if "swift_type" in raw and not raw.get("peft_type"):
        return (
            f"{folder} was written by ms-swift with a tuner of its own ({raw['swift_type']!r}). Merge it there: "
            f"swift export --adapters {folder} --merge_lora true; the result loads here as a model."
        )
    if not raw and _is_opendelta(folder):
        raw = {"delta_type": None}
    for one in _FORMATS:
        file = next((path for pattern in one.files for path in sorted(folder.glob(pattern))), None)
        if file is not None or any(key in raw for key in one.keys):
            return one.text.format(folder=folder, file=file and file.relative_to(folder))
    return _whole_state(folder) or (_unknown(folder) if not raw else None)


def check_either(folder: Path) -> None:
    """Refuse a folder that holds neither an adapter nor a model.

    Raises:
        ShippingError: with the tool that wrote it and what to do, where that can be told.
    """
    if (folder / ADAPTER_CONFIG).is_file() or ((folder / "config.json").is_file() and not _is_opendelta(folder)):
        return
    neither = f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json)."
    raise ShippingError((told(folder, {}) if folder.exists() else None) or neither)


def _several(folder: Path) -> str | None:
    """What a folder is that has no adapter of its own but some in it, or AdapterHub's layer over some."""
    if (folder / _FUSION).is_file():
        return (
            f"{folder} holds an AdapterFusion layer of AdapterHub's library, which mixes several adapters by attention "
            "and has no equal here. The adapters that it mixes lie in folders of their own, and each can be loaded."
        )
    inner = sorted((path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")), key=_natural)
    if not inner:
        return None
    names = ", ".join(map(repr, inner))
    if all(_CHECKPOINT.fullmatch(name) for name in inner):
        last = str(folder / inner[-1])
        return f"{folder} holds the checkpoints of a training and no adapter of its own: {names}. Name one: {last!r}."
    first = f"Name one of them: {str(folder / inner[0])!r}."
    if not (folder / _SETUP).is_file():
        return f"{folder} is a folder of {len(inner)} adapters: {names}. {first}"
    try:
        setup = read_json(folder / _SETUP).get("adapter_setup") or {}
        how = str(setup.get("type", "composition")) if isinstance(setup, dict) else "composition"
    except ShippingError:
        how = "composition"
    stack = (
        f"To stack them, load each under its name (adapter_name=...), then ak.activate(model, {inner})."
        if how == "Stack"
        else f"A {how} of them has no equal here."
    )
    return f"{folder} is AdapterHub's {how} of the adapters {names}. {first} {stack}"


def _natural(name: str) -> tuple[Any, ...]:
    """checkpoint-90 before checkpoint-100."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def _whole_state(folder: Path) -> str | None:
    """A folder whose model file holds the state of a whole peft model, as a trainer's or FSDP's full save leaves it."""
    file = next((path for name in ("model", "pytorch_model") for path in sorted(folder.glob(f"{name}*.*"))), None)
    try:
        names = tensor_names(file) if file is not None else []
    except (OSError, ShippingError):
        return None
    if file is None or not any(".lora_" in name or name.startswith("base_model.model.") for name in names):
        return None
    return (
        f"{folder} holds the state of a whole peft model ({file.name}), and no adapter. Load it where it was trained, "
        "model.load_state_dict(...), and call model.save_pretrained(OUT), which writes the adapter alone."
    )


def _unknown(folder: Path) -> str | None:
    """A folder of weights that nothing here has a name for."""
    files = [path.name for path in weight_files(folder)] if folder.is_dir() else []
    if not files or (folder / "config.json").is_file():
        return None
    return (
        f"{folder} holds {', '.join(files[:3])}{' …' if len(files) > 3 else ''} and no {ADAPTER_CONFIG}, so that "
        "nothing tells what these weights are. If they are an adapter of peft's, fetch or write that file too; else "
        "load them with the code that wrote them, and save the model there with peft's save_pretrained."
    )


def _is_opendelta(folder: Path) -> bool:
    config = folder / "config.json"
    try:
        return config.is_file() and config.stat().st_size < 1 << 20 and b'"delta_type"' in config.read_bytes()
    except OSError:
        return False


def unnamed(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors under peft's names: without those of wrappers (DDP's, FSDP's, torch.compile's), with peft's prefix,
    and without an adapter's name inside (`lora_A.default.weight`), as `torch.save` of a model's state leaves them."""
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) != len(tensors):  # two tensors of one name: nothing is renamed, and what fits nowhere is refused
        return dict(tensors)
    factors = [name for name in bare if _FACTOR.search(name)]
    if factors and not any(name.startswith("base_model.") for name in bare):
        bare = {f"base_model.model.{name}": tensor for name, tensor in bare.items()}
    found = {match.group(2) for name in bare if (match := _NAMED.search(name)) and match.group(2) != "weight"}
    if len(found) != 1:
        return bare
    (adapter,) = found
    return {_NAMED.sub(lambda m: f".{m[1]}" if m[2] == adapter else m[0], name): t for name, t in bare.items()}


def not_known(raw: Mapping[str, Any], options: Collection[str]) -> list[str]:
    """Options of an `adapter_config.json` that the installed peft does not have and that are not off. peft leaves them
    out with a warning, and computes another adapter."""
    strange = raw.keys() - set(options) - _OF_TRAINING
    return sorted(key for key in strange if not any(raw[key] == off for off in _OFF))


def upgrade(file: Path, raw: Mapping[str, Any], keys: list[str], version: str) -> str:
    """The sentence that refuses them."""
    given = ", ".join(
        f"{key}={str(raw[key])[:60]!r}" if isinstance(raw[key], str) else f"{key}={str(raw[key])[:60]}" for key in keys
    )
    wrote = f" It was written by peft {raw['peft_version']}." if raw.get("peft_version") else ""
    return (
        f"{file} has {given}, which the installed peft {version} does not know: without it the adapter would compute "
        f"something else.{wrote} Install a peft that knows it: pip install -U peft."
    )
