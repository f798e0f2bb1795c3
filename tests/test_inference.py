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
