"""Whole runs on tiny models: they learn, leave a complete folder, resume exactly, and stop readably when they must."""

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from rich.console import Console

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import (
    AdapterError,
    DataError,
    MissingPackageError,
    ModelError,
    RecipeError,
    ShippingError,
    TrainingError,
)
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.text_classification import TextClassification
from adapters_kit.training import trackers
from tests.support import small, stopping

QUICK = {"epochs": 8, "batch_size": 8, "learning_rate": 3e-3, "log_every": 2, "samples": 2}


@pytest.fixture
def rows(tmp_path) -> Path:
    small.write_jsonl(tmp_path / "data" / "train.jsonl", small.sentiment(256))
    small.write_jsonl(tmp_path / "data" / "test.jsonl", small.sentiment(64, seed=1))
    return tmp_path / "data"


def recipe(rows: Path, *, family: str = "bert", training: dict | None = None, **more) -> Recipe:
    fields = {"model": str(small.model(family)), "task": "text-classification", "data": str(rows)}
    fields |= {"method": {"name": "lora", "r": 4}, "training": {**QUICK, **(training or {})}}
    return Recipe(**{**fields, **more})


def train(given: Recipe, out: Path, **options) -> ak.Run:
    return ak.train(given, out, quiet=True, **options)


def losses(run: ak.Run) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in run.history() if "loss" in line]


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_complete_folder(rows, tmp_path):
    run = train(recipe(rows, training={}), tmp_path / "run")
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics == run.metrics
    assert metrics["accuracy"] >= 0.85 > metrics["base_accuracy"]
    for key in ("f1", "base_f1", "trainable_params", "total_params", "train_seconds", "peak_memory_bytes"):
        assert metrics[key] > 0
    assert metrics["trainable_params"] < metrics["total_params"] / 2
    for name in ("recipe.yaml", "README.md", "environment.json", "metrics.jsonl", "adapter/adapter_config.json"):
        assert (run.path / name).stat().st_size > 0
    assert not (run.path / "checkpoints").exists()
    assert Recipe.read(run.path / "recipe.yaml") == run.recipe
    assert run.recipe.labels == ["bad", "good"]
    card = (run.path / "README.md").read_text()
    assert "The adapter kept is that of the best `accuracy` among the evaluations." in card
    assert "12 of 12 LoRA layers fused, 2 groups of siblings" in card
    assert f"| accuracy | {metrics['base_accuracy']:.4f} | {metrics['accuracy']:.4f} |" in card
    assert json.loads((run.path / "environment.json").read_text())["torch"] == torch.__version__
    steps = [step for step, _ in losses(run)]
    assert steps == sorted(set(steps))
    assert steps[-1] == metrics["steps"] == 256
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"base", "tuned"}] * 2


@pytest.mark.slow
def test_the_adapter_alone_gives_the_run_s_scores_and_loads_with_peft(rows, tmp_path):
    run = train(recipe(rows), tmp_path / "run")
    for name in (run.path, run.adapter):
        again = ak.evaluate(name)
        assert {key: again[key] for key in ("loss", "accuracy", "f1")} == pytest.approx(
            {key: run.metrics[key] for key in ("loss", "accuracy", "f1")}, abs=1e-6
        )
    base = ak.evaluate(run.recipe.model, rows, task="text-classification", labels=["bad", "good"])
    assert base["examples"] == 64
    texts = ["the film was great", "a dull plot"]
    answers = ak.predict(run.path, texts)

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.recipe.model, num_labels=2, ignore_mismatched_sizes=True
    )
    model = peft.PeftModel.from_pretrained(plain, run.adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.adapter)
    with torch.no_grad():
        scores = [model(**tokenizer([text], return_tensors="pt")).logits.softmax(-1)[0] for text in texts]
    labels = ["bad", "good"]
    assert [answer["label"] for answer in answers] == [labels[int(score.argmax())] for score in scores]
    assert [answer["score"] for answer in answers] == pytest.approx([score.max().item() for score in scores], abs=1e-5)


@pytest.mark.slow
def test_same_seed_same_run(rows, tmp_path):
    first, second = (train(recipe(rows, training={"epochs": 1}), tmp_path / name) for name in "ab")
    other = train(recipe(rows, training={"epochs": 1, "seed": 5}), tmp_path / "c")
    assert losses(first) == losses(second) != losses(other)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(rows, tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")  # rich takes the first for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    given = recipe(rows, training={"max_steps": 4, "samples": 0})
    ak.train(given, tmp_path / "run")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    note = r"ETA 0:\d\d  loss \d\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tok/s  \d+\.\d\d GiB"
    assert bool(re.search(rf"^step 2/4  {note}$", shown, re.MULTILINE)) != terminal
    assert bool(re.search(rf"training .*4/4 0:00:\d\d {note}", shown)) == terminal
    assert re.search(r"^base model: held-out accuracy 0\.\d{4}", shown, re.MULTILINE)
    assert "step 4: held-out accuracy" in shown


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_never_stopped(rows, tmp_path):
    """Kill -9 in the middle of an epoch; the losses after the resume equal those of a run that was left alone."""
    small.write_jsonl(rows / "train.jsonl", small.sentiment(96))
    training = {"epochs": 3, "save_every": 5, "log_every": 1, "gradient_accumulation": 2}
    given = recipe(rows, training=training, method={"name": "lora", "r": 4, "lora_dropout": 0.2})
    whole = train(given, tmp_path / "whole")
    out = tmp_path / "killed"
    stopping.kill_at_file(out, "checkpoints/checkpoint-5/trainer_state.json", train, given, out)
    assert not (out / "metrics.json").exists()
    with pytest.raises(TrainingError, match="has not finished: resume=True"):
        train(given, out)
    with pytest.raises(TrainingError, match=r"training\.seed: 0 -> 1"):
        train(given.changed(**{"training.seed": 1}), out, resume=True)
    torn = out / "checkpoints" / "checkpoint-999"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    resumed = train(given, out, resume=True)
    assert losses(resumed) == losses(whole)
    skip = {"train_seconds", "tokens_per_second", "peak_memory_bytes"}
    assert {k: v for k, v in resumed.metrics.items() if k not in skip} == {
        k: v for k, v in whole.metrics.items() if k not in skip
    }
    assert resumed.metrics["train_seconds"] > 0
    assert train(given, out, resume=True) == resumed, "a run that has finished is opened"
    with pytest.raises(TrainingError, match=r"finished run of another recipe.*training\.seed: 0 -> 1"):
        train(given.changed(**{"training.seed": 1}), out, resume=True)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_rows(rows, tmp_path, monkeypatch):
    original = TextClassification.collate

    def poisoned(self, features):
        batch = original(self, features)
        if any(feature["row"] == 17 for feature in features) and "labels" in batch:
            batch["inputs_embeds"] = torch.full((*batch.pop("input_ids").shape, 64), float("nan"))
        return batch

    monkeypatch.setattr(TextClassification, "collate", poisoned)
    small.write_jsonl(rows / "test.jsonl", small.sentiment(16, seed=1))
    with pytest.raises(TrainingError, match=r"loss became nan at step \d+, on the training rows .*\b18\b"):
        train(recipe(rows), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower_or_halves_the_batch(rows, tmp_path, monkeypatch):
    kind = transformers.BertForSequenceClassification
    original = kind.forward

    def forward(self, input_ids=None, **inputs):
        if self.training and len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(TrainingError, match=r"Lower training\.batch_size \(now 8\)"):
        train(recipe(rows), tmp_path / "a")
    run = train(recipe(rows, training={"auto_batch": True, "epochs": 1}), tmp_path / "b")
    monkeypatch.undo()
    same = train(recipe(rows, training={"batch_size": 2, "gradient_accumulation": 4, "epochs": 1}), tmp_path / "c")
    assert run.recipe.training.batch_size == 2
    assert losses(run) == losses(same)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_accumulated_batches_train_as_one(rows, tmp_path, family):
    """Losses of 2 x 4 accumulated are those of 8 at once: models that do not count items are not scaled by the 4."""
    language = {"task": "causal-lm", "data": str(rows / "train.jsonl")} if family == "llama" else {}
    whole = {"max_steps": 4, "log_every": 1, "group_by_length": False, "samples": 0, "max_grad_norm": 0.0}
    parts = {**whole, "batch_size": 2, "gradient_accumulation": 4}
    one, two = (
        train(recipe(rows, family=family, training=t, **language), tmp_path / name)
        for name, t in (("a", whole), ("b", parts))
    )
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-4)


@pytest.mark.slow
def test_early_stopping_and_the_best_adapter(rows, tmp_path):
    """A learning rate that wrecks the model: the run stops, and the best evaluation's adapter is what is kept."""
    wild = {"epochs": 12, "learning_rate": 0.5, "scheduler": "constant", "warmup": 0.0, "early_stopping": 2}
    run = train(recipe(rows, training=wild), tmp_path / "run")
    scores = [line["eval_accuracy"] for line in run.history() if "eval_accuracy" in line]
    assert len(scores) < 12
    assert len(scores) - 1 - scores.index(max(scores)) == 2
    assert run.metrics["accuracy"] == max(scores)
    assert ak.evaluate(run.path)["accuracy"] == pytest.approx(max(scores))


@pytest.mark.slow
def test_continue_from_an_adapter(rows, tmp_path):
    first = train(recipe(rows, training={"epochs": 2}), tmp_path / "a")
    more = train(recipe(rows, training={"epochs": 2}, method=str(first.adapter)), tmp_path / "b")
    assert more.metrics["train_loss"] < first.metrics["train_loss"]
    assert more.metrics["accuracy"] >= first.metrics["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("bf16", False), ("bf16", True), ("fp32", True)])
def test_precision_and_checkpointing(rows, tmp_path, precision, checkpointing):
    plain = train(recipe(rows, training={"max_steps": 4}), tmp_path / "plain")
    options = {"precision": precision, "gradient_checkpointing": checkpointing, "max_steps": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`gradient_checkpointing")
        run = train(recipe(rows, training=options), tmp_path / "run")
    expected = [loss for _, loss in losses(plain)]
    assert [loss for _, loss in losses(run)] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 0.02)
    saved = peft.load_peft_weights(str(run.adapter))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_tensorboard_gets_the_metrics_and_they_stay(rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe(rows, training={"epochs": 2, "log_to": ["tensorboard"]}), tmp_path / "run")
    found = EventAccumulator(str(run.path / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert [step for step, _ in logged] == [step for step, _ in losses(run)]
    assert [value for _, value in logged] == pytest.approx([value for _, value in losses(run)], rel=1e-5)
    scores = [line["eval_accuracy"] for line in run.history() if "eval_accuracy" in line]
    assert [event.value for event in found.Scalars("eval/accuracy")] == pytest.approx(scores)


class Told(transformers.TrainerCallback):
    """A tracker that keeps what it is told, and fails where a test wants it to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.logs = fails, []

    def on_train_begin(self, args, state, control, **_):
        if self.fails == "start":
            raise ConnectionError("no server answers at http://tracker.invalid\n  at line 3")

    def on_log(self, args, state, control, logs=None, **_):
        if self.fails == "log" and self.logs:
            raise ConnectionError("the server went away.")
        self.logs.append((args.run_name, state.global_step, logs))


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["trackio", "wandb", "mlflow"])
def test_a_tracker_is_told_or_missed_at_once(rows, tmp_path, monkeypatch, tracker):
    """Not installed: refused before anything is loaded. Installed: transformers' callback for it gets every log. One
    that fails on the way is left out, aloud, and the training is what it would have been."""
    given = recipe(rows, training={"max_steps": 4, "log_to": [tracker], "samples": 0})
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=f"log_to: {tracker} is not installed: pip install {tracker}"):
        train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    told = Told("log" if tracker == "mlflow" else "")
    monkeypatch.setitem(trackers.integration_utils.INTEGRATION_TO_CALLBACK, tracker, lambda: told)
    run = train(given, tmp_path / "run")
    assert {name for name, *_ in told.logs} == {"run"}
    seen = [(step, logs["loss"]) for _, step, logs in told.logs if "loss" in logs]
    assert len(losses(run)) == 2 and seen == losses(run)[: 1 if told.fails else 2]


def test_a_tracker_that_does_not_start_is_one_sentence(rows, monkeypatch):
    monkeypatch.setitem(trackers.integration_utils.INTEGRATION_TO_CALLBACK, "wandb", lambda: Told("start"))
    (made,) = trackers.trackers(recipe(rows, training={"log_to": ["wandb", "tensorboard", "wandb"]}), Console())
    with pytest.raises(
        TrainingError, match=r"log_to: wandb did not start: no server answers at \S+ Mend that, or leave"
    ):
        made.on_train_begin(None, None, None)
    monkeypatch.setitem(trackers.integration_utils.INTEGRATION_TO_CALLBACK, "wandb", lambda: 1 / 0)
    with pytest.raises(TrainingError, match="wandb did not start: division by zero"):
        trackers.Tracker("wandb", Console())
    with pytest.raises(RecipeError, match=r"(?s)log_to.*tensorbord"):
        recipe(rows, training={"log_to": ["tensorbord"]})


def test_refused_before_anything_is_written(rows, tmp_path):
    out = tmp_path / "run"
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((small.model("bert") / "config.json").read_text())
    cases = [
        (recipe(rows, method={"name": "lora", "rr": 4}), AdapterError, "has no option 'rr'"),
        (recipe(rows, method={"name": "lora", "target_modules": ["querry"]}), AdapterError, "querry"),
        (recipe(rows, model=str(hollow)), ModelError, "weights"),
        (recipe(rows, labels=["good", "great"]), DataError, r"leaves out classes .*\['bad'\]"),
        (recipe(tmp_path / "nothing.csv"), DataError, "No data file"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            train(given, out)
        assert not out.exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(TrainingError, match="is not a run folder"):
        train(recipe(rows), tmp_path / "photos", overwrite=True)


@pytest.mark.slow
def test_an_adapter_for_another_base_is_refused(rows, tmp_path):
    run = train(recipe(rows, training={"max_steps": 1}), tmp_path / "run")
    wider = small.model("bert", hidden_size=128)
    with pytest.raises(ShippingError, match="is not the base that"):
        ak.evaluate(run.adapter, model=str(wider))
    (run.adapter / "adapters_kit.json").unlink()  # as for an adapter that was trained elsewhere
    with pytest.raises(ModelError, match="does not fit"):
        ak.evaluate(run.adapter, model=str(wider))


def test_open_a_run(rows, tmp_path):
    run = train(recipe(rows, training={"max_steps": 1}), tmp_path / "run")
    assert ak.Run.open(run.path) == run
    with pytest.raises(TrainingError, match="no run folder"):
        ak.Run.open(tmp_path)


@pytest.mark.slow
@pytest.mark.pictures
def test_pictures_and_the_confusion_matrix(rows, tmp_path):
    run = train(recipe(rows), tmp_path / "run")
    for name in ("curves.png", "confusion.png"):
        assert (run.path / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads((run.path / "confusion.json").read_text())
    right = sum(found["tuned"][i][i] for i in range(2))
    assert sum(map(sum, found["tuned"])) == sum(map(sum, found["base"])) == 64
    assert right / 64 == pytest.approx(run.metrics["accuracy"])


@pytest.mark.slow
def test_sweep_and_compare(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    given = recipe(rows, training={"epochs": 4, "samples": 0})
    table = ak.sweep(given, tmp_path / "sweep", learning_rates=[1e-5, 3e-3], ranks=[2, 8], quiet=True)
    assert [row["accuracy"] for row in table] == sorted((row["accuracy"] for row in table), reverse=True)
    assert table[0]["training.learning_rate"] == 3e-3
    assert {row["method.r"] for row in table} == {2, 8}
    assert {key for key in table[0] if key.startswith(("training.", "data.", "method."))} == {
        "training.learning_rate",
        "method.r",
    }
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == table
    began = (tmp_path / "sweep" / "lr1e-05-r2" / "metrics.json").stat().st_mtime_ns
    assert ak.sweep(given, tmp_path / "sweep", learning_rates=[1e-5, 3e-3], ranks=[2, 8], quiet=True) == table
    assert (tmp_path / "sweep" / "lr1e-05-r2" / "metrics.json").stat().st_mtime_ns == began
    with pytest.raises(TrainingError, match=r"sweep into a new folder.*training\.epochs: 4\.0 -> 5\.0"):
        ak.sweep(given.changed(**{"training.epochs": 5.0}), tmp_path / "sweep", learning_rates=[1e-5], ranks=[2])
    runs = [str(tmp_path / "sweep" / name) for name in ("lr1e-05-r2", "lr0.003-r8")]
    assert cli.main(["compare", *runs]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"run", "training.learning_rate", "method.r", "accuracy", "base_accuracy"} <= set(shown[0].split())
    assert shown[1].split()[0] == runs[1], "best first"
    (tmp_path / "recipe.yaml").write_text(given.to_yaml())
    words = ["sweep", str(tmp_path / "recipe.yaml"), "--learning-rates", "1e-5", "3e-3", "--ranks", "2", "8"]
    assert cli.main([*words, "--out", str(tmp_path / "sweep")]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0].split() == shown[0].split() and len(again) == 6
    assert cli.main(["compare", runs[0], str(tmp_path / "sweep" / "lr0.003-r88")]) == 2
    assert "Did you mean lr0.003-r8" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="two runs or more"):
        ak.compare_runs([tmp_path / "sweep" / "lr1e-05-r2"])
