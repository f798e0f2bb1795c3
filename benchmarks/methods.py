"""Which method for the reviews? Every method on the same model, data, budget and seed, at its own default rate.

    python benchmarks/methods.py                         # all of METHODS; finished ones are not run again
    python benchmarks/methods.py --methods lora prefix   # only these
    python benchmarks/methods.py --smollm2               # language modelling instead, on a 135 M Llama

MiniLM (22 M parameters), 4,000 movie reviews, two epochs, 1,000 held out: `make demo`'s job. One seed, so differences
below about one point are noise (the standard error of an accuracy of 0.8 on 1,000 reviews is 1.3 points). With
--smollm2, SmolLM2-135M-Instruct learns the language of 400 of the reviews, one epoch, 100 held out. Results go to
results/methods.json; `--table` prints them as Markdown.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"

LORA = {"name": "lora", "r": 8}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "pfeiffer": {"name": "pfeiffer"},
    "houlsby": {"name": "houlsby"},
    "parallel": {"name": "parallel"},
    "prefix": {"name": "prefix"},
    "ia3": {"name": "ia3"},
    "lora+prefix": {"name": ["lora", "prefix"]},
    "mam": {"name": "mam"},
    "unipelt": {"name": "unipelt"},
}
# How a prefix starts matters to a language model: from words (the default), at random, or from a text of the field.
START = "The film tells a story about people and what they do, with some good scenes and some bad ones."
STARTS = {"prefix, random start": {"init": "random"}, "prefix, from a text": {"init_ids": START}}
LANGUAGE = {name: METHODS[name] for name in ("lora", "prefix", "lora+prefix")}
LANGUAGE |= {name: {"name": "prefix", **start} for name, start in STARTS.items()}
KEPT_OF_LANGUAGE = ("base_perplexity", "perplexity", "trainable_params", "total_params", "train_seconds")
KEPT = ("base_accuracy", "accuracy", "f1", "trainable_params", "total_params", "train_seconds", "peak_memory_bytes")


def run(method: dict[str, Any]) -> dict[str, Any]:
    """Train once; returns the figures that the table shows."""
    import assets

    import adapters_kit as ak

    with tempfile.TemporaryDirectory() as folder:
        recipe = ak.Recipe(
            model=str(assets.minilm()),
            task="text-classification",
            data={"train": str(assets.reviews()), "limit": 4000},
            method=method,
            training={"epochs": 2, "batch_size": 16, "max_length": 128, "keep_best": False, "evals_per_epoch": 0},
        )
        done = ak.train(recipe, Path(folder) / "run")
        adapter = sum(path.stat().st_size for path in done.adapter.glob("adapter_model*"))
        rate = done.recipe.training.learning_rate
        return {**{key: done.metrics[key] for key in KEPT}, "learning_rate": rate, "adapter_bytes": adapter}


def run_language(method: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of SmolLM2 on reviews, before and after training once."""
    import assets

    import adapters_kit as ak

    if "init_ids" in method:
        method = {**method, "init_ids": ak.load_processor(assets.smollm2())(method["init_ids"])["input_ids"]}
    with tempfile.TemporaryDirectory() as folder:
        recipe = ak.Recipe(
            model=str(assets.smollm2()),
            task="causal-lm",
            data={"train": str(assets.reviews()), "columns": {"text": "text"}, "limit": 400, "test_limit": 100},
            method=method,
            training={
                "epochs": 1,
                "batch_size": 8,
                "max_length": 64,
                "keep_best": False,
                "evals_per_epoch": 0,
                "samples": 0,
            },
        )
        done = ak.train(recipe, Path(folder) / "run")
        return {
            **{key: done.metrics[key] for key in KEPT_OF_LANGUAGE},
            "learning_rate": done.recipe.training.learning_rate,
        }


def read() -> dict[str, Any]:
    empty = {"environment": {}, "methods": {}, "smollm2": {}}
    return empty | (json.loads(RESULTS.read_text()) if RESULTS.is_file() else {})


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, best first."""
    lines = ["| method | trained | of all | adapter | accuracy | F1 |", "|---|---|---|---|---|---|"]
    for name, row in sorted(results["methods"].items(), key=lambda item: -item[1]["accuracy"]):
        trained, share = row["trainable_params"], row["trainable_params"] / row["total_params"]
        size = f"{row['adapter_bytes'] / 1e6:.2f} MB"
        lines.append(f"| {name} | {trained:,} | {share:.2%} | {size} | {row['accuracy']:.3f} | {row['f1']:.3f} |")
    return "\n".join(lines)


def language_table(results: dict[str, Any]) -> str:
    """The language-modelling results as a Markdown table."""
    lines = ["| SmolLM2-135M | trained | perplexity before | after |", "|---|---|---|---|"]
    for name, row in sorted(results["smollm2"].items(), key=lambda item: item[1]["perplexity"]):
        before, after = row["base_perplexity"], row["perplexity"]
        lines.append(f"| {name} | {row['trainable_params']:,} | {before:.2f} | {after:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--smollm2", action="store_true", help="language modelling on SmolLM2")
    parser.add_argument("--again", action="store_true", help="run methods again that have a result")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    if options.table:
        print(table(read()), language_table(read()), sep="\n\n")
        return
    import torch

    part, once = ("smollm2", run_language) if options.smollm2 else ("methods", run)
    chosen = LANGUAGE if options.smollm2 else {name: METHODS[name] for name in options.methods}
    for name in chosen:
        if name in read()[part] and not options.again:
            continue
        row = once(chosen[name])
        results = read()
        results["environment"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        }
        results[part][name] = row
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        print(name, row)


if __name__ == "__main__":
    main()
