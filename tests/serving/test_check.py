"""check() gives every reason, no false alarm for a plain adapter, and fixes that work."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.serving.start import go_template
from tests.support import small
from tests.support.shipping import disturb, gap, load, save_base, train_on

LORA = peft.LoraConfig
TARGETS = ["peft", "transformers", "vllm", "sglang", "llama.cpp", "ollama"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("check") / "base")


def adapter(base, folder, config):
    train_on(base, config, folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_adapter_loads_everywhere(target, base, tmp_path):
    report = ak.check(adapter(base, tmp_path / "a", LORA(r=8, target_modules=["o_proj", "down_proj"])), target)
    if target == "llama.cpp":
        assert [problem.what for problem in report.problems] == ["it takes GGUF files"]
    else:
        assert report, str(report)


@pytest.mark.parametrize("target", TARGETS)
def test_another_version_that_is_installed_is_not_known(target, base, tmp_path, monkeypatch):
    folder = adapter(base, tmp_path / "a", LORA(r=8, target_modules=["o_proj", "down_proj"]))
    assert "Not known for" not in str(ak.check(folder, target))
    monkeypatch.setattr("adapters_kit.serving.rules.version", lambda _: "99.1.0")
    told = "which is installed here: the rules are of" in str(ak.check(folder, target))
    assert told is (target != "ollama")  # which is no package


TAKEN = [
    (LORA(target_modules=["q_proj"], rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 3}), "vllm"),
    (LORA(target_modules=["q_proj"], use_rslora=True, modules_to_save=["score"]), "vllm"),
    (LORA(target_modules=["q_proj", "v_proj"]), "sglang"),
    (LORA(target_modules=["gate_proj", "o_proj"]), "sglang"),
    (LORA(target_modules=["o_proj", "up_proj"], rank_pattern={"up_proj": 4}), "ollama"),
]


@pytest.mark.parametrize(("config", "target"), TAKEN)
def test_no_false_alarm(config, target, base, tmp_path):
    """What the server's own source takes: vLLM reads patterns, SGLang fills in a missing k or up."""
    report = ak.check(adapter(base, tmp_path / "a", config), target)
    assert report, str(report)


SILENT = [
    (LORA(target_modules=["q_proj", "v_proj"], trainable_token_indices=[3]), "sglang", "single tokens"),
    (LORA(use_rslora=True, target_modules=["o_proj"]), "sglang", "use_rslora ignored"),
    (LORA(target_modules=["o_proj"], alpha_pattern={"o_proj": 4}), "sglang", "alpha_pattern ignored"),
    (LORA(target_modules=["o_proj"], modules_to_save=["lm_head"]), "sglang", "lm_head"),
    (LORA(init_lora_weights="olora", target_modules=["o_proj"]), "sglang", "olora"),
    (LORA(target_modules=["q_proj"], alpha_pattern={"q_proj": 4}), "llama.cpp", "alpha_pattern ignored"),
    (LORA(target_modules=["q_proj"]), "ollama", "lora_A of q_proj"),
    (LORA(use_dora=True, target_modules=["q_proj"]), "transformers", "magnitudes"),
]
REFUSED = [
    (LORA(r=48, target_modules=["q_proj"]), "vllm", "rank 48"),
    (LORA(target_modules=["q_proj"], rank_pattern={"q_proj": 32}), "vllm", "rank 32"),
    (LORA(use_dora=True, target_modules=["q_proj"]), "vllm", "DoRA"),
    (LORA(bias="all", target_modules=["q_proj"]), "vllm", "biases"),
    (LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "vllm", "lm_head"),
    (LORA(init_lora_weights="pissa", target_modules=["q_proj"]), "vllm", "pissa"),
    (LORA(target_modules=["q_proj"]), "sglang", "q_proj without v_proj"),
    (LORA(target_modules=["up_proj"]), "sglang", "up_proj without gate_proj"),
    (LORA(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}), "sglang", "rank_pattern"),
    (LORA(target_modules=r".*\.[qv]_proj"), "sglang", "regular expression"),
    (LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "llama.cpp", "neither lora_A nor lora_B"),
    (LORA(lora_alpha=2.5, target_modules=["o_proj"]), "ollama", "whole number"),
    (LORA(target_modules=["o_proj", "lm_head"]), "ollama", "no name for lm_head"),
    (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "vllm", "LoRA only"),
    (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "transformers", "prompt learning"),
    (peft.VeraConfig(target_modules=["q_proj"]), "transformers", "share weights"),
]
CASES = [(*case, True) for case in SILENT] + [(*case, False) for case in REFUSED]


@pytest.mark.parametrize(("config", "target", "reason", "silent"), CASES, ids=[f"{c[1]}: {c[2]}" for c in CASES])
def test_every_reason_is_given_with_a_fix(config, target, reason, silent, base, tmp_path):
    report = ak.check(adapter(base, tmp_path / "a", config), target)
    found = [problem for problem in report.problems if reason in problem.what]
    assert found, str(report)
    assert found[0].fix and reason in str(report) and not report.ok and found[0].silent == silent


LOADED = {
    "lora": LORA(target_modules=["q_proj"]),
    "patterns": LORA(target_modules=["q_proj"], use_rslora=True, rank_pattern={"q_proj": 3}),
    "dora": LORA(use_dora=True, target_modules=["q_proj"]),
    "head": LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LORA(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "pissa": LORA(init_lora_weights="pissa", target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", LOADED)
def test_what_is_said_of_transformers_and_peft_is_what_they_do(method, base, tmp_path):
    """Loaded for real: a clean report means the same outputs, a silent problem means others, else it raises."""
    trained, folder = train_on(base, LOADED[method], tmp_path / "a"), tmp_path / "a"
    assert ak.check(folder, "peft") and gap(trained, peft.PeftModel.from_pretrained(load(base), folder).eval()) == 0
    report, model = ak.check(folder, "transformers"), load(base)
    if report or report.problems[0].silent:
        model.load_adapter(str(folder))
        assert (gap(trained, model.eval()) == 0) == report.ok
    else:
        with pytest.raises(ValueError, match="does not support"):
            model.load_adapter(str(folder))


def test_added_tokens_are_those_beyond_the_base(base, tmp_path):
    folder = adapter(base, tmp_path / "a", LORA(target_modules=["o_proj"]))
    words = json.loads((base / "config.json").read_text())["vocab_size"]
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": words - 1}))
    assert ak.check(folder, "sglang")
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": words - 1, "<new>": words}))
    assert "adds 1 tokens, such as '<new>'" in str(ak.check(folder, "sglang"))


def test_every_report_names_its_source(base):
    for target in TARGETS:
        assert any(digit in str(ak.check(base, target)).splitlines()[0] for digit in "0123456789")


def test_the_fix_fixes(base, tmp_path):
    odd = LORA(
        r=48,
        use_rslora=True,
        target_modules=r".*\.[qv]_proj",
        alpha_pattern={"layers.0.self_attn.v_proj": 4},
        rank_pattern={"v_proj": 3},
    )
    folder = adapter(base, tmp_path / "a", odd)
    assert len(ak.check(folder, "vllm").problems) == 1 and len(ak.check(folder, "sglang").problems) == 3
    ak.export(folder, tmp_path / "b", rank=16)
    assert ak.check(tmp_path / "b", "vllm") and ak.check(tmp_path / "b", "sglang")
    ak.export(folder, tmp_path / "c", canonical=True)
    trained = peft.PeftModel.from_pretrained(load(base), folder).eval()
    assert gap(trained, peft.PeftModel.from_pretrained(load(base), tmp_path / "c").eval()) < 1e-5
    ak.merge(folder, tmp_path / "merged", verify="off")
    assert ak.check(tmp_path / "merged", "transformers")


@pytest.mark.parametrize("method", ["loha", "dora", "houlsby", "prefix", "p-tuning"])
def test_the_command_that_is_advised_ships_the_adapter(method, base, tmp_path, monkeypatch):
    """A merge, or our own server for what no merge can hold."""
    model = ak.wrap(load(base), method)
    disturb(model)
    model.save_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    name, verb, *words = ak.check(tmp_path / "a", "vllm").problems[0].fix.split()
    assert name == "adapters-kit"
    if method in ("loha", "dora"):
        assert verb == "merge" and cli.main([verb, *words, "--base", str(base)]) == 0
        assert ak.check("merged", "transformers")
    else:
        assert (verb, words) == ("serve", [str(tmp_path / "a")])
        with pytest.raises(ak.AdapterError):
            ak.merge(tmp_path / "a", tmp_path / "merged", base=base)


def test_broken_adapters_are_found_for_every_target(base, tmp_path):
    folder = adapter(base, tmp_path / "a", LORA(target_modules=["q_proj"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    for target in TARGETS:
        assert "NaN" in str(ak.check(folder, target))
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(zero, folder / "adapter_model.safetensors")
    assert "changes nothing" in str(ak.check(folder, "vllm"))


def test_models(base, tmp_path):
    assert ak.check(base, "transformers")
    assert "tokenizer" in str(ak.check(base, "vllm"))
    assert "GGUF" in str(ak.check(base, "llama.cpp"))
    ak.merge(adapter(base, tmp_path / "a", LORA(target_modules=["q_proj"])), tmp_path / "q", quantize="nf4")
    assert ak.check(tmp_path / "q", "transformers") and "bitsandbytes" in str(ak.check(tmp_path / "q", "llama.cpp"))
    shards = save_base("llama", tmp_path / "shards", max_shard_size="60KB")
    next(shards.glob("*.safetensors")).unlink()
    assert "Fetch the missing shard" in str(ak.check(shards, "transformers"))


def test_unknown_names(base, tmp_path):
    with pytest.raises(ak.AdapterError, match="Did you mean vllm"):
        ak.check(base, "vlm")
    with pytest.raises(ak.AdapterError, match="neither an adapter"):
        ak.check(tmp_path)


def test_embeddings_saved_after_a_resize_are_told(base, tmp_path):
    model = load(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model = peft.get_peft_model(model, LORA(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    for name, tensor in (weights := load_file(tmp_path / "a/adapter_model.safetensors")).items():
        weights[name] = tensor + 0.1
    save_file(weights, tmp_path / "a/adapter_model.safetensors")
    for target, silent in (("vllm", False), ("sglang", True)):
        problems = ak.check(tmp_path / "a", target).problems
        assert any("embed_tokens" in p.what or "lm_head" in p.what for p in problems), problems
        assert {p.silent for p in problems} == {silent}


@pytest.mark.parametrize("extra", [{}, {"rows": 3}], ids=["as it was", "resized"])
def test_embeddings_below_a_lora_are_vllms_own_unless_they_were_resized(extra, base, tmp_path):
    model = load(base)
    words = model.config.vocab_size + extra.get("rows", 0)
    model.resize_token_embeddings(words)
    folder = tmp_path / "a"
    model = peft.get_peft_model(model, LORA(r=8, target_modules=["embed_tokens", "q_proj"]))
    disturb(model)
    model.save_pretrained(folder)
    found = ak.check(folder, "vllm")
    assert bool(found) is not bool(extra) and (f"{words} rows" in str(found)) is bool(extra), str(found)


@pytest.mark.parametrize("beginning", ["", "model.language_model.", "transformer.model."])
def test_names_that_a_server_matches_with_nothing_are_told(beginning, base, tmp_path):
    folder = adapter(base, tmp_path / "a", LORA(r=8, target_modules=["o_proj"]))
    weights = load_file(folder / "adapter_model.safetensors")
    other = {name.replace(".model.model.", f".model.{beginning}"): value for name, value in weights.items()}
    save_file(other, folder / "adapter_model.safetensors")
    report = ak.check(folder, "vllm")
    assert [p.silent for p in report.problems] == [True] and "with nothing" in str(report)


def test_what_a_folder_would_tell_is_listed_and_stands_in_no_ones_way(base, tmp_path, capsys):
    folder = adapter(base, tmp_path / "told", LORA(r=4, target_modules=["o_proj"]))
    assert {leak.text for leak in ak.check(folder, "peft").leaks} == {str(base)}, "peft names the base by its path"
    (folder / "README.md").write_text("Trained on /home/somebody/patients/rows.csv\n\n## Samples\n- a row\n")
    (folder / "notes.txt").write_text("see https://example.org/a/b, and/or 1/2\ntoken hf_" + "a1B2" * 8 + "\n")
    report = ak.check(folder, "peft")
    assert report.ok, report
    found = {(leak.file, leak.line, leak.kind) for leak in report.leaks if leak.file != "adapter_config.json"}
    assert found == {
        ("README.md", 1, "a path"),
        ("README.md", 1, "samples of data"),
        ("notes.txt", 2, "an access token"),
    }
    assert cli.main(["check", str(folder), "--target", "peft"]) == 0
    said = capsys.readouterr().out
    assert "README.md:1 holds a path: /home/somebody/patients/rows.csv" in said and "notes.txt:2" in said
    assert "a1B2a1B2" not in said, "a token is not shown once more"
    shipped = ak.export(folder, tmp_path / "shipped", base=base)
    assert not ak.check(shipped.path if hasattr(shipped, "path") else tmp_path / "shipped", "peft").leaks


def test_what_to_paste(base, tmp_path, monkeypatch):
    """vLLM's command names base, rank and folder; Ollama's Modelfile writes conversations as the tokenizer does."""
    folder = adapter(base, tmp_path / "mine", LORA(r=12, target_modules=["o_proj"]))
    monkeypatch.chdir(base.parent)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base.name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = ak.check(folder, "vllm", max_lora_rank=16)
    assert report and f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules mine={folder}" in str(report)
    assert "not known" in str(report) and "--chat-template" not in report.start
    small.tokenizer(encoder=False, chat=True).save_pretrained(folder)
    assert f"--chat-template {folder / 'chat_template.jinja'}" in ak.check(folder, "vllm").start
    made = ak.check(folder, "ollama").start
    assert made.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n") and 'PARAMETER stop "[EOS]"' in made
    turn = "{{ range .Messages }}"
    for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant")):
        turn += f'{{{{ {word} eq .Role "{role}" }}}}{role} : {{{{ .Content }}}} [EOS] '
    assert f'TEMPLATE """{turn}{{{{ end }}}}{{{{ end }}}}assistant : """' in made


@pytest.mark.parametrize(
    ("default", "odd", "found"),
    [("", False, True), ("<s>Be kind.</s>", False, True), ("", True, False)],
    ids=["plain", "a default system message", "only the last question is marked"],
)
def test_a_template_in_gos_language_is_given_only_where_it_is_the_same(default, odd, found):
    def render(messages, asked):
        text = "" if messages[0][0] == "system" else default
        for index, (role, words) in enumerate(messages):
            last = "!" if odd and role == "user" and index == len(messages) - 1 else ""
            text += f"<{role[0]}>{words}{last}</{role[0]}>"
        return text + ("<a>" if asked else "")

    made = go_template(render)
    assert (made is not None) == found
    if default:
        assert made.startswith("{{ if not .System }}" + default + "{{ end }}")


def test_a_template_that_refuses_system_messages_gets_none():
    def render(messages, asked):
        if messages[0][0] == "system":
            raise ValueError("no system messages")
        return "".join(words for _, words in messages)

    assert go_template(render) is None
