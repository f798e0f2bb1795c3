"""The main job, from a pretrained model to merged weights, through the public command line: `make demo`.

Fetches a 22 M encoder and 10,000 movie reviews (examples/assets.py), scores the untouched model, trains LoRA on 4,000
reviews, scores again, merges, proves that the merged model computes the same, and asks it about three sentences.
Everything it makes is under runs/demo.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import assets
from rich.console import Console
from rich.table import Table

RUN = Path("runs/demo")
RECIPE = Path(__file__).parent / "recipes" / "text_classification.yaml"
SENTENCES = [
    "A warm, funny film that I would gladly see again.",
    "Two hours of my life that nobody will give back.",
    "The acting is fine, but the story goes nowhere.",
]


def command(*words: str | Path, capture: bool = False) -> str:
    """Run one adapters-kit command, shown as a user would type it."""
    shown = " ".join(f"'{word}'" if " " in str(word) else str(word) for word in words)
    print(f"\n$ adapters-kit {shown}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "adapters_kit", *map(str, words)], stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def main() -> None:
    begun = time.perf_counter()
    try:
        model, data = assets.minilm(), assets.reviews()
    except assets.AssetError as error:
        sys.exit(f"make demo: {error}")
    shutil.rmtree(RUN, ignore_errors=True)
    command("train", RECIPE, "--model", model, "--data.train", data, "--out", RUN)
    command("merge", RUN / "adapter", RUN / "merged")
    answers = command("predict", RUN / "merged", *SENTENCES, "--task", "text-classification", capture=True)

    metrics = json.loads((RUN / "metrics.json").read_text())
    check = json.loads((RUN / "merged" / "manifest.json").read_text())["check"]
    metrics["merged_max_abs_diff"] = check["largest"]
    (RUN / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    table = Table(title="adapters_kit demo", show_header=False)
    share = metrics["trainable_params"] / metrics["total_params"]
    rows = {
        "accuracy before training": f"{metrics['base_accuracy']:.3f}",
        "accuracy with LoRA": f"{metrics['accuracy']:.3f}",
        "F1 with LoRA": f"{metrics['f1']:.3f}",
        "parameters trained": f"{metrics['trainable_params']:,} of {metrics['total_params']:,} ({share:.1%})",
        "training": f"{metrics['train_seconds']:.0f} s",
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "merged against adapter": f"{check['largest']:.1e} at most (rounding floor {check['floor_largest']:.1e})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for sentence, line in zip(SENTENCES, answers.splitlines(), strict=True):
        answer = json.loads(line)
        table.add_row(sentence, f"{answer['label']} ({answer['score']:.2f})")
    Console(width=100).print(table)
    print(f"Whole demo: {time.perf_counter() - begun:.0f} s. Run folder: {RUN}, merged model: {RUN / 'merged'}")


if __name__ == "__main__":
    main()
