"""Rows that training should not spoil: scored before and after, and a budget that chooses what is shipped."""

import json

import peft
import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit.errors import DataError, ModelError, RecipeError, TrainingError
from adapters_kit.training import inputs, kept
from tests.support import small, stopping, tiny

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran"]


@pytest.fixture
def given(tmp_path):
    """A recipe as a dict: stories of one kind to learn, judgements of another kind to keep."""
    small.write_jsonl(tmp_path / "train.jsonl", [{"text": " ".join(WORDS[i % 5 :])} for i in range(24)])
    small.write_jsonl(tmp_path / "kept.jsonl", [{"body": row["story"]} for row in _others(8)])
    return {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "data": {"train": str(tmp_path / "train.jsonl"), "test_size": 6},
        "method": {"name": "lora", "r": 4},
        "eval": {"keep": str(tmp_path / "kept.jsonl"), "keep_columns": {"text": "body"}},
        "training": {
            "max_steps": 16,
            "batch_size": 6,
            "learning_rate": 8e-2,
            "evals_per_epoch": 1,
            "samples": 0,
            "max_length": 32,
        },
    }


def _others(count):
    return [{"story": row["text"]} for row in small.sentiment(count)]


def changed(given, **training):
    return {**given, "training": {**given["training"], **training}}


@pytest.mark.slow
def test_what_holds_the_budget_is_what_peft_and_a_merge_load(given, tmp_path, capsys):
    budget = 0.002
    run = ak.train(changed(given, keep_within=budget), tmp_path / "run")
    told, metrics = run.metrics["kept"], run.metrics
    assert told["holds"] and metrics["keep_loss"] <= metrics["base_keep_loss"] * (1 + budget)
    assert told["rise"] == pytest.approx(metrics["keep_loss"] / metrics["base_keep_loss"] - 1, abs=1e-6)
    assert told["score"] == pytest.approx(metrics["loss"])
    assert told["score"] >= told["score_without_budget"]
    assert 0 < told["scale"] < 1 and metrics["keep_examples"] == 8
    for text in (capsys.readouterr().err.replace("\n", " "), (run.adapter / "README.md").read_text()):
        assert told["told"] in text
    assert told["told"].split(":")[0] in (run.path / "report.html").read_text()
    assert "keep_loss" in (run.adapter / "README.md").read_text()
    assert str(tmp_path) not in (run.adapter / "README.md").read_text()
    # The saved adapter is the scored one: in our hands, in peft's, merged.
    again = ak.evaluate(run, str(tmp_path / "kept.jsonl"), **{"data.columns": {"text": "body"}})
    assert again["loss"] == pytest.approx(metrics["keep_loss"], rel=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(given["model"])
    tuned = peft.PeftModel.from_pretrained(base, run.adapter).eval()
    ids = torch.arange(3, 19)[None]
    answer = tuned(ids).logits
    ak.merge(run, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, answer, rtol=1e-4, atol=1e-4)
    with tuned.disable_adapter():
        assert (tuned(ids).logits - answer).abs().max() > 1e-2


@pytest.mark.slow
def test_a_resumed_run_chooses_the_same(given, tmp_path):
    whole = ak.train(changed(given, keep_within=0.002), tmp_path / "whole", quiet=True)
    with stopping.killed_at_step(10), pytest.raises(stopping.Killed):
        ak.train(changed(given, keep_within=0.002), tmp_path / "run", quiet=True)
    run = ak.train(changed(given, keep_within=0.002), tmp_path / "run", quiet=True, resume=True)
    assert run.metrics["kept"] == whole.metrics["kept"]
    assert not (run.path / "checkpoints").exists()


@pytest.mark.slow
def test_without_a_budget_the_rows_are_scored_and_nothing_is_chosen(given, tmp_path):
    plain = ak.train({**given, "eval": {}}, tmp_path / "plain", quiet=True)
    run = ak.train({**given, "eval": {**given["eval"], "keep_limit": 3}}, tmp_path / "run", quiet=True)
    assert run.metrics["keep_examples"] == 3 and "kept" not in run.metrics
    assert run.metrics["loss"] == plain.metrics["loss"]  # it changes nothing of the training
    assert run.metrics["base_keep_loss"] > 0 and "keep_perplexity" in run.metrics


def test_a_method_without_a_scale_chooses_among_checkpoints(given, tmp_path):
    method = {"method": {"name": "houlsby", "reduction_factor": 4}}
    run = ak.train({**changed(given, keep_within=0.0), **method}, tmp_path / "run", quiet=True)
    told = run.metrics["kept"]
    assert told["scale"] == 1 and told["checkpoints"] > 1
    assert any("has no scale" in note for note in run.metrics["notes"])
    assert told["holds"] == (told["rise"] <= 0)
    if not told["holds"]:
        assert told["told"] in run.metrics["advice"]
    with pytest.raises(TrainingError, match="keep_best: true"):
        ak.train({**changed(given, keep_within=0.1, evals_per_epoch=0), **method}, tmp_path / "none", quiet=True)


@pytest.mark.parametrize(
    "method, options",
    [
        ("lora", {}),
        ("lora", {"use_rslora": True}),
        ("adalora", {"total_step": 9}),
        ("loha", {}),
        ("lokr", {}),
        ("vera", {}),
    ],
)
def test_factors_multiply_the_update(method, options):
    model = ak.wrap(tiny.build("llama"), method, fuse=False, **({"r": 4} | options))
    tiny.perturb(model, scale=0.3)
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight") and "default" in m.active_adapters]
    before = [layer.get_delta_weight("default") for layer in layers]
    with kept._scaling(model) as scale:
        scale(0.25)
    after = [layer.get_delta_weight("default") for layer in layers]
    assert layers and any(delta.abs().max() > 1e-5 for delta in before)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one / 4, other)


@pytest.mark.parametrize(
    "method, options",
    [("dora", {}), ("pissa", {}), ("houlsby", {}), ("prefix", {}), ("lora", {"bias": "all"}), (["lora", "prefix"], {})],
)
def test_methods_whose_update_is_no_multiple_of_a_factor(method, options):
    assert kept.factors(ak.wrap(tiny.build("gpt2"), method, **options)) is None


def test_a_full_copy_beside_the_adapter_stays_whole():
    model = ak.wrap(tiny.build("llama"), "lora", r=2, modules_to_save=["lm_head"])
    found = kept.factors(model)
    assert found and all(parameter is not model.base_model.model.lm_head.weight for parameter in found)
    assert {p.shape[1] for p in found} == {2}


def test_the_largest_scale_is_found_by_halving():
    at = {"now": 0.0}
    for most in range(1, 16):
        found = kept._largest(lambda part: at.update(now=part), lambda: 16 * at["now"], most + 0.5)
        assert found == (most / 16, most) and at["now"] == most / 16
    assert kept._largest(lambda part: at.update(now=part), lambda: at["now"], 0.01) == (2**-7, 2**-7)
    assert kept._largest(lambda part: at.update(now=part), lambda: 1.0, 0.01) == (kept.LEAST, 1.0) == (at["now"], 1.0)


def test_bad_input_is_refused_before_anything_is_written(given, tmp_path):
    with pytest.raises(RecipeError, match="keep_within: needs rows that are to be kept: set eval"):
        ak.Recipe(**{**changed(given, keep_within=0.1), "eval": {}})
    with pytest.raises(RecipeError, match="no column 'label'"):
        ak.Recipe(**{**given, "eval": {**given["eval"], "keep_columns": {"label": "x"}}})
    with pytest.raises(DataError, match=r"kept data: eval.keep_columns names columns .* text: 'bodi'.*body"):
        ak.train({**given, "eval": {**given["eval"], "keep_columns": {"text": "bodi"}}}, tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="No data file"):
        ak.train({**given, "eval": {"keep": str(tmp_path / "kpt.jsonl")}}, tmp_path / "run", quiet=True)
    with pytest.raises(RecipeError, match="a pass of many"):
        ak.train_many([given], tmp_path / "many", quiet=True)
    with pytest.raises(RecipeError, match="a comparison"):
        ak.compare(given, ["lora"], out=tmp_path / "compared", quiet=True)
    small.write_jsonl(tmp_path / "labels.jsonl", small.sentiment(16))
    fresh = {**changed(given, keep_within=0.1), "task": "text-classification", "model": str(small.model("bert"))}
    fresh |= {"data": str(tmp_path / "labels.jsonl"), "eval": {"keep": str(tmp_path / "labels.jsonl")}}
    with pytest.raises(ModelError, match="no trained head"):
        ak.train(fresh, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert json.dumps(given)


def test_rows_in_memory_are_written_as_training_rows_are(given, tmp_path):
    rows = [{"body": row["story"]} for row in _others(3)]
    made = inputs.recipe_from({**given, "eval": {**given["eval"], "keep": rows}}, tmp_path / "rows")
    assert made.eval.keep == str(next((tmp_path / "rows").glob("*.parquet")))
    with pytest.raises(RecipeError, match="keep_colums"):
        inputs.recipe_from({**given, "eval": {"keep": rows, "keep_colums": {}}}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(RecipeError, match="train takes rows in memory"):
        ak.Recipe(**{**given, "eval": {"keep": rows}})
