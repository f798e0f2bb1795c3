"""What is merged computes what was trained: every method and family, against peft and against the live model."""

import json
import subprocess
import sys
from dataclasses import replace

import bitsandbytes
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from shipping_tools import LLAMA_LINEARS, gap, load, save_base, train_on

import adapters_kit as ak
from adapters_kit.artifacts.adapter import open_adapter
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.record import record_base
from adapters_kit.loading import load as load_quantized
from adapters_kit.shipping.direct import find_direct
from adapters_kit.shipping.plan import changed, plan
from adapters_kit.shipping.quantized import roundtrip

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
    assert (tmp_path / "merged" / "config.json").read_text().strip() == (base / "config.json").read_text().strip()


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


def test_added_tokens(tmp_path):
    base = save_base("llama", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCAB + 6)
    model = peft.get_peft_model(model, LORA(target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == merged.lm_head.out_features == tiny.VOCAB + 6
    ids = torch.tensor([[1, tiny.VOCAB, tiny.VOCAB + 5, 7]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, merged(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantized_base_is_merged_dequantized(family, quantize, tmp_path):
    """GPT-2 stores its linears transposed, and bitsandbytes quantizes them the other way round."""
    base = save_base(family, tmp_path / "base")
    config = LORA(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"] if family == "llama" else ["c_attn"])
    model = peft.get_peft_model(load_quantized(base, quantize=quantize), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    record_base(tmp_path / "adapter", base, model)
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged")
    linears = {name for name in load_file(base / "model.safetensors") if ".weight" in name and "proj" in name}
    assert report.changed >= len(linears)  # those without an update too: they were rounded in training
    original = ak.merge(tmp_path / "adapter", tmp_path / "original", base="original", dtype="bfloat16")
    assert any("not the trained model" in note for note in original.notes)
    # Weight by weight: dequantized + update, rounded once.
    name = "model.layers.0.self_attn.q_proj" if family == "llama" else "transformer.h.0.attn.c_attn"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].bfloat16()
    settings = json.loads((tmp_path / "adapter" / "adapters_kit.json").read_text())["quantize"]
    assert settings["type"] == quantize and name in settings["modules"]
    layer = model.get_submodule(f"base_model.model.{name}")
    held = roundtrip(weight, settings) if family == "llama" else roundtrip(weight.T, settings).T
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 1.0
    expected = held.double() + (update if family == "llama" else update.T)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(merged.double(), expected, rtol=2**-8, atol=1e-6)


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


@pytest.mark.parametrize("way", ["direct", "by peft"])
def test_a_wrong_merge_is_caught(way, tmp_path, monkeypatch):
    """The check is worth something: a merge with half the scale does not pass it."""
    from adapters_kit.shipping import deltas
    from adapters_kit.shipping.direct import Direct

    def halved(unit, adapter, read):
        merged, base = merge_unit(unit, adapter, read), {name: read(name).float() for name in unit.shapes}
        return {name: (value + base[name]) / 2 for name, value in merged.items()}

    merge_unit, changed = deltas.merge_unit, Direct.changed
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    patterns = {} if way == "direct" else {"rank_pattern": {"q_proj": 4}}
    train_on(base, LORA(target_modules=["q_proj"], **patterns), tmp_path / "adapter")
    monkeypatch.setattr(deltas, "merge_unit", halved)
    monkeypatch.setattr(Direct, "changed", lambda self, base: changed(replace(self, scale=self.scale / 2), base))
    with pytest.raises(ak.AdapterError, match="not the trained one"):
        ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


DIRECT = {
    "plain": ("llama", {"target_modules": "all-linear"}, True),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, True),
    "a regular expression": ("llama", {"target_modules": r".*\.1\..*\.(up|down)_proj"}, True),
    "patterns": ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}}, False),
    "stored transposed": ("gpt2", {"target_modules": ["c_proj"]}, False),
    "a tied head": ("gpt2", {"target_modules": ["lm_head"]}, False),
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, False),
    "moved base": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, False),
}


@pytest.mark.parametrize("case", DIRECT)
def test_plain_lora_needs_no_model(case, tmp_path):
    """Without a model exactly where the files leave no doubt; the bytes are those of the way through peft."""
    family, options, direct = DIRECT[case]
    base = save_base(family, tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(**options), tmp_path / "adapter", dtype=torch.bfloat16)
    adapter = open_adapter(tmp_path / "adapter")
    with open_checkpoint(base) as checkpoint:
        found = find_direct(adapter, checkpoint, json.loads((base / "config.json").read_text()))
        assert (found is not None) == direct
        if found:
            job = plan(adapter, checkpoint, None)
            assert job.computed == found.factors.keys()
            ours = {name: torch.cat([block.clone() for block in blocks]) for name, blocks in found.changed(checkpoint)}
            theirs = {name: value.clone() for name, value in changed(job)}
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("rank", [1, 5, 16, 300])
@pytest.mark.parametrize("scale", [2.0, 1.7])
def test_a_merge_in_blocks_of_rows_is_that_of_the_whole(rank, scale, tmp_path, monkeypatch):
    """To the bit, wherever the blocks end; matrices are read, multiplied and written a few rows at a time."""
    from adapters_kit.shipping import direct

    shapes = {f"{rows}.weight": (rows, columns) for rows, columns in ((1, 64), (65, 33), (129, 96), (993, 40))}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    factors = {name: (torch.randn(rank, c), torch.randn(r, rank)) for name, (r, c) in shapes.items()}
    monkeypatch.setattr(direct, "BLOCK", 1300)
    with open_checkpoint(tmp_path) as checkpoint:
        found = direct.Direct(scale, factors).changed(checkpoint)
        merged = {name: [block.clone() for block in blocks] for name, blocks in found}
        assert merged.keys() == shapes.keys() and max(map(len, merged.values())) > 20
        for name, (a, b) in factors.items():
            assert torch.equal(torch.cat(merged[name]), checkpoint.read(name) + (b @ a) * scale), name


def test_a_plain_merge_imports_neither_peft_nor_transformers(tmp_path):
    base = save_base("llama", tmp_path / "base")
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    code = (
        "import sys, adapters_kit as ak; ak.merge(*sys.argv[1:3], base=sys.argv[3], verify='off');"
        "assert not {'peft', 'transformers', 'accelerate'} & sys.modules.keys()"
    )
    paths = [tmp_path / name for name in ("adapter", "merged", "base")]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_full_verification_finds_a_single_wrong_value(tmp_path, monkeypatch):
    """One weight off by one unit in the last place is below every tolerance on outputs; so is a lost copy."""
    from adapters_kit.shipping import merge as module

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


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "nf4"), ("llama", "fp4"), ("llama", "int8"), ("gpt2", "nf4"), ("gpt2", "int8")]
)
def test_requantized(family, kind, tmp_path, capsys):
    """What is loaded is the merged weights rounded, and the survival is that of the definition in float64."""
    base = save_base(family, tmp_path / "base", torch.bfloat16, max_shard_size="60KB")
    linears = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    train_on(base, LORA(target_modules=linears), tmp_path / "adapter", scale=0.05)
    plain = ak.merge(tmp_path / "adapter", tmp_path / "plain", base=base)
    report = ak.merge(tmp_path / "adapter", tmp_path / "small", base=base, quantize=kind)
    assert report.check == plain.check and report.nbytes < plain.nbytes
    merged, original = load(tmp_path / "plain").state_dict(), load(base).state_dict()
    settings = {"type": kind, "blocksize": 64, "nested": True}
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    arrived = size = 0.0
    for name, module in small.named_modules():
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        held = module.weight.data
        if kind != "int8":
            assert module.weight.quant_state.quant_type == kind
            held = bitsandbytes.functional.dequantize_4bit(held, module.weight.quant_state)
        else:
            held = bitsandbytes.functional.int8_vectorwise_dequant(held, module.weight.SCB)
        one, other = merged[f"{name}.weight"].bfloat16(), original[f"{name}.weight"].bfloat16()
        one, other = (one.T.contiguous(), other.T.contiguous()) if family == "gpt2" else (one, other)
        after, before = roundtrip(one, settings).double(), roundtrip(other, settings).double()
        assert torch.equal(held.double(), after)
        update = one.double() - other.double()
        arrived, size = arrived + ((after - before) * update).sum().item(), size + update.square().sum().item()
    assert size > 0 and report.survival.overall == pytest.approx(arrived / size, rel=1e-5)
    assert f"{report.survival.overall:.1%} of the update survived" in str(report)
    assert all(any(part in name for part in linears) for name in report.survival.tensors)
    files = json.loads((tmp_path / "small" / "manifest.json").read_text())["files"]
    assert files.keys() == {path.name for path in (tmp_path / "small").iterdir()} - {"manifest.json"}
    with open_checkpoint(tmp_path / "small"), torch.no_grad():
        ids = torch.arange(5, 15)[None]
        assert small(ids).logits.isfinite().all()


def test_a_small_update_drowns_in_four_bits_and_that_is_told(tmp_path):
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter", scale=0.005)
    nf4 = ak.merge(tmp_path / "adapter", tmp_path / "nf4", base=base, quantize="nf4", verify="off").survival
    assert nf4.noise > 1 and "Ship the adapter beside" in str(nf4)
    with pytest.raises(ak.AdapterError, match=r"quantize='int4'.*'nf4'"):
        ak.merge(tmp_path / "adapter", tmp_path / "x", base=base, quantize="int4")
