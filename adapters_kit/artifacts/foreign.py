"""Adapter folders that other tools wrote: which tool, and what to do where its format is not peft's.

Unsloth, axolotl, LLaMA-Factory, TRL, ms-swift and torchtune's Hugging Face checkpointer write peft's format, which is
read as it is. Nothing is computed from a format that cannot be proved here: MLX-LM, for one, leaves out of its file
which of the base's tensors it had renamed.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")
_NAMED = re.compile(
    r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!(?:weight|bias)$)([^.]+)(?=\.(?:weight|bias)$|$)"
)
# Written by ms-swift beside peft's own options; about its training only.
_OF_TRAINING = frozenset({"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "runtime_config"})
_OFF: tuple[Any, ...] = (None, False, "", [], {}, 0)


def told(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What an adapter folder is, if it is in the format of another tool, and what to do; None for peft's.

    Args:
        raw: its `adapter_config.json`; empty if it has none.
    """
    own = any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin"))
    if (folder / "adapters.safetensors").is_file() or "lora_parameters" in raw or "fine_tune_type" in raw:
        return (
            f"{folder} was written by MLX-LM, in a format of its own. Merge it there: mlx_lm.fuse --model BASE "
            f"--adapter-path {folder} --save-path MERGED; the folder MERGED loads here as a model."
        )
    if not own and list(folder.glob("adapter_[0-9]*.pt")):
        return (
            f"{folder} holds torchtune's own format ({next(folder.glob('adapter_[0-9]*.pt')).name}). torchtune writes "
            "peft's beside it where the recipe's checkpointer is FullModelHFCheckpointer: save with that, and load the "
            "folder with adapter_model.safetensors."
        )
    if (folder / "lit_model.pth.lora").is_file():
        return (
            f"{folder} was written by LitGPT. Merge it there: litgpt merge_lora {folder}, then litgpt "
            "convert_from_litgpt; what that writes loads here as a model."
        )
    if "delta_type" in raw or (not raw and _is_opendelta(folder / "config.json")):
        return (
            f"{folder} was written by OpenDelta, whose modules have no equal in peft. Train it again here, "
            "for example with the method 'lora' or 'houlsby'."
        )
    if "swift_type" in raw and not raw.get("peft_type"):
        return (
            f"{folder} was written by ms-swift with a tuner of its own ({raw['swift_type']!r}). Merge it there: "
            f"swift export --adapters {folder} --merge_lora true; the result loads here as a model."
        )
    return None


def _is_opendelta(config: Path) -> bool:
    try:
        return config.is_file() and config.stat().st_size < 1 << 20 and b'"delta_type"' in config.read_bytes()
    except OSError:
        return False


def unnamed(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors without an adapter's name inside theirs (`lora_A.default.weight`), as `torch.save` of a whole model's
    state leaves it; peft's own files have none."""
    found = {match.group(2) for name in tensors if (match := _NAMED.search(name)) and match.group(2) != "weight"}
    if len(found) != 1:
        return dict(tensors)
    (adapter,) = found
    return {_NAMED.sub(lambda m: f".{m[1]}" if m[2] == adapter else m[0], name): t for name, t in tensors.items()}


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
