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
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import assets
from demo import command
from rich.console import Console
from rich.table import Table

RUN = Path("runs/demo-gguf")
RECIPE = Path(__file__).parent / "recipes" / "gguf.yaml"
ROWS = {"train": 160, "test": 40}
TOKENS = 8  # of an answer; the untuned model would go on
SENTENCES = [
    "A warm, funny film that I would gladly see again.",
    "Two hours of my life that nobody will give back.",
]


def some_rows(source: Path, folder: Path) -> list[dict[str, str]]:
    """Write the first rows of each part, a minute's worth; those of the test part."""
    folder.mkdir(parents=True)
    for part, count in ROWS.items():
        with open(source / f"{part}.csv", encoding="utf-8", newline="") as read:
            rows = list(islice(csv.DictReader(read), count))
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as written:
            writer = csv.DictWriter(written, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return rows


def by_llama_cpp(file: Path, texts: list[str]) -> list[str]:
    """What llama.cpp answers with a file."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=512, verbose=False)
    given = {"max_tokens": TOKENS, "temperature": 0.0}
    asked = ([{"role": "user", "content": text}] for text in texts)
    return [model.create_chat_completion(talk, **given)["choices"][0]["message"]["content"].strip() for talk in asked]


def by_transformers(file: Path, texts: list[str]) -> list[str]:
    """What the file answers when transformers runs it, unpacked."""
    lines = command("predict", file, *texts, "--max-new-tokens", str(TOKENS), capture=True).splitlines()
    return [json.loads(line)["text"].strip() for line in lines]


def main() -> None:
    begun = time.perf_counter()
    try:
        base, reviews = assets.smollm2(), assets.reviews()
    except assets.AssetError as error:
        sys.exit(f"make demo-gguf: {error}")
    shutil.rmtree(RUN, ignore_errors=True)
    held_out = some_rows(reviews, RUN / "data")
    tuned = RUN / "tuned.gguf"
    command("train", RECIPE, "--model", base, "--data.train", RUN / "data", "--out", RUN / "run")
    command("merge", RUN / "run", tuned)

    ask, by = by_llama_cpp, "llama.cpp"
    if not find_spec("llama_cpp"):
        print('\nllama-cpp-python is not installed (pip install "adapters-kit[llama-cpp]": a build of minutes), so')
        print("transformers is asked for both files' answers.")
        ask, by = by_transformers, "transformers"
    texts = SENTENCES + [row["text"] for row in held_out]
    answers = {file: ask(file, texts) for file in (base, tuned)}

    def right(file: Path) -> str:
        answered = zip(answers[file][len(SENTENCES) :], held_out, strict=True)
        return f"{sum(answer == row['label'] for answer, row in answered)} of {len(held_out)}"

    before, after = base.read_bytes(), tuned.read_bytes()
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    metrics = json.loads((RUN / "run" / "metrics.json").read_text())
    table = Table(title="adapters_kit: the file that you run, tuned", show_header=False)
    rows = {
        "file before": f"{base.name}, {len(before):,} bytes",
        "file after": f"{tuned.name}, {len(after):,} bytes, {changed:,} of them other ones",
        "training": f"{metrics['train_seconds']:.0f} s, {metrics['trainable_params']:,} parameters",
        f"right answers before, by {by}": right(base),
        f"right answers after, by {by}": right(tuned),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for row, text in enumerate(SENTENCES):
        table.add_row(text, f"{answers[base][row]!r} → {answers[tuned][row]!r}")
    Console(width=110).print(table)
    print(f"Whole demo: {time.perf_counter() - begun:.0f} s. Everything is under {RUN}; the file to run is {tuned}")


if __name__ == "__main__":
    main()
