"""How many bytes does a step keep for its backward pass?

    python benchmarks/memory.py                          # SmolLM2, MiniLM and a 1B-shaped model, bf16 and fp32
    python benchmarks/memory.py --quick                  # four layers of SmolLM2
    python benchmarks/memory.py --device cuda            # also the allocator's peak
    python benchmarks/memory.py --table                  # README's table from results/memory.json

Every tensor that autograd saves is counted (`training.memory.kept_for_backward`): a storage once, parameters and
buffers not. Exact, so one run is enough. Writes results/memory.json and .png.
"""

import argparse
import json
import sys

import common
import torch

from adapters_kit.training.memory import kept_for_backward

# Contestant -> its row in the table; None: counted for the plot alone.
COUNTED = {
    "full": "full fine-tuning",
    "peft": "peft",
    "peft, dropout": "peft, dropout 0.05",
    "peft, low adapters": None,
    "ours": "ours",
    "ours, dropout": "ours, dropout 0.05",
    "ours, dropout, chunked": "… and chunked loss (what `train` does)",
    "ours, dropout, chunked, recompute": '… and `wrap(..., recompute="cheap")`',
    "peft, DoRA": "peft, DoRA",
    "ours, DoRA": "ours, DoRA",
}
SHOWN = {"smollm2 bf16": "SmolLM2-135M bf16", "smollm2 fp32": "SmolLM2-135M fp32", "minilm bf16": "MiniLM bf16"}


def measure(name: str, dtype: str, arguments: argparse.Namespace) -> dict:
    """All contestants of one model in one dtype, one after the other."""
    found = {}
    for kind in COUNTED:
        if (name == "minilm" and "chunked" in kind) or (name == "1b" and "DoRA" in kind):
            continue
        layers = 4 if arguments.quick else None
        model, real = common.contestant(kind, name, common.DTYPES[dtype], arguments.device, layers)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = common.batch(base, arguments.rows, arguments.length)
        found[kind] = {"kept": kept_for_backward(model, inputs).total, "real_weights": real}
        if arguments.device == "cuda":
            common.step(model, inputs)
            torch.cuda.reset_peak_memory_stats()
            common.step(model, inputs)
            found[kind]["peak"] = torch.cuda.max_memory_allocated()
        del model, base
    return found


def read() -> dict:
    """The saved results."""
    return json.loads((common.RESULTS / "memory.json").read_text())


def table(cases: dict[str, dict]) -> str:
    """Megabytes as Markdown: the columns of `SHOWN` that were measured."""
    shown = {title: cases[case] for case, title in SHOWN.items() if case in cases}
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for kind, title in COUNTED.items():
        if title is not None and any(kind in case for case in shown.values()):
            cells = [f"{case[kind]['kept'] / 1e6:.0f}" if kind in case else "–" for case in shown.values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=common.MODELS, default=None)
    parser.add_argument("--dtypes", nargs="+", choices=list(common.DTYPES), default=list(common.DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="memory", help="of the result files")
    parser.add_argument("--table", action="store_true", help="print the saved results and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()["cases"]))
        return 0
    models = arguments.models or (["smollm2"] if arguments.quick else list(common.MODELS))
    result = {"environment": common.environment(), "batch": [arguments.rows, arguments.length], "cases": {}}
    for name in models:
        for dtype in arguments.dtypes:
            result["cases"][f"{name} {dtype}"] = measure(name, dtype, arguments)
            print(f"{name} {dtype} done", file=sys.stderr, flush=True)
    print(table(result["cases"]))
    if not arguments.quick:
        path = common.write(arguments.name, result)
        panels = {
            case: {kind: entry["kept"] / 1e6 for kind, entry in found.items()}
            for case, found in result["cases"].items()
        }
        common.bars(path.with_suffix(".png"), panels, "Bytes kept for the backward pass", "MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
