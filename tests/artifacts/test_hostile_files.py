"""Files that somebody else wrote: configs with impossible numbers, JSON that is none, links to elsewhere, pickles."""

import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, GPTNeoForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.artifacts.base_config import check_config
from adapters_kit.artifacts.card import split
from adapters_kit.artifacts.json_file import read_json, read_json_lines
from adapters_kit.errors import AdapterError, ModelError, ShippingError
from adapters_kit.merging.weightless import base_config, empty_model
from adapters_kit.serving import llama_cpp
from adapters_kit.training import checkpoints
from tests.support import small, tiny

DEEP = '{"a":' * 100_000


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(small.model("llama"), tmp_path / "base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    ak.wrap(ak.load(base), "lora", r=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- a base's config ---


@pytest.mark.parametrize("number", [10**7, 10**12, 10**30])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_attention_heads"])
def test_counts_that_no_model_has_are_refused_before_anything_is_built(key, number, base, adapter, tmp_path):
    change(base / "config.json", **{key: number})
    with pytest.raises(ModelError, match=f"{key} is .*which no model has"):
        ak.load(base)
    with pytest.raises(ShippingError, match=f"{key} is .*which no model has"):
        ak.merge(adapter, tmp_path / "merged", base=base)


def test_counts_of_real_models_are_taken():
    real = {
        "num_hidden_layers": 126,
        "vocab_size_per_layer_input": 262_144,
        "max_position_embeddings": 10_485_760,
        "num_experts": 512,
        "rope_theta": 500_000_000,
        "tokenizer_model_max_length": 10**30,
        "num_labels": 21_843,
        "text_config": {"num_local_experts": 128, "sliding_window": 2**31 - 1},
    }
    check_config(real, "config.json", ModelError)
    with pytest.raises(ModelError, match="num_local_experts"):
        check_config({"text_config": {"num_local_experts": 10**6}}, "config.json", ModelError)


@pytest.mark.parametrize("kind", sorted(CONFIG_MAPPING_NAMES)[::25])
def test_the_config_of_no_kind_of_model_is_refused(kind):
    try:
        made = CONFIG_MAPPING[kind]()
    except ValueError:  # a few kinds have no defaults
        pytest.skip("no defaults")
    check_config(json.loads(made.to_json_string(use_diff=False)), kind, ModelError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", 7),
        ("hidden_act", "no such"),
        ("head_dim", 0),
        ("hidden_size", 10**30),
        ("num_key_value_heads", 0),
        ("pad_token_id", 10**6),
        ("vocab_size", 0),
        ("attn_implementation", [1]),
        ("text_config", "x"),
    ],
)
def test_whatever_a_config_provokes_is_one_sentence(key, value, base):
    change(base / "config.json", **{key: value})
    with pytest.raises(ModelError, match=r"Cannot (load|read)|another shape|heads|no model has|is 1000000 in"):
        ak.load(base)


@pytest.mark.parametrize("key", ["head_dim", "hidden_size", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("size", [10**5, 10**8])
def test_sizes_that_the_files_do_not_hold_are_refused_before_memory_is_taken(key, size, base, adapter, tmp_path):
    change(base / "config.json", **{key: size * 4})
    before = psutil.Process().memory_info().rss
    for use in (
        lambda: ak.load(base),
        lambda: ak.load(base, "text-classification", labels=["a", "b"]),
        lambda: ak.merge(adapter, tmp_path / "merged", base=base),
    ):
        with pytest.raises(AdapterError, match=r"do not belong together|do not belong to this config|mismatched"):
            use()
    assert psutil.Process().memory_info().rss - before < 300 << 20


def test_masks_of_contexts_that_are_far_too_long(tmp_path):
    tiny.build("gpt-neo").save_pretrained(tmp_path)
    change(tmp_path / "config.json", max_position_embeddings=10**6)
    with pytest.raises(ModelError, match=r"describes .*(computed numbers|weights) .*do not belong together"):
        ak.load(tmp_path)
    with pytest.raises(ShippingError, match=r"describes .*computed numbers .*do not belong together"):
        empty_model(GPTNeoForCausalLM, base_config(tmp_path))


def test_a_head_of_another_size_is_refused_unless_it_is_asked_for(tmp_path):
    tiny.build("bert", num_labels=3).save_pretrained(tmp_path)
    assert ak.load(tmp_path, "text-classification", labels=["a", "b"]).config.num_labels == 2
    change(tmp_path / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError, match=r"have another shape than the config says \(classifier"):
        ak.load(tmp_path, "text-classification")


@pytest.mark.parametrize("value", [7, "LlamaForCausalLM", {}, [1], [["LlamaForCausalLM"]]])
def test_architectures_of_a_wrong_type(value, base, adapter, tmp_path):
    change(base / "config.json", architectures=value)
    for use in (
        lambda: ak.load(base),
        lambda: ak.merge(adapter, tmp_path / "merged", base=base, verify="off"),
        lambda: ak.check(base),
        lambda: ak.export(base, tmp_path / "m.gguf", format="gguf"),
        lambda: ak.predict(base, ["a"], task="causal-lm"),
    ):
        with pytest.raises(AdapterError, match="architectures is"):
            use()


@pytest.mark.parametrize("saved", [{"quant_method": "evil"}, {"bits": 4}])
def test_a_quantization_that_nobody_knows_is_not_ignored(saved, base):
    change(base / "config.json", quantization_config=saved)
    with pytest.raises(ModelError, match=r"quantized by '(evil|unknown)', which is not known|Cannot read the config"):
        ak.load(base)


def test_a_damaged_generation_config_is_told(base):
    """transformers goes on without it: the model would not know where its answers end."""
    (base / "generation_config.json").write_text('{"eos_token_id": 1')
    with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
        ak.load(base)


LONG = "a/" + "b" * 5000


@pytest.mark.parametrize("name", [LONG, "a\0b", "a\ud800b", "x/" * 3000], ids=["long", "zero", "half", "deep"])
def test_names_that_nothing_has_are_told_by_all_that_take_one(name, adapter, base, tmp_path):
    change(adapter / "adapter_config.json", base_model_name_or_path=name)
    for use in (
        lambda: ak.merge(adapter, tmp_path / "merged"),
        lambda: ak.load(name),
        lambda: ak.wrap(ak.load(base), f"./{name}"),
        lambda: ak.check(name),
        lambda: ak.merge(name, tmp_path / "merged"),
        lambda: ak.merge(adapter, tmp_path / name, base=base),
        lambda: ak.export(name, tmp_path / "x"),
        lambda: ak.Run.open(name),
        lambda: ak.compare_runs([name, name]),
        lambda: ak.evaluate(name, task="causal-lm"),
        lambda: ak.train(name, tmp_path / "run", quiet=True),
        lambda: ak.train({"model": "m", "task": "causal-lm", "data": name}, tmp_path / "run", quiet=True),
        lambda: ak.sweep({"model": "m", "task": "causal-lm", "data": "d.jsonl"}, name, learning_rates=[1e-3]),
        lambda: ak.compare({"model": "m", "task": "causal-lm", "data": "d.jsonl"}, ["lora"], 1, out=name),
    ):
        with pytest.raises(AdapterError, match=r"is no name of a file") as told:
            use()
        assert len(str(told.value)) < 300
    assert [cli.main([verb, name]) for verb in ("plan", "compare", "check")] == [2, 2, 2]


def test_a_pickle_with_code_is_no_base(base):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {base}/ran",))

    (base / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, base / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="needs to run code"):
        ak.load(base)
    assert not (base / "ran").exists()


# --- an adapter's config ---


@pytest.mark.parametrize("value", [8.5, [8], None, True, "8", {}, 0, -1])
def test_a_rank_that_is_none(value, base, adapter, tmp_path):
    change(adapter / "adapter_config.json", r=value)
    for use in (lambda: ak.wrap(ak.load(base), adapter), lambda: ak.merge(adapter, tmp_path / "merged", base=base)):
        with pytest.raises(AdapterError, match=r"r is .*a whole number, 1 or more"):
            use()


@pytest.mark.parametrize(
    "fields", [{"auto_mapping": True}, {"auto_mapping": ["a"]}, {"odd": 1, "odder": 2, "monteclora_config": {"x": 1}}]
)
def test_fields_that_peft_stumbles_over(fields, base, adapter, tmp_path):
    change(adapter / "adapter_config.json", **fields)
    for use in (lambda: ak.wrap(ak.load(base), adapter), lambda: ak.merge(adapter, tmp_path / "merged", base=base)):
        with pytest.raises(AdapterError):
            use()


def test_a_record_without_a_format(base, adapter):
    change(adapter / "adapters_kit.json", format=None)
    ak.wrap(ak.load(base), adapter)


@pytest.mark.parametrize("rank", [3, 100, 1_000_000])
def test_a_rank_that_the_tensors_do_not_have_scales_nothing(rank, base, adapter, tmp_path):
    change(adapter / "adapter_config.json", r=rank)
    for use in (
        lambda: ak.wrap(ak.load(base), adapter),
        lambda: ak.merge(adapter, tmp_path / "merged", base=base, verify="off"),
        lambda: ak.export(adapter, tmp_path / "exported", canonical=True),
        lambda: ak.combine([adapter, adapter], tmp_path / "combined"),
    ):
        with pytest.raises(AdapterError, match=r"rank|r is 1,000,000|has shape"):
            use()


@pytest.mark.parametrize("value", [1e308, 10**300, float("inf"), -1e39])
@pytest.mark.parametrize("key", ["lora_alpha", "lora_dropout", "alpha_pattern"])
def test_numbers_that_nothing_computes_with(key, value, base, adapter, tmp_path):
    change(adapter / "adapter_config.json", **{key: {"q_proj": value} if key == "alpha_pattern" else value})
    for use in (lambda: ak.wrap(ak.load(base), adapter), lambda: ak.merge(adapter, tmp_path / "merged", base=base)):
        with pytest.raises(AdapterError, match=rf"{key} is .*float32"):
            use()


@pytest.mark.parametrize("text", [DEEP, "[1]", "{", "\ufeff7", '{"r": 1' + "0" * 5000 + "}"], ids=list("abcde"))
def test_json_that_is_none_is_told_everywhere(text, base, adapter, tmp_path):
    (adapter / "adapter_config.json").write_text(text)
    for use in (
        lambda: ak.wrap(ak.load(base), adapter),
        lambda: ak.merge(adapter, tmp_path / "merged", base=base),
        lambda: ak.check(adapter, "peft") or pytest.fail("taken"),
    ):
        try:
            use()
        except AdapterError as error:
            assert "adapter_config.json" in str(error)
        except pytest.fail.Exception:
            pass


def test_lines_name_theirs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n\n{"step": 2}\n')
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]
    for bad in ("[1]", DEEP, "\0"):
        file.write_text('{"step": 1}\n' + bad)
        with pytest.raises(ShippingError, match="line 2"):
            read_json_lines(file)
    with pytest.raises(ShippingError, match="cannot be read"):
        read_json(tmp_path / "none.json")


# --- cards ---


def test_a_card_cannot_be_a_bomb():
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    for front in (laughs, "a: &a [*a]\n", "x: " + "[" * 5000 + "\n", "- 1\n", "x: !!python/name:os.system\n"):
        found, body = split(f"---\n{front}---\nText\n")
        assert found == {} and body == "Text\n"


# --- checkpoints ---


SEALS = ["[]", "{}", '{"trained.safetensors": 7}', DEEP, '{"trained.safetensors": [1, 2, 3]}']


@pytest.mark.parametrize("seal", SEALS, ids=range(5))
def test_a_seal_that_is_none_confirms_nothing(seal, tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / checkpoints.STATE).write_text('{"global_step": 3}')
    (folder / checkpoints.TRAINED).write_bytes(b"x")
    (folder / checkpoints.SEAL).write_text(seal)
    assert checkpoints.damage(folder)


# --- links ---


def test_what_a_link_leads_to_is_not_shipped(base, adapter, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("-----private-----")
    for name in ("README.md", "recipe.yaml", "proof.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"):
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(secret)
    ak.export(adapter, tmp_path / "exported", base=base)
    ak.export(adapter, tmp_path / "canonical", canonical=True)
    (adapter / "proof.json").unlink()
    ak.merge(adapter, tmp_path / "merged", base=base)
    for folder in ("exported", "canonical", "merged"):
        for path in (tmp_path / folder).rglob("*"):
            assert b"-private-" not in path.read_bytes(), path


def test_code_that_an_adapter_brings_is_not_planted(tmp_path):
    folder, ran = tmp_path / "adapter", tmp_path / "ran"
    ak.wrap(ak.load(small.model("llama")), "lora").save_pretrained(folder)
    (folder / "tokenizer_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    named = {"auto_map": {"AutoTokenizer": ["tokenizer_own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    record = json.loads((folder / "adapters_kit.json").read_text())
    record["config"] = {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "tokenizer_own.Own"}}
    (folder / "adapters_kit.json").write_text(json.dumps(record))
    told = str(ak.merge(folder, tmp_path / "merged"))
    assert "named code of their own (auto_map)" in told
    assert not list((tmp_path / "merged").rglob("*.py"))
    for path in (tmp_path / "merged").glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not ran.exists()


def test_the_converters_see_no_code_and_no_tokens(base, adapter, tmp_path, monkeypatch):
    """llama.cpp's scripts trust what they read: they are shown a folder without it, and run with nothing of ours."""
    (base / "tokenizer_own.py").write_text("raise SystemExit\n")
    change(
        base / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["tokenizer_own.Own", None]}
    )
    shown = llama_cpp.clean_folder(base, tmp_path / "shown")
    assert {path.suffix for path in shown.iterdir()} <= {".json", ".safetensors", ".jinja", ".model", ".txt"}
    assert not [path for path in shown.glob("*.json") if b"auto_map" in path.read_bytes()]
    told = str(ak.merge(adapter, tmp_path / "merged", base=base, verify="off"))
    assert not list((tmp_path / "merged").rglob("*.py")) and "auto_map" in told
    change(base / "config.json", architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.Own"})
    with pytest.raises(ShippingError, match=r"needs code of its own \(OwnForCausalLM\), which is not run here"):
        llama_cpp.clean_folder(base, tmp_path / "other")
    monkeypatch.setenv("HF_TOKEN", "secret")
    asked = "import os, sys; sys.exit(' '.join(os.environ.get(n, '-') for n in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HOME')))"
    with pytest.raises(ShippingError, match=rf"refuses {base}: - 1 {tmp_path}"):
        llama_cpp._run([sys.executable, "-c", asked], base, tmp_path)


def test_a_pickle_beside_the_weights_is_neither_opened_nor_shipped(base, adapter, tmp_path):
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(AdapterError, match=r"both .* and adapter_model\.bin.*Remove the stale one"):
        ak.export(adapter, tmp_path / "exported", base=base)
    assert not (tmp_path / "exported").exists()


# --- the last net ---


class Panic(BaseException):
    """What a library in Rust raises is no Exception."""


def test_the_last_net_holds_what_is_no_exception(monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise Panic("regex over its limit")

    monkeypatch.setattr("adapters_kit.serving.check.check", broken)
    assert cli.main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "check broke: Panic: regex over its limit" in said and "The whole trace is in" in said
    monkeypatch.setattr("tempfile.mkstemp", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "no file (No space left)" in capsys.readouterr().err
