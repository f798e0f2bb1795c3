"""How long is a training step? LoRA by peft and by us, full fine-tuning, and the floor that no LoRA can beat.

    python benchmarks/step_time.py                       # every model and dtype: under six minutes on two quiet cores
    python benchmarks/step_time.py --quick               # does it run: four layers, few tokens, two rounds
    python benchmarks/step_time.py --models smollm2 --dtypes bf16 --device cuda --rows 8 --length 1024

The floor is the frozen model's own forward and the gradient on its input. All contestants of one model and dtype take
turns in one process; what is reported is the median of the ratios to the floor within a round. Forward and backward are
timed, the optimizer is not. SmolLM2 and MiniLM have their real weights; "1b" is two layers of Llama-3.2-1B's widths and
a vocabulary of 32,000. Writes results/step_time.json and .png, and prints a Markdown table.
"""

import argparse
import sys

import common
import torch

TIMED = ["floor", "full", "peft", "peft, dropout", "peft, low adapters", "ours", "ours, dropout"]
TIMED += ["ours, dropout, chunked", "ours, dropout, chunked, recompute", "peft, DoRA", "ours, DoRA"]
SHARE = {"smollm2": 3, "1b": 2, "minilm": 1}  # of the time, as a step of theirs takes


def measure(name: str, dtype: str, arguments: argparse.Namespace, seconds: float) -> dict:
    """All contestants of one model in one dtype."""
    without = {"minilm": "chunked", "1b": "DoRA"}.get(name)  # no causal head; two more copies take 3 GB
    kinds = [kind for kind in TIMED if without is None or without not in kind]
    layers = 4 if arguments.quick and name == "smollm2" else None
    runs, real = {}, False
    for kind in kinds:
        model, real = common.contestant(kind, name, common.DTYPES[dtype], arguments.device, layers)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = common.batch(base, arguments.rows, arguments.length)
        runs[kind] = lambda model=model, inputs=inputs: common.step(model, inputs)
        common.step(model, common.batch(base, arguments.rows, min(32, arguments.length)))  # warm, at little cost
    times = common.interleaved(runs, 2 if arguments.quick else arguments.rounds, arguments.device, seconds)
    return {"real_weights": real, "rounds": len(times["floor"]), "steps": common.ratios(times, "floor")}


def table(cases: dict[str, dict]) -> str:
    """Ratios to the floor as Markdown."""
    lines = ["| step time ÷ floor | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for kind in [kind for kind in TIMED if any(kind in case["steps"] for case in cases.values())]:
        cells = [f"{case['steps'][kind]['ratio']:.2f}" if kind in case["steps"] else "–" for case in cases.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    seconds = [f"{case['steps']['floor']['seconds']:.2f} s" for case in cases.values()]
    return "\n".join([*lines, "| the floor itself | " + " | ".join(seconds) + " |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=common.MODELS, default=list(common.MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(common.DTYPES), default=list(common.DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=4.5, help="for all cases together, loading not counted")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="step_time", help="of the result files")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.length = 1, 32
    if arguments.device == "cpu" and not arguments.quick:
        torch.set_num_threads(common.os.cpu_count() or 1)
    todo = [(name, dtype) for name in arguments.models for dtype in arguments.dtypes]
    result = {"environment": common.environment(), "batch": [arguments.rows, arguments.length], "cases": {}}
    total = sum(SHARE[name] for name, _ in todo)
    for name, dtype in todo:
        seconds = 60 * arguments.minutes * SHARE[name] / total
        result["cases"][f"{name} {dtype}"] = measure(name, dtype, arguments, seconds)
        print(f"{name} {dtype} done", file=sys.stderr, flush=True)
    print(table(result["cases"]))
    if not arguments.quick:
        path = common.write(arguments.name, result)
        panels = {
            case: {kind: step["ratio"] for kind, step in found["steps"].items() if kind != "floor"}
            for case, found in result["cases"].items()
        }
        common.bars(path.with_suffix(".png"), panels, "Step time over the frozen model's own", "÷ floor", line=1.0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
