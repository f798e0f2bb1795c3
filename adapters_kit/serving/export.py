"""export(): an adapter in the one form that every server reads alike, or a model or adapter as GGUF.

Servers read `adapter_config.json` differently: most take alpha / r as the scale and ignore rank-stabilised scaling and
patterns. The canonical form leaves them nothing to ignore: all scales folded into B, alpha = r, one rank for all.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, Adapter, adapter_folder, read_adapter
from adapters_kit.artifacts.dtypes import as_dtype
from adapters_kit.artifacts.factors import canonicalise
from adapters_kit.artifacts.files import write_json, write_tensors, write_text
from adapters_kit.artifacts.leaks import scrub, scrubbed
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.proof import PROOF
from adapters_kit.artifacts.record_reader import RECORD
from adapters_kit.artifacts.side_files import copy_card, copy_processor, own_file
from adapters_kit.artifacts.source import portable_base
from adapters_kit.artifacts.staging import staged
from adapters_kit.artifacts.unread import PEFTS
from adapters_kit.errors import ShippingError
from adapters_kit.serving.llama_cpp import write_gguf


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        path: the folder or file.
        rank: of every pair of factors, for a canonical adapter.
        errors: module -> what re-ranking lost of its update, as a share of its Frobenius norm.
    """

    path: Path
    rank: int | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"Exported to {self.path}"
        if self.rank is not None:
            text += f": every scale in B, alpha = r = {self.rank}"
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            mean = sum(self.errors.values()) / len(self.errors)
            text += f"; re-ranking lost {mean:.2%} of the update on average, most in {worst} ({self.errors[worst]:.2%})"
        return text + "."


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str = "peft",
    canonical: bool = False,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    base: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter or a merged model in the form that a server takes.

    Args:
        source: an adapter folder or a run folder; for GGUF also a model folder.
        out: the folder to write, for GGUF the file.
        format: "peft": an adapter folder. "gguf": a file for llama.cpp and Ollama. "kv-cache": a prefix as the cache
            that plain transformers starts from (see `load_cache`), for decoders where that is exact.
        canonical: LoRA only: fold all scales into B, set alpha = r, pad every pair of factors to one rank, drop what
            servers ignore or refuse. The adapter computes the same.
        rank: LoRA only, implies canonical: the best approximation of that rank (singular value decomposition).
        dtype: of the written tensors. For "peft" None keeps float32; for "gguf" one of "float16" (default),
            "bfloat16", "float32", "q8_0", and for a model "q4_k_m" and the other types of llama.cpp's quantizer, where
            that is installed.
        base: for GGUF adapters and caches, the base's folder; None takes the one that the adapter names.
        overwrite: replace what `out` holds.

    Returns:
        A report; with `rank` it tells what was lost.

    Raises:
        ShippingError: the adapter is broken or has no canonical form; the message says what to do instead.
    """
    source = adapter_folder(source)
    if format == "gguf":
        foreign.check_either(Path(source))
        return ExportReport(
            write_gguf(Path(source), Path(out), dtype=dtype or "float16", base=base, overwrite=overwrite)
        )
    if format == "kv-cache":
        from adapters_kit.serving.kv_cache import export_cache

        if canonical or rank is not None:
            raise ShippingError("format='kv-cache' is for a prefix, which has no rank and no canonical form.")
        export_cache(Path(source), Path(out), base=base, dtype=as_dtype(dtype or "float32"), overwrite=overwrite)
        return ExportReport(Path(out))
    if format != "peft":
        raise ShippingError(f"format={format!r}: choose 'peft', 'gguf' or 'kv-cache'.")
    if not canonical and rank is None and dtype is None:
        return _ship(Path(source), Path(out), overwrite)
    adapter = read_adapter(source)
    config, weights, errors = canonicalise(adapter, rank)
    target = as_dtype(dtype or "float32")
    weights = {name: tensor.to(target) for name, tensor in weights.items()}
    with staged(Path(out), overwrite=overwrite, keep=[adapter.folder]) as stage:
        _write_side_files(adapter, stage)
        base = portable_base(adapter.base, Path(out))
        write_json(stage / CONFIG, scrubbed(config) | {"base_model_name_or_path": base}, sort_keys=True)
        write_tensors(stage / WEIGHTS, weights)
        write_manifest(stage, {"adapter": describe(adapter.folder), "base": describe(adapter.base or "")})
    return ExportReport(Path(out), config["r"], errors)


def _ship(source: Path, out: Path, overwrite: bool) -> ExportReport:
    """The adapter as it is (bottleneck, prefix, anything), without what only its training needed."""
    adapter = read_adapter(source)
    with staged(out, overwrite=overwrite, keep=[source]) as stage:
        _write_side_files(adapter, stage)
        base = portable_base(adapter.base, out)
        write_json(stage / CONFIG, scrubbed(adapter.raw) | {"base_model_name_or_path": base}, sort_keys=True)
        stored = next((name for name in PEFTS if (source / name).is_file()), None)  # the one that was looked at
        if stored is None:
            write_tensors(stage / WEIGHTS, adapter.weights)  # read from another tool's
        else:
            shutil.copyfile(source / stored, stage / stored)
        write_manifest(stage, {"adapter": describe(source), "base": describe(adapter.base or "")})
    return ExportReport(out)


def _write_side_files(adapter: Adapter, stage: Path) -> None:
    """The tokenizer's files, the card, the recipe and the record, without what tells about the user's data or machine;
    nothing that only training needed, and no code."""
    source = adapter.folder
    copy_processor(source, stage)
    copy_card(source, stage)
    if proof := own_file(source, PROOF):
        shutil.copyfile(proof, stage / PROOF)
    if recipe := own_file(source, "recipe.yaml"):
        write_text(stage / "recipe.yaml", scrub(recipe.read_text(encoding="utf-8", errors="replace")))
    if adapter.record:
        write_json(stage / RECORD, adapter.record | {"base": describe(adapter.record.get("base", ""))}, indent=1)
