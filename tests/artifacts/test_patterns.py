"""Expressions that take for ever to fail, which nothing could stop: refused, the user's own as an adapter's."""

import json
import shutil

import pytest

import adapters_kit as ak
from adapters_kit.artifacts import patterns
from adapters_kit.errors import AdapterError, ShippingError, UnknownNameError
from tests.support import small, tiny

BOMBS = [r"((\w+)+\.?)+!", r"(\w|\.|\w\w)+x9"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.6)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("lora", "target_modules"),
        ("lora", "exclude_modules"),
        ("lora", "rank_pattern"),
        ("ia3", "feedforward_modules"),
        ("houlsby", "reduction_factor"),
    ],
)
def test_the_user_s_own(method, key, bomb):
    value = {bomb: 4, "default": 8} if key in ("rank_pattern", "reduction_factor") else bomb
    with pytest.raises(UnknownNameError, match="cannot be used: it was not done with the model's paths"):
        ak.wrap(tiny.build("llama"), method, **{key: value})


def test_in_a_part_of_several_methods():
    with pytest.raises(UnknownNameError, match="cannot be used"):
        ak.wrap(tiny.build("llama"), ["lora", "prefix"], parts={"lora": {"target_modules": BOMBS[0]}})


@pytest.mark.slow
@pytest.mark.parametrize("place", ["whole", "part"])
def test_an_adapter_s(place, tmp_path):
    base = shutil.copytree(small.model("llama"), tmp_path / "base")
    method = "lora" if place == "whole" else ["lora", "prefix"]
    ak.wrap(ak.load(base), method).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(file.read_text())
    (raw if place == "whole" else raw["parts"]["lora"])["target_modules"] = BOMBS[0]
    file.write_text(json.dumps(raw))
    with pytest.raises(ShippingError, match="cannot be used"):
        ak.wrap(ak.load(base), tmp_path / "adapter")
    with pytest.raises(AdapterError):
        ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)


def test_an_expression_of_another_kind_of_size():
    with pytest.raises(UnknownNameError, match=r"it has 6,00\d characters"):
        ak.wrap(tiny.build("llama"), "lora", target_modules="(" + "a|" * 3000 + "q_proj)")


@pytest.mark.parametrize("expression", [r".*\.[01]\.self_attn\.[qv]_proj", r".*(q|k|v)_proj", r"(.+\.)+up_proj"])
def test_what_people_write_is_taken(expression):
    model = ak.wrap(tiny.build("llama"), "lora", target_modules=expression)
    assert model.get_nb_trainable_parameters()[0] > 0
