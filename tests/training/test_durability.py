"""Nothing is lost: runs killed at any write, full disks, two writers, replaced runs, stops by hand."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit import cli, system
from adapters_kit.artifacts import files
from adapters_kit.errors import RecipeError, TrainingError, WriteError
from adapters_kit.recipe import Recipe
from adapters_kit.training import checkpoints, loop, run_card, run_folder, train
from tests.support import small, stopping

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1, "samples": 2, "save_every": 3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    small.write_jsonl(folder / "train.jsonl", small.sentiment(40))
    small.write_jsonl(folder / "test.jsonl", small.sentiment(16, seed=1))
    return folder


def recipe(rows: Path, method: object = "lora", **training: object) -> Recipe:
    fields = {"model": str(small.model("bert")), "task": "text-classification", "data": str(rows)}
    return Recipe(**fields, method=method, training={**TRAINING, **training})


def run(given: Recipe, out: Path, **options: object) -> ak.Run:
    return ak.train(given, out, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory) -> ak.Run:
    """The run that the killed ones have to equal."""
    return run(recipe(rows), tmp_path_factory.mktemp("whole") / "run")


# What a method learns beside its parameters, or saves in another form, is what a resume forgets. All: tests/kills.
METHODS = [
    {"name": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 1},
    "p-tuning",
    "houlsby",
    ["lora", "prefix"],
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("step", [8])
def test_every_method_resumes(rows, tmp_path, method, step):
    given = recipe(rows, method)
    expected = run(given, tmp_path / "whole")
    with pytest.raises(stopping.Killed), stopping.killed_at_step(step):
        run(given, tmp_path / "killed")
    resumed = run(given, tmp_path / "killed", resume=True)
    assert stopping.digest(resumed.path) == stopping.digest(expected.path)
    assert stopping.metrics(resumed.path) == stopping.metrics(expected.path)
    assert resumed.history()[-1]["step"] == expected.history()[-1]["step"]


@pytest.mark.slow
def test_killed_at_a_write_and_resumed(rows, whole, tmp_path):
    """A few of the writes; tests/kills takes every one."""
    given = recipe(rows)
    counter = stopping.Writes(tmp_path)
    with counter.watched():
        run(given, tmp_path / "counted")
    assert counter.count > 20
    last = counter.count
    for number in sorted({1, 2, last // 2, last - 2, last}):
        out = tmp_path / f"killed-{number}"
        with pytest.raises(stopping.Killed), stopping.Writes(tmp_path, number).watched():
            run(given, out)
        resumed = run(given, out, resume=True)
        assert stopping.digest(resumed.path) == stopping.digest(whole.path)
        assert stopping.metrics(resumed.path) == stopping.metrics(whole.path)
        assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", [{"max_steps": 2}, {"epochs": 4, "early_stopping": 1, "evals_per_epoch": 2}], ids=["steps", "patience"]
)
def test_killed_after_the_last_step_trains_no_further(rows, tmp_path, training):
    """The last step may lie in the middle of an epoch, and its checkpoint is there before what comes after it."""
    given = recipe(rows, **training | {"save_every": 1, "samples": 0})
    counter = stopping.Writes(tmp_path)
    with counter.watched():
        expected = run(given, tmp_path / "whole")
    with pytest.raises(stopping.Killed), stopping.Writes(tmp_path, counter.count).watched():
        run(given, tmp_path / "killed")
    resumed = run(given, tmp_path / "killed", resume=True)
    assert stopping.metrics(resumed.path) == stopping.metrics(expected.path)
    assert stopping.digest(resumed.path) == stopping.digest(expected.path)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(rows, whole, tmp_path):
    given = recipe(rows)
    for number in (1, 12):
        out = tmp_path / f"full-{number}"
        with (
            pytest.raises(WriteError, match=rf"Could not write .*full-{number}: the disk is full"),
            stopping.Writes(tmp_path, number, stopping.full_disk).watched(),
        ):
            run(given, out)
        assert stopping.digest(run(given, out, resume=True).path) == stopping.digest(whole.path)


@pytest.mark.parametrize("version", ["now", "before"])
def test_a_start_that_died_blocks_nothing(version, rows, tmp_path):
    """Killed while recipe.yaml was written: the next run, without any flag, takes the folder."""
    out = tmp_path / "run"
    out.mkdir()
    left = ".recipe.yaml.0a1b2c3d.tmp"
    if version == "now":
        with files.replacing(tmp_path / "recipe.yaml") as beside:
            left = beside.name
    (out / left).write_text("model: half")
    (out / "environment.json").write_text("{}")
    done = run(recipe(rows, max_steps=1), out)
    assert done.metrics["steps"] == 1 and not list(out.glob(".*"))


@pytest.mark.parametrize("name", sorted(run_folder.OWN))
def test_what_a_killed_writer_leaves_is_known(name, tmp_path):
    with files.replacing(tmp_path / name) as beside:
        left = beside.name
    assert files.place_of(left) == name and files.place_of(name) is None


def test_a_run_knows_all_that_it_writes(whole):
    assert {path.name for path in whole.path.iterdir()} <= run_folder.OWN


@pytest.mark.slow
def test_a_torn_checkpoint_is_left_out_and_said(rows, whole, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(stopping.Killed), stopping.killed_at_step(8):
        run(recipe(rows), out)
    newest = checkpoints.folder_of(out, 6)
    data = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(data[: len(data) // 2])
    resumed = ak.train(recipe(rows), out, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged: optimizer.pt has" in said and "going on from checkpoint-5" in said
    assert stopping.digest(resumed.path) == stopping.digest(whole.path)


@pytest.mark.slow
def test_a_moved_run_folder_goes_on(rows, whole, tmp_path):
    with pytest.raises(stopping.Killed), stopping.killed_at_step(8):
        run(recipe(rows), tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    resumed = run(recipe(rows), tmp_path / "after", resume=True)
    assert stopping.digest(resumed.path) == stopping.digest(whole.path)


@pytest.mark.slow
@pytest.mark.pictures
def test_a_failure_after_training_loses_no_metric(rows, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def broken(*_):
        raise ValueError("nothing that can be drawn")

    monkeypatch.setattr(train.pictures, "curves", broken)
    with pytest.raises(ValueError, match="drawn"):
        run(recipe(rows), out)
    assert stopping.metrics(out) == stopping.metrics(whole.path)
    assert ak.Run.open(out).metrics["steps"] == 10
    monkeypatch.undo()
    done = run(recipe(rows), out, resume=True)
    assert (out / "curves.png").is_file() and not (out / "checkpoints").exists()
    assert stopping.metrics(out) == stopping.metrics(whole.path)
    assert done.metrics["train_seconds"] > 0


@pytest.mark.slow
def test_the_old_run_goes_only_when_the_new_one_is_complete(rows, whole, tmp_path):
    out = tmp_path / "run"
    run(recipe(rows, max_steps=2), out)
    (out / "notes.txt").write_text("mine")
    before = stopping.digest(out)
    with pytest.raises(TrainingError, match=r"finite|became"):
        run(recipe(rows, learning_rate=1e30, max_grad_norm=0.0), out, overwrite=True)
    with pytest.raises(stopping.Killed), stopping.killed_at_step(8):
        run(recipe(rows), out, overwrite=True)
    assert stopping.digest(out) == before and ak.Run.open(out).metrics["steps"] == 2
    run(recipe(rows), out, resume=True)  # goes on with the run that was to replace it
    assert stopping.digest(out) == stopping.digest(whole.path)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_two_writers_do_not_meet_in_one_folder(rows, tmp_path):
    out = tmp_path / "run"
    with system.lock(out):
        for call in (
            lambda: run(recipe(rows), out),
            lambda: ak.sweep(recipe(rows), out, quiet=True),
            lambda: ak.compare(recipe(rows), ["lora"], 1, out=out, grid=None, quiet=True),
        ):
            with pytest.raises(WriteError, match=f"is being written by process {os.getpid()}"):
                call()
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_by_hand_saves_the_step(rows, whole, tmp_path, capsys, name):
    """Before any evaluation or checkpoint."""
    given = recipe(rows, save_every=None, log_every=1)
    original, out = loop.AdapterTrainer.compute_loss, tmp_path / "run"

    def compute_loss(self, *args, **options):
        if self.state.global_step == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *args, **options)

    assert threading.current_thread() is threading.main_thread()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.AdapterTrainer, "compute_loss", compute_loss)
        ak.train(given, out)
    said = capsys.readouterr().err
    assert f"Stopped at step 2 of 10, saved in {checkpoints.folder_of(out, 2)}" in said and "--resume" in said
    resumed = ak.train(given.changed(**{"training.log_every": 5}), out, resume=True)
    assert "going on from checkpoint-2" in capsys.readouterr().err
    assert stopping.digest(resumed.path) == stopping.digest(whole.path)
    assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]


def test_weights_that_stop_being_numbers_at_the_last_step(rows, tmp_path, monkeypatch):
    original = loop.AdapterTrainer.training_step

    def training_step(self, model, *args, **options):
        loss = original(self, model, *args, **options)
        if self.state.global_step + 1 == self.state.max_steps:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(loop.AdapterTrainer, "training_step", training_step)
    with pytest.raises(TrainingError, match=r"After step 2 the parameter .* no longer finite\. Lower"):
        run(recipe(rows, max_steps=2, max_grad_norm=0.0), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_fp16_without_a_gpu_is_refused_before_anything_is_loaded(rows, tmp_path, monkeypatch, quantize):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match=r"fp16 needs a GPU, and there is none here\. Set it to bf16"):
        run(recipe(rows, precision="fp16").changed(quantize=quantize), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_of_the_machine_or_the_rows_travels(rows, whole, tmp_path, monkeypatch):
    given = recipe(rows, log_to=["tensorboard"], max_steps=2)
    done = run(given, tmp_path / "run")
    text = {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()}
    sample = small.sentiment(16, seed=1)[0]["text"].encode()
    for path, content in text.items():
        shipped = "adapter" in path.relative_to(done.path).parts or path.name == "README.md"
        if shipped and path.name not in ("adapter_config.json", "adapters_kit.json"):
            assert str(rows).encode() not in content and given.model.encode() not in content, path
            assert sample not in content, path
    import socket

    assert not [path for path, content in text.items() if socket.gethostname() in path.name]
    assert rows.name in (done.path / "README.md").read_text(), "the name alone says which data"
    assert ak.evaluate(done.adapter)["accuracy"] == pytest.approx(done.metrics["accuracy"])
    noted = run_card.card(given, done.metrics | {"notes": [f"The head of {given.model} is kept."]}, "accuracy")
    assert f"- The head of {Path(given.model).name} is kept." in noted
    assert given.model not in noted
    told = run(given.changed(**{"card.samples": True}), tmp_path / "told")
    assert "## Samples" in (told.adapter / "README.md").read_text()


def test_an_adapter_that_is_no_better_is_said_first(rows, tmp_path, capsys):
    given = recipe(rows, learning_rate=1e-9, max_steps=1)
    done = ak.train(given, tmp_path / "run")
    assert done.metrics["advice"][0].startswith("The adapter is the same as the base model: held-out accuracy 0.")
    assert "What to try: more steps than 1" in done.metrics["advice"][-1]
    assert done.metrics["advice"][0] in capsys.readouterr().err
    assert f"**{done.metrics['advice'][0]}**" in (done.path / "README.md").read_text()


def test_runs_on_other_rows_are_not_ranked_without_a_word(rows, whole, tmp_path):
    other = run(recipe(rows, max_steps=1).changed(**{"data.test_limit": 8}), tmp_path / "other")
    table = ak.compare_runs([other.path, whole.path])
    assert [row["run"] for row in table] == [str(other.path), str(whole.path)], "as given"
    assert "different held-out rows (data.test_limit, test_examples differ): they are not ranked" in table.notes[0]


def test_files_have_the_mode_of_the_user(rows, tmp_path):
    before = os.umask(0o027)
    try:
        done = run(recipe(rows, max_steps=1), tmp_path / "run")
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in done.path.rglob("*") if path.is_file()}
    assert modes == {"0o640"}


def test_the_command_says_where_a_full_disk_was(rows, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe(rows).to_yaml())
    (tmp_path / "file").write_text("x")
    for verb in ("train", "sweep", "compare"):
        assert cli.main([verb, str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "file")]) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_leaves_its_lock_to_the_next(rows, whole, tmp_path):
    stopping.kill_at_file(tmp_path / "run", "checkpoints/*/complete.json", run, recipe(rows), tmp_path / "run")
    assert (tmp_path / ".run.lock").is_file()
    assert stopping.digest(run(recipe(rows), tmp_path / "run", resume=True).path) == stopping.digest(whole.path)
    assert not (tmp_path / ".run.lock").exists()


@pytest.mark.slow
def test_metrics_lines_are_never_rewritten_in_place(rows, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(stopping.Killed), stopping.killed_at_step(8):
        run(recipe(rows), out)
    lines = (out / "metrics.jsonl").read_text().splitlines()

    def killed(*_, **__):
        raise stopping.Killed

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(stopping.Killed):
        run(recipe(rows), out, resume=True)
    monkeypatch.undo()
    assert (out / "metrics.jsonl").read_text().splitlines() == lines
    resumed = run(recipe(rows), out, resume=True)
    assert [json.loads(line)["step"] for line in lines if json.loads(line)["step"] <= 6] == [
        line["step"] for line in resumed.history() if line["step"] <= 6
    ]


# What leaves the folder


@pytest.mark.slow
def test_the_adapter_tells_no_path_and_its_base_is_found_all_the_same(rows, whole, tmp_path, monkeypatch):
    """peft and transformers do not find it by the folder alone, and say so; nobody takes another base in silence."""
    base = str(small.model("bert"))
    for file in (path for path in whole.adapter.rglob("*") if path.is_file()):
        assert base.encode() not in file.read_bytes() and str(rows).encode() not in file.read_bytes(), file.name
    named = json.loads((whole.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not os.path.isabs(named) and Path(named).name == Path(base).name
    monkeypatch.chdir(tmp_path)
    text = "a fine film"
    answer = ak.predict(whole, [text])
    for place in ("near", "far/away"):  # the path from the adapter on leads nowhere; the recipe beside it knows
        run_folder = tmp_path / place / "run"
        shutil.copytree(whole.path, run_folder)
        assert ak.predict(run_folder, [text]) == answer
        merged = ak.merge(run_folder / "adapter", tmp_path / place / "merged", verify="off").path
        assert base.encode() not in (merged / "manifest.json").read_bytes()
        assert ak.check(run_folder / "adapter", "peft").ok
    alone = tmp_path / "alone"
    shutil.copytree(whole.adapter, alone)
    with pytest.raises(OSError):
        transformers.AutoModelForSequenceClassification.from_pretrained(alone)
    with pytest.raises(ak.AdapterError, match="base=FOLDER"):
        ak.merge(alone, tmp_path / "merged")
    assert ak.merge(alone, tmp_path / "merged", base=base, verify="off")
