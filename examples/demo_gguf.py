"""A GGUF file in, the same file with other weights out: `make demo-gguf`.

Fetches SmolLM2-135M-Instruct as the 98 MB file that llama.cpp runs, and movie reviews (examples/assets.py); trains the
block minima of that file to answer a review with its sentiment; writes them into a copy of the same size; and asks both
files, by llama.cpp where llama-cpp-python is installed. Everything it makes is under runs/demo-gguf.
"""

import csv
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import assets
from demo import command
from rich.console import Console
from rich.table import Table

RUN = Path("runs/demo-gguf")
RECIPE = Path(__file__).parent / "recipes" / "gguf.yaml"
ROWS = {"train": 320, "test": 40}
SENTENCES = [
    "A warm, funny film that I would gladly see again.",
    "Two hours of my life that nobody will give back.",
]


def some_rows(source: Path, folder: Path) -> Path:
    """The first rows of each part: a minute's worth."""
    folder.mkdir(parents=True)
    for part, count in ROWS.items():
        with open(source / f"{part}.csv", encoding="utf-8", newline="") as read:
            lines = [line for line, _ in zip(csv.reader(read), range(count + 1), strict=False)]
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as written:
            csv.writer(written).writerows(lines)
    return folder


def llama_cpp(file: Path) -> Callable[[str], str] | None:
    """What llama.cpp answers with a file, or None where llama-cpp-python is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    model = Llama(str(file), n_ctx=256, verbose=False)

    def ask(text: str) -> str:
        given = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0.0}
        return model.create_chat_completion(**given)["choices"][0]["message"]["content"].strip()

    return ask


def by_this_package(file: Path) -> Callable[[str], str]:
    """What the file answers when transformers runs it."""
    return lambda text: json.loads(command("predict", file, text, "--max-new-tokens", "12", capture=True))[
        "text"
    ].strip()


def main() -> None:
    begun = time.perf_counter()
    try:
        base, reviews = assets.smollm2(), assets.reviews()
    except assets.AssetError as error:
        sys.exit(f"make demo-gguf: {error}")
    shutil.rmtree(RUN, ignore_errors=True)
    data = some_rows(reviews, RUN / "data")
    tuned = RUN / "tuned.gguf"
    command("train", RECIPE, "--model", base, "--data.train", data, "--out", RUN / "run")
    command("merge", RUN / "run", tuned)

    before, after = base.read_bytes(), tuned.read_bytes()
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    metrics = json.loads((RUN / "run" / "metrics.json").read_text())
    by = "llama.cpp"
    asked = llama_cpp(base), llama_cpp(tuned)
    if None in asked:
        by = "transformers"
        print('llama-cpp-python is not installed (pip install "adapters-kit[llama-cpp]", a build of minutes), so')
        print("transformers is asked for both files' answers.")
        asked = by_this_package(base), by_this_package(tuned)

    table = Table(title="adapters_kit: the file that you run, tuned", show_header=False)
    rows = {
        "file": f"{base.name}, {len(before):,} bytes; tuned.gguf, {len(after):,} bytes",
        "bytes that changed": f"{changed:,} ({changed / len(before):.1%}): two of every 20 of a block",
        "parameters trained": f"{metrics['trainable_params']:,}",
        "exact answers before": f"{metrics['base_exact_match']:.2f} of {ROWS['test']} held-out reviews",
        "exact answers after": f"{metrics['exact_match']:.2f}",
        "training": f"{metrics['train_seconds']:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for text in SENTENCES:
        for name, ask in zip(("before", "after"), asked, strict=True):
            table.add_row(f"{by}, {name}: {text}", ask(text))
    Console(width=110).print(table)
    print(f"Whole demo: {time.perf_counter() - begun:.0f} s. Everything is under {RUN}; the file to run is {tuned}")


if __name__ == "__main__":
    main()
