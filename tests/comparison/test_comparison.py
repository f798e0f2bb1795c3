"""ak.compare: same rows and budget for every method, rates chosen without the test rows, resumable, honest figures."""

import json
import math
import signal
import statistics
import subprocess
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.comparison import cell as cells
from adapters_kit.comparison import score_plots, study, summary, worker
from adapters_kit.comparison.cell import Cell, rows_of, run_cell
from adapters_kit.comparison.remaining import Remaining
from adapters_kit.comparison.study import FULL_RATE, GRID, _search
from adapters_kit.errors import AdapterError, RecipeError, TrainingError
from tests.support import small, stopping

drawn = pytest.mark.pictures  # whichever comes first makes `compared`
TRAINING = {"epochs": 1, "batch_size": 8, "max_length": 16, "evals_per_epoch": 0, "keep_best": False}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> ak.Recipe:
    folder = tmp_path_factory.mktemp("data")
    small.write_jsonl(folder / "train.jsonl", small.sentiment(96))
    small.write_jsonl(folder / "test.jsonl", small.sentiment(48, seed=1))
    return ak.Recipe(
        model=str(small.model("bert")),
        task="text-classification",
        data=str(folder),
        method={"name": "lora", "r": 2},
        training=TRAINING,
    )


@pytest.fixture
def in_process(monkeypatch):
    """Cells run in this process: for tests of what is compared, not of how cells are kept apart."""

    jobs: list[int] = []

    @contextmanager
    def here(folder, threads):
        folder.mkdir(parents=True, exist_ok=True)

        def files(cell):
            return {"kept": str(folder / f"{cell.key}.json"), "error": str(folder / f"{cell.key}.error.json")}

        def ask(cells):
            jobs.append(len(cells))
            worker._work({"cells": [{"cell": asdict(cell), **files(cell)} for cell in cells], "work": str(folder)})

        def run(cell):
            kept, error = map(Path, files(cell).values())
            if not kept.is_file():
                ask([cell])
            return json.loads(kept.read_text())["result"] if kept.is_file() else json.loads(error.read_text())

        yield worker.Worker(run, ask)

    monkeypatch.setattr(study, "worker", here)
    monkeypatch.setattr(score_plots, "draw", lambda document, out: [])  # half of the time; `compared` has pictures
    return jobs


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    """Three kinds, two seeds, rates searched."""
    out = tmp_path_factory.mktemp("comparison")
    methods = ["full", "lora", "lora+prefix"]
    return ak.compare(recipe, methods, 2, out=out, grid=(1, 10), validation_size=32, quiet=True)


@pytest.mark.slow
@drawn
def test_every_method_has_a_row_with_its_costs(compared, recipe):
    rows = {row.label: row for row in compared.rows}
    assert set(rows) == {"full", "lora", "lora+prefix"}
    assert [row.score for row in compared.rows] == sorted((row.score for row in compared.rows), reverse=True)
    total = rows["full"].costs["total_params"]
    assert rows["full"].costs["trainable_params"] == total
    assert rows["full"].gap is None and rows["full"].merge is None
    # AdamW keeps two fp32 numbers for each trained one, and a step count a tensor.
    assert 8 * total <= rows["full"].costs["optimizer_bytes"] <= 8.1 * total
    for label in ("lora", "lora+prefix"):
        row = rows[label]
        assert row.seeds == 2 and row.interval[0] <= row.gap <= row.interval[1]
        assert row.costs["trainable_params"] < total / 2
        assert row.costs["adapter_bytes"] >= 4 * row.costs["trainable_params"]
        assert row.costs["tokens_per_second"] > 0 and row.costs["seconds"] > 0 and row.costs["peak_bytes"] > 0
    assert rows["lora"].merge["largest"] <= 8 * rows["lora"].merge["floor"]
    assert rows["lora+prefix"].merge is None


@pytest.mark.slow
@drawn
def test_the_gap_is_paired_by_seed(compared):
    document = json.loads((compared.path / "comparison.json").read_text())
    score = {
        label: {seed: cell["scores"]["accuracy"] for seed, cell in found.items()}
        for label, found in document["cells"].items()
    }
    gaps = [score["lora+prefix"][seed] - score["full"][seed] for seed in ("0", "1")]
    row = next(row for row in compared.rows if row.label == "lora+prefix")
    assert row.gap == pytest.approx(statistics.fmean(gaps))
    # Student's t with one degree of freedom has its 97.5 % point at 12.706.
    half = max(12.7062 * statistics.stdev(gaps) / math.sqrt(2), 3 / 48)  # no narrower than 48 rows can tell
    assert row.interval == pytest.approx((row.gap - half, row.gap + half), rel=1e-4)


@pytest.mark.slow
@drawn
def test_the_folder_tells_everything(compared):
    report = (compared.path / "report.md").read_text()
    for text in ("gap to full", "± ", "validation rows", "lora+prefix", "score_and_parameters.png", "torch "):
        assert text in report
    for name in ("score_and_parameters.png", "score_and_cost.png"):
        assert (compared.path / name).stat().st_size > 5_000
    document = json.loads((compared.path / "comparison.json").read_text())
    assert document["rows"] == {"train": 64, "validation": 32, "test": 48}
    assert document["environment"]["torch"] == torch.__version__
    for label, found in document["searched"].items():
        good = {float(rate): score for rate, score in found.items()}
        assert 2 <= len(good) <= 5
        assert good[min(good, key=lambda rate: abs(rate - document["learning_rates"][label]))] == max(good.values())


@pytest.mark.slow
@drawn
def test_again_nothing_is_trained(compared, recipe, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (compared.path / "cells").iterdir()}
    monkeypatch.setattr(subprocess, "Popen", None)  # no worker may start
    methods = ["full", "lora", "lora+prefix"]
    again = ak.compare(recipe, methods, 2, out=compared.path, grid=(1, 10), validation_size=32, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (compared.path / "cells").iterdir()} == before
    assert [row.score for row in again.rows] == [row.score for row in compared.rows]


@pytest.mark.parametrize("change", [{"training.epochs": 5.0}, {"method.r": 3}, {"data.limit": 50}])
def test_what_a_cell_depends_on_is_in_its_key(recipe, change):
    def key(given: ak.Recipe) -> str:
        _, rows = rows_of(given, 32)
        fields = given.model_dump(mode="json")
        return Cell(fields, "adapter", 1e-3, 0, "test", 32, True, cells.depends_on(given, rows, None)).key

    assert key(recipe) == key(recipe.changed()) != key(recipe.changed(**change))


def test_a_cell_depends_on_rows_weights_and_defaults(recipe, tmp_path):
    _, rows = rows_of(recipe, 32)
    first = cells.depends_on(recipe, rows, None)
    other = dict(rows, test=rows["test"].select(range(40)))
    assert cells.depends_on(recipe, other, None)["rows"] != first["rows"]
    model = ak.load(recipe.model, recipe.task)
    model.base_model.embeddings.word_embeddings.weight.data[3, 3] += 1
    model.save_pretrained(tmp_path / "model")
    assert cells.depends_on(recipe.changed(model=str(tmp_path / "model")), rows, None)["model"] != first["model"]
    from adapters_kit.wrapping import build_config

    ranks = [cells.depends_on(recipe, rows, build_config(model, "lora", r=r))["method"] for r in (2, 2, 3)]
    assert ranks[0] == ranks[1] != ranks[2]


def test_validation_rows_are_neither_trained_on_nor_tested_on(recipe):
    _, rows = rows_of(recipe, 0.25)
    assert [len(rows[part]) for part in ("train", "validation", "test")] == [72, 24, 48]
    _, again = rows_of(recipe, 0.25)
    assert again["validation"].to_list() == rows["validation"].to_list()


@pytest.mark.slow
def test_a_cell_is_reproducible_and_full_trains_everything(recipe):
    _, rows = rows_of(recipe, 32)
    depends = cells.depends_on(recipe, rows, None)
    made = Cell(recipe.model_dump(mode="json"), "full", 1e-3, 3, "test", 32, False, depends)
    one, two = run_cell(made), run_cell(made)
    assert one["scores"] == two["scores"]
    assert one["trainable_params"] == one["total_params"]
    assert one["adapter_bytes"] == 4 * one["total_params"]


@pytest.mark.slow
def test_labelled_variants_change_the_recipe(recipe, in_process, tmp_path):
    planned = {"name": "adalora", "init_r": 2, "target_r": 1}  # asks how many steps the run will have
    methods = {"r=1": {"name": "lora", "r": 1}, "r=4": {"name": "lora", "r": 4}, "adalora": planned}
    kinds = {label: {"method": method} for label, method in methods.items()}
    rates = dict.fromkeys(kinds, 1e-3)
    found = ak.compare(recipe, kinds, [5], out=tmp_path, rates=rates, validation_size=32, quiet=True)
    trained = {row.label: row.costs["trainable_params"] for row in found.rows}
    assert trained["r=1"] < trained["r=4"]
    assert all(row.gap is None and row.spread is None and row.interval is None for row in found.rows)


@pytest.mark.slow
def test_a_variant_of_full_fine_tuning_keeps_its_own_rate(recipe, in_process, tmp_path):
    kinds = {"fast": {"method": "full", "training.learning_rate": 2e-3}, "full": {"method": "full"}}
    found = ak.compare(recipe, kinds, 1, out=tmp_path, grid=None, validation_size=32, quiet=True)
    assert found.document["learning_rates"] == {"fast": 2e-3, "full": FULL_RATE}


@pytest.mark.slow
def test_no_time_left_says_what_is_missing_and_goes_on(recipe, in_process, tmp_path):
    call = {"out": tmp_path, "rates": {"lora": 1e-3, "ia3": 1e-2}, "validation_size": 32, "quiet": True}
    with pytest.raises(TrainingError, match="max_minutes=0 left no time"):
        ak.compare(recipe, ["lora", "ia3"], 2, max_minutes=0, **call)
    done = ak.compare(recipe, ["lora"], 1, **call | {"rates": {"lora": 1e-3}})
    assert done.missing == 0
    partly = ak.compare(recipe, ["lora", "ia3"], 1, max_minutes=0, **call)
    assert partly.missing == 1 and [row.label for row in partly.rows] == ["lora"]
    assert "the same call goes on" in str(partly)


@pytest.mark.slow
def test_together_every_score_and_rate_is_that_of_going_apart(recipe, in_process, tmp_path):
    """In passes: both methods' rates, and all seeds but the first; not prefix, which cannot, nor what is kept."""
    asked = {"methods": ["lora", "pfeiffer", "prefix"], "seeds": 2, "grid": (1, 30), "validation_size": 32}
    apart = ak.compare(recipe, **asked, out=tmp_path / "apart", quiet=True)
    assert set(in_process) == {1}
    in_process.clear()
    joint = ak.compare(recipe, **asked, out=tmp_path / "joint", together="auto", quiet=True)
    assert [count for count in in_process if count > 1] == [4, 2]
    for key in ("learning_rates", "searched"):
        assert joint.document[key] == apart.document[key]
    for label, seeds in apart.document["cells"].items():
        for seed, told in seeds.items():
            assert joint.document["cells"][label][seed]["scores"] == pytest.approx(told["scores"], abs=1e-4)
    assert all(row.costs["seconds"] > 0 and row.costs["peak_bytes"] for row in joint.rows)
    in_process.clear()
    ak.compare(recipe, **asked, out=tmp_path / "joint", quiet=True)
    assert in_process == []


@pytest.mark.slow
def test_what_fails_costs_its_own_row_only(recipe, in_process, tmp_path, monkeypatch):
    def run(cell, work, guest):
        if cell.kind == study.BASE:
            raise TrainingError("it was not its day")
        return run_cell(cell, work, guest)

    monkeypatch.setattr(worker, "run_cell", run)
    kinds = {"lora": {}, "too long": {"training.max_length": 500}}
    found = ak.compare(recipe, kinds, 1, out=tmp_path, rates=dict.fromkeys(kinds, 1e-3), validation_size=32, quiet=True)
    assert [row.label for row in found.rows] == ["lora"]
    assert "takes at most" in found.document["failures"]["too long"]
    assert "too long gave no result" in str(found)
    assert "base gave no result: it was not its day" in str(found) and found.document["base"] is None


MISTAKES = {
    "unknown method": ({"methods": ["full", "lorra"]}, "no method 'lorra'. Did you mean"),
    "one string": ({"methods": "full,lora"}, "give a list, such as ['full', 'lora']"),
    "seeds twice": ({"methods": ["lora"], "seeds": [1, 1]}, "each once"),
    "no seeds": ({"methods": ["lora"], "seeds": 0}, "at least one seed"),
    "rates": (
        {"methods": ["lora"], "rates": {"lore": 1.0}},
        "there is no method 'lore' here. Did you mean lora",
    ),
    "grid": ({"methods": ["lora"], "grid": [0, 1]}, "factors above 0"),
    "option": ({"methods": {"x": {"method": {"name": "lora", "rank": 3}}}}, "has no option 'rank'"),
    "target": ({"methods": {"x": {"method": {"name": "lora", "target_modules": ["quary"]}}}}, "quary"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_anything_is_trained(name, recipe, tmp_path):
    given, sentence = MISTAKES[name]
    with pytest.raises(AdapterError) as caught:
        ak.compare(recipe, out=tmp_path / "out", quiet=True, **given)
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(recipe, tmp_path):
    """SIGTERM before its first cell, which leaves nothing; kill -9 after that cell: the last call keeps it."""
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    out = tmp_path / "out"
    words = ["compare", str(tmp_path / "recipe.yaml"), "--methods", "lora", "--seeds", "2", "--grid", "1"]
    stopping.kill_at_file(out, "cells/.work", cli.main, [*words, "--out", str(out)], number=signal.SIGTERM)
    assert not [path.name for path in out.rglob("*") if path.name.startswith(".")]
    assert not [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    stopping.kill_at_file(out, "cells/*.json", cli.main, [*words, "--out", str(out)])
    kept = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert kept and not (out / "comparison.json").exists()
    assert cli.main([*words, "--out", str(out)]) == 0
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}.items()
    assert json.loads((out / "comparison.json").read_text())["methods"][0]["seeds"] == 2


def test_the_search_follows_the_edge():
    class One:
        rate = 1.0

    def best_at(peak):
        tried = []

        def attempt(_, rate):
            tried.append(rate)
            return {"scores": {"m": -abs(math.log(rate / peak))}}

        found = _search(One, GRID, True, "m", attempt)
        return max(found, key=found.get), tried

    assert best_at(1.0) == (1.0, pytest.approx([1 / 3, 1, 3]))
    assert best_at(9.0)[0] == pytest.approx(9.0)
    assert len(best_at(1e6)[1]) == 5
    assert best_at(0.1)[0] == pytest.approx(1 / 9)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_the_interval_holds_the_mean(differences):
    low, high = summary.interval(differences)
    assert low <= statistics.fmean(differences) + 1e-12 and statistics.fmean(differences) <= high + 1e-12


@pytest.mark.slow
def test_language_models_compare_perplexity(in_process, tmp_path):
    small.write_jsonl(tmp_path / "train.jsonl", [{"text": row["text"]} for row in small.sentiment(64)])
    given = ak.Recipe(
        model=str(small.model("llama")), task="causal-lm", data=str(tmp_path / "train.jsonl"), training=TRAINING
    )
    kinds = {"full": {"method": "full"}, "lora": {}}
    rates = {"full": 1e-3, "lora": 5e-3}
    found = ak.compare(given, kinds, 1, out=tmp_path / "out", rates=rates, validation_size=0.2, quiet=True)
    assert found.metric == "perplexity" and not found.document["higher_is_better"]
    assert found.rows[0].score <= found.rows[1].score < found.document["base"]["perplexity"]
    assert Path(found.path / "report.md").read_text().count("perplexity") >= 2


def test_compare_of_a_recipe_and_of_runs_do_not_mix(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model: x\n")
    assert cli.main(["compare", str(tmp_path / "a.yaml"), str(tmp_path)]) == 2
    assert "Give one recipe, or run folders" in capsys.readouterr().err


def test_a_recipe_error_is_told_before_torch(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("modell: x\n")
    assert cli.main(["compare", str(tmp_path / "a.yaml")]) == 2
    assert "there is no key 'modell'" in capsys.readouterr().err
    with pytest.raises(RecipeError):
        ak.Recipe.read(tmp_path / "a.yaml")


def test_one_eta_counts_every_cell_that_is_planned():
    left = Remaining({"base": 1, "full": 4, "lora": 4})
    left.done("base", None)
    assert left.seconds() is None, "a cell that was kept tells no time"
    left.done("full", 10.0)
    assert left.seconds() == 3 * 10 + 4 * 10
    left.done("lora", 4.0)
    assert left.seconds() == 3 * 10 + 3 * 4
    left.dropped("full")
    assert left.seconds() == 3 * 4
    for _ in range(5):  # the search went on at the edge of its grid
        left.done("lora", 4.0)
    assert left.seconds() == 0


@pytest.mark.slow
def test_blocks_beside_lora_on_a_file_in_its_blocks(in_process, tmp_path):
    """The file's own formats tell what `blocks` can train; what it ships is the .gguf file, compared in nats."""
    pytest.importorskip("gguf")
    from tests.support.gguf_files import write

    write("llama", tmp_path / "model.gguf", "Q4_1")
    rows = [{"text": f"{row['name']} {row['answer']}"} for row in small.questions(16)]
    recipe = {
        "model": str(tmp_path / "model.gguf"),
        "quantize": "keep",
        "task": "causal-lm",
        "data": {"train": rows, "test_size": 4},
        "training": {"max_steps": 2, "batch_size": 4},
    }
    kinds = {"lora": {"method": {"name": "lora", "r": 2}}, "blocks": {"method": "blocks"}}
    found = ak.compare(recipe, kinds, 1, out=tmp_path / "out", grid=None, validation_size=2, quiet=True)
    merged = {row.label: row.merge for row in found.rows}
    assert merged["lora"]["largest"] < 1e-4 and merged["blocks"]["kl"] < 1e-3, merged
    assert "KL " in str(found) and "(base " in str(found)
    with pytest.raises(ak.AdapterError, match='quantize="keep"'):
        ak.compare(recipe, {"blocks": {"method": "blocks", "quantize": None}}, 1, out=tmp_path / "other", quiet=True)
