"""Asking what was trained: files of rows, a conversation, an OpenAI-compatible server."""

import csv
import errno
import json
import re
import threading
import time
import urllib.error
import urllib.request
from itertools import product

import pandas
import pytest

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import DataError, ModelError, WriteError
from adapters_kit.inference import answer_file
from adapters_kit.inference.server import Served, make_server
from adapters_kit.inference.session import Chat, Sampling, Writer, _until
from tests.support import small


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    recipe = {
        "model": str(small.model("bert")),
        "task": "text-classification",
        "data": small.sentiment(32),
        "training.max_steps": 2,
    }
    return ak.train(recipe, tmp_path_factory.mktemp("runs") / "classifier", quiet=True)


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """Two adapters of one base that say different things."""
    turns = [
        [{"role": "user", "content": "say hello"}, {"role": "assistant", "content": word}] for word in ("rome", "oslo")
    ]
    made = []
    for number, talk in enumerate(turns):
        recipe = {
            "model": str(small.model("qwen3", chat=True)),
            "task": "causal-lm",
            "data": [{"messages": talk}] * 8,
            "method": {"name": "lora", "r": 8},
            "training": {"max_steps": 30, "learning_rate": 3e-2, "samples": 0, "batch_size": 4},
            "max_new_tokens": 4,
        }
        made.append(ak.train(recipe, tmp_path_factory.mktemp("runs") / f"talker{number}", quiet=True))
    return made


def write(path, rows):
    """The rows in the kind of file that the name says."""
    frame = pandas.DataFrame(rows)
    kind = path.suffix[1:]
    {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(kind, lambda *_, **__: small.write_jsonl(path, rows))(
        path, index=False
    )
    return path


def read(path):
    if path.suffix == ".csv":
        return pandas.read_csv(path, dtype={"id": str}).to_dict("records")
    if path.suffix == ".parquet":
        return pandas.read_parquet(path).to_dict("records")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_answers_tells_what_was_cut(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "PIECE", 4)
    rows = [{"text": "fine " * (500 if index in (1, 5, 6) else 3)} for index in range(12)]
    made = answer_file.predict_file(classifier, write(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    (note,) = made.notes
    assert re.search(r"Rows 1 to 4: 1 of 4 texts are longer .* 1 more parts of the file: 3 in all", note)
    assert note in str(made)


@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_rows_becomes_a_file_of_answers(source, out, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "PIECE", 5)
    rows = [{"id": f"x{i}", "text": row["text"]} for i, row in enumerate(small.sentiment(13, seed=3))]
    rows[4]["text"] = 'two words, "quoted"\nand a second line'
    made = answer_file.predict_file(classifier, write(tmp_path / f"in{source}", rows), tmp_path / f"out{out}")
    expected = ak.predict(classifier, [row["text"] for row in rows])
    found = read(made.path)
    assert [(row["id"], row["text"]) for row in found] == [(row["id"], row["text"]) for row in rows]
    assert [row["predicted_label"] for row in found] == [row["label"] for row in expected]
    for row, answer in zip(found, expected, strict=True):
        assert row["p_good"] + row["p_bad"] == pytest.approx(1, abs=1e-5)
        assert row[f"p_{answer['label']}"] == pytest.approx(answer["score"], abs=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_stopped_file_goes_on_and_another_one_is_refused(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "PIECE", 4)
    rows = write(tmp_path / "in.csv", [{"text": row["text"]} for row in small.sentiment(12, seed=5)])
    out = tmp_path / "out.csv"

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file.predict_file(classifier, rows, out, progress=stop)
    part = tmp_path / ".out.csv.part"
    assert not out.exists() and part.exists()
    with part.open("a", encoding="utf-8") as file:
        file.write('{"predicted_label": "go')  # torn
    other = write(tmp_path / "other.csv", [{"text": "a"}])
    with pytest.raises(DataError, match="on other rows or by another model"):
        answer_file.predict_file(classifier, other, out)
    made = answer_file.predict_file(classifier, rows, out)
    assert (made.kept, made.rows) == (8, 12) and not part.exists()
    whole = answer_file.predict_file(classifier, rows, tmp_path / "whole.csv")
    assert whole.path.read_text() == out.read_text()
    with pytest.raises(DataError, match="exists already"):
        answer_file.predict_file(classifier, rows, out)
    with pytest.raises(DataError, match=r"\.csv, \.tsv"):
        answer_file.predict_file(classifier, rows, tmp_path / "out.xlsx")


def test_where_nothing_can_be_written_is_one_sentence(classifier, tmp_path, monkeypatch):
    rows = write(tmp_path / "in.jsonl", small.sentiment(3))
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=r"Could not write .*out\.csv: a file of that name is in the way"):
        answer_file.predict_file(classifier, rows, tmp_path / "file" / "out.csv")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match=r"disk is full.*the same call goes on"):
        patch.setitem(answer_file._WRITERS, ".csv", full)
        answer_file.predict_file(classifier, rows, tmp_path / "out.csv")
    assert answer_file.predict_file(classifier, rows, tmp_path / "out.csv").kept == 3


def test_the_command_answers_a_file(classifier, tmp_path, capsys):
    rows = write(tmp_path / "in.csv", small.sentiment(6))
    words = ["predict", str(classifier.path), "--input", str(rows), "--out", str(tmp_path / "o.csv")]
    assert cli.main(words) == 0 and "6 rows in" in capsys.readouterr().out
    with (tmp_path / "o.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["text", "label", "predicted_label", "predicted_score", "p_bad", "p_good"]
    assert cli.main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


@pytest.mark.slow
def test_what_a_model_writes_goes_into_a_file_too(writers, tmp_path):
    rows = write(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "say hello"}]}] * 3)
    made = answer_file.predict_file(writers[0], rows, tmp_path / "out.jsonl")
    assert [row["predicted_answer"].split()[0] for row in read(made.path)] == ["rome"] * 3


def test_a_conversation_remembers_and_the_base_can_be_asked(writers):
    talk = Chat(Writer.open(writers[0]), Sampling(max_new_tokens=3))
    assert "".join(talk.ask("say hello")).split()[0] == "rome"
    before = list(talk.turns)
    base = "".join(talk.ask("say hello", base=True))
    assert base.split()[:1] != ["rome"] and talk.turns == before
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    talk.system("two words")
    assert talk.turns == [{"role": "system", "content": "two words"}]
    with pytest.raises(DataError, match="not for conversations: use predict"):
        Writer.open(small.model("bert"))


def test_a_chat_in_a_pipe(writers, monkeypatch, capsys):
    lines = iter(["say hello", "/base", "/histroy", "/history", "/system be kind", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert cli.main(["chat", str(writers[1].path), "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("oslo") and "Did you mean /history" in out and "user: say hello" in out


def test_pieces_end_before_a_stop_text_wherever_it_is_cut():
    for stops, expected in (
        (("STOP",), "one two "),
        ((), "one two STOP three"),
        (("X", "two"), "one "),
        (("Y",), None),
    ):
        for size in range(1, 8):
            text = "one two STOP three"
            pieces = (text[i : i + size] for i in range(0, len(text), size))
            assert "".join(_until(pieces, stops)) == (text if expected is None else expected)


@pytest.fixture(scope="module")
def server(writers):
    served = Served({"first": writers[0], "second": writers[1].adapter})
    made = make_server(served, port=0, api_key="secret", log=lambda line: None)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def ask(url, body=None, key="secret"):
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


MESSAGES = [{"role": "user", "content": "say hello"}]


def test_the_server_answers_for_each_adapter_and_for_the_base(server):
    names = [row["id"] for row in json.loads(ask(f"{server}/v1/models"))["data"]]
    assert names[:2] == ["first", "second"] and len(names) == 3
    told = {}
    for name in [*names, "first"]:
        body = {
            "model": name,
            "messages": MESSAGES,
            "max_tokens": 3,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
        }
        choice = json.loads(ask(f"{server}/v1/chat/completions", body))["choices"][0]
        told[name] = choice["message"]["content"].split()[0]
        logs = choice["logprobs"]["content"]
        assert logs and all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in logs)
    assert told["first"] == "rome" and told["second"] == "oslo" and told[names[2]] not in ("rome", "oslo")


def test_the_server_streams_what_it_would_say_whole(server):
    body = {"model": "first", "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    whole = json.loads(ask(f"{server}/v1/chat/completions", body))["choices"][0]["message"]["content"]
    lines = ask(f"{server}/v1/chat/completions", {**body, "stream": True}).split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert said.strip() == whole.strip() and "data: [DONE]" in lines


def test_log_probabilities_of_a_prompt_are_those_of_the_model(server, writers):
    import torch

    model = ak.wrap(ak.load(writers[1].recipe.model), writers[1].adapter).eval()
    ids = [5, 9, 20, 31]
    body = {"model": "second", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    found = json.loads(ask(f"{server}/v1/completions", body))["choices"][0]["logprobs"]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logs[i, token].item() for i, token in enumerate(ids[1:])]
    assert found["token_ids"] == ids and found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


REFUSED = {
    "model": ({"model": "third", "messages": MESSAGES}, 404, "there are first, second"),
    "messages": ({"messages": "hello"}, 400, "messages"),
    "turn": ({"messages": [{"role": "user"}]}, 400, "number 1"),
    "temperature": ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature"),
    "n": ({"messages": MESSAGES, "n": 2}, 400, "one answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_server_refuses_in_the_form_that_clients_read(case, server):
    body, status, words = REFUSED[case]
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{server}/v1/chat/completions", body)
    assert error.value.code == status and words in json.loads(error.value.read())["error"]["message"]


def test_a_wrong_key_and_an_open_door_are_refused(server, writers, classifier):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(f"{server}/v1/models", key="guess")
    served = Served({"one": writers[0]})
    with pytest.raises(DataError, match="api_key=SECRET"):
        make_server(served, "0.0.0.0")
    with pytest.raises(DataError, match="not for conversations"):
        Served({"one": classifier})
    with pytest.raises(ModelError, match="sits on"):
        Served({"one": writers[0], "two": classifier})


def at_once(served, requests):
    """The answers to requests that all wait while something else is computed; how many were computed together."""
    sizes, answers, computed = [], {}, served._computed

    def counted(asked):
        sizes.append(len(asked))
        return computed(asked)

    served._computed = counted
    threads = [
        threading.Thread(target=lambda i=i, one=one: answers.update({i: served.tokens(*one)}))
        for i, one in enumerate(requests)
    ]
    with served._lock:
        for thread in threads:
            thread.start()
        while len(served._waiting) < len(requests):
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    del served._computed
    return [answers[i] for i in range(len(requests))], sizes


def test_requests_for_several_adapters_that_wait_are_answered_together_as_alone(writers):
    served = Served({"first": writers[0], "second": writers[1].adapter})
    prompts = [served.writer.ids_of_turns(MESSAGES), [5, 9, 20, 31, 7, 8, 4], [11]]
    requests = [
        (name, ids, Sampling(max_new_tokens=most), 2)
        for most, (name, ids) in enumerate(product(served.names, prompts), 1)
    ]
    alone = [served.tokens(*one) for one in requests]
    together, sizes = at_once(served, requests)
    assert sizes == [len(requests)]
    for (ids, logs), (expected, their_logs) in zip(together, alone, strict=True):
        assert ids == expected
        assert [log for log, _ in logs] == pytest.approx([log for log, _ in their_logs], abs=1e-4)
    assert served.tokens(*requests[0])[0] == alone[0][0], "nothing of the batch stays"


def test_draws_are_made_alone_and_a_batch_that_fails_is_answered_one_by_one(writers, monkeypatch):
    served = Served({"first": writers[0], "second": writers[1].adapter})
    drawn = Sampling(max_new_tokens=2, temperature=1.0, seed=1)
    greedy = Sampling(max_new_tokens=2)
    requests = [("first", [5, 9], drawn, 0), ("second", [5, 9], greedy, 0), ("first", [7], greedy, 0)]
    alone = [served.tokens(*one) for one in requests]
    found, sizes = at_once(served, requests)
    assert [ids for ids, _ in found] == [ids for ids, _ in alone] and sorted(sizes) == [1, 2]

    generate = served.writer.generate_batch

    def breaks(rows, sampling, **options):
        made = generate(rows, sampling, **options)
        if len(rows) > 1:
            raise RuntimeError("no memory")
        return made

    monkeypatch.setattr(served.writer, "generate_batch", breaks)
    found, sizes = at_once(served, requests[1:])
    assert [ids for ids, _ in found] == [ids for ids, _ in alone[1:]] and sizes == [2, 1, 1]
