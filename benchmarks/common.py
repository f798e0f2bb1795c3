"""What the benchmarks of the kernels share: models, contestants, interleaved timing, results with their environment."""

import copy
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# name -> (LoRA dropout, adapters in the base's dtype, fused, chunked loss, recompute, shared dropout mask, DoRA)
CONTESTANTS: dict[str, dict[str, Any]] = {
    "floor": {},
    "full": {},
    "peft": {"p": 0.0},
    "peft, dropout": {"p": 0.05},
    "peft, low adapters": {"p": 0.0, "low": True},
    "ours": {"p": 0.0, "fused": True},
    "ours, dropout": {"p": 0.05, "fused": True},
    "ours, shared dropout": {"p": 0.05, "fused": True, "shared": True},
    "ours, dropout, chunked": {"p": 0.05, "fused": True, "chunked": True},
    "ours, dropout, chunked, recompute": {"p": 0.05, "fused": True, "chunked": True, "recompute": True},
    "peft, DoRA": {"p": 0.0, "dora": True},
    "ours, DoRA": {"p": 0.0, "fused": True, "dora": True},
}
MODELS = ("smollm2", "minilm", "1b")


def environment() -> dict[str, Any]:
    """Machine, packages and load, for the record."""
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@functools.lru_cache(maxsize=1)
def base(name: str, dtype: torch.dtype, device: str, layers: int | None = None) -> tuple[nn.Module, bool]:
    """A model with task head, and whether its weights are real ones: the shape alone where they cannot be fetched."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "minilm":
        import assets

        return AutoModelForSequenceClassification.from_pretrained(assets.minilm(), dtype=dtype).to(device), True
    if name == "smollm2":
        shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers or 30}
        shape |= {"num_attention_heads": 9, "num_key_value_heads": 3}
        try:
            import assets
            from transformers import AutoModelForCausalLM

            path = assets.smollm2()
            if layers is None:
                model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
                return model.to(device), True
        except (ImportError, RuntimeError) as error:
            print(f"weights at random: {error}", file=sys.stderr)
    else:  # Llama-3.2-1B's widths; two of its layers carry the ratio
        shape = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers or 2}
        shape |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, tie_word_embeddings=True, dtype=dtype)
    return LlamaForCausalLM._from_config(config).to(device), False


def batch(model: nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens with labels, on the model's device."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(config.vocab_size, 20000), (rows, length), generator=generator).to(model.device)
    causal = "CausalLM" in type(model).__name__
    return {"input_ids": ids, "labels": ids if causal else torch.arange(rows, device=ids.device) % config.num_labels}


def contestant(
    kind: str, name: str, dtype: torch.dtype, device: str, layers: int | None = None
) -> tuple[nn.Module, bool]:
    """One way of training `name`: a model ready to step."""
    from adapters_kit.kernels.cross_entropy import chunked_loss
    from adapters_kit.kernels.fuse import fuse
    from adapters_kit.kernels.recompute import recompute_cheap

    options = CONTESTANTS[kind]
    model, real = base(name, dtype, device, layers)
    model = copy.deepcopy(model)
    if kind == "full":
        return model.train(), real
    if kind == "floor":
        model.requires_grad_(False)
        # The input gradient runs through every layer, as it does in LoRA above the lowest adapter.
        model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.detach().requires_grad_())
        return model.train(), real
    head = ["classifier"] if name == "minilm" else None
    config = LoraConfig(r=16, lora_dropout=options["p"], target_modules="all-linear", exclude_modules=head)
    config.use_dora = options.get("dora", False)
    model = get_peft_model(model, config, autocast_adapter_dtype=not options.get("low"))
    with torch.no_grad():  # B is zero when fresh
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.01)
    if options.get("fused"):
        fuse(model, shared_dropout=options.get("shared", False))
    if options.get("chunked"):
        chunked_loss(model)
    if options.get("recompute"):
        recompute_cheap(model)
    return model.train(), real


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward, without the optimizer."""
    model(**inputs).loss.backward()
    model.zero_grad(set_to_none=True)


def interleaved(
    runs: dict[str, Callable[[], None]], rounds: int, device: str, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each run, round by round, so that what disturbs the machine disturbs all.

    Args:
        runs: warmed up already.
        rounds: at most so many.
        seconds: no new round begins that would end after this time, but two are always made.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for number in range(rounds):
        names = list(runs)
        shift = number % len(names)  # nobody is always behind the same neighbour
        for name in names[shift:] + names[:shift]:
            gc.collect()
            sync(device)
            start = time.perf_counter()
            runs[name]()
            sync(device)
            times[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - began
        if number and spent * (number + 2) / (number + 1) > seconds:
            break
    return times


def sync(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(times: dict[str, list[float]], to: str) -> dict[str, dict[str, float]]:
    """Median of the round-by-round ratios to one contestant, with quartiles and the median of the seconds."""
    found = {}
    for name, values in times.items():
        each = [value / floor for value, floor in zip(values, times[to], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        found[name] = {"ratio": middle, "low": low, "high": high, "seconds": statistics.median(values)}
    return found


def read(name: str) -> dict[str, Any]:
    """results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(name: str, result: dict[str, Any]) -> Path:
    """Save as results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def bars(path: Path, panels: dict[str, dict[str, float]], title: str, unit: str, line: float | None = None) -> None:
    """A panel of horizontal bars for each entry, saved as an image at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tall = max(len(values) for values in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 0.8 + 0.36 * tall), squeeze=False)
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        labels = list(values)[::-1]
        colors = ["tab:blue" if label.startswith("ours") else "0.7" for label in labels]
        drawn = axis.barh(labels, [values[label] for label in labels], color=colors)
        axis.bar_label(drawn, fmt="%.2f" if max(values.values()) < 10 else "%.0f", padding=2)
        axis.set(title=name, xlabel=unit)
        axis.margins(x=0.15)
        if line is not None:
            axis.axvline(line, color="black", linewidth=0.8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
