"""Answers of tasks that generate arrive piece by piece: the same text as all at once, on the command line too."""

import io
import json
import sys

import pytest
import torch

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import DataError
from adapters_kit.tasks.streaming import pieces
from tests.support import small

PROMPTS = ["the film was", "where does ben live ?"]
CASES = {"gpt2": "causal-lm", "qwen3": "causal-lm", "bart": "seq2seq", "t5": "seq2seq"}


def model(family: str) -> str:
    return str(small.model(family))


@pytest.mark.parametrize("family", CASES)
def test_pieces_join_to_the_answer(family):
    options = {"task": CASES[family], "max_new_tokens": 8}
    whole = [row["answer"] for row in ak.predict(model(family), PROMPTS, **options)]
    streamed = [list(answer) for answer in ak.stream(model(family), PROMPTS, **options)]
    assert ["".join(parts) for parts in streamed] == whole
    assert any(len(parts) > 2 for parts in streamed), "the text came in one piece"


@pytest.mark.slow
def test_a_chat_is_asked_through_its_template(tmp_path):
    folder = small.model("qwen3", chat=True)
    turns = [{"role": "user", "content": "say hello"}, {"role": "assistant", "content": "hello"}]
    path = small.write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    recipe = ak.Recipe(model=str(folder), task="causal-lm", data=str(path), training={"max_steps": 1, "samples": 0})
    run = ak.train(recipe.changed(max_new_tokens=8), tmp_path / "run", quiet=True)
    (answer,) = ak.predict(run.path, [{"messages": turns[:1]}])
    assert ak.predict(run.path, ["say hello"])[0]["answer"] == answer["answer"]
    assert ["".join(parts) for parts in ak.stream(run.path, "say hello")] == [answer["answer"]]


def test_generation_ends_when_nobody_listens_and_its_errors_arrive():
    made = []

    def endless(streamer, stopping_criteria):
        streamer.put(torch.tensor([[0]]))  # the prompt
        while not stopping_criteria(torch.zeros(1, 1, dtype=torch.long), None).all():
            made.append(len(made))
            streamer.put(torch.tensor([5]))

    words = pieces(small.tokenizer(encoder=False), endless)
    assert next(words).strip() in small.WORDS
    words.close()  # returns: the thread has ended

    def broken(**_):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        list(pieces(small.tokenizer(encoder=False), broken))


def test_a_classifier_does_not_stream():
    with pytest.raises(DataError, match="writes no text to stream: use predict"):
        ak.stream(model("bert"), "a", task="text-classification")


class Output(io.StringIO):
    """Standard output that remembers what was there at each flush."""

    terminal, flushed = False, ()

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.flushed += (self.getvalue(),)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_prints_pieces_as_they_come(terminal, monkeypatch):
    """Plain text on a terminal; elsewhere one JSON object a line, written in pieces all the same."""
    out = Output()
    out.terminal = terminal
    monkeypatch.setattr(sys, "stdout", out)
    words = ["predict", model("qwen3"), *PROMPTS, "--task", "causal-lm", "--max_new_tokens", "8"]
    assert cli.main(words) == 0
    answers = [row["answer"] for row in ak.predict(model("qwen3"), PROMPTS, task="causal-lm", max_new_tokens=8)]
    assert len(set(out.flushed)) > 4
    if terminal:
        assert out.getvalue() == "".join(f"{answer}\n" for answer in answers)
    else:
        rows = [json.loads(line) for line in out.getvalue().splitlines()]
        assert rows == [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)]


def test_a_file_of_prompts_gives_json_lines(tmp_path, capsys):
    path = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": prompt} for prompt in PROMPTS])
    words = ["predict", model("gpt2"), "--data", str(path), "--task", "causal-lm", "--max_new_tokens", "8"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == PROMPTS


@pytest.mark.parametrize("family", CASES)
def test_the_n_best_answers_are_the_likeliest_of_all(family):
    """One token is searched exactly: the scores are those of the whole vocabulary's likeliest tokens."""
    options = {"task": CASES[family], "max_new_tokens": 1}
    rows = ak.predict(model(family), PROMPTS, n_best=4, **options)
    loaded = ak.load(model(family), task=CASES[family]).eval()
    tokenizer = ak.load_processor(model(family))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        batch = tokenizer(prompt, return_tensors="pt")
        batch.pop("token_type_ids", None)
        if CASES[family] == "seq2seq":
            batch["decoder_input_ids"] = torch.tensor([[loaded.config.decoder_start_token_id]])
        with torch.no_grad():
            truth = loaded(**batch).logits[0, -1].double().log_softmax(-1).topk(4).values.tolist()
        assert [one["score"] for one in row["best"]] == pytest.approx(truth, abs=1e-4)
        assert row["answer"] == row["best"][0]["answer"]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_n_best_answers_of_many_tokens_do_not_depend_on_their_company(family):
    options = {"task": CASES[family], "max_new_tokens": 6, "n_best": 3}
    together = ak.predict(model(family), PROMPTS, **options)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = ak.predict(model(family), prompt, **options)
        assert [one["answer"] for one in alone["best"]] == [one["answer"] for one in row["best"]]
        scores = [one["score"] for one in row["best"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3


@pytest.mark.slow
def test_n_best_classes_in_memory_in_files_and_on_the_command_line(tmp_path, capsys):
    recipe = {"model": model("bert"), "task": "text-classification", "data": small.sentiment(24)}
    run = ak.train({**recipe, "training.max_steps": 1, "training.samples": 0}, tmp_path / "run", quiet=True)
    (row,) = ak.predict(run, "a fine film", n_best=9)
    assert row["best"][0] == {"label": row["label"], "score": row["score"]} and len(row["best"]) == 2
    assert sum(one["score"] for one in row["best"]) == pytest.approx(1, abs=1e-5)
    assert "best" not in ak.predict(run, "a fine film")[0]
    path = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": "a fine film"}])
    words = ["predict", str(run.path), "--input", str(path), "--out", str(tmp_path / "out.jsonl"), "--n-best", "2"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["predicted_best"] == row["best"]
    capsys.readouterr()
    assert cli.main(["predict", str(run.path), "a fine film", "--n-best", "0"]) == 2
    assert "--n-best 0: how many answers" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["masked-lm", "question-answering", "token-classification"])
def test_tasks_without_a_second_best_say_so(task):
    rows = [{"text": "a [MASK]", "question": "a", "context": "b", "tokens": ["a"]}]
    labels = {"labels": ["O", "B-X"]} if "token" in task else {}
    with pytest.raises(DataError, match=f"n_best=2: only classes and written texts.*{task}"):
        ak.predict(model("bert"), rows, task=task, n_best=2, **labels)
