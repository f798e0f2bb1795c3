"""A function of the user's scores what the model writes, before and after; what is wrong with it is told in time."""

import json

import pytest

import adapters_kit as ak
from adapters_kit.errors import RecipeError
from adapters_kit.named_function import named_function, scored
from adapters_kit.recipe_changes import without_paths
from adapters_kit.training.judged import Judged
from tests.support import small

JUDGE = '''
import dataclasses

@dataclasses.dataclass
class Kept:
    calls: int = 0

KEPT = Kept()

def right(rows, answers):
    """1 where the answer begins as it should."""
    KEPT.calls += 1
    return [float(a.split()[:1] == [r["completion"]]) for r, a in zip(rows, answers)]

def fails(rows, answers):
    return [1 / (row["completion"] != "rome") for row in rows]

def later(rows, answers):
    KEPT.calls += 1
    if KEPT.calls > 1:
        raise OSError("the line is down")
    return [0] * len(rows)

def one(rows):
    return rows

NUMBER = 3
'''


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "stops.py").write_text("1 / 0\n")
    rows = [{"prompt": " ".join(row["words"]), "completion": row["answer"]} for row in small.questions(40)]
    small.write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "data": {"train": str(tmp_path / "rows.jsonl"), "test_size": 8},
        "method": {"name": "lora", "r": 4},
        "max_new_tokens": 3,
        "eval": {"judge": "my_judge.py:right", "judge_limit": 6},
        "training": {"max_steps": 2, "batch_size": 8, "samples": 0, "max_length": 32},
    }


@pytest.mark.slow
def test_answers_are_judged_before_and_after(given, tmp_path, capsys):
    given["training"] |= {"max_steps": 12, "learning_rate": 5e-2}
    run = ak.train(given, tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "judged.jsonl").read_text().splitlines()]
    assert len(lines) == run.metrics["judged"]["examples"] == 6
    for side, name in (("base", "base_judge"), ("tuned", "judge")):
        numbers = [line[side]["judge"] for line in lines]
        assert run.metrics[name] == pytest.approx(sum(numbers) / 6)
        firsts = [line[side]["answer"].split()[:1] == [line["row"]["completion"]] for line in lines]
        assert numbers == [float(one) for one in firsts]
    pairs = [(line["base"]["judge"], line["tuned"]["judge"]) for line in lines]
    rate = sum((now > was) + (now == was) / 2 for was, now in pairs) / 6
    assert run.metrics["judge_win_rate"] == pytest.approx(rate)
    told = run.metrics["judged"]["told"]
    texts = (capsys.readouterr().err.replace("\n", " "), (run.adapter / "README.md").read_text())
    assert all(told in text for text in (*texts, (run.path / "report.html").read_text()))
    assert str(tmp_path) not in (run.adapter / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_judge_that_fails_after_training_costs_no_model(given, tmp_path):
    given["eval"]["judge"] = str(tmp_path / "my_judge.py:later")
    run = ak.train(given, tmp_path / "run", quiet=True)
    assert "were not judged" in run.metrics["judged"]["told"] and "the line is down" in run.metrics["judged"]["told"]
    assert "judge" not in run.metrics and (run.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_judge.py", "names no function"),
        ("my_judge.py:", "names no function"),
        ("my_judge:rigth", "has no function 'rigth'. Did you mean right"),
        ("my_judge:NUMBER", "is no function but int"),
        ("my_judge:one", "is called with 2 arguments"),
        ("my_juge:right", "no module 'my_juge' here .* Did you mean my_judge"),
        ("my_juge.py:right", "no file 'my_juge.py'. Did you mean my_judge.py"),
        ("nowhere/my_judge.py:right", "no file 'nowhere/my_judge.py'"),
        ("broken:right", "broken cannot be imported: No module named 'nothing_of_that_name'"),
        ("stops.py:right", "stops.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_names_that_are_none_are_refused_before_the_model_is_read(given, name, told):
    given["eval"]["judge"] = name
    with pytest.raises(RecipeError, match=rf"eval.judge: .*{told}"):
        ak.train({**given, "model": "nowhere"}, "run", quiet=True)


def test_what_writes_nothing_is_not_judged(given):
    with pytest.raises(RecipeError, match="text-classification writes none"):
        ak.train({**given, "task": "text-classification", "data": small_labels(), "model": "m"}, "run", quiet=True)
    with pytest.raises(RecipeError, match=r"eval.judge_limit: needs somebody"):
        ak.Recipe(**{**given, "eval": {"judge_limit": 3}})


def small_labels():
    return str(small.write_jsonl(__import__("pathlib").Path("labels.jsonl"), small.sentiment(20)))


def test_what_a_judge_gives_is_looked_at(given):
    rows = [{"completion": "rome"} for _ in range(3)]
    fails = named_function("eval.judge", "my_judge:fails")
    with pytest.raises(RecipeError, match=r"fails at row 2 \(answer 'b'\): ZeroDivisionError"):
        scored("eval.judge", fails, [{"completion": "oslo"}, *rows], ["a", "b", "c", "d"])
    bad = [
        (lambda r, a: [1.0], "1 numbers for 3 answers"),
        (lambda r, a: None, "gives NoneType; it has to give a list"),
        (lambda r, a: [1, None, 2], "gives None for row 2"),
        (lambda r, a: [1, 2, float("nan")], "gives nan for row 3"),
        (lambda r, a: ["x", 2, 3], "gives 'x' for row 1"),
    ]
    for function, told in bad:
        with pytest.raises(RecipeError, match=told):
            scored("eval.judge", function, rows, ["a", "b", "c"])
    assert scored("k", lambda r, a: (n for n in (True, 2, "3")), rows, ["a", "b", "c"]) == [1.0, 2.0, 3.0]
    import numpy as np
    import torch

    assert scored("k", lambda r, a: np.arange(3), rows, list("abc")) == [0, 1, 2]
    assert scored("k", lambda r, a: torch.ones(3), rows, list("abc")) == [1, 1, 1]
    assert scored("k", lambda r, a: 4, rows[:1], ["a"]) == [4.0]


def test_a_win_is_half_where_both_are_the_same(given):
    class Task:
        generates = True

        def predict(self, model, rows, batch):
            return [{"answer": model} for _ in rows]

    from datasets import Dataset

    rows = Dataset.from_list([{"n": i} for i in range(4)])
    one = Judged(lambda r, a: [float(x["n"] % 2) * len(y) for x, y in zip(r, a, strict=True)], Task(), rows, 4)
    one.before = one.ask("a")
    found = one.compare("bb")
    assert (found["base_judge"], found["judge"], found["judge_win_rate"]) == (0.5, 1.0, 0.75)
    assert (
        "adapter 2 times and that of the base 0 times; 2 are as good as each other: a win rate of 0.75"
        in found["judged"]["told"]
    )


def test_what_travels_has_no_path(given, tmp_path):
    given["eval"]["judge"] = str(tmp_path / "my_judge.py") + ":right"
    assert without_paths(ak.Recipe(**given)).eval.judge == "my_judge.py:right"
