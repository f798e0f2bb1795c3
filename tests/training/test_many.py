"""Several adapters in one pass over one base: each as its own run, and one that fails stops no other."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit import system
from adapters_kit.errors import ManyError, RecipeError
from adapters_kit.recipe import Recipe
from adapters_kit.training import assembly
from adapters_kit.training.many.passes import passes
from adapters_kit.training.many.seat import Seat
from adapters_kit.training.many.trainer import JointTrainer
from tests.support import small


@pytest.fixture
def rows(tmp_path) -> Path:
    for name, seed, count in (("d", 0, 40), ("e", 5, 32)):
        small.write_jsonl(tmp_path / name / "train.jsonl", small.sentiment(count, seed=seed))
        small.write_jsonl(tmp_path / name / "test.jsonl", small.sentiment(12, seed=seed + 1))
    return tmp_path


def recipe(rows: Path, method, data: str = "d", family: str = "bert", **training) -> Recipe:
    quick = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1, "samples": 1}
    fields = {"model": str(small.model(family)), "task": "text-classification", "data": str(rows / data)}
    return Recipe(**fields, method=method, training=quick | training)


def distance(one: ak.Run, other: ak.Run) -> float:
    """Largest difference of a tensor, relative to its norm."""
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    pairs = ((ours[name].double(), theirs[name].double()) for name in ours)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


@pytest.fixture
def seats(monkeypatch) -> list[Seat]:
    made: list[Seat] = []
    init = Seat.__init__
    monkeypatch.setattr(Seat, "__init__", lambda self, *given: made.append(self) or init(self, *given))
    return made


@pytest.mark.slow
def test_each_adapter_has_the_weights_of_its_own_run(rows, tmp_path, monkeypatch, seats):
    load = assembly.load
    monkeypatch.setattr(assembly, "load", lambda *given, **options: load(*given, **options).double())
    recipes = [
        recipe(rows, {"name": "lora", "r": 4, "lora_dropout": 0.1}, base_dropout=0.1),
        recipe(rows, {"name": "lora", "r": 2}, "e", seed=3, learning_rate=1e-2, batch_size=4, gradient_accumulation=2),
        recipe(rows, {"name": "houlsby", "dropout": 0.1}, seed=5, base_dropout=0.1),
        recipe(rows, {"name": "dora", "r": 4}, "e", epochs=2),
        recipe(rows, "ia3", seed=2, base_dropout=0.1),
        recipe(rows, "pfeiffer", max_grad_norm=0.1, group_by_length=False),
        recipe(rows, {"name": "rslora", "lora_dropout": 0.3}, base_dropout=0.1),
    ]
    together = ak.train_many(recipes, tmp_path / "many", quiet=True)
    assert [seat.alone for seat in seats] == [None] * len(recipes)
    for number, (given, run) in enumerate(zip(recipes, together, strict=True)):
        assert distance(run, ak.train(given, tmp_path / f"own{number}", quiet=True)) < 1e-10, given.method.label


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_going_on(rows, tmp_path):
    recipes = [recipe(rows, "lora"), recipe(rows, "houlsby", learning_rate=1e30), recipe(rows, "lora", seed=4)]
    with pytest.raises(ManyError, match=r"1 of 3 trainings failed(.|\n)*2-houlsby") as caught:
        ak.train_many(recipes, tmp_path / "many", quiet=True)
    first, second, third = caught.value.runs
    assert second is None and list(caught.value.failures) == ["2-houlsby"]
    assert distance(first, ak.train(recipes[0], tmp_path / "own", quiet=True)) < 1e-4
    assert json.loads((third.path / "metrics.json").read_text()) == third.metrics


def test_what_cannot_go_together_is_refused_before_anything_is_loaded(rows, tmp_path):
    with pytest.raises(RecipeError) as caught:
        given = [
            recipe(rows, "lora"),
            recipe(rows, "lora", family="distilbert", precision="bf16"),
            recipe(rows, "prefix"),
        ]
        ak.train_many(given, tmp_path / "many", names=["a", "b", "c"], quiet=True)
    told = str(caught.value)
    assert "3 problems" in told and "model is" in told and "training.precision is 'bf16' in b" in told
    assert "method prefix" in told and "houlsby" in told and not list((tmp_path / "many").glob("*/recipe.yaml"))


@pytest.mark.slow
def test_stopped_and_resumed_all_end_where_their_own_runs_end(rows, tmp_path, monkeypatch):
    recipes = [recipe(rows, {"name": "lora", "lora_dropout": 0.1}), recipe(rows, "houlsby", "e", seed=3, epochs=2)]
    step = JointTrainer.training_step

    def stopping(self, *given, **named):
        if self.seat.name == "2-houlsby" and self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(JointTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            ak.train_many(recipes, tmp_path / "many", quiet=True)
    assert not list((tmp_path / "many").glob("*/metrics.json"))
    resumed = ak.train_many(recipes, tmp_path / "many", resume=True, quiet=True)
    for number, (given, run) in enumerate(zip(recipes, resumed, strict=True)):
        own = ak.train(given, tmp_path / f"own{number}", quiet=True)
        assert distance(run, own) < 1e-4, given.method.label
        assert [line["step"] for line in run.history()] == [line["step"] for line in own.history()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "more", "close"),
    [
        ("llama", "causal-lm", {}, 1e-4),
        ("llama", "causal-lm", {"quantize": "nf4"}, 5e-2),  # bf16
        ("gpt2", "causal-lm", {}, 1e-4),
        ("t5", "seq2seq", {}, 1e-4),
    ],
)
def test_decoders_and_encoder_decoders_share_their_bodies_too(family, task, more, close, tmp_path, seats):
    """Answers of other lengths for each, so that one's rows are padded because of the other's."""
    made = []
    for name, words in (("d", 1), ("e", 4)):
        rows = [
            {"prompt": one["question"], "completion": " ".join([one["answer"]] * words)} for one in small.questions(24)
        ]
        if task == "seq2seq":
            rows = [{"source": one["prompt"], "target": one["completion"]} for one in rows]
        small.write_jsonl(tmp_path / name / "train.jsonl", rows)
        small.write_jsonl(tmp_path / name / "test.jsonl", rows[:4])
    for name, method in (("d", {"name": "lora", "lora_dropout": 0.1}), ("e", "lora"), ("e", "pfeiffer")):
        training = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "samples": 0}
        fields = {"model": str(small.model(family)), "task": task, "data": str(tmp_path / name), "method": method}
        made.append(Recipe(**fields, **more, training=training))
    together = ak.train_many(made, tmp_path / "many", quiet=True)
    assert [seat.alone for seat in seats] == [None] * len(made)
    for number, (given, run) in enumerate(zip(made, together, strict=True)):
        assert distance(run, ak.train(given, tmp_path / f"own{number}", quiet=True)) < close, given.method.label


@pytest.mark.slow
def test_a_sweep_goes_together_where_there_is_memory(rows, tmp_path, monkeypatch, seats, capsys):
    given = recipe(rows, {"name": "lora", "lora_dropout": 0.1})
    options = {"learning_rates": [1e-3, 3e-3], "ranks": [2, 4]}
    table = ak.sweep(given, tmp_path / "together", **options, together="auto")
    assert len(seats) == 4 and "Up to 4 in one pass" in capsys.readouterr().err
    apart = ak.sweep(given, tmp_path / "apart", **options, quiet=True)
    assert len(seats) == 4
    for row in apart:
        ours, theirs = (ak.Run.open(tmp_path / folder / row["run"]) for folder in ("together", "apart"))
        assert distance(ours, theirs) < 1e-4
    assert sorted(row["run"] for row in table) == sorted(row["run"] for row in apart)
    monkeypatch.setattr(system, "free_memory", lambda: 1)
    told = passes({"a": given, "b": given.changed(**{"training.learning_rate": 1e-3})})
    assert told[0] == [["a"], ["b"]] and "would not fit" in told[1]
    told = passes({"a": given.changed(method="prefix"), "b": given})
    assert told[0] == [["a"], ["b"]] and "method prefix" in told[1]
