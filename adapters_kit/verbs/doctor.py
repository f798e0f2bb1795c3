"""doctor: versions, devices, and what is missing for which feature."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import zip_longest

from adapters_kit.verbs.display import Shown, print_table

# What a feature needs: its packages, and what to type where one is missing.
FEATURES: dict[str, tuple[tuple[str, ...], str]] = {
    "4 and 8 bit weights (quantize)": (("bitsandbytes",), 'pip install "adapters-kit[quantize]"'),
    "GGUF files": (("gguf",), 'pip install "adapters-kit[gguf]"'),
    "pictures, report.html": (("matplotlib",), 'pip install "adapters-kit[plots]"'),
    "BLEU, ROUGE": (("sacrebleu", "rouge_score"), 'pip install "adapters-kit[metrics]"'),
    "tagging by span (seqeval)": (("seqeval",), 'pip install "adapters-kit[metrics]"'),
    "images": (("PIL",), "pip install pillow"),
    "recordings": (("soundfile", "jiwer"), 'pip install "adapters-kit[audio]"'),
    "log_to: tensorboard": (("tensorboard",), "pip install tensorboard"),
    "log_to: wandb": (("wandb",), "pip install wandb"),
    "log_to: mlflow": (("mlflow",), "pip install mlflow"),
    "log_to: trackio": (("trackio",), "pip install trackio"),
    "page in the browser": (("gradio",), 'pip install "adapters-kit[ui]"'),
    "shell completion": (("shtab",), "pip install shtab"),
    "running GGUF files here": (("llama_cpp",), 'pip install "adapters-kit[llama-cpp]"'),
    "FlashAttention 2": (("flash_attn",), "pip install flash-attn (CUDA only)"),
}
_PACKAGES = ("adapters-kit", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
             "huggingface-hub", "pydantic", "rich", "bitsandbytes", "trl")  # fmt: skip


def doctor(options: argparse.Namespace) -> Shown:
    """Versions, devices, and which features work here; for the others, what to type."""
    import torch

    from adapters_kit.devices import has_bf16

    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) or "missing" for name in _PACKAGES}
    seen = _devices()
    features = {
        what: {
            "works": not (lacking := [one for one in needs if find_spec(one) is None]),
            "missing": lacking,
            "try": fix,
        }
        for what, (needs, fix) in FEATURES.items()
    }
    hub = _hub()
    disk = shutil.disk_usage(os.getcwd())
    data = {
        "versions": found,
        "devices": seen,
        "dtypes": {"bf16 on the GPU": has_bf16()},
        "threads": torch.get_num_threads(),
        "free_disk_gib": round(disk.free / 2**30, 1),
        "hub": hub,
        "features": features,
    }

    def show() -> None:
        print_table(["what", "version"], [[name, value] for name, value in found.items()])
        print(f"\ndevices: {', '.join(seen)}; torch threads: {torch.get_num_threads()}")
        print(f"free disk here: {disk.free / 2**30:.1f} GiB\nmodel hub: {hub}\n")
        rows = [
            [what, "works" if one["works"] else "missing", "" if one["works"] else str(one["try"])]
            for what, one in features.items()
        ]
        print_table(["feature", "", "try"], rows)

    return Shown(data, show)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    from adapters_kit import devices

    sizes = [f" ({bytes_ / 2**30:.0f} GiB)" for bytes_ in devices.memory()]
    cards = [name + size for name, size in zip_longest(devices.names(), sizes, fillvalue="")]
    return [*cards, f"{os.cpu_count()} CPU cores"]


def _hub() -> str:
    from adapters_kit.artifacts.hub_ping import endpoint, not_asked, reachable

    if not_asked():
        return "offline (HF_HUB_OFFLINE is set)"
    return f"{endpoint()} answers" if reachable() else f"{endpoint()} does not answer; local folders and the cache work"


def completion(options: argparse.Namespace) -> Shown:
    """Completion for a shell, to be read at its start: adapters-kit completion bash >> ~/.bashrc"""
    from adapters_kit.verbs.display import ask_for

    ask_for("shtab", "Shell completion")
    import shtab

    script = shtab.complete(options.whole_parser(), shell=options.shell)
    return Shown({"shell": options.shell, "script": script}, script)
