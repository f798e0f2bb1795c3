"""What `training.init` does to the first hundred steps: held-out loss after 0, 25, 50, 75 and 100, for several rates.

    python benchmarks/starts.py [minilm] [smollm2] [minilm-nf4]

Real models on 800 sentences of movie reviews: MiniLM tells good ones from bad ones, SmolLM2 writes them. Held out are
others of the same source.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, environment

import adapters_kit as ak
from examples import assets

STARTS = (None, "eva", "corda", "lora-ga", "pissa", "olora")
RATES = (2e-4, 6e-4)


def run(model: str, start: str | None, rate: float, folder: Path) -> dict[str, Any]:
    """One training of a hundred steps."""
    labelled = model != "smollm2"
    recipe = {
        "model": str(assets.minilm() if labelled else assets.smollm2()),
        "task": "text-classification" if labelled else "causal-lm",
        "data": {
            **{part: str(assets.reviews() / f"{part}.csv") for part in ("train", "test")},
            "limit": 800,
            "test_limit": 200 if labelled else 100,
        },
        "method": {"name": "lora", "r": 8},
        "quantize": "nf4" if model.endswith("nf4") else None,
        "training": {
            "max_steps": 100,
            "batch_size": 8 if labelled else 4,
            "max_length": 32,
            "learning_rate": rate,
            "evals_per_epoch": 4,
            "keep_best": False,
            "samples": 0,
            "init": start,
        },
    }
    out = folder / "run"
    made = ak.train(recipe, out, quiet=True)
    found = {"0": made.metrics["base_loss"]}
    found |= {str(line["step"]): line["eval_loss"] for line in made.history() if "eval_loss" in line}
    shutil.rmtree(out)
    score = {"accuracy": made.metrics["accuracy"]} if labelled else {}
    return {
        "model": model,
        "start": start,
        "rate": rate,
        "loss": found,
        **score,
        "seconds": made.metrics["train_seconds"],
    }


def main(models: list[str]) -> None:
    """Adds each result as it comes."""
    file = RESULTS / "starts.json"
    known = json.loads(file.read_text()) if file.is_file() else {"runs": []}
    for model in models:
        for start in (None, "loftq", "eva", "pissa") if model.endswith("nf4") else STARTS:
            for rate in RATES:
                if any((one["model"], one["start"], one["rate"]) == (model, start, rate) for one in known["runs"]):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    known["runs"].append(run(model, start, rate, Path(folder)))
                known["environment"] = environment()
                file.write_text(json.dumps(known, indent=1) + "\n")
                print(known["runs"][-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["minilm", "smollm2", "minilm-nf4"])
