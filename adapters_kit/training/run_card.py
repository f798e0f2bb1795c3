"""The model card of a run: scores, what was done to the data, how to load it, the recipe.

It travels with the adapter, to a hub too. So it holds no path, and rows of the user's data only where the recipe asks
for them (`card.samples`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_kit.artifacts.card import model_index, render
from adapters_kit.artifacts.leaks import scrub
from adapters_kit.artifacts.manifest import describe
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import without_paths
from adapters_kit.task_table import TASKS


def card(
    recipe: Recipe, metrics: Mapping[str, Any], metric: str, samples: Sequence[Mapping[str, Any]] = (), layers: str = ""
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        recipe: of the run, with paths: they become names here.
        metrics: what metrics.json holds.
        metric: by which evaluations were compared.
        samples: what the base and the adapter say to held-out rows; shown if `card.samples` is set.
        layers: which layers computed how, as `FuseReport` says it.
    """
    shown = without_paths(recipe)
    task = TASKS[recipe.head]
    label = shown.method.label
    scores = {name: metrics[name] for name in _scored(metrics) if not name.startswith("keep_")}
    data = shown.data.test or shown.data.train
    front = {
        "base_model": shown.model,
        "library_name": "peft",
        "pipeline_tag": task.pipeline,
        "datasets": [recipe.data.train] if describe(recipe.data.train) == recipe.data.train else None,  # of the hub
        "tags": ["adapters-kit", label],
        "model-index": model_index(f"{label}-{describe(recipe.model)}", task.pipeline, data, scores),
    }
    lead = (
        f"Trained with adapters_kit: {metrics['trainable_params']:,} of\n{metrics['total_params']:,} parameters, "
        f"{metrics['train_examples']:,} examples, {metrics['steps']:,} steps."
    )
    if shown.trust_remote_code:
        lead += (
            "\n\nThe Python files that come with the base model were run for this (`trust_remote_code`), and have to "
            "be wherever it is loaded."
        )
    if advice := metrics.get("advice"):
        lead = "\n\n".join([*(f"**{scrub(line)}**" for line in advice), lead])
    examples = (
        [f"- `{json.dumps(sample, ensure_ascii=False)}`" for sample in samples[:3]] if recipe.card.samples else []
    )
    held_out = f", held out: `{shown.data.test}`" if shown.data.test else ""
    mixed = "".join(f", with `{name}` ({one.weight})" for name, one in shown.data.mix.items())
    sections = [
        (f"Scores on {metrics['test_examples']:,} held-out examples", _scores(recipe, metrics, metric, layers)),
        ("What was done to the data", "\n".join(f"- {scrub(note)}" for note in metrics.get("notes", ()))),
        ("Load", _load(shown)),
        ("Data", f"`{shown.data.train}`{mixed}{held_out}"),
        ("Samples", "\n".join(examples)),
        ("Recipe", f"```yaml\n{shown.to_yaml().rstrip()}\n```"),
    ]
    by = f", by {recipe.objective.name}" if recipe.objective else ""
    title = f"{label} adapter of {shown.model} for {recipe.task}{by}"
    return render(front, title, sections, lead)


def _scores(recipe: Recipe, metrics: Mapping[str, Any], metric: str, layers: str) -> str:
    lines = ["| metric | base model | with this adapter |", "|---|---|---|"]
    lines += [
        f"| {name} | {_number(metrics[f'base_{name}'])} | {_number(metrics[name])} |" for name in _scored(metrics)
    ]
    best = recipe.training.keep_best and recipe.training.evals_per_epoch
    kept = f"that of the best `{metric}` among the evaluations" if best else "that of the last step"
    budget = metrics.get("kept")
    lines += ["", budget["told"] if budget else f"The adapter kept is {kept}."]
    if "keep_examples" in metrics:
        name = without_paths(recipe).eval.keep
        lines += ["", f"The scores that begin with keep_ are those on {metrics['keep_examples']:,} rows of `{name}`."]
    if "judged" in metrics:
        lines += ["", scrub(metrics["judged"]["told"])]
    if layers:
        lines += ["", "How its layers computed while it was trained:", "", "```", layers, "```"]
    return "\n".join(lines)


def _scored(metrics: Mapping[str, Any]) -> list[str]:
    """The names of what base and adapter were scored by."""
    return [name[5:] for name in metrics if name.startswith("base_") and name[5:] in metrics]


def _load(recipe: Recipe) -> str:
    if recipe.quantize or recipe.model.endswith(".gguf"):  # transformers alone would load another base
        options = f', "{recipe.head}"' if recipe.head != "causal-lm" else ""
        options += f", labels={recipe.labels}" if recipe.labels else ""
        options += f', quantize="{recipe.quantize}"' if recipe.quantize else ""
        options += ", trust_remote_code=True" if recipe.trust_remote_code else ""
        return f"""```python
import adapters_kit as ak

model = ak.wrap(ak.load("{recipe.model}"{options}), "adapter")
```"""
    row = TASKS[recipe.head]
    auto = row.auto_class
    other = f"  # {row.second_class} for a model that spells" if row.second_class else ""
    options = ", trust_remote_code=True" if recipe.trust_remote_code else ""
    named = ""
    if recipe.labels:
        named = f"""labels = dict(enumerate({json.dumps(recipe.labels, ensure_ascii=False)}))
numbers = {{name: number for number, name in labels.items()}}
# transformers may say that the head is new and has to be trained: it comes with the adapter
"""
        options += ", id2label=labels, label2id=numbers, ignore_mismatched_sizes=True"
    return f"""```python
from peft import PeftModel
from transformers import {auto}{other}

{named}base = {auto}.from_pretrained("{recipe.model}"{options})
model = PeftModel.from_pretrained(base, "adapter")
```"""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def advice(metrics: Mapping[str, Any], metric: str, higher: bool, majority: float | None, recipe: Recipe) -> list[str]:
    """What a reader of the scores has to be told first: the adapter is no better than no adapter, and what to try.

    Args:
        majority: the score of always giving the most frequent class; None where there is no such thing.
    """
    tuned, base = metrics[metric], metrics[f"base_{metric}"]
    better = tuned > base if higher else tuned < base
    steps, rate = metrics["steps"], recipe.training.learning_rate
    told = []
    if not better:
        how = "the same as" if tuned == base else "worse than"
        told.append(f"The adapter is {how} the base model: held-out {metric} {tuned:.4f} against {base:.4f}.")
    if majority is not None and tuned <= majority:
        told.append(
            f"It is not better than always giving the most frequent class, which scores {majority:.4f} here "
            f"(the adapter: {tuned:.4f})."
        )
    if told:
        few = f"more steps than {steps:,} (training.epochs, or a smaller training.batch_size), " if steps < 500 else ""
        told.append(
            f"What to try: {few}another training.learning_rate than {rate:.1e} (adapters-kit sweep tries several), "
            "more training rows; and look at samples.jsonl whether columns and labels are what you mean."
        )
    if "kept" in metrics and not metrics["kept"]["holds"]:
        told.append(metrics["kept"]["told"])
    return told
