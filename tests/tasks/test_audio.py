"""Recordings: read as they are meant to be heard, or refused by their row; a class for each, on five families."""

import io

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError, MissingPackageError, ModelError, RecipeError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.audio import kind_of, open_audio, resampled
from adapters_kit.tasks.notes import Notes
from adapters_kit.training import data
from adapters_kit.training.resolve import prepare
from tests.support import sounds

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile: pip install 'adapters-kit[audio]'")
TASK = "audio-classification"


def file_of(samples, kind="WAV", rate=16_000, **options):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, **options)
    return out.getvalue()


SOUND = sounds.tone(440, 0.5)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF"])
def test_every_way_to_give_a_recording_is_the_same(kind, tmp_path):
    content = file_of(SOUND, kind)
    path = tmp_path / "a.sound"
    path.write_bytes(content)
    ways = [str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    found = [open_audio(way, 0) for way in ways]
    for clip in found:
        assert (clip.rate, clip.channels, len(clip.samples)) == (16_000, 1, len(SOUND))
        np.testing.assert_array_equal(clip.samples, found[0].samples)
    if kind != "OGG":
        np.testing.assert_allclose(found[0].samples, SOUND, atol=1e-4)
    assert kind_of(str(path), 0) == (0.5, 16_000, 1)


def test_samples_in_memory_and_several_channels():
    both = np.stack([SOUND, np.zeros_like(SOUND)])
    for array in (both, both.T, both.tolist()):
        clip = open_audio({"array": array, "sampling_rate": 8000}, 0)
        np.testing.assert_allclose(clip.samples, SOUND / 2, atol=1e-7)
        assert (clip.rate, clip.channels) == (8000, 2)
    np.testing.assert_array_equal(open_audio(SOUND.tolist(), 0, 16_000).samples, SOUND)
    assert open_audio(file_of(both.T), 0).channels == 2


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (22_050, 24_000), (999_983, 16_000)]
)
def test_a_tone_stays_the_tone_that_it_was_at_another_rate(rate, wanted):
    clip = open_audio({"array": sounds.tone(600, 1.0, rate), "sampling_rate": rate}, 0)
    found = resampled(clip, wanted)
    assert abs(len(found) - wanted) <= 1
    assert np.abs(np.fft.rfft(found)).argmax() == pytest.approx(600, abs=1)
    assert np.abs(found).max() == pytest.approx(np.abs(clip.samples).max(), rel=0.15)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_cut_off_recordings_are_refused_by_row(tmp_path, kind, part):
    content = file_of(sounds.tone(440, 3.0), kind)
    path = tmp_path / "a.sound"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"Row 4: .*a\.sound"):
        open_audio(str(path), 3)


@pytest.mark.parametrize(
    ("value", "rate", "message"),
    [
        ("nowhere.wav", None, "no sound file 'nowhere.wav'"),
        (b"no sound", None, "no recording that can be read"),
        ({"bytes": None, "path": None}, None, "is no recording: give a path"),
        (7, None, "7 \\(int\\) is no recording"),
        (None, None, "None \\(NoneType\\) is no recording"),
        ([0.1, 0.2], None, "samples without a sampling rate.*data.columns: {sampling_rate: NAME}"),
        ({"array": [0.1], "sampling_rate": 0}, None, "samples without a sampling rate"),
        ({"array": [0.1], "sampling_rate": 2**31 - 1}, None, "says 2,147,483,647 samples a second.*damaged"),
        ({"array": [0.1], "sampling_rate": 1}, None, "says 1 samples a second.*damaged"),
        ({"array": ["a"], "sampling_rate": 8000}, None, "no list of numbers"),
        ({"array": [], "sampling_rate": 8000}, None, "it has no samples"),
        ({"array": [0.0, float("nan")], "sampling_rate": 8000}, None, "no numbers"),
        ([0, 12_000, -9000], 8000, "samples of 12,000, and samples are from -1 to 1"),
        (file_of(np.zeros(0, np.float32)), None, "it has no samples"),
    ],
)
def test_what_is_no_recording(value, rate, message):
    with pytest.raises(DataError, match=f"Row 3: .*{message}"):
        open_audio(value, 2, rate)


def test_without_soundfile_it_is_said_before_work_starts(tmp_path, monkeypatch):
    sounds.tones(4, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'adapters-kit\[audio\]'"):
        prepare(Recipe(model="m", task=TASK, data=str(tmp_path)))
    assert open_audio({"array": SOUND, "sampling_rate": 8000}, 0).rate == 8000, "arrays need nothing"


def bound(name, rows, **recipe):
    columns = {role: role for role in ("audio", "label", "sampling_rate") if role in rows[0]}
    folder = sounds.model(name)
    task = tasks.get(TASK)(Recipe(**{"model": str(folder), "task": TASK, "data": "x", **recipe}), columns)
    table = Dataset.from_list(rows)
    task.fit(table, None)
    model = ak.load(folder, TASK, labels=task.labels)
    task.bind(load_processor(folder), model)
    return task, table, model


def arrays(lengths, rate=16_000):
    return [
        {"audio": sounds.tone(300 + 100 * i, n, rate, i).tolist(), "sampling_rate": rate, "label": "ab"[i % 2]}
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", sounds.KINDS)
def test_an_answer_does_not_depend_on_the_others_in_the_batch(name):
    task, rows, model = bound(name, arrays([0.9, 0.2, 0.55, 0.3]))
    features = task.encode(rows)
    together, alone = (np.stack(task.run(model, features, size)) for size in (4, 1))
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert np.ptp(alone[:, 0]) > 1e-4, "and the model does hear a difference"


def test_what_was_done_to_recordings_is_said():
    rows = [*arrays([0.5, 1.5, 0.5]), *arrays([0.6, 0.6], 8000)]
    rows[2]["audio"] = np.zeros(4000).tolist()
    rows[4]["audio"] = [rows[4]["audio"], rows[4]["audio"]]
    with pytest.raises(DataError, match="2 of 5 recordings are too short"):
        short = [{**row, "audio": row["audio"][:20]} if i in (1, 3) else row for i, row in enumerate(rows[:4])]
        task, table, _ = bound("wav2vec2", [*short, rows[3]])
        task.encode(table)
    rows[4]["audio"] = rows[4]["audio"][0]
    task, table, _ = bound("wav2vec2", rows, data={"train": "x", "max_seconds": 1.0})
    features = task.encode(table)
    batch = task.collate_training(features[0:5])
    assert batch["input_values"].shape == (5, 16_000), "the longest was cut to a second"
    told = " ".join(task.notes.sentences)
    assert "1 recordings hold nothing but silence: row 3." in told
    assert "2 of 5 recordings have 8,000 samples a second; the model hears 16,000: they are resampled." in told
    assert "1 of 5 recordings are longer than 1 seconds (data.max_seconds): their end was cut." in told
    assert task.notes.counts == {"silent_recordings": 1, "recordings_resampled": 2, "recordings_cut": 1}


def test_keys_that_do_not_fit():
    with pytest.raises(ModelError, match=r"data\.max_seconds is 20; .* hears 1 seconds at most"):
        bound("whisper", arrays([0.5, 0.5]), data={"train": "x", "max_seconds": 20})
    with pytest.raises(RecipeError, match=r"training\.max_length counts tokens.*data\.max_seconds"):
        bound("wav2vec2", arrays([0.5, 0.5]), training={"max_length": 64})
    with pytest.raises(RecipeError, match="max_seconds"):
        Recipe(model="m", task="causal-lm", data={"train": "x", "max_seconds": 3})


def test_folders_and_tables_of_recordings(tmp_path):
    rows = sounds.tones(8, tmp_path / "by_class" / "train")
    sounds.tones(4, tmp_path / "by_class" / "test", ".flac")
    found = data.read(Recipe(model="m", task=TASK, data=str(tmp_path / "by_class")).data)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert {row["label"] for row in found.train} == {"low", "high"}
    flat = data.read_rows(tmp_path / "by_class" / "train" / "low")
    assert flat.column_names == ["audio"]
    assert len(flat) == 4
    assert data.read_rows(rows[0]["audio"]).to_list() == [{"audio": rows[0]["audio"]}]
    table = tmp_path / "by_class" / "rows.csv"
    table.write_text("clip,label\ntrain/low/0.wav,low\ntrain/high/1.wav,high\n")
    task, splits = prepare(Recipe(model="m", task=TASK, data={"train": str(table), "test": str(table)}))
    assert task.columns == {"audio": "clip", "label": "label"}
    assert data.read_rows(table)["clip"][0] == splits.train["clip"][0] == rows[0]["audio"]
    (tmp_path / "by_class" / "train" / "low" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="holds images and recordings"):
        data.read_rows(tmp_path / "by_class" / "train")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "rate"), [("wav2vec2", "lora", 5e-3), ("hubert", "houlsby", 2e-2), ("ast", "prefix", 5e-2)]
)
def test_a_run_learns_ships_and_answers_files(name, method, rate, tmp_path):
    """Trained on a folder of classes, planned, merged; asked about a file, a folder, a table and `datasets`' own."""
    rows = sounds.tones(32, tmp_path / "clips")
    keys = {"model": str(sounds.model(name)), "task": TASK, "data": str(tmp_path / "clips"), "method": method}
    training = {"epochs": 8, "batch_size": 8, "learning_rate": rate, "head_learning_rate": rate, "samples": 2}
    if method == "lora":
        keys["quantize"] = "nf4"
    assert ak.plan({**keys, "training": training}).trainable > 0
    run = ak.train({**keys, "training": training}, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.9 * run.metrics["base_loss"]
    assert ak.evaluate(run.path)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    expected = {row["audio"]: row["label"] for row in rows}
    told = ak.predict(run.path, str(tmp_path / "clips"))
    assert {answer["audio"] for answer in told} == set(expected)
    right = [answer for answer in told if answer["label"] == expected[answer["audio"]]]
    assert len(right) > 0.7 * len(rows)
    assert ak.predict(run.path, rows[0]["audio"])[0]["label"] in sounds.PITCH
    saved = Dataset.from_list([{"audio": row["audio"]} for row in rows[:3]]).cast_column("audio", Audio(decode=False))
    again = ak.predict(run.path, saved)
    by_name = {answer["audio"]: answer["score"] for answer in told}
    assert [a["score"] for a in again] == pytest.approx([by_name[row["audio"]] for row in rows[:3]], abs=1e-4)
    from adapters_kit.inference.answer_file import predict_file

    sounds.rows_file(tmp_path / "new.jsonl", [{"audio": row["audio"]} for row in rows[:3]])
    predict_file(run, tmp_path / "new.jsonl", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "audio,predicted_label,predicted_score,p_high,p_low"
    if method == "lora":
        ak.merge(run.adapter, tmp_path / "merged")
        merged = ak.predict(tmp_path / "merged", saved)
        assert [a["score"] for a in merged] == pytest.approx([a["score"] for a in again], abs=5e-3)
        assert "pipeline_tag: audio-classification" in (run.path / "README.md").read_text()


def test_a_model_without_an_extractor_is_named(tmp_path):
    rows = arrays([0.5, 0.5])
    task, _, model = bound("wav2vec2", rows)
    with pytest.raises(ModelError, match=r"is for no recordings\. Copy preprocessor_config\.json"):
        task.bind(torch.nn.Identity(), model)


def test_notes_are_those_of_the_part():
    notes = Notes()
    task = tasks.get(TASK)(Recipe(model="m", task=TASK, data="x"), {"audio": "audio", "label": "label"}, notes=notes)
    with pytest.raises(DataError, match="Row 2: no sound file"):
        good = {"audio": {"bytes": file_of(SOUND), "path": None}, "label": "a"}
        task.fit(Dataset.from_list([good, {"audio": {"bytes": None, "path": "gone.wav"}, "label": "b"}]), None)
