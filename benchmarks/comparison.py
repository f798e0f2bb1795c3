"""Is an adapter as good as full fine-tuning? Every method beside it, same rows, same budget, several seeds.

    python benchmarks/comparison.py sentiment            # MiniLM on movies, products and tweets
    python benchmarks/comparison.py combinations         # LoRA, prefix, both, MAM, UniPELT on movies
    python benchmarks/comparison.py others               # every other method on movies, at its default rate
    python benchmarks/comparison.py language             # SmolLM2-135M on reviews: LoRA on bf16, nf4, int8; prefix
    python benchmarks/comparison.py curves               # LoRA's rank; its learning rate and full fine-tuning's
    python benchmarks/comparison.py sentiment --only movies --methods full lora --seeds 2

Everything goes through `ak.compare`, so that an interrupted run goes on where it stopped. Learning rates are searched
on movies with one seed, on rows that are neither trained on nor tested on; products and tweets take the rates that
movies chose. Results: results/comparison.json and results/comparison_*.png.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
FOLDER = ROOT / "benchmarks" / "results"
RESULTS = FOLDER / "comparison.json"
WORK = ROOT / "runs" / "comparison"

SETS = ("movies", "products", "tweets")
METHODS = ("full", "lora", "dora", "ia3", "pfeiffer", "houlsby", "parallel", "prefix", "mam")
BUDGET = {"epochs": 2, "batch_size": 16, "max_length": 64, "keep_best": False, "evals_per_epoch": 0, "samples": 0}
TRAINED, VALIDATION = 1000, 1500
LANGUAGE_BUDGET = BUDGET | {"epochs": 1, "batch_size": 2, "max_length": 128, "packing": True, "precision": "bf16"}
COMBINED = ("lora", "prefix", "lora+prefix", "mam", "unipelt")
# loftq needs a GPU, blocks a .gguf file.
OTHERS = (
    "rslora",
    "pissa",
    "olora",
    "adalora",
    "vera",
    "oft",
    "adapterplus",
    "compacter",
    "compacter++",
    "prompt",
    "p-tuning",
)
LANGUAGE: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {},
    "lora, nf4": {"quantize": "nf4"},
    "lora, int8": {"quantize": "int8"},
    "prefix": {"method": "prefix"},
    "prefix, random start": {"method": {"name": "prefix", "init": "random"}},
    "lora+prefix": {"method": ["lora", "prefix"]},
}
RANKS = (1, 4, 16, 64)
RATES = {"lora": (2e-4, 6e-4, 1e-3, 2e-3, 6e-3), "full": (3e-5, 1e-4, 3e-4, 1e-3)}


def sentiment(name: str) -> Any:
    """The recipe of one of `SETS`: positive or negative?"""
    import assets

    import adapters_kit as ak

    folder = {"movies": assets.reviews, "products": assets.products, "tweets": assets.tweets}[name]()
    return ak.Recipe(
        model=str(assets.minilm()),
        task="text-classification",
        data={"train": str(folder), "limit": TRAINED + VALIDATION},
        training=BUDGET,
    )


def language() -> Any:
    """The recipe of language modelling: SmolLM2 learns how movie reviews are written."""
    import assets

    import adapters_kit as ak

    return ak.Recipe(
        model=str(assets.smollm2()),
        task="causal-lm",
        data={"train": str(assets.reviews()), "columns": {"text": "text"}, "limit": 300, "test_limit": 200},
        training=LANGUAGE_BUDGET,
    )


def read() -> dict[str, Any]:
    """The committed results."""
    empty: dict[str, Any] = {"sentiment": {}, "combinations": None, "others": None, "language": None, "curves": {}}
    return empty | (json.loads(RESULTS.read_text()) if RESULTS.is_file() else {})


def keep(part: str, name: str | None, document: dict[str, Any]) -> None:
    """Lays one comparison into the committed results, without paths of this machine."""
    document["recipe"]["data"]["train"] = Path(document["recipe"]["data"]["train"]).name
    results = read()
    if name is None:
        results[part] = document
    else:
        results[part][name] = document
    FOLDER.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True, default=float) + "\n")


def run_sentiment(options: argparse.Namespace) -> None:
    """Movies with a search of the learning rates, the others with what movies chose."""
    import adapters_kit as ak

    rates: dict[str, float] = read()["sentiment"].get("movies", {}).get("learning_rates", {})
    for name in options.only or SETS:
        methods = options.methods or METHODS
        given = {label: rate for label, rate in rates.items() if label in methods and name != "movies"}
        found = ak.compare(
            sentiment(name),
            methods,
            options.seeds,
            out=WORK / name,
            rates=given,
            validation_size=VALIDATION,
            max_minutes=options.max_minutes,
            threads=options.threads,
        )
        if name == "movies":
            rates = found.document["learning_rates"]
        keep("sentiment", name, found.document)
        print(name, found, sep="\n")


def run_language(options: argparse.Namespace) -> None:
    """bf16 full fine-tuning, its rate searched, beside adapters at their default rates, on bf16, nf4 and int8 weights.

    The lines of the prefix differ in how it starts: from words (the default), at random.
    """
    import adapters_kit as ak

    recipe, folder = language(), WORK / "language"
    common = {"validation_size": 100, "max_minutes": options.max_minutes, "threads": options.threads}
    kinds = {label: changes for label, changes in LANGUAGE.items() if label in (options.methods or LANGUAGE)}
    searched = None
    if "full" in kinds:
        searched = ak.compare(recipe, {"full": kinds["full"]}, 1, out=folder, **common).document
    rates = searched and searched["learning_rates"]
    found = ak.compare(recipe, kinds, options.seeds, out=folder, rates=rates, grid=None, **common)
    if searched:
        found.document["searched"] = searched["searched"]
    keep("language", None, found.document)
    print(found)


def run_combinations(options: argparse.Namespace) -> None:
    """Several methods as one adapter beside their parts, on movies, at their default rates."""
    import adapters_kit as ak

    common = {"validation_size": VALIDATION, "max_minutes": options.max_minutes, "threads": options.threads}
    rates = read()["sentiment"]["movies"]["learning_rates"]
    given = {label: rate for label, rate in rates.items() if label in COMBINED}
    found = ak.compare(
        sentiment("movies"), COMBINED, options.seeds, out=WORK / "movies", rates=given, grid=None, **common
    )
    keep("combinations", None, found.document)
    print(found)


def run_others(options: argparse.Namespace) -> None:
    """The methods that no search was made for, on movies, at their default rates."""
    import adapters_kit as ak

    common = {"validation_size": VALIDATION, "max_minutes": options.max_minutes, "threads": options.threads}
    methods = options.methods or OTHERS
    found = ak.compare(sentiment("movies"), methods, options.seeds, out=WORK / "movies", grid=None, **common)
    keep("others", None, found.document)
    print(found)


def run_curves(options: argparse.Namespace) -> None:
    """On movies, each rank at the searched rate; each rate at the default rank, and each of full fine-tuning."""
    import adapters_kit as ak

    rate = read()["sentiment"]["movies"]["learning_rates"]["lora"]
    common = {"validation_size": VALIDATION, "max_minutes": options.max_minutes, "threads": options.threads}
    ranks = {f"r={r}": {"method": {"name": "lora", "r": r}} for r in RANKS}
    steps = {
        f"{method} {rate:.0e}": {"method": method, "training.learning_rate": rate}
        for method, rates in RATES.items()
        for rate in rates
    }
    for name, kinds, given in (("rank", ranks, dict.fromkeys(ranks, rate)), ("rate", steps, None)):
        folder = WORK / "curves"
        found = ak.compare(sentiment("movies"), kinds, options.seeds, out=folder, rates=given, grid=None, **common)
        keep("curves", name, found.document)
        print(found)


HELD_OUT = 1000  # rows of each set that every score is over


def over_sets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a method, best first: mean accuracy over the sets, and the gap to full with its interval over the seeds.

    Only seeds count that all sets have, for the method and for full fine-tuning. `each` holds the sets' own means.
    """
    from adapters_kit.comparison.summary import summarize

    found = [results["sentiment"][name] for name in SETS if name in results["sentiment"]]
    rows = {label: [_row(document, label) for document in found] for label in found[0]["learning_rates"]}
    finals: dict[str, dict[str, Any]] = {}
    for label, lines in rows.items():
        if all(lines):
            costs = {name: fmean(line["costs"][name] for line in lines) for name in lines[0]["costs"]}
            cells = [document["cells"][label] for document in found]
            finals[label] = {
                seed: {"scores": {"accuracy": fmean(cell[seed]["scores"]["accuracy"] for cell in cells)}, **costs}
                for seed in sorted(set.intersection(*map(set, cells)))
            }
    rates = found[0]["learning_rates"]
    return [
        asdict(row) | {"each": [line["score"] for line in rows[row.label]], "rate": rates[row.label]}
        for row in summarize(finals, "accuracy", True, "full", len(found) * HELD_OUT)
    ]


def _row(document: dict[str, Any], label: str) -> dict[str, Any] | None:
    return next((row for row in document["methods"] if row["label"] == label), None)


def _share(cost: dict[str, float]) -> str:
    return f"{cost['trainable_params'] / cost['total_params']:.2%}"


def _score(row: dict[str, Any], metric: str) -> str:
    from adapters_kit.comparison.report import shown

    return shown(row["score"], metric) + (f" ± {shown(row['spread'], metric)}" if row["spread"] is not None else "")


def sentiment_table(results: dict[str, Any]) -> str:
    """Accuracy in points, as Markdown."""
    from adapters_kit.comparison.report import as_markdown, gap

    head = ["method", *(name for name in SETS if name in results["sentiment"]), "mean", "gap to full [95 %]"]
    body = []
    for row in over_sets(results):
        cost = row["costs"]
        cells = [row["label"], *(f"{100 * score:.1f}" for score in row["each"]), f"**{100 * row['score']:.1f}**"]
        cells += [gap(row, "accuracy"), _share(cost), f"{cost['adapter_bytes'] / 1e6:.2f}", f"{row['rate']:.1e}"]
        body.append(cells)
    return as_markdown([*head, "trained", "adapter MB", "lr"], body)


def cost_table(results: dict[str, Any]) -> str:
    """What a run on movies costs, relative to full fine-tuning, and whether the merged model is the trained one."""
    from adapters_kit.comparison.report import as_markdown

    document = results["sentiment"]["movies"]
    full = _row(document, "full")["costs"]
    body = []
    for row in document["methods"]:
        cost, merge = row["costs"], row["merge"]
        exact = f"{merge['largest']:.0e} ({merge['floor']:.0e})" if merge else "–"
        cells = [row["label"], f"{cost['cpu_seconds'] / full['cpu_seconds']:.2f}", f"{cost['peak_bytes'] / 1e6:.0f}"]
        body.append([*cells, f"{cost['optimizer_bytes'] / 1e6:.1f}", exact])
    return as_markdown(["method", "CPU time / full", "peak MB", "optimizer MB", "merged − trained (rounding)"], body)


def language_table(results: dict[str, Any]) -> str:
    """Perplexities, as Markdown; the gap to full fine-tuning where that was run."""
    from adapters_kit.comparison.report import as_markdown, gap

    document, metric = results["language"], "perplexity"
    with_full = "full" in document["learning_rates"]
    head = ["SmolLM2-135M", f"perplexity (before: {document['base'][metric]:.1f})"]
    head += ["gap to full [95 %]"] if with_full else []
    body = []
    for row in document["methods"]:
        cost = row["costs"]
        cells = [row["label"], _score(row, metric), *([gap(row, metric)] if with_full else []), _share(cost)]
        cells += [f"{cost['adapter_bytes'] / 1e6:.1f}", f"{cost['peak_bytes'] / 1e6:,.0f}"]
        body.append([*cells, f"{document['learning_rates'][row['label']]:.1e}"])
    return as_markdown([*head, "trained", "adapter MB", "peak MB", "lr"], body)


def rates_table(results: dict[str, Any]) -> str:
    """The search on movies: accuracy on the validation rows, one seed, rate by rate; the taken one in bold."""
    document = results["sentiment"]["movies"]
    lines = ["| method | accuracy at each learning rate |", "|---|---|"]
    for label, found in document["searched"].items():
        cells = []
        for rate, score in sorted(found.items(), key=lambda item: float(item[0])):
            if score is not None:
                mark = "**" if f"{document['learning_rates'][label]:.3g}" == rate else ""
                cells.append(f"{mark}{float(rate):.1e}: {100 * score:.1f}{mark}")
        lines.append(f"| {label} | {', '.join(cells)} |")
    return "\n".join(lines)


def movies_table(document: dict[str, Any]) -> str:
    """Accuracy on movies alone: methods as one adapter beside their parts, or at their default rates."""
    from adapters_kit.comparison.report import as_markdown

    body = []
    for row in document["methods"]:
        cost = row["costs"]
        cells = [row["label"], _score(row, "accuracy"), f"{cost['trainable_params']:,.0f}"]
        body.append([*cells, f"{cost['adapter_bytes'] / 1e6:.2f}", f"{document['learning_rates'][row['label']]:.1e}"])
    return as_markdown(["on movies", "accuracy", "trained", "adapter MB", "lr"], body)


def curve_table(results: dict[str, Any], name: str) -> str:
    """Accuracy on movies over LoRA's rank, or over the learning rate."""
    from adapters_kit.comparison.report import as_markdown

    rows = sorted(results["curves"][name]["methods"], key=_point)
    body = [[row["label"], _score(row, "accuracy"), f"{row['costs']['trainable_params']:,.0f}"] for row in rows]
    return as_markdown([name, "accuracy", "trained"], body)


def _point(row: dict[str, Any]) -> tuple[str, float]:
    """Which curve a line belongs to, and where: "r=16", "lora 6e-04"."""
    line, number = re.split("[= ]", row["label"])
    return line, float(number)


def draw() -> None:
    """The plots in the results folder, from the committed JSON alone."""
    from adapters_kit.comparison import score_plots
    from adapters_kit.training import pictures

    results = read()
    if results["sentiment"]:
        score_plots.draw({"metric": "accuracy", "methods": over_sets(results)}, FOLDER, "comparison_")
    if {"rank", "rate"} <= set(results["curves"]):
        figure, (left, right) = pictures.blank(2)
        for place, name, what in ((left, "rank", "LoRA's rank"), (right, "rate", "learning rate")):
            lines: dict[str, list[tuple[float, float, float]]] = {}
            for row in sorted(results["curves"][name]["methods"], key=_point):
                line, x = _point(row)
                lines.setdefault(line, []).append((x, 100 * row["score"], 100 * (row["spread"] or 0)))
            for line, points in lines.items():
                xs, scores, spreads = zip(*points, strict=True)
                place.errorbar(xs, scores, yerr=spreads, marker="o", capsize=3, label=line)
            place.set(xscale="log", xlabel=what, ylabel="accuracy on movies (points)")
        left.set_xticks(RANKS, [str(rank) for rank in RANKS])
        right.legend()
        figure.savefig(FOLDER / "comparison_curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sentiment", "combinations", "others", "language", "curves"])
    parser.add_argument("--only", nargs="+", choices=SETS, help="these data sets")
    parser.add_argument("--methods", nargs="+", help="only these lines")
    parser.add_argument("--seeds", type=int, help="default: 5, the others 3")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.seeds = options.seeds or (5 if options.what == "sentiment" else 3)
    runs = {"sentiment": run_sentiment, "combinations": run_combinations, "language": run_language}
    {**runs, "others": run_others, "curves": run_curves}[options.what](options)


if __name__ == "__main__":
    main()
