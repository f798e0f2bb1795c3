"""Names, and methods that other packages add through the entry-point group."""

import sys

import pytest
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit import registry
from adapters_kit.errors import UnknownNameError, did_you_mean, nearest
from tests.support import small, tiny

# What pip leaves behind when it installs a package that declares two methods.
INSTALLED = {
    "tiny_method-1.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: tiny-method\nVersion: 1.0\n",
    "tiny_method-1.0.dist-info/entry_points.txt": """[adapters_kit.methods]
only-values = tiny_method:ONLY_VALUES
broken = tiny_method:NOT_A_METHOD
""",
    "tiny_method.py": """
from adapters_kit.registry import Method
ONLY_VALUES = Method(
    name="only-values", config="peft:LoraConfig", trains="the value projections", paper="none", mergeable=True,
    defaults={"r": 2, "target_modules": ["v_proj"]},
)
NOT_A_METHOD = 3
""",
}


@pytest.fixture
def looked_up_anew(monkeypatch):
    """What was looked up before is forgotten, and after."""
    looked_up = [registry._declared, registry.get, registry.known_names]

    def forget():
        for function in looked_up:
            function.cache_clear()

    forget()
    yield forget
    monkeypatch.undo()
    sys.modules.pop("tiny_method", None)
    forget()


@pytest.fixture
def third_party(tmp_path, monkeypatch, looked_up_anew):
    """An environment in which the package above is installed."""
    for name, text in INSTALLED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    looked_up_anew()


def test_a_third_party_method_is_found_and_used(third_party):
    model = ak.wrap(tiny.build("llama"), "only-values")
    trained = {name.split(".")[-4] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"v_proj"}
    assert "only-values" in registry.names()
    recipe = ak.Recipe(model="m", task="causal-lm", data="d.jsonl", method={"name": "only-values", "r": 3})
    assert recipe.method.label == "only-values"
    with pytest.raises(ak.AdapterError, match=r"'broken'.*3, not to an adapters_kit.registry.Method"):
        ak.wrap(tiny.build("llama"), "broken")


KEYS_ONLY = registry.Method(
    name="keys-only",
    config="peft:LoraConfig",
    trains="the key projections",
    paper="none",
    mergeable=True,
    defaults={"r": 2},
    learning_rate=7e-3,
    prepare=lambda model, options: {"target_modules": ["k_proj"], **options},
)


@pytest.mark.slow
def test_a_method_in_the_house_is_one_declaration_and_one_line(looked_up_anew, monkeypatch, tmp_path):
    """Its name, options and rate are known to recipes, `wrap` and the table of methods; it trains, and merges."""
    monkeypatch.setitem(registry.BUILTIN, "keys-only", f"{__name__}:KEYS_ONLY")
    assert "keys-only" in str(ak.methods())
    rows = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in small.sentiment(24)])
    training = {"max_steps": 2, "max_length": 16, "batch_size": 4}
    recipe = ak.Recipe(
        model=str(small.model("llama")), task="causal-lm", data=str(rows), method="keys-only", training=training
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.recipe.training.learning_rate == 7e-3
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert weights and all(".k_proj." in name for name in weights)
    assert ak.merge(run.adapter, tmp_path / "merged").check is not None
    with pytest.raises(ak.AdapterError, match=r"keys_onli.*Did you mean keys-only"):
        recipe.changed(method="keys_onli")


def test_names_are_found_in_any_spelling_and_close_ones_offered():
    assert registry.canonical("P_Tuning") == "p-tuning"
    assert registry.get("lora").name == "lora"
    with pytest.raises(UnknownNameError, match=r"'lorra'.*Did you mean lora"):
        registry.get("lorra")


def test_names_from_peft_source_equal_peft_itself():
    from peft import PeftType

    ours = {"bottleneck", "prefix", "combined", "blocks"}
    assert set(registry.peft_names()) == {registry.canonical(member.value) for member in PeftType} - ours


def test_did_you_mean():
    assert nearest("lroa", ["lora", "dora", "prefix"]) == ["lora", "dora"]
    assert did_you_mean("lroa", ["lora", "dora", "prefix"]) == "Did you mean lora or dora?"
    assert did_you_mean("zzz", ["lora", "dora"]) == "There are: dora, lora."
    assert did_you_mean("zzz", []) == "None exist here."
