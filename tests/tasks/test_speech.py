"""Speech recognition: models that write (Whisper) and that spell (CTC) learn, are scored and refuse by row."""

import numpy as np
import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError, MissingPackageError, ModelError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.speech_recognition import make_ctc_base
from adapters_kit.training.resolve import prepare
from tests.support import sounds

pytest.importorskip("jiwer", reason="word error rates need jiwer: pip install 'adapters-kit[audio]'")
pytest.importorskip("soundfile", reason="sound files need soundfile: pip install 'adapters-kit[audio]'")
TASK = "speech-recognition"
SPELLS = ["wav2vec2", "hubert", "wavlm"]


def arrays(texts, seconds=0.4):
    return [
        {"audio": sounds.tone(300 + 150 * i, seconds + 0.1 * i, seed=i).tolist(), "rate": 16_000, "text": text}
        for i, text in enumerate(texts)
    ]


def bound(name, rows, **recipe):
    folder = sounds.speaker(name)
    columns = {"audio": "audio", "transcript": "text", "sampling_rate": "rate"}
    task = tasks.get(TASK)(Recipe(**{"model": str(folder), "task": TASK, "data": "x", **recipe}), columns)
    table = Dataset.from_list(rows)
    task.fit(table, None)
    model = ak.load(folder, TASK)
    task.bind(load_processor(folder), model)
    return task, table, model


@pytest.mark.parametrize("name", [*SPELLS, "whisper"])
def test_the_loss_is_the_models_own_and_no_answer_depends_on_its_neighbours(name):
    """In a batch and alone the same transcript and loss; alone, the loss that transformers computes."""
    task, table, model = bound(name, arrays(["ab", "c", "bca", "a c"]), max_new_tokens=6)
    features = task.encode(table)
    together, alone = (task.run(model, features, size) for size in (4, 1))
    assert [text for *_, text in together] == [text for *_, text in alone]
    np.testing.assert_allclose([one[0] for one in together], [one[0] for one in alone], rtol=2e-4)
    for feature, (loss, count, _) in zip(features, alone, strict=True):
        batch = task.collate_training([feature])
        batch.pop("row")
        with torch.no_grad():
            assert float(model(**batch).loss) == pytest.approx(loss / count, rel=1e-4)
    spoken = {feature["target"] for feature in features}
    assert task.score([(0.0, 1, text) for text in ("ab", "c", "bca", "a c")], features)["wer"] == 0
    wrong = task.score([(1.0, 1, text) for text in ("ab", "c", "bcb", "a")], features)
    assert (wrong["wer"], wrong["cer"]) == (pytest.approx(2 / 5), pytest.approx(3 / 9))
    assert spoken == {"ab", "c", "bca", "a c"}


def test_whisper_is_told_language_and_task():
    rows = arrays(["ab", "c"])
    german = {"language": "de"}, ["<|de|>", "<|transcribe|>"]
    english = {"language": "en", "speech_task": "translate"}, ["<|en|>", "<|translate|>"]
    for keys, told in (german, english):
        task, table, _ = bound("whisper", rows, data={"train": "x", **keys})
        ids = task.encode(table)[0]["labels"]
        assert task.tokenizer.convert_ids_to_tokens(ids) == [*told, "<|notimestamps|>", "a", "b", "<|endoftext|>"]
        assert task.options == {"language": keys["language"], "task": keys.get("speech_task", "transcribe")}
    with pytest.raises(ModelError, match=r"data\.language: .* has no 'ed'\. Did you mean en or de"):
        bound("whisper", rows, data={"train": "x", "language": "ed"})
    with pytest.raises(ModelError, match="is told no language"):
        bound("hubert", rows, data={"train": "x", "language": "en"})


def test_letters_that_a_model_cannot_spell_are_named():
    task, table, _ = bound("hubert", arrays(["AB, c!", "ca!"]))
    features = task.encode(table)
    assert [feature["target"] for feature in features] == ["ab c", "ca"]
    told = " ".join(task.notes.sentences)
    assert "Transcripts are spelled in lower case." in told
    assert "cannot spell '!' (2) ',' (1): they are left out" in told
    task, table, _ = bound("hubert", arrays(["ab", "xyz"]))
    with pytest.raises(DataError, match=r"Row 2: .* has none of the letters of 'xyz'.*make_ctc_base"):
        task.encode(table)


def test_rows_that_cannot_be_learned():
    with pytest.raises(DataError, match=r"Row 2: the transcript ' ' has no words"):
        bound("hubert", arrays(["ab", " "]))
    task, table, _ = bound("hubert", arrays(["ab", "abc" * 60]))
    with pytest.raises(DataError, match=r"Row 2: a transcript of 180 characters, and the model makes \d+ positions"):
        task.encode(table)
    task, table, _ = bound("hubert", arrays(["ab", "c", "b"]), data={"train": "x", "max_seconds": 0.55})
    features = task.encode(table)
    assert [feature["row"] for feature in features] == [0, 1]
    assert "1 of 3 recordings are longer than 0.55 seconds (data.max_seconds) and were left out: rows 3." in " ".join(
        task.notes.sentences
    )
    with pytest.raises(DataError, match=r"Row 3 is 0\.6 seconds long; .* hears 0\.55 at once"):
        task.encode(table, answers=False)


def test_without_jiwer_it_is_said_before_work_starts(tmp_path, monkeypatch):
    sounds.rows_file(tmp_path / "rows.jsonl", sounds.melodies(4, tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(MissingPackageError, match=r"jiwer: pip install 'adapters-kit\[audio\]'"):
        prepare(Recipe(model="m", task=TASK, data=str(tmp_path / "rows.jsonl")))


@pytest.mark.slow
def test_a_model_without_letters_says_how_it_gets_them_and_they_work(tmp_path):
    """A vocabulary of the texts' own letters and a new head, which the adapter trains and saves."""
    sounds.rows_file(tmp_path / "rows.jsonl", sounds.melodies(12, tmp_path))
    keys = {"task": TASK, "data": str(tmp_path / "rows.jsonl"), "training": {"max_steps": 2, "batch_size": 4}}
    bare = sounds.model("hubert")
    with pytest.raises(ModelError, match=r"has no tokenizer.*make_ctc_base"):
        ak.train({"model": str(bare), **keys}, tmp_path / "none", quiet=True)
    base = make_ctc_base(bare, ["a cab", "bc"], tmp_path / "base")
    run = ak.train({"model": str(base), **keys}, tmp_path / "run", quiet=True)
    wrapped = ak.wrap(ak.load(base, TASK), "lora", r=2)
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad and "lm_head.modules_to_save" in name]
    assert ak.evaluate(run.path)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-4)
    with pytest.raises(DataError, match="no letters"):
        make_ctc_base(bare, [], tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("hubert", "lora"), ("wav2vec2", "houlsby"), ("whisper", "prefix"), ("whisper", "nf4")]
)
def test_a_run_learns_ships_and_answers_files(name, method, tmp_path):
    rows = sounds.melodies(24, tmp_path / "clips")
    table = sounds.rows_file(tmp_path / "rows.jsonl", rows)
    rate = 5e-2 if method == "prefix" else 1e-2
    training = {"epochs": 6, "batch_size": 8, "learning_rate": rate, "head_learning_rate": 1e-2, "samples": 2}
    training |= {"keep_best": False}
    data = {"train": str(table), **({"language": "en"} if name == "whisper" else {})}
    keys = {"model": str(sounds.speaker(name)), "task": TASK, "data": data, "max_new_tokens": 6, "training": training}
    keys |= {"quantize": "nf4"} if method == "nf4" else {"method": method}
    assert ak.plan(keys).trainable > 0
    run = ak.train(keys, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.9 * run.metrics["base_loss"]
    assert ak.evaluate(run.path)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-4)
    told = ak.predict(run.path, str(table))
    assert [answer["audio"] for answer in told] == [row["audio"] for row in rows]
    assert ak.predict(run.path, rows[0]["audio"])[0] == told[0]
    assert "pipeline_tag: automatic-speech-recognition" in (run.path / "README.md").read_text()
    if method == "lora":
        ak.merge(run.adapter, tmp_path / "merged")
        merged = ak.predict(tmp_path / "merged", str(table))
        assert [answer["answer"] for answer in merged] == [answer["answer"] for answer in told]
