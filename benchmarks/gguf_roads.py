"""Three roads from a GGUF file to the same file, tuned: what each costs, what it learns, and what of it is shipped.

    python benchmarks/gguf_roads.py                       # everything that is missing: hours on two cores
    python benchmarks/gguf_roads.py --files Q4_1 --seeds 1
    python benchmarks/gguf_roads.py --stages llama        # llama.cpp beside transformers on what was made
    python benchmarks/gguf_roads.py --table               # prints results/gguf_roads.json as Markdown

SmolLM2-135M-Instruct as it is packaged (Q4_1), and as llama.cpp's own tools write it from there (Q8_0, Q4_K_M: since
576 is no multiple of 256, most of its matrices are Q5_0 then, and only the second of each MLP is in K-quants).
Movie reviews as plain text, rows of 128 tokens, one epoch in batches of two; perplexity of held-out reviews, bf16.

lora keep     LoRA r=16 on the file's blocks; shipped as codes chosen for the outputs (`merge`, calibrated on the
              training texts). Beside the file (`export`, adapter.gguf) nothing is rounded.
lora nf4      LoRA r=16 on the weights in nf4; shipped beside the file, and merged and quantized anew to its type.
blocks        the minima or scales that the file stores, r=16; shipped into the file.

A learning rate for each road is searched with seed 0 on other reviews. A process for each file and road; all that was
measured is kept at once under runs/gguf, so that an interrupted run goes on where it stopped.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
RESULTS = ROOT / "benchmarks" / "results" / "gguf_roads.json"
WORK = ROOT / "runs" / "gguf"
FILES = ("Q4_1", "Q8_0", "Q4_K_M")
ROADS: dict[str, dict[str, Any]] = {
    "lora keep": {"method": "lora", "quantize": "keep"},
    "lora nf4": {"method": "lora", "quantize": "nf4"},
    "blocks": {"method": "blocks", "quantize": "keep"},
}
RATES = {
    ("Q4_1", "lora keep"): (1e-3, 2e-3, 4e-3),
    ("Q4_1", "blocks"): (1e-3, 2e-3),
    ("Q8_0", "blocks"): (2e-3, 8e-3),
}
ROWS = {"train": 120, "validation": 40, "test": 60}
LENGTH, BATCH = 128, 2
PROMPTS, ANSWER = 100, 32  # of llama.cpp's greedy answers, in tokens
ROWS_AT_ONCE = 8


def reviews(part: str) -> list[str]:
    """Texts of reviews: the first of the training file are trained on, the next are for the search."""
    import assets

    first = ROWS["train"] if part == "validation" else 0
    name = "test.csv" if part in ("test", "prompts") else "train.csv"
    with open(assets.reviews() / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows[first : first + ROWS.get(part, PROMPTS)]]


def file_of(name: str) -> Path:
    """The GGUF file, made where it is not packaged."""
    import assets

    import adapters_kit as ak

    base = assets.smollm2()
    if name == "Q4_1":
        return base
    out = WORK / "files" / f"{name}.gguf"
    if not out.exists():
        folder = WORK / "files" / "folder"
        if not folder.exists():
            ak.load(base, dtype="float16").save_pretrained(folder)
            ak.load_processor(base).save_pretrained(folder)
        ak.export(folder, out, format="gguf", dtype=name.lower())
    return out


def rows_of(tokenizer: Any, part: str) -> Any:
    """Token ids `(rows, LENGTH)`."""
    import torch

    ids = [token for text in reviews(part) for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def perplexity(model: Any, rows: Any) -> float:
    """Of the tokens of `rows`."""
    import torch

    with torch.no_grad():
        losses = [float(model(input_ids=each, labels=each).loss) * len(each) for each in rows.split(ROWS_AT_ONCE)]
    return math.exp(sum(losses) / len(rows))


def train(model: Any, rows: Any, rate: float, seed: int) -> dict[str, float]:
    """One epoch; tokens a second of wall-clock and of processor time."""
    import torch

    torch.manual_seed(seed)
    trained = [entry for entry in model.parameters() if entry.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    batches = rows[torch.randperm(len(rows))].split(BATCH)
    wall, busy = time.perf_counter(), time.process_time()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 3) * (1 - step / len(batches))
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "tokens_per_s": rows.numel() / (time.perf_counter() - wall),
        "tokens_per_cpu_s": rows.numel() / (time.process_time() - busy),
    }


class Kept:
    """Figures of a file and a road, written as soon as they are known."""

    def __init__(self, file: str, road: str) -> None:
        self.path = WORK / f"{file} {road}.json"
        self.all: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, key: str, value: Any) -> None:
        self.all[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".new").write_text(json.dumps(self.all, indent=1))
        self.path.with_suffix(".new").replace(self.path)
        print(self.path.stem, key, value, flush=True)


def rate_of(file: str, road: str) -> float | None:
    """The best of a search: on this file, else on one of the others; LoRA on nf4 takes that of LoRA on keep."""
    for place, way in ((file, road), ("Q8_0", road), ("Q4_1", road), ("Q4_1", "lora keep")):
        found = {key: value for key, value in Kept(place, way).all.items() if key.startswith("rate ")}
        if found:
            return float(min(found, key=found.__getitem__).removeprefix("rate "))
    return None


def one(file: str, road: str, seeds: int, search: bool) -> None:
    """Train what is missing of a file and a road, in this process."""
    import gc

    import bitsandbytes  # noqa: F401 - all imports before the count begins
    import gguf  # noqa: F401
    import torch
    from loading import resident

    import adapters_kit as ak
    from adapters_kit.artifacts.record import record_base

    kept, way = Kept(file, road), ROADS[road]
    wanted = [f"rate {rate:g}" for rate in RATES[file, road]] if search else [f"seed {seed}" for seed in range(seeds)]
    if all(key in kept.all for key in wanted):
        return
    source = file_of(file)
    tokenizer = ak.load_processor(source)
    rows = {part: rows_of(tokenizer, part) for part in ROWS}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model = ak.load(source, quantize=way["quantize"], dtype="bfloat16").eval()
    costs = {"load_peak": resident("VmHWM") - before, "weights": _held(model), "file": source.stat().st_size}
    if "before" not in kept.all:
        kept.add("before", perplexity(model, rows["test"]))
    for key in wanted:
        if key in kept.all:
            continue
        rate = float(key.removeprefix("rate ")) if search else rate_of(file, road)
        seed = 0 if search else int(key.removeprefix("seed "))
        if rate is None:
            raise SystemExit("No learning rate was searched yet: run with --stages search first.")
        torch.manual_seed(seed)
        wrapped = ak.wrap(model, way["method"], **({"lora_dropout": 0.0} if way["method"] == "lora" else {}), r=16)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        speed = train(wrapped.train(), rows["train"], rate, seed)
        found = costs | speed | {"train_peak": resident("VmHWM") - before, "rate": rate, "load": os.getloadavg()[0]}
        found["trained"] = sum(entry.numel() for entry in wrapped.parameters() if entry.requires_grad)
        wrapped.eval()
        if search:
            kept.add(key, perplexity(wrapped, rows["validation"]))
        else:
            folder = WORK / f"{file} {road} {seed}"
            wrapped.save_pretrained(folder)
            record_base(folder, str(source), wrapped)
            kept.add(key, found | {"after": perplexity(wrapped, rows["test"])})
        model = wrapped.unload()


def _held(model: Any) -> int:
    from adapters_kit.kernels.block_tensor import BlockTensor

    tensors = {id(entry): entry for entry in model.parameters()}.values()
    state = {id(entry): entry for entry in model.buffers()}.values()
    return sum(entry.packed_bytes if isinstance(entry, BlockTensor) else entry.nbytes for entry in (*tensors, *state))


def ship(file: str, road: str, seeds: int) -> None:
    """Perplexity of what was trained, after each way into or beside the file."""
    import adapters_kit as ak

    kept, source = Kept(file, road), file_of(file)
    rows = rows_of(ak.load_processor(source), "test")
    for seed in range(seeds):
        adapter = WORK / f"{file} {road} {seed}"
        if f"seed {seed}" not in kept.all:
            continue
        key, out = f"shipped {seed}", WORK / "shipped" / f"{file} {road} {seed}.gguf"
        out.parent.mkdir(exist_ok=True)
        if key not in kept.all and road == "lora nf4":
            whole = WORK / "shipped" / "whole"
            ak.merge(adapter, whole, base=source, overwrite=True)
            ak.export(whole, out, format="gguf", dtype=file.lower(), overwrite=True)
            kept.add(key, {"perplexity": perplexity(_again(out), rows), "bytes": out.stat().st_size})
        elif key not in kept.all:
            given = {"calibration": reviews("train")} if road == "lora keep" else {}
            report = ak.merge(adapter, out, base=source, overwrite=True, **given)
            told = {"kl": report.kl, "kl_base": report.kl_base, "seconds": report.seconds, "bytes": report.nbytes}
            kept.add(key, told | {"perplexity": perplexity(_again(out), rows)})
        key = f"beside {seed}"
        if key not in kept.all and road == "lora nf4":
            beside = ak.wrap(_again(source), adapter, force=True).eval()
            kept.add(key, {"perplexity": perplexity(beside, rows)})


def _again(file: Path) -> Any:
    import adapters_kit as ak

    return ak.load(file, quantize="keep", dtype="bfloat16").eval()


def llama(file: str) -> None:
    """llama.cpp beside transformers: the base, base + adapter.gguf, and the file with the blocks trained."""
    import adapters_kit as ak

    kept, source = Kept(file, "llama.cpp"), file_of(file)
    adapter, shipped = WORK / f"{file} lora keep 0", WORK / "shipped" / f"{file} blocks 0.gguf"
    out = WORK / "shipped" / f"{file} adapter.gguf"
    if not adapter.exists() or not shipped.exists():
        return
    if not out.exists():
        ak.export(adapter, out, format="gguf", dtype="float32", base=source)
    for key, model, lora in (("base", source, None), ("adapter.gguf", source, out), ("merged", shipped, None)):
        if key not in kept.all:
            ours = ak.load(model, quantize="keep", dtype="float32")
            ours = ak.wrap(ours, adapter, fuse=False, force=True) if lora else ours
            kept.add(key, compared(ours.eval(), model, lora, ak.load_processor(source)))


def compared(ours: Any, file: Path, lora: Path | None, tokenizer: Any) -> dict[str, Any]:
    """Perplexity of both, and llama.cpp's greedy answers token by token beside what ours would say after the same ones.

    top_two is how far llama.cpp's rounding (it rounds activations to 8 bit for these types) moves the difference of
    our two likeliest tokens, in nats: root mean square and largest over all positions.
    """
    import numpy as np
    import torch
    from llama_cpp import Llama

    theirs = Llama(
        str(file),
        lora_path=lora and str(lora),
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        verbose=False,
    )

    @torch.no_grad()
    def both(ids: list[list[int]], others: list[Any]) -> Iterable[tuple[Any, Any]]:
        longest = max(map(len, ids))
        padded = torch.tensor([each + [0] * (longest - len(each)) for each in ids])  # to the right: nobody looks there
        for each, logs, other in zip(ids, ours(input_ids=padded).logits, others, strict=True):
            yield logs[: len(each)].float().log_softmax(-1), other.log_softmax(-1)

    def scores(count: int) -> Any:
        return torch.from_numpy(np.array(theirs.scores[:count]))

    sums = [0.0, 0.0]
    rows = rows_of(tokenizer, "test")
    for some in rows.split(ROWS_AT_ONCE):
        others = []
        for row in some.tolist():
            theirs.reset()
            theirs.eval(row)
            others.append(scores(len(row)))
        for row, pair in zip(some, both(some.tolist(), others), strict=True):
            for which, logs in enumerate(pair):
                sums[which] -= float(logs[:-1].gather(1, row[1:, None]).mean())
    moved, gaps, same = [], [], 0
    texts = reviews("prompts")
    for first_text in range(0, PROMPTS, ROWS_AT_ONCE):
        talks, starts, others = [], [], []
        for text in texts[first_text : first_text + ROWS_AT_ONCE]:
            ids = tokenizer(text).input_ids[:12]
            told = list(ids)
            theirs.reset()
            theirs.eval(ids)
            for _ in range(ANSWER):
                told.append(int(theirs.scores[len(told) - 1].argmax()))
                theirs.eval(told[-1:])
            talks.append(told)
            starts.append(len(ids))
            others.append(scores(len(told)))
        for told, start, pair in zip(talks, starts, both(talks, others), strict=True):
            logs, other = (each[start - 1 : -1] for each in pair)
            first, second = logs.topk(2).indices.unbind(1)
            pick = torch.arange(len(logs))
            gap, gap_other = (each[pick, first] - each[pick, second] for each in (logs, other))
            moved += (gap - gap_other).tolist()
            differs = (first != torch.tensor(told[start:])).nonzero().flatten()
            same += not len(differs)
            gaps += gap[differs].tolist()
    top_two = {"rms": (sum(value**2 for value in moved) / len(moved)) ** 0.5, "largest": max(map(abs, moved))}
    return {
        "perplexity": math.exp(sums[0] / len(rows)),
        "perplexity_llama_cpp": math.exp(sums[1] / len(rows)),
        "prompts": PROMPTS,
        "tokens": len(moved),
        "prompts_equal": same,
        "gaps_where_other": sorted(gaps),
        "top_two": top_two,
    }


def collect() -> dict[str, Any]:
    """All that is known, for results/gguf_roads.json."""
    import common

    files = {name: {road: Kept(name, road).all for road in (*ROADS, "llama.cpp")} for name in FILES}
    return {"model": "SmolLM2-135M-Instruct", "rows": ROWS, "environment": common.environment(), "files": files}


def read() -> dict[str, Any]:
    """The saved results."""
    return json.loads(RESULTS.read_text())


def _mean(values: Iterable[float], digits: int = 1) -> str:
    found = list(values)
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{spread}" if found else ""


def table(results: dict[str, Any]) -> str:
    """One line a file and a road, as Markdown."""
    # Of processor time, one thread: other work on the machine counts less.
    head = ("", "file MB", "weights MB", "peak MB", "tokens / CPU s", "seeds", "rate", "before", "trained")
    head += ("shipped", "kept")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for file, roads in results["files"].items():
        for road in ROADS:
            found = roads[road]
            seeds = {key.split()[1]: value for key, value in found.items() if key.startswith("seed ")}
            if not seeds:
                continue
            first = next(iter(seeds.values()))
            cells = [f"{first[name] / 1e6:.0f}" for name in ("file", "weights", "train_peak")]
            cells += [_mean((each["tokens_per_cpu_s"] for each in seeds.values()), 0)]
            cells += [str(len(seeds)), f"{first['rate']:g}"]
            cells += [f"{found['before']:.1f}", _mean(each["after"] for each in seeds.values())]
            for way, said in (("shipped", ""), ("beside", ", beside the file")):
                there = {key: found[f"{way} {key}"]["perplexity"] for key in seeds if f"{way} {key}" in found}
                # What it is measured against is what llama.cpp runs before: the file itself.
                base = roads["lora keep"]["before"]
                share = [100 * (base - value) / (base - seeds[key]["after"]) for key, value in there.items()]
                if way == "shipped" or there:
                    tail = [_mean(there.values()), _mean(share, 0) + (" %" if share else "")]
                    lines.append("| " + " | ".join([f"{file}, {road}{said}", *cells, *tail]) + " |")
                    cells = [""] * len(cells)
    return "\n".join(lines)


def llama_table(results: dict[str, Any]) -> str:
    """llama.cpp beside transformers, as Markdown."""
    head = ("", "perplexity", "by llama.cpp", "prompts equal", "tokens equal", "gap where other", "rounding, largest")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for file, roads in results["files"].items():
        for what, found in roads["llama.cpp"].items():
            gaps = found["gaps_where_other"]
            cells = [f"{found['perplexity']:.2f}", f"{found['perplexity_llama_cpp']:.2f}"]
            cells += [f"{found['prompts_equal']} of {found['prompts']}"]
            cells += [f"{found['tokens'] - len(gaps):,} of {found['tokens']:,}"]
            cells += [f"≤ {gaps[-1]:.2f}" if gaps else "", f"{found['top_two']['largest']:.2f}"]
            lines.append(f"| {file}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(ROADS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the saved results and stop")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.table:
        print(table(read()), llama_table(read()), sep="\n\n")
        return
    if chosen.one:
        stage, file, road = chosen.one
        if stage == "llama":
            llama(file)
        elif stage == "ship":
            ship(file, road, chosen.seeds)
        else:
            one(file, road, chosen.seeds, search=stage == "search")
        return
    for stage in chosen.stages:
        for file in chosen.files:
            for road in chosen.roads[:1] if stage == "llama" else chosen.roads:
                if stage == "search" and (file, road) not in RATES:
                    continue
                command = [sys.executable, __file__, "--one", stage, file, road, "--seeds", str(chosen.seeds)]
                subprocess.run(command, check=True)
    RESULTS.write_text(json.dumps(collect(), indent=1) + "\n")
    print(table(read()), llama_table(read()), sep="\n\n")


STAGES = ("search", "train", "ship", "llama")

if __name__ == "__main__":
    main()
