"""export(): an adapter in the one form that every server reads alike, or a model or adapter as GGUF.

Servers read `adapter_config.json` differently: most take alpha / r as the scale and ignore rank-stabilised scaling and
patterns. The canonical form leaves them nothing to ignore: all scales folded into B, alpha = r, one rank for all.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from adapters_kit.artifacts.adapter import CONFIG, PICKLE, RECORD, WEIGHTS, Adapter, read_adapter, read_json
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError
from adapters_kit.merging.merge import as_dtype, write_manifest
from adapters_kit.serving.llama_cpp import write_gguf

KEY = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?$"
)
# Initialisations that moved a part of the base weights into the adapter: B A is not the whole update then.
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        source: an adapter folder; for GGUF also a model folder.
        out: the folder to write, for GGUF the file.
        format: "peft": an adapter folder. "gguf": a file for llama.cpp and Ollama. "kv-cache": a prefix as the cache
            that plain transformers starts from (see `load_cache`), for decoders where that is exact.
        canonical: LoRA only: fold all scales into B, set alpha = r, pad every pair of factors to one rank, drop what
            servers ignore or refuse. The adapter computes the same.
        rank: LoRA only, implies canonical: the best approximation of that rank (singular value decomposition).
        dtype: of the written tensors. For "peft" None keeps float32; for "gguf" one of "float16" (default),
            "bfloat16", "float32", "q8_0".
        base: for GGUF adapters and caches, the base's folder; None takes the one that the adapter names.
        overwrite: replace what `out` holds.

    Returns:
        A report; with `rank` it tells what was lost.

    Raises:
        ShippingError: the adapter is broken or has no canonical form; the message says what to do instead.
    """
    if format == "gguf":
        return ExportReport(
            write_gguf(Path(source), Path(out), dtype=dtype or "float16", base=base, overwrite=overwrite)
        )
    if format == "kv-cache":
        from adapters_kit.serving.kv_cache import export_cache

        if canonical or rank is not None:
            raise ShippingError("format='kv-cache' is for a prefix, which has no rank and no canonical form.")
        export_cache(Path(source), Path(out), base=base, dtype=as_dtype(dtype), overwrite=overwrite)
        return ExportReport(Path(out))
    if format != "peft":
        raise ShippingError(f"format={format!r}: choose 'peft', 'gguf' or 'kv-cache'.")
    if not canonical and rank is None and dtype is None:
        return _ship(Path(source), Path(out), overwrite)
    adapter = read_adapter(source)
    config, weights, errors = canonicalise(adapter, rank)
    target = as_dtype(dtype) or torch.float32
    weights = {name: tensor.to(target).contiguous() for name, tensor in weights.items()}
    with staged(Path(out), overwrite=overwrite) as stage:
        _copy_side_files(adapter.folder, stage)
        (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(weights, stage / WEIGHTS, {"format": "pt"})
        os.chmod(stage / WEIGHTS, (stage / CONFIG).stat().st_mode & 0o777)
        write_manifest(stage, {"adapter": str(adapter.folder), "base": str(adapter.base)})
    return ExportReport(Path(out), config["r"], errors)


def _ship(source: Path, out: Path, overwrite: bool) -> ExportReport:
    """The adapter as it is (bottleneck, prefix, anything), without what only its training needed."""
    adapter = read_adapter(source)
    with staged(out, overwrite=overwrite) as stage:
        _copy_side_files(source, stage)
        for name in (CONFIG, WEIGHTS, PICKLE):
            if (source / name).is_file():
                shutil.copyfile(source / name, stage / name)
        write_manifest(stage, {"adapter": str(source), "base": str(adapter.base)})
    return ExportReport(out)


def _copy_side_files(source: Path, stage: Path) -> None:
    for path in sorted(source.iterdir()):
        training = path.name.startswith(("optimizer", "scheduler", "rng_state", "trainer_state", "training_args"))
        ours = path.name in {CONFIG, WEIGHTS, PICKLE, "manifest.json"}
        if path.is_file() and not training and not ours and (path.name == RECORD or path.suffix != ".bin"):
            shutil.copyfile(path, stage / path.name)


def canonicalise(
    adapter: Adapter, rank: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, float]]:
    """The canonical form of a LoRA adapter.

    Args:
        rank: of the result; None takes the largest that the adapter has.

    Returns:
        The new `adapter_config.json`, the tensors in float32, and what re-ranking lost by module.
    """
    config = adapter.config
    _check_foldable(adapter)
    pairs: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.weights.items():
        match = KEY.match(name)
        if match:
            pairs.setdefault(match["path"], {})[match["side"]] = (name, tensor.float())
        elif ".lora_B.bias" not in name:
            weights[name] = tensor
    broken = [path for path, sides in pairs.items() if set(sides) != {"A", "B"}]
    if broken:
        raise ShippingError(f"{adapter.folder} has only one of lora_A and lora_B for {broken[0]!r}: it is incomplete.")
    target = rank or max(sides["A"][1].shape[0] for sides in pairs.values())
    errors = {}
    for path, sides in pairs.items():
        (name_a, a), (name_b, b) = sides["A"], sides["B"]
        if a.ndim != 2 or b.ndim != 2:
            raise ShippingError(f"{path} is a convolution, for which servers have no common form. {_instead(adapter)}")
        if b.shape[-1] != a.shape[0]:
            raise ShippingError(f"{path}: lora_A has rank {a.shape[0]}, lora_B {b.shape[-1]}.")
        scale = scaling(config, path)
        bias = name_b.removesuffix("weight") + "bias"
        if bias in adapter.weights:
            weights[bias] = adapter.weights[bias].float() * scale
        b = b * scale
        if a.shape[0] > target:
            a, b, errors[path] = _lower_rank(a, b, target)
        missing = target - a.shape[0]
        weights[name_a] = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        weights[name_b] = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    raw = read_json(adapter.folder / CONFIG)
    raw |= {"r": target, "lora_alpha": target, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    raw |= {"init_lora_weights": True, "lora_dropout": 0.0, "inference_mode": True}
    if isinstance(raw.get("target_modules"), str):  # a regular expression, which not every server reads
        raw["target_modules"] = sorted(pairs)
    return raw, weights, errors


def scaling(config: Any, path: str) -> float:
    """What peft multiplies B A with, for the module at `path`."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    return alpha / r**0.5 if config.use_rslora else alpha / r


def _lower_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of B A of a lower rank, from the factors alone (float64); and the share that is lost."""
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    lost = (s[rank:].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)).sqrt().item()
    return (root[:, None] * (vh[:rank] @ qa.T)).float(), (qb @ (u[:, :rank] * root)).float(), lost


def _instead(adapter: Adapter) -> str:
    return f"Merge it instead: adapters-kit merge {adapter.folder} merged/"


def _check_foldable(adapter: Adapter) -> None:
    config, where = adapter.config, adapter.folder
    instead = _instead(adapter)
    if adapter.method != "lora":
        raise ShippingError(f"{where} is a {adapter.method} adapter; only LoRA has a canonical form. {instead}")
    if config.use_dora:
        raise ShippingError(f"{where} uses DoRA, whose magnitudes do not fold into B. {instead}")
    if getattr(config, "target_parameters", None):
        raise ShippingError(f"{where} adapts fused experts, for which servers have no common form. {instead}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(RESIDUAL):
        raise ShippingError(
            f"{where} was initialised with {config.init_lora_weights!r}, so it does not sit on the original base. "
            f"{instead}"
        )
