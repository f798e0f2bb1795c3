"""Options of methods with values that mean nothing are refused in a sentence, of an adapter's config and a recipe's."""

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest

import adapters_kit as ak
from adapters_kit import registry
from adapters_kit.artifacts.option_types import lora_types, types_of, unfit
from adapters_kit.errors import AdapterError, UnknownNameError
from adapters_kit.methods.configs import check_options
from adapters_kit.peft_plugin import peft_methods
from adapters_kit.training import train
from tests.support import small, tiny

WRONG = {
    "bias": ["all"],
    "lora_dropout": None,
    "layers_to_transform": "0",
    "modules_to_save": "lm_head",
    "lora_alpha": "32",
    "use_rslora": "false",
    "use_dora": 1,
    "fan_in_fan_out": None,
    "init_lora_weights": 3,
    "layer_replication": [[0, 1], [1]],
    "trainable_token_indices": {"embed_tokens": ["a"]},
    "eva_config": "x",
    "rank_pattern": {"q_proj": True},
    "alpha_pattern": ["q_proj"],
    "task_type": 7,
    "target_modules": {"q_proj": 1},
    "megatron_core": 1,
}


@pytest.fixture(scope="module")
def base() -> Path:
    return small.model("llama")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    ak.wrap(ak.load(base), "lora", r=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", WRONG)
def test_a_config_of_a_wrong_type_is_refused_by_all_that_read_it(key, base, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: WRONG[key]}))
    for use in (
        lambda: ak.wrap(ak.load(base), folder),
        lambda: ak.merge(folder, tmp_path / "merged", base=base),
        lambda: ak.export(folder, tmp_path / "exported", base=base),
    ):
        with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key} is .*; it has to be "):
            use()


@pytest.mark.parametrize("value", [-0.5, 1, 1.5, 1e39, float("nan")])
def test_a_dropout_that_is_none(value, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": value}))
    with pytest.raises(AdapterError, match=r"lora_dropout is .*; it has to be (0 or more|a finite number)"):
        ak.merge(folder, tmp_path / "merged")


def every_config() -> dict[str, type]:
    for name in registry.names():
        _ = registry.get(name).config_class
    return peft_methods()


@pytest.mark.parametrize("kind", sorted(every_config()))
def test_every_field_of_every_method_has_a_type(kind):
    config = every_config()[kind]
    types, fields = types_of(config), dataclasses.fields(config)
    assert {field.name for field in fields} <= types.keys()
    for field in fields:
        made = field.default_factory() if field.default is dataclasses.MISSING else field.default
        assert unfit(types, {field.name: made}) is None, "the default does not fit"
        if field.name not in ("target_modules", "exclude_modules"):  # of any type in ours, which check them themselves
            assert unfit(types, {field.name: b"x"}) is not None, "bytes fit"


def test_loras_types_are_told_without_peft():
    assert lora_types().keys() == types_of(peft.LoraConfig).keys()


def test_what_others_write_is_taken():
    written = {"loftq_config": None, "layers_pattern": None, "lora_alpha": 16.5, "modules_to_save": None, "r": 8}
    written |= {"init_lora_weights": "pissa_niter_16", "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    assert unfit(lora_types(), written) is None
    given = {"target_modules": {"q_proj"}, "layers_to_transform": range(2), "lora_dropout": 0}
    assert unfit(lora_types(), given) is None


def test_a_table_that_is_null_is_empty(base, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    nothing = {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None, "layers_pattern": None}
    (folder / "adapter_config.json").write_text(json.dumps(config | nothing))
    assert ak.check(folder, "vllm").ok == ak.check(saved, "vllm").ok
    ak.wrap(ak.load(base), folder)
    ak.merge(folder, tmp_path / "merged", base=base)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "lora", "rr": 4}, "no option 'rr'"),
        ({"name": "lora", "peft_type": "IA3"}, "no option 'peft_type'"),
        ({"name": "lora", "bias": ["all"]}, r"lora: bias is \['all'\]; it has to be one of"),
        ({"name": "lora", "lora_alpha": 0}, "lora_alpha is 0"),
        ({"name": "lora", "lora_alpha": 1e39}, "more than any run has"),
        ({"name": "lora", "init_lora_weights": "eva"}, "set training.init: eva"),
        ({"name": "houlsby", "reduction_factor": "x"}, "reduction_factor is 'x'"),
        ({"name": "mam", "parts": ["x"]}, "parts is"),
    ],
)
def test_a_recipes_options_are_refused_before_the_base_is_loaded(method, said, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded"))
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "method": method}
    with pytest.raises(AdapterError, match=said):
        ak.train({**recipe, "data": {"train": small.sentiment(8), "test_size": 2}}, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lora", {"rank_pattern": {"zz": 4}}, "'zz' matches no module"),
        ("lora", {"alpha_pattern": {"quert": 4}}, "Did you mean query"),
        ("lora", {"trainable_token_indices": [-1]}, "there is no token -1"),
        ("trainable-tokens", {"token_indices": [10**6]}, "there is no token 1000000"),
        ("mam", {"parts": {"prefix": 3}}, "no table of options"),
        (["lora", "ia3"], {"parts": ["lora"]}, "no table of options"),
        (["lora", "ia3"], {"parts": {"lora": {"r": "x"}}}, "r is 'x'"),
        ("adalora", {"total_step": 9, "deltaT": 0}, "deltaT=0"),
        ("adalora", {"total_step": 9, "target_r": 30}, "between 1 and init_r=24"),
        ("adalora", {"total_step": 9, "beta1": 5.0}, "beta1"),
    ],
)
def test_options_that_fit_no_model(method, options, said):
    with pytest.raises(AdapterError, match=said):
        ak.wrap(tiny.build("bert"), method, **options)


def test_options_are_checked_without_a_model():
    check_options("lora", {"r": 8, "layers_to_transform": (0, 1)})
    check_options(peft.LoraConfig(), {"bias": "none"})
    with pytest.raises(AdapterError, match="r is None"):
        check_options(peft.LoraConfig(r=4), {"r": None})


@pytest.mark.parametrize(
    ("family", "method"), [("bert", "lora"), ("llama", "loha"), ("gpt2", "lora"), ("t5", "lora"), ("llama", "vera")]
)
def test_layers_to_transform_holds_for_the_default_targets(family, method):
    """peft looks at layers only where it completes a name: full paths it would train in all of them."""
    wrapped = ak.wrap(tiny.build(family), method, layers_to_transform=[1])
    layers = [name.split(".default")[0] for name, one in wrapped.named_parameters() if ".default" in name]
    inside = [
        name for name in layers if "modules_to_save" not in name and "vera_A" not in name and "vera_B" not in name
    ]
    assert inside
    assert all(".1." in name for name in inside), inside


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers_to_transform": [0, 99]}, "there is no layer 99. There are: 0 to 1"),
        ({"layers_to_transform": -1}, "there is no layer -1"),
        ({"layers_to_transform": []}, "is empty"),
        ({"layers_to_transform": 1, "target_modules": ["model.layers.0.self_attn.q_proj"]}, "outside layers"),
    ],
)
def test_layers_that_are_none(options, said):
    with pytest.raises(UnknownNameError, match=said):
        ak.wrap(tiny.build("llama"), "lora", **options)
