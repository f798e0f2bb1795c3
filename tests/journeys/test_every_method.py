"""Every method that `adapters-kit methods` lists goes the whole road in a recipe, or says first what it lacks."""

import pytest
import torch

import adapters_kit as ak
from adapters_kit.errors import AdapterError, RecipeError
from adapters_kit.methods import find_method, table
from tests.support import small

METHODS = [method.name for method in table()]
GIVEN = {"trainable-tokens": {"token_indices": [*range(5, 40)]}}  # words that occur in every row
ELSEWHERE = {"blocks": "GGUF", "loftq": "CUDA"}  # see test_blocks.py; loftq goes the road where there is a GPU
LOOPS = {method.name for method in table() if not method.in_recipes}


def recipe(name, task="causal-lm", family="llama", rate=1e-2, **training):
    rows = small.sentiment(24)
    if task == "causal-lm":
        rows = [{"text": row["text"]} for row in rows]
    return {
        "model": str(small.model(family)),
        "task": task,
        "data": rows,
        "method": {"name": name, **GIVEN.get(name, {})},
        "training": {"epochs": 2, "batch_size": 8, "samples": 1, "learning_rate": rate, **training},
        "max_new_tokens": 2,
    }


def walk(tmp_path, name, **options):
    """Trains, and asks what was saved: it scores what was scored, best or not, and answers."""
    run = ak.train(recipe(name, **options), tmp_path / "run", quiet=True)
    evaluations = [line["eval_loss"] for line in run.history() if "eval_loss" in line]
    assert run.metrics["base_loss"] > 0 and len(evaluations) >= 2
    again = ak.evaluate(run)["loss"]
    assert again == pytest.approx(run.metrics["loss"], rel=1e-5)
    assert min(abs(again - loss) for loss in evaluations) < 1e-5 * again
    assert len(ak.predict(run, [{"text": "a fine film"}])) == 1
    return run


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LOOPS])
def test_a_method_trains_scores_saves_and_answers(tmp_path, name):
    if name in ELSEWHERE and not (name == "loftq" and torch.cuda.is_available()):
        with pytest.raises(AdapterError, match=ELSEWHERE[name]):
            ak.train(recipe(name), tmp_path / "run", quiet=True)
        assert find_method(name).needs
        return
    run = walk(tmp_path, name)
    assert run.metrics["loss"] != run.metrics["base_loss"]


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "prefix-tuning", "cartridge"])
def test_what_stands_in_front_of_a_text_is_kept_as_it_was_scored(tmp_path, name):
    # At this rate the last evaluation is rarely the best one.
    run = walk(tmp_path, name, task="text-classification", family="bert", rate=0.3, evals_per_epoch=2)
    assert run.metrics["base_accuracy"] is not None


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_what_a_recipe_cannot_hold_is_said_before_training(tmp_path, name):
    with pytest.raises(RecipeError, match=r"wrap\(model"):
        ak.train(recipe(name), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "adapter").exists()
    assert find_method(name).needs
