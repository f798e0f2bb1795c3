"""Recipes: YAML, Python and flags say the same; a wrong one is refused with every problem and its place."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_kit import recipe as recipe_module
from adapters_kit import registry
from adapters_kit.errors import RecipeError
from adapters_kit.recipe import Recipe, known_flags, schema
from adapters_kit.recipe_sections import TrainingSpec
from adapters_kit.task_table import TASKS

BASE = {"model": "m", "task": "text-classification", "data": "reviews.csv"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_python_and_flags_are_one_recipe(tmp_path):
    text = "model: m\ntask: text-classification\ndata: reviews.csv\nmethod: {name: lora, r: 16}\n"
    text += "training:\n  learning_rate: 1e-4\n"
    from_yaml = Recipe.read(write(tmp_path / "a.yaml", text))
    from_python = Recipe(**BASE, method={"name": "lora", "r": 16}, training={"learning_rate": 1e-4})
    flags = ["--model", "m", "--task=text-classification", "--data", "reviews.csv"]
    flags += ["--method", "lora", "--method.r", "16", "--training.learning_rate", "1e-4"]
    assert from_yaml == from_python == Recipe.read(None, flags)
    assert from_yaml.training.learning_rate == 1e-4
    assert from_yaml.method.options == {"r": 16}


def test_flags_win_over_the_file_and_keep_what_they_do_not_name(tmp_path):
    path = write(tmp_path / "a.yaml", "model: m\ntask: causal-lm\ndata: x.txt\nmethod: {name: dora, r: 4}\n")
    recipe = Recipe.read(path, ["--method.r=8", "--data.limit", "5", "--training.packing", "--method.bias", "none"])
    assert recipe.method.name == "dora"
    assert recipe.method.options == {"r": 8, "bias": "none"}
    assert (recipe.data.train, recipe.data.limit, recipe.training.packing) == ("x.txt", 5, True)


def test_all_problems_are_told_at_once_with_their_lines(tmp_path):
    text = """model: m
task: text-clasification
method: {name: lroa}
data:
  train: a.csv
  colums: {text: a}
training:
  learning_rat: 1e-4
  epochs: many
  batch_size: 0
  epochs: 2
"""
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(tmp_path / "bad.yaml", text), ["--training.warmpu", "1", "--sed", "3"])
    problems = caught.value.problems
    expected = [
        ("line 2: task: 'text-clasification'", "text-classification"),
        ("line 3: method: there is no method 'lroa'", "lora"),
        ("line 6: data.colums: there is no key 'colums'", "columns"),
        ("line 8: training.learning_rat: there is no key", "learning_rate"),
        ("line 10: training.batch_size: 0 does not fit", "greater than or equal to 1"),
        ("line 11: training.epochs: given twice, first on line 9", ""),
        ("--training.warmpu: there is no such key", "training.warmup"),
        ("--sed: there is no such key", "training.seed"),
    ]
    assert len(problems) == len(expected)
    for problem, (start, hint) in zip(problems, expected, strict=True):
        assert problem.startswith(start)
        assert hint in problem
    assert str(caught.value).startswith("8 problems in the recipe")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "causal-lm"}, "data: is missing"),
        ({**BASE, "data": {"train": "a", "columns": {"txt": "b"}}}, "has no column 'txt'. Did you mean text"),
        ({**BASE, "training": {"packing": True}}, "only causal-lm has this key"),
        ({**BASE, "training": {"early_stopping": 2, "evals_per_epoch": 0}}, "needs evaluations"),
        ({**BASE, "method": "./nowhere/adapter"}, "no adapter_config.json in that folder"),
        ({**BASE, "version": 2}, "version: 2 is not one of 1"),
        ({**BASE, "task": "masked-lm", "problem": "regression"}, "only text-classification"),
        ({**BASE, "quantize": "int4"}, "quantize: 'int4' is not one of nf4, fp4, int8"),
    ],
)
def test_python_recipes_are_checked_too(fields, message):
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "The file is empty"), ("- a\n", "line 1: A recipe is a mapping"), ("model: m\n  x: [\n", "line 2: .*YAML")],
)
def test_text_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.read(write(tmp_path / "a.yaml", text))


def test_missing_file_names_the_near_one(tmp_path):
    write(tmp_path / "recipe.yaml", "model: m\n")
    with pytest.raises(RecipeError, match=r"Did you mean recipe\.yaml"):
        Recipe.read(tmp_path / "recpie.yaml")


def test_every_peft_method_name_is_known():
    for name in registry.known_names():
        assert Recipe(**BASE, method=name).method.name == name


@settings(max_examples=60, deadline=None)
@given(
    model=st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable()),
    task=st.sampled_from(list(TASKS)),
    options=st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "lora_dropout", "target_modules", "bias"]),
        st.one_of(st.integers(-5, 5), st.floats(0, 1), st.lists(st.text(max_size=5), max_size=3), st.text(max_size=8)),
    ),
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-9, 1),
    limit=st.none() | st.integers(1, 10**6),
)
def test_what_is_written_is_read_back(tmp_path_factory, model, task, options, seed, rate, limit):
    recipe = Recipe(
        model=model,
        task=task,
        data={"train": "a.csv", "limit": limit},
        method={"name": "lora", **options},
        training={"seed": seed, "learning_rate": rate},
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    assert Recipe.read(write(path, recipe.to_yaml())) == recipe


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from([*known_flags(), "data.columns.text", "training.epoch", "method.r", "extra", "training.a.b"]),
    value=ANYTHING,
)
def test_any_value_anywhere_gives_a_recipe_or_its_problems(tmp_path_factory, key, value):
    """As a file and as a flag: never another exception, and every problem says where it stands."""
    fields = {**BASE, "data": {"train": "a.csv"}, "method": {"name": "lora"}, "training": {}}
    inside = fields
    for part in key.split(".")[:-1]:
        inside = inside.setdefault(part, {})
    inside[key.rpartition(".")[2]] = value
    path = write(tmp_path_factory.mktemp("recipe") / "recipe.yaml", yaml.safe_dump(fields))
    for source, flags in ((path, []), (write(path.with_name("b.yaml"), yaml.safe_dump(BASE)), [f"--{key}={value}"])):
        try:
            assert Recipe.read(source, flags).version == 1
        except RecipeError as error:
            assert all(problem.startswith(("line ", "--")) for problem in error.problems), error.problems


def test_changed_checks_again():
    recipe = Recipe(**BASE)
    assert recipe.changed(**{"training.seed": 7, "method.r": 2}).training.seed == 7
    with pytest.raises(RecipeError, match="epochs"):
        recipe.changed(**{"training.epochs": -1})


def test_every_field_has_help_and_a_place_in_the_schema():
    assert all(text.strip() for text in known_flags().values())
    made = schema()
    assert {"model", "data", "method", "training"} <= set(made["properties"])
    described = made["$defs"]["TrainingSpec"]["properties"]
    assert set(described) == set(TrainingSpec.model_fields)
    assert all(entry["description"] for entry in described.values())


def test_published_schema_is_the_current_one():
    assert not (Path(__file__).parents[1] / "docs" / "recipe.schema.json").exists(), (
        "it lies in the package, for the wheel"
    )
    published = json.loads((Path(recipe_module.__file__).parent / "recipe.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(json.dumps(schema())), (
        "write it anew: python -m adapters_kit.recipe > adapters_kit/recipe.schema.json"
    )


def test_examples_load():
    recipes = sorted((Path(__file__).parents[1] / "examples").rglob("*.yaml"))
    found = [path for path in recipes if "task" in (yaml.safe_load(path.read_text()) or {})]
    assert found
    for path in found:
        assert Recipe.read(path).version == 1


def test_no_torch_is_imported():
    code = "import sys, adapters_kit.recipe; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


BEGINNING = "model: m\ntask: causal-lm\ndata: d.jsonl\n"


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfem\x00o\x00",
        b"model: a\x00b\n",
        BEGINNING + "x: &x [*x]\n",
        BEGINNING + "training: &t\n  a: *t\n",
        BEGINNING + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12)),
        BEGINNING + "x: " + "[" * 5000 + "\n",
        BEGINNING + "x: !!python/object/apply:os.getcwd []\n",
        BEGINNING + "max_length: " + "9" * 5000 + "\n",
        *(BEGINNING + f"training:\n  {key}: {value}\n" for key, value in [("seed", 2**32), ("seed", -1)]),
        *(BEGINNING + f"training:\n  learning_rate: {value}\n" for value in (".inf", "-.inf", ".nan", "1e400", "1e39")),
        *(BEGINNING + f"training:\n  {key}\n" for key in ("max_steps: 1" + "0" * 30, "epochs: 1e300")),
        BEGINNING + "max_new_tokens: 1000000000000000000\n",
        BEGINNING.replace("d.jsonl", "{train: d.jsonl, test_size: 2.5}"),
        BEGINNING + "method: {name: lora, r: 1" + "0" * 400 + "}\n",
    ],
    ids=range(20),
)
def test_a_hostile_recipe_is_told_soon(tmp_path, text):
    (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = time.process_time()
    with pytest.raises(RecipeError) as caught:
        Recipe.read(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 2000
    assert time.process_time() - before < 5
