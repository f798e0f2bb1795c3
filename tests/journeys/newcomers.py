"""Ten tasks of somebody who is new here, done with the documentation alone on small real models, with their times.

python -m tests.journeys.newcomers 1 4      # these; without numbers all ten
python -m tests.journeys.newcomers --list

Each task is what the newcomer wants, the page that tells how, and the page's commands, typed as they stand there; only
hub ids become the folders of examples/assets.py. Five minutes each is the promise. Time on the clock is this machine's
at this load; seconds of CPU say what the task itself costs. tests/test_docs.py holds every line to its page.
"""

import argparse
import csv
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MINILM, SMOLLM = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
PYTHON = "python:"
"""A step that begins so is the Python blocks of its page, down to the n-th."""


@dataclass(frozen=True)
class Journey:
    """What is wanted, where it stands, and what is typed."""

    wish: str
    page: str
    steps: tuple[str, ...]


TEN = (
    Journey(
        "I have a CSV of reviews with labels. Teach a model to label new ones, and show me what came of it.",
        "start.md",
        (
            "adapters-kit doctor",
            "adapters-kit init reviews.csv",
            "adapters-kit plan reviews.yaml",
            "adapters-kit train reviews.yaml",
            'adapters-kit predict runs/reviews "I would gladly see it again."',
        ),
    ),
    Journey(
        "My columns are called body and team. Train on them, score on another file, label a file of new tickets.",
        "howto/classify.md",
        (
            "adapters-kit init tickets.csv --out tickets.yaml",
            "adapters-kit train tickets.yaml",
            "adapters-kit eval runs/tickets --data other.csv",
            "adapters-kit predict runs/tickets --input new.csv --out answers.csv",
        ),
    ),
    Journey(
        "Here are conversations. Make a chat model answer as they do, and serve it behind OpenAI's protocol.",
        "howto/chat.md",
        (
            f"adapters-kit train chats.jsonl --task causal-lm --model {SMOLLM} --out runs/chat",
            "adapters-kit chat runs/chat",
            "adapters-kit serve runs/chat --port 8000",
        ),
    ),
    Journey(
        "Will QLoRA of an 8B model fit my card? And let me see it work on this laptop first.",
        "howto/qlora.md",
        (
            "adapters-kit plan --model ./model --task causal-lm --length 1024 --gpu 8GB",
            f"adapters-kit train chats.jsonl --task causal-lm --model {SMOLLM} --quantize nf4 "
            "--training.batch_size 4 --training.max_steps 10 --out runs/small",
        ),
    ),
    Journey(
        "Ship what I trained: is it loadable by vLLM, one merged model, an adapter that every server computes alike.",
        "howto/ship.md",
        (
            "adapters-kit check runs/chat --target vllm",
            "adapters-kit merge runs/chat merged",
            "adapters-kit check merged --target vllm",
            "adapters-kit export runs/chat shipped --canonical",
        ),
    ),
    Journey(
        "Which learning rate and rank? Put finished runs beside each other.",
        "howto/compare.md",
        (
            "adapters-kit sweep reviews.yaml --learning-rates 1e-4 3e-4 1e-3 --ranks 4 16",
            f"{PYTHON}1",
        ),
    ),
    Journey(
        "Is LoRA as good as full fine-tuning on my data?",
        "howto/compare.md",
        ("adapters-kit compare reviews.yaml --methods full,lora --seeds 2 --max-minutes 4",),
    ),
    Journey(
        "The training was stopped. Go on; then train several adapters, and make one of two.",
        "howto/adapters.md",
        (
            "adapters-kit train reviews.yaml --out runs/reviews --resume",
            f"{PYTHON}3",
        ),
    ),
    Journey(
        "Ten customers, one base: train their adapters together.",
        "howto/many.md",
        (
            "adapters-kit train-many customer-a.yaml customer-b.yaml --out runs/customers",
            f"{PYTHON}1",
        ),
    ),
    Journey(
        "I have a Trainer, or a loop of my own. Put an adapter in it and merge what it saves.",
        "howto/trainers.md",
        (f"{PYTHON}3",),
    ),
)
ROOT = Path(__file__).parents[2]
ROWS, TURNS = 400, 40
"""Reviews and conversations that the newcomer brings."""


def desk(folder: Path) -> dict[str, str]:
    """The files that the pages speak of; hub id -> folder of the model that is here."""
    sys.path.insert(0, str(ROOT / "examples"))
    import assets

    import adapters_kit as ak

    minilm, gguf = str(assets.minilm()), str(assets.smollm2())
    with (assets.reviews() / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)][:ROWS]
    for name, columns in {
        "reviews": ("text", "label"),
        **dict.fromkeys(("tickets", "other", "new"), ("body", "team")),
    }.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *(rows if name in ("reviews", "tickets") else rows[:100])])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Was this review kind? {text}"},
                {"role": "assistant", "content": label},
            ]
        }
        for text, label in rows[:TURNS]
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    recipe = {"model": minilm, "task": "text-classification", "data": "reviews.csv", "training": {"epochs": 1}}
    for name in ("reviews", "customer-a", "customer-b"):
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    ak.load(gguf, task="causal-lm").save_pretrained(folder / "model")  # as the hub would give it
    ak.load_processor(gguf).save_pretrained(folder / "model")
    return {MINILM: minilm, SMOLLM: str(folder / "model")}


def spent() -> float:
    """Seconds of CPU of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python_blocks(page: str, number: int) -> str:
    """The Python blocks of a page down to the n-th, as one program."""
    from tests.test_docs import blocks

    return "\n".join(block["text"] for block in blocks(f"docs/{page}", "python")[:number])


def type_in(step: str, page: str, folder: Path, models: dict[str, str]) -> int:
    """One step in a process of its own, as in a terminal."""
    if step.startswith(PYTHON):
        words, said = [sys.executable, "-c", python_blocks(page, int(step.removeprefix(PYTHON)))], None
    else:
        words = [sys.executable, "-m", "adapters_kit", *shlex.split(step, comments=True)[1:]]
        said = "Was this review kind? A fine film.\n/base\n" if words[3] == "chat" else None
    for hub_id, model in models.items():
        words = [word.replace(hub_id, model) for word in words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if "serve" in words[:4]:  # asked once, then stopped
        return serve(words, folder, path)
    return subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True, input=said).returncode


def serve(words: list[str], folder: Path, path: str) -> int:
    """Starts the server, asks it one question, stops it."""
    import urllib.request

    with subprocess.Popen(words, cwd=folder, env={**os.environ, "PYTHONPATH": path}) as server:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Was this review kind? A fine film."}], "max_tokens": 4}
        )
        try:
            for _ in range(120):
                try:
                    asked = urllib.request.Request(
                        "http://127.0.0.1:8000/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
                    )
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        print(json.load(answer)["choices"][0]["message"])
                    return 0
                except OSError:
                    time.sleep(1)
            return 1
        finally:
            server.terminate()


def main() -> int:
    """Runs the tasks that are named and prints a table of their times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", type=int, choices=range(1, len(TEN) + 1))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{number:2} {one.wish} [docs/{one.page}]" for number, one in enumerate(TEN, 1)))
        return 0
    table, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="newcomers-") as made:
        models = desk(Path(made))
        for number in options.tasks or range(1, len(TEN) + 1):
            one = TEN[number - 1]
            began, cpu = time.monotonic(), spent()
            for step in one.steps:
                print(f"\n[{number}] $ {step}", flush=True)
                status = type_in(step, one.page, Path(made), models)
                if status and not (status == 1 and " check " in step):  # check answers 1 for what will not load there
                    print(f"[{number}] ended with {status}")
                    failed += 1
            load = os.getloadavg()[0]
            table.append(
                f"{number:2}  {time.monotonic() - began:6.0f} s on the clock  {spent() - cpu:6.0f} s of CPU  "
                f"load {load:4.1f}  {one.wish}"
            )
            print(table[-1], flush=True)
    print("\n" + "\n".join(table))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
