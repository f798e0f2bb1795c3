"""What a precision costs: SmolLM2-135M at fp32, bf16, nf4, int8 and in its GGUF file's blocks ("keep").

A process for each case, since peaks only grow.

    python benchmarks/loading.py                 # all cases, three rounds in turn, medians: a few minutes
    python benchmarks/loading.py --rounds 1
    python benchmarks/loading.py --table         # prints results/loading.json as Markdown

On a CPU; memory as the system counts it (VmHWM of /proc/self/status) above the process after its imports.
weights     what the model's tensors take
load peak   the most that loading took, mapped files included (bf16 only maps its file: pages come in as they are used)
train peak  the most that loading and training took: LoRA r=8, batches of 2 x 128 tokens
tokens/s    of training steps and of evaluation
KL          of the next-token distributions against fp32, mean over the tokens of 32 held-out reviews, nats
The rows "transformers" load the same weights by plain `from_pretrained` with the same config of bitsandbytes, the rows
"from GGUF" the Q4_1 file that the others were unpacked from; both only load, in the first round.
"""

import argparse
import csv
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
RESULTS = ROOT / "benchmarks" / "results" / "loading.json"
FULL = ("fp32", "bf16", "nf4", "int8", "keep")
CASES = (*FULL, "nf4 transformers", "int8 transformers", "nf4 from GGUF", "int8 from GGUF")
BATCH, LENGTH = 2, 128
MB = 1e6


def resident(entry: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads /proc/self/status, which only Linux has.")


def load(folder: Path, case: str) -> Any:
    """The model of a case."""
    import adapters_kit as ak

    kind, _, how = case.partition(" ")
    if kind == "keep":
        import assets

        return ak.load(assets.smollm2(), quantize=kind)
    if not how:
        return ak.load(folder, dtype=kind) if kind in ("fp32", "bf16") else ak.load(folder, quantize=kind)
    if how == "from GGUF":
        import assets

        return ak.load(assets.smollm2(), quantize=kind)
    import torch
    from transformers import AutoModelForCausalLM

    from adapters_kit.quantization import bnb_config

    config = bnb_config(kind, skip=["lm_head"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def measure(folder: Path, case: str, steps: int) -> dict[str, float]:
    """All figures of one case, in this process."""
    import adapters_kit as ak

    _ = ak.load, ak.wrap  # all imports before the count begins
    import bitsandbytes  # noqa: F401
    import gguf  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    texts = json.loads((folder / "texts.json").read_text())
    tokenizer = ak.load_processor(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model = load(folder, case)
    result: dict[str, float] = {
        "weights_mb": model.get_memory_footprint() / MB,
        "load_peak_mb": (resident("VmHWM") - before) / MB,
    }
    if case not in FULL:
        return result
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        begin = time.perf_counter()
        logs = torch.cat(
            [model(**_rows(batch, i, i + 8)).logits.float().log_softmax(-1) for i in range(0, len(texts), 8)]
        )
        result["eval_tokens_per_s"] = int(seen.sum()) / (time.perf_counter() - begin)
    reference = folder / "fp32.pt"
    if case == "fp32":
        torch.save(logs[seen].half(), reference)
    else:
        want = torch.load(reference).float()
        result["kl"] = float((want.exp() * (want - logs[seen])).sum(-1).mean())
        del want
    del logs
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    torch.manual_seed(0)
    wrapped = ak.wrap(model, "lora", r=8).train()
    optimizer = torch.optim.AdamW([entry for entry in wrapped.parameters() if entry.requires_grad], lr=2e-4)
    ids = torch.randint(5, 40_000, (BATCH, LENGTH))
    rates = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(ids.numel() / (time.perf_counter() - begin))
    result["train_tokens_per_s"] = statistics.median(rates[1:])
    result["train_peak_mb"] = (resident("VmHWM") - before) / MB
    return result


def _rows(batch: Any, first: int, last: int) -> dict[str, Any]:
    return {key: value[first:last] for key, value in batch.items()}


def prepare(folder: Path) -> None:
    """SmolLM2 as a bf16 folder, and 32 held-out reviews."""
    import assets

    import adapters_kit as ak

    file = assets.smollm2()
    ak.load(file, dtype="bf16").save_pretrained(folder)
    ak.load_processor(file).save_pretrained(folder)
    table = next(path for path in sorted(assets.reviews().glob("*.csv")) if "test" in path.name)
    with table.open(newline="", encoding="utf-8") as rows:
        texts = [row["text"] for row, _ in zip(csv.DictReader(rows), range(32), strict=False)]
    (folder / "texts.json").write_text(json.dumps(texts))


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The saved results."""
    return json.loads(path.read_text())


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = {
        "weights MB": ("weights_mb", ".0f"),
        "load peak MB": ("load_peak_mb", ".0f"),
        "train peak MB": ("train_peak_mb", ".0f"),
        "train tokens/s": ("train_tokens_per_s", ".0f"),
        "eval tokens/s": ("eval_tokens_per_s", ".0f"),
        "KL": ("kl", ".4f"),
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for case, figures in results["cases"].items():
        cells = [format(figures[key], form) if key in figures else "" for key, form in columns.values()]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="training steps that are timed")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the saved results and stop")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.table:
        print(table(read(chosen.out)))
        return
    if chosen.one:
        print(json.dumps(measure(chosen.folder, chosen.one, chosen.steps)))
        return
    cases = [case for case in CASES if case in chosen.cases or case == "fp32"]  # fp32 is the reference of the others
    found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        folder = chosen.folder or Path(name)
        if not (folder / "texts.json").exists():
            prepare(folder)
        for number in range(chosen.rounds):
            for case in cases:
                if number and case not in FULL:
                    continue
                command = [sys.executable, __file__, "--one", case, "--folder", folder, "--steps", str(chosen.steps)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[case].append(json.loads(done.stdout.splitlines()[-1]))
                print(case, found[case][-1], flush=True)
    import common

    results = {
        "model": "SmolLM2-135M-Instruct",
        "rounds": chosen.rounds,
        "environment": common.environment() | {"bitsandbytes": version("bitsandbytes")},
        "cases": {
            case: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for case, runs in found.items()
        },
    }
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
