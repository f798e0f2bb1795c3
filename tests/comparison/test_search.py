"""Successive halving: the rungs spend the budget, the best goes to its end as its own run would, kills cost nothing."""

import json
import math

import pytest
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit.comparison import halving, space
from adapters_kit.errors import RecipeError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training import loop
from tests.support import small


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("rows")
    small.write_jsonl(folder / "train.jsonl", small.sentiment(48))
    small.write_jsonl(folder / "test.jsonl", small.sentiment(16, seed=1))
    training = {"epochs": 2, "batch_size": 4, "log_every": 1, "samples": 1}
    method = {"name": "lora", "lora_dropout": 0.1}
    fields = {"model": str(small.model("bert")), "task": "text-classification", "data": str(folder)}
    return Recipe(**fields, method=method, training=training)


def weights(run: ak.Run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("candidates", [1, 2, 5, 9, 12, 40])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.999, 1.0])
def test_rungs_spend_the_budget_and_no_more(candidates, share):
    budget = max(share * candidates, 1.2 if candidates > 1 else 1.0)
    for asked in (budget, budget / candidates):
        found = halving.rungs(candidates, asked if asked != 1 or candidates == 1 else 0.999)
        counts, parts = [rung.count for rung in found], [rung.part for rung in found]
        assert counts[0] == candidates and parts[-1] == 1.0 and parts == sorted(set(parts))
        assert counts == sorted(counts, reverse=True)
        assert halving.cost(found) == pytest.approx(min(budget, candidates), rel=2e-3)


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, 0.05, 1])
def test_a_budget_that_is_none_or_too_small_is_refused_and_the_advice_holds(budget):
    with pytest.raises(RecipeError, match="budget=") as caught:
        halving.rungs(12, budget)
    if budget in (0.05, 1):
        words = str(caught.value).replace(":", " ").replace(",", " ").split()
        trainings, part = (
            float(words[words.index("take") + 1]),
            float(words[words.index("is", words.index("take")) + 1]),
        )
        assert halving.rungs(12, trainings) and halving.rungs(12, part)


def test_what_the_rows_cannot_tell_apart_the_loss_does():
    early = {"slow": (0.565, 0.692), "fast": (0.525, 0.689), "between": (0.54, 0.691)}
    found = {name: halving.Found(score, loss, halving.noise(score, 200)) for name, (score, loss) in early.items()}
    assert halving.ranked(found) == ["fast", "between", "slow"]
    late = {"a": (0.78, 0.7), "b": (0.6, 0.5), "c": (0.61, 0.6), "failed": (-math.inf, math.inf)}
    found = {name: halving.Found(score, loss, halving.noise(score, 200)) for name, (score, loss) in late.items()}
    assert halving.ranked(found) == ["a", "c", "b", "failed"]
    assert halving.noise(-3.2, 200) == halving.noise(0.5, 0) == 0.0


def test_the_grid_suits_each_method(recipe):
    found = space.grid(recipe, ["lora", "houlsby", "ia3"], None, None, None)
    counts = {label: sum(one.told["method"] == label for one in found.values()) for label in ("lora", "houlsby", "ia3")}
    assert counts == {"lora": 12, "houlsby": 12, "ia3": 3}
    options = found[
        "houlsby-" + next(n for n in found if n.startswith("houlsby")).split("-", 1)[1]
    ].recipe.method.options
    assert options == {"bottleneck_dim": 8, "dropout": 0.0}
    assert list(space.grid(recipe, None, [1e-3], [2], [0.1])) == ["lora-lr0.001-r2-d0.1"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"methods": ["lroa"]}, "lora or loha"),
        ({"methods": "lora"}, "methods='lora'"),
        ({"methods": ["full"]}, "compare"),
        ({"methods": ["ia3"], "ranks": [4]}, "ranks"),
        ({"methods": ["prompt"], "dropouts": [0.1]}, "dropouts"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [4, 4]}, "each once"),
        ({"ranks": [0]}, "r=0"),
        ({"dropouts": [0.1, 1.5]}, "1.5 is no"),
        ({"learning_rates": [0.0]}, "learning_rate"),
        ({"budget": 0.01}, "budget"),
        ({"together": "yes"}, "together"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work(recipe, tmp_path, asked, told):
    with pytest.raises(RecipeError, match=told):
        ak.search(recipe, tmp_path / "s", **asked, quiet=True)
    assert not list((tmp_path / "s").glob("*/recipe.yaml"))


@pytest.mark.slow
@pytest.mark.pictures
def test_in_passes_the_best_is_the_run_that_train_would_have_made(recipe, tmp_path, capsys):
    asked = {"learning_rates": [1e-6, 3e-3], "ranks": [2, 4], "dropouts": [0.1], "budget": 0.5}
    found = ak.search(recipe, tmp_path / "s", **asked)
    assert "rung 1 of 2: 4 of 4" in (told := capsys.readouterr().err) and "Up to 4 in one pass" in told
    assert found.best.path == tmp_path / "s" / found.table[0]["run"] and not found.best.path.is_symlink()
    own = ak.train(found.best.recipe, tmp_path / "own", quiet=True)
    ours = weights(found.best)
    assert all(float((ours[n] - t).norm()) <= 1e-4 * float(t.norm()) for n, t in weights(own).items())
    assert found.best.metrics["accuracy"] == own.metrics["accuracy"]
    assert [row["steps"] for row in found.table] == [24, 8, 8, 8] and found.cost == pytest.approx(2.0)
    assert sum((tmp_path / "s" / row["run"] / "metrics.json").is_file() for row in found.table) == 1
    told = json.loads((tmp_path / "s" / "search.json").read_text())
    assert told["best"] == found.table[0]["run"] and told["rows"] == found.table and told["cost"] == found.cost
    page = (tmp_path / "s" / "report.html").read_text()
    assert "<svg" in page and found.best.path.name in page and str(tmp_path) not in page
    assert ak.search(recipe, tmp_path / "s", **asked, quiet=True).table == found.table
    with pytest.raises(TrainingError, match=r"another search.*budget: 0\.5 -> 0\.6"):
        ak.search(recipe, tmp_path / "s", **{**asked, "budget": 0.6}, quiet=True)
    with pytest.raises(TrainingError, match=r"training\.epochs: 2\.0 -> 3\.0"):
        ak.search(recipe.changed(**{"training.epochs": 3.0}), tmp_path / "s", **asked, quiet=True)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_killed_and_with_one_that_diverges_the_same_call_ends_with_the_same_table(recipe, tmp_path, monkeypatch):
    asked = {"learning_rates": [1e-6, 1e30, 3e-3], "ranks": [2], "dropouts": [0.1], "budget": 0.5}
    whole = ak.search(recipe, tmp_path / "whole", **asked, together="off", quiet=True)
    assert list(whole.failures) == ["lora-lr1e+30-r2-d0.1"] and "learning_rate" in next(iter(whole.failures.values()))
    assert "failed" in str(whole) and whole.table[0]["steps"] == 24
    fatal, made, step = {3, 15, 25}, [], loop.AdapterTrainer.training_step

    def killing(self, *given, **named):
        made.append(self.state.global_step)
        if len(made) in fatal:
            raise Killed
        return step(self, *given, **named)

    monkeypatch.setattr(loop.AdapterTrainer, "training_step", killing)
    for _ in fatal:
        with pytest.raises(Killed):
            ak.search(recipe, tmp_path / "s", **asked, together="off", quiet=True)
    found = ak.search(recipe, tmp_path / "s", **asked, together="off", quiet=True)
    assert found.table == whole.table and found.failures == whole.failures
    own = ak.train(found.best.recipe, tmp_path / "own", quiet=True)
    for name, tensor in weights(own).items():
        assert (weights(found.best)[name] == tensor).all() and (weights(whole.best)[name] == tensor).all()
