"""What is merged computes what was trained: every method and family, against peft and against the live model."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.artifacts.record import record_base
from tests.support import tiny
from tests.support.shipping import LLAMA_LINEARS, disturb, gap, load, save_base, train_on

GPT2_LINEARS = ["c_attn", "c_fc", "c_proj"]
LORA = peft.LoraConfig

METHODS = {
    "lora": ("llama", LORA(target_modules="all-linear")),
    "rslora-patterns": (
        "llama",
        LORA(
            use_rslora=True,
            target_modules=LLAMA_LINEARS,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"up_proj": 32, r"layers\.0\.self_attn\.v_proj": 5},
        ),
    ),
    "dora": ("llama", LORA(use_dora=True, target_modules=LLAMA_LINEARS)),
    "dora-conv1d": ("gpt2", LORA(use_dora=True, target_modules=GPT2_LINEARS)),
    "conv1d": ("gpt2", LORA(target_modules=GPT2_LINEARS)),
    "lora-bias": ("gpt2", LORA(lora_bias=True, target_modules=GPT2_LINEARS)),
    "all-biases": ("gpt2", LORA(bias="all", target_modules=["c_attn"])),
    "own-biases": ("gpt2", LORA(bias="lora_only", target_modules=["c_attn"])),
    "pissa": ("llama", LORA(init_lora_weights="pissa", target_modules=LLAMA_LINEARS)),
    "olora": ("llama", LORA(init_lora_weights="olora", target_modules=LLAMA_LINEARS)),
    "embeddings": ("llama", LORA(target_modules=["embed_tokens", "q_proj"])),
    "some-tokens": ("llama", LORA(target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "convolution": ("wav2vec2", LORA(target_modules=["conv_layers.0.conv", "q_proj"])),
    "experts": (
        "qwen3-moe",
        LORA(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "one-of-the-experts": ("mixtral", LORA(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "vera": ("llama", peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"])),
    "vera-from-seed": ("llama", peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], save_projection=False)),
    "oft": ("llama", peft.OFTConfig(r=8, oft_block_size=0, target_modules=LLAMA_LINEARS)),
    "boft": ("llama", peft.BOFTConfig(boft_block_size=4, target_modules=LLAMA_LINEARS)),
    "loha": ("llama", peft.LoHaConfig(target_modules=LLAMA_LINEARS)),
    "lokr": ("llama", peft.LoKrConfig(target_modules=LLAMA_LINEARS)),
    "adalora": ("llama", peft.AdaLoraConfig(target_modules=LLAMA_LINEARS, total_step=10)),
    "layer-norms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "miss": ("llama", peft.MissConfig(target_modules=LLAMA_LINEARS)),
}
KINDS = {"wav2vec2": "AutoModelForAudioClassification"}


@pytest.mark.parametrize("method", METHODS)
def test_merged_computes_what_was_trained(method, tmp_path):
    family, config = METHODS[method]
    kind = KINDS.get(family, "AutoModelForCausalLM")
    base = save_base(family, tmp_path / "base")
    trained = train_on(base, config, tmp_path / "adapter", kind=kind)
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert report.check.passed and report.check.values > 0
    untouched, merged = load(base, kind), load(tmp_path / "merged", kind)
    difference, moved = gap(trained, merged), gap(trained, untouched)
    assert difference < 3e-5, f"{difference} where the adapter itself moves the outputs by {moved}"
    assert moved > 100 * difference
    ours, theirs = merged.state_dict(), trained.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())


FAMILIES = ["bert", "albert", "deberta-v2", "distilbert", "xlnet", "gemma3", "qwen3", "deepseek-v3", "gpt-oss", "t5",
            "marian", "vit", "clip-vision", "whisper"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    base = save_base(family, tmp_path / "base")
    kind = type(tiny.build(family)).__name__
    trained = train_on(base, LORA(r=4, target_modules="all-linear"), tmp_path / "adapter", kind=kind)
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert report.changed > 0 and report.check.passed
    merged = load(tmp_path / "merged", kind)
    assert gap(trained, merged) < 1e-5 * max(1, merged(**tiny.inputs(merged))[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_bitwise_equal_to_peft(dtype, sharded, tmp_path):
    options = {"max_shard_size": "60KB"} if sharded else {}
    base = save_base("llama", tmp_path / "base", dtype, **options)
    trained = train_on(base, LORA(target_modules="all-linear"), tmp_path / "adapter", dtype=dtype)
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    trained.merge_and_unload().save_pretrained(tmp_path / "peft", **options)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    assert files == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    theirs = {
        name: tensor for path in (tmp_path / "peft").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    ours = {name: tensor for file in files for name, tensor in load_file(tmp_path / "merged" / file).items()}
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    if sharded:
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())


def test_a_base_in_the_hub_cache(tmp_path, monkeypatch):
    """By its id, offline; the cache holds links, the merged folder files."""
    base, place = save_base("llama", tmp_path / "base"), tmp_path / "hub" / "models--org--tiny"
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    snapshot = place / "snapshots" / ("0" * 40)
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(snapshot.name)
    for file in base.iterdir():
        shutil.copy(file, place / "blobs")
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source, out in (("org/tiny", "one"), (base, "other")):
        ak.merge(tmp_path / "adapter", tmp_path / out, base=source, verify="off")
    for file in base.iterdir():
        assert not (tmp_path / "one" / file.name).is_symlink()
        assert (tmp_path / "one" / file.name).read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype(dtype, tmp_path):
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base, dtype=dtype)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    assert report.check.passed


def test_untouched_bytes_and_files_are_the_bases(tmp_path):
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "tokenizer_config.json").write_text('{"base": 1}')
    (base / "pytorch_model-00001-of-00009.bin").write_bytes(b"left over")
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"trained": 1}')
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(2)}
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"trained": 1}'
    assert not list((tmp_path / "merged").glob("*.bin"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_text().strip() == (base / name).read_text().strip()


def test_the_model_card_tells_where_it_comes_from(tmp_path):
    base = save_base("llama", tmp_path / "base")
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\n# Trained on poems\n")
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "library_name: peft" not in card
    assert "# Trained on poems" in card and "same function" in card and "LlamaForCausalLM" in card


def test_a_fresh_classification_head_comes_along(tmp_path):
    tiny.build("bert").bert.save_pretrained(tmp_path / "base")
    kind, labels = "AutoModelForSequenceClassification", {0: "bad", 1: "so so", 2: "fine", 3: "good"}
    trained = train_on(
        tmp_path / "base",
        LORA(task_type="SEQ_CLS", target_modules=["query", "value"]),
        tmp_path / "adapter",
        kind=kind,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )
    record_base(tmp_path / "adapter", tmp_path / "base", trained)
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert report.added == ["classifier.bias", "classifier.weight"]
    merged = load(tmp_path / "merged", kind)
    assert gap(trained, merged) < 1e-6
    assert merged.config.id2label == labels and merged.config.architectures == ["BertForSequenceClassification"]
    assert all(name.startswith(("bert.", "classifier.")) for name in load_file(report.path / "model.safetensors"))


def test_a_head_that_nobody_saved_is_refused(tmp_path):
    tiny.build("distilbert").distilbert.save_pretrained(tmp_path / "base")
    config = LORA(target_modules=["q_lin"])
    train_on(tmp_path / "base", config, tmp_path / "adapter", kind="AutoModelForSequenceClassification", num_labels=3)
    with pytest.raises(ak.AdapterError, match=r"classifier.*random"):
        ak.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (LORA(target_modules=["wte", "c_attn"]), False),
        (LORA(target_modules=["lm_head", "c_attn"]), False),
        (LORA(target_modules=["c_attn"], modules_to_save=["wte"]), False),
        (LORA(target_modules=["c_attn"], trainable_token_indices=[3, 5]), True),
        (LORA(target_modules=["c_attn"]), True),
    ],
    ids=["embedding", "head", "whole-embedding", "some-tokens", "neither"],
)
def test_tied_embeddings(config, tied, tmp_path):
    """An update of one of the two unties them: adding it to both would be another model."""
    base = save_base("gpt2", tmp_path / "base")
    trained = train_on(base, config, tmp_path / "adapter")
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = load(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()) == tied
    assert gap(trained, merged) < 1e-5


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", LORA(target_modules=["q_proj"])),
        ("bart", LORA(target_modules=["q_proj"])),  # whose biases of the words are a buffer
        ("bart", LORA(target_modules=["q_proj"], modules_to_save=["shared", "lm_head"])),  # what was tied to both parts
        ("t5", LORA(target_modules=["q"], modules_to_save=["shared", "lm_head"])),
    ],
)
@pytest.mark.parametrize("more", [6, -6])
def test_added_and_dropped_tokens(family, config, more, tmp_path):
    kind = "AutoModelForCausalLM" if family == "llama" else "AutoModelForSeq2SeqLM"
    base = save_base(family, tmp_path / "base")
    model = getattr(transformers, kind).from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCAB + more)
    model = peft.get_peft_model(model, config)
    disturb(model)
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = load(tmp_path / "merged", kind)
    assert merged.config.vocab_size == merged.lm_head.out_features == tiny.VOCAB + more
    ids = torch.tensor([[1, tiny.VOCAB + more - 1, 7]])
    batch = {"input_ids": ids} | ({} if family == "llama" else {"decoder_input_ids": ids.flip(1)})
    with torch.no_grad():
        apart = (model(**batch).logits - merged(**batch).logits).abs().max().item()
    assert apart < (1e-4 if family != "t5" else 1e-2)  # it reads rows that nobody saved: their mean, without the draw


def test_what_cannot_be_merged_says_why(tmp_path):
    base = save_base("llama", tmp_path / "base")
    cases = {
        "virtual tokens": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "no bias": LORA(lora_bias=True, target_modules=["q_proj"]),
        "cannot be repeated": LORA(init_lora_weights="pissa_niter_4", target_modules=["q_proj"]),
    }
    for index, (reason, config) in enumerate(cases.items()):
        train_on(base, config, tmp_path / f"adapter{index}")
        with pytest.raises(ak.AdapterError, match=reason):
            ak.merge(tmp_path / f"adapter{index}", tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_full_verification_finds_a_single_wrong_value(tmp_path, monkeypatch):
    """One weight off by one unit in the last place is below every tolerance on outputs; so is a lost copy."""
    from adapters_kit.merging import merge as module

    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    few = ak.merge(tmp_path / "adapter", tmp_path / "sample", base=base).check.values
    assert ak.merge(tmp_path / "adapter", tmp_path / "full", base=base, verify="full").check.values == 8 * few
    write = module.write
    for part in ("q_proj", "k_proj"):

        def damaged(layout, checkpoint, changed, folder, part=part):
            hashes = write(layout, checkpoint, changed, folder)
            tensors = load_file(folder / "model.safetensors")
            name = next(name for name in tensors if part in name)
            tensors[name].view(torch.int16)[5, 7] += 1
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return hashes

        monkeypatch.setattr(module, "write", damaged)
        with pytest.raises(ak.AdapterError, match="check the disk"):
            ak.merge(tmp_path / "adapter", tmp_path / "damaged", base=base, verify="full")
        assert not (tmp_path / "damaged").exists()
