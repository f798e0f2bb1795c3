"""Python files that come with a base model: run where the recipe says so, and nowhere else."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import AdapterError, ModelError
from tests.support import small

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def base(tmp_path) -> Path:
    """A model whose architecture is in a file beside its weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in small.model("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return folder


@pytest.fixture
def recipe(base, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    rows = [{"text": row["text"]} for row in small.sentiment(24)]
    small.write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"model": str(base), "task": "causal-lm", "data": {"train": str(tmp_path / "rows.jsonl"), "test_size": 8}}
    training = {"max_steps": 1, "batch_size": 4, "samples": 1}
    (tmp_path / "recipe.yaml").write_text(ak.Recipe(**fields, training=training, max_new_tokens=2).to_yaml())
    return tmp_path / "recipe.yaml"


def test_a_bases_own_code_runs_only_where_the_user_says_so(recipe, base, tmp_path, capsys):
    mark, out = tmp_path / "mark", tmp_path / "run"
    assert cli.main(["train", str(recipe), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "are not run unless you say so" in said and "--trust_remote_code" in said
    assert not mark.exists()
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        ak.load(base)
    assert not mark.exists()

    assert cli.main(["train", str(recipe), "--out", str(out), "--trust-remote-code"]) == 0
    assert mark.read_text() == "ran"
    card = (out / "adapter" / "README.md").read_text()
    assert "trust_remote_code: true" in card and "come with the base model were run" in card
    assert "trust_remote_code=True" in card

    # What a run's author trusted is for whoever asks the run to say again.
    mark.unlink()
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        ak.evaluate(out)
    for use in (
        lambda: ak.merge(out, tmp_path / "merged"),
        lambda: ak.export(out, tmp_path / "x.gguf", base=base, format="gguf"),
        lambda: ak.plan(out / "recipe.yaml"),
        lambda: ak.check(base),
        lambda: cli.main(["inspect", str(base)]),
    ):
        with suppress(AdapterError):
            use()
        assert not mark.exists()
    assert not (tmp_path / "merged").exists()
    assert ak.evaluate(out, trust_remote_code=True)["loss"] > 0


def test_code_is_never_preferred_to_what_transformers_has(tmp_path):
    """`auto_map` on an architecture that needs none."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in small.model("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    assert ak.load(folder).config.model_type == "llama"
    rows = [{"text": row["text"]} for row in small.sentiment(8)]
    assert ak.evaluate(folder, rows, task="causal-lm")["loss"] > 0
    assert not (tmp_path / "mark").exists()
