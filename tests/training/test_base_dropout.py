"""training.base_dropout: the dropout of the frozen model while an adapter trains."""

import re

import pytest
import torch

import adapters_kit as ak
from adapters_kit.training.assembly import add_adapter, set_dropout
from adapters_kit.training.resolve import resolve
from tests.methods.test_prefix import logits
from tests.support import small, tiny


def build(name, probability):
    options = vars(tiny.config(name))
    own = [key for key, value in options.items() if re.search("dropout|pdrop", key) and isinstance(value, float)]
    return tiny.build(name, **dict.fromkeys(own, probability)), bool(own)


# MPT's options are read by nobody; Falcon reads its config at every step (all its checkpoints have 0).
@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in ("mpt", "falcon")])
def test_every_dropout_of_a_model_can_be_set(name):
    torch.manual_seed(0)
    model, has_some = build(name, 0.4)
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    set_dropout(model.train(), None)
    assert not has_some or not torch.equal(logits(model, **batch), logits(model, **batch))
    set_dropout(model, 0.0)
    torch.testing.assert_close(logits(model, **batch), expected)
    set_dropout(model, 0.4)
    assert not has_some or not torch.equal(logits(model, **batch), logits(model, **batch))


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [("prefix", None, 0.0), ("prefix", 0.2, 0.2), ("lora", None, 0.4), ("lora", 0.0, 0.0), ("lora+prefix", None, 0.4)],
)
def test_the_recipe_or_the_method_says_it(method, given, expected, tmp_path):
    recipe = ak.Recipe(
        model=str(small.model("bert")),
        task="text-classification",
        data=str(tmp_path),
        method={"name": method.split("+") if "+" in method else method},
        training={"base_dropout": given},
    )
    bare, _ = build("bert", 0.4)
    own = [module for module in bare.modules() if isinstance(module, torch.nn.Dropout)]
    add_adapter(bare, resolve(recipe), steps=10)
    assert own and {module.p for module in own} == {expected}


def test_a_run_writes_down_what_it_took(tmp_path):
    small.write_jsonl(tmp_path / "train.jsonl", small.sentiment(32))
    fields = {"model": str(small.model("bert")), "task": "text-classification", "data": str(tmp_path / "train.jsonl")}
    recipe = ak.Recipe(**fields, method="prefix", training={"max_steps": 2, "samples": 0})
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert ak.Recipe.read(run.path / "recipe.yaml").training.base_dropout == 0.0
