"""quantize="keep": the file's blocks are the model's weights, and every method of the linear family trains on them."""

import re
import shutil

import pytest
import torch

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import AdapterError, ModelError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.fuse import fuse_report
from tests.support import small, tiny

pytest.importorskip("gguf")
from tests.support.gguf_files import write

WIDE = {"hidden_size": 256, "intermediate_size": 256}  # K-quants have blocks of 256
CASES = [("llama", "Q4_1", {}), ("llama", "Q5_0", {}), ("llama", "Q8_0", {}), ("llama", "Q4_K", WIDE)]
CASES += [("qwen3-moe", "Q4_1", {}), ("qwen3-moe", "Q4_K", {"hidden_size": 256})]


def pair(tmp_path, name, kind, options):
    file = tmp_path / "model.gguf"
    write(name, file, kind, **options)
    return ak.load(file, quantize="keep", dtype="float32"), ak.load(file, dtype="float32")


def packed(model) -> list[str]:
    return [path for path, entry in model.named_parameters() if isinstance(entry, BlockTensor)]


@pytest.mark.parametrize(("name", "kind", "options"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_the_model_is_the_unpacked_one_bit_by_bit(name, kind, options, tmp_path):
    kept, plain = pair(tmp_path, name, kind, options)
    assert len(packed(kept)) >= 12 and "model.layers.0.self_attn.q_proj.weight" in packed(kept)
    for path, entry in kept.named_parameters():
        value = entry.unpack() if isinstance(entry, BlockTensor) else entry
        assert torch.equal(value, plain.get_parameter(path)), path
    batch = tiny.inputs(kept)
    with torch.no_grad():
        torch.testing.assert_close(kept(**batch).logits, plain(**batch).logits)


def test_transposed_weights_are_unpacked_and_said(tmp_path, caplog):
    """GPT-2 stores its linears the other way round: these become plain tensors."""
    kept, plain = pair(tmp_path, "gpt2", "Q8_0", {})
    assert "8 tensors of model.gguf are unpacked, such as transformer.h.0.attn.c_attn.weight (Q8_0" in caplog.text
    assert packed(kept) == ["transformer.wte.weight", "transformer.wpe.weight"]
    with torch.no_grad():
        batch = tiny.inputs(kept)
        torch.testing.assert_close(kept(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "ia3", "houlsby", "prefix", "vera", "oft", "loha"])
def test_methods_train_on_blocks_as_on_the_unpacked_weights(method, tmp_path):
    kept, plain = pair(tmp_path, "llama", "Q4_1", {})
    torch.manual_seed(0)
    first = ak.wrap(kept, method)
    torch.manual_seed(0)
    second = ak.wrap(plain, method)
    generator = torch.Generator().manual_seed(1)
    for (name, ours), (other, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other and ours.requires_grad == theirs.requires_grad
        if ours.requires_grad:
            value = torch.randn(ours.shape, generator=generator) * 0.05
            ours.data, theirs.data = ours.data + value, theirs.data + value
    batch = tiny.inputs(first, labels=True)
    for model in (first, second):
        model.eval()(**batch).loss.backward()
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert ours.grad is None, name
    if method == "lora":
        assert not fuse_report(first).plain


def test_lora_on_experts_in_their_blocks(tmp_path):
    """The file holds gate and up of all experts as two tensors, the model as one; every way of computing them."""
    kept, plain = pair(tmp_path, "qwen3-moe", "Q4_1", {})
    experts = [path for path in packed(kept) if "experts" in path]
    assert len(experts) == 4 and kept.get_parameter(experts[0]).shape == (4, 2 * 768, 64)
    held = sum(entry.packed_bytes for entry in kept.parameters() if isinstance(entry, BlockTensor))
    assert held < 0.2 * sum(plain.get_parameter(path).nbytes for path in packed(kept))
    models = [ak.wrap(one, "lora", r=2) for one in (kept, plain)]
    for ours, theirs in zip(*(one.parameters() for one in models), strict=True):
        if ours.requires_grad:
            theirs.data = ours.data = torch.randn_like(ours) * 0.1
    batch = tiny.inputs(kept, labels=True)
    for way in ("eager", "batched_mm", "grouped_mm"):
        for model in models:
            model.zero_grad()
            model.get_base_model().set_experts_implementation(way)
            model.eval()(**batch).loss.backward()
        for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if ours.requires_grad:
                assert ours.grad.any() or "experts" in name, name  # an expert may have had no token
                torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert any("experts" in name and entry.requires_grad for name, entry in models[0].named_parameters())


def test_a_run_on_a_kept_base_trains_saves_and_merges(tmp_path):
    kept, _ = pair(tmp_path, "llama", "Q4_1", {})
    model = ak.wrap(kept, "lora", r=4)
    for name, entry in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(entry, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "model.gguf")
    assert report.check.passed
    batch = tiny.inputs(kept)
    with torch.no_grad():
        merged = ak.load(tmp_path / "merged", dtype="float32")
        torch.testing.assert_close(merged(**batch).logits, model.eval()(**batch).logits, rtol=1e-3, atol=1e-4)


def test_keep_is_for_gguf_files(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"keeps the weights of a \.gguf file.*nf4"):
        ak.load(tmp_path, quantize="keep")


def test_methods_that_would_move_the_weights_are_refused(tmp_path):
    kept, _ = pair(tmp_path, "llama", "Q4_1", {})
    with pytest.raises(AdapterError, match="pissa"):
        ak.wrap(kept, "pissa")


def test_a_weight_in_blocks_is_not_trained_as_a_whole(tmp_path):
    kept, _ = pair(tmp_path, "llama", "Q4_1", {})
    assert not any(entry.requires_grad for entry in kept.parameters() if isinstance(entry, BlockTensor))
    with pytest.raises(ModelError, match="full fine-tuning"):
        kept.requires_grad_(True)
    with pytest.raises(ModelError, match="modules_to_save"):
        ak.wrap(kept, "lora", modules_to_save=["lm_head"])
    assert not hasattr(kept, "peft_config") and type(kept.lm_head) is torch.nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["keep", None])
def test_the_card_s_code_loads_what_was_trained_and_check_s_command_ships_it(quantize, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    write("llama", folder / "model.gguf", "Q4_1")
    words = [{"text": f"{row['name']} {row['answer']}"} for row in small.questions(12)]
    rows = small.write_jsonl(tmp_path / "rows.jsonl", words)
    recipe = {
        "model": str(folder / "model.gguf"),
        "quantize": quantize,
        "task": "causal-lm",
        "data": {"train": str(rows), "test_size": 4},
    }
    recipe |= {
        "method": "blocks" if quantize else "lora",
        "training": {"epochs": 1, "learning_rate": 0.05, "batch_size": 4},
    }
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    shutil.copytree(run.adapter, folder / "adapter")
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "adapter/README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(code, found)
    batch = {"input_ids": torch.arange(3, 12)[None]}
    with torch.no_grad():
        ours = ak.wrap(ak.load(folder / "model.gguf", quantize=quantize), run.adapter).eval()(**batch).logits
        torch.testing.assert_close(found["model"].eval()(**batch).logits, ours)
    if quantize:
        fix = ak.check(run, "ollama").problems[0].fix
        assert fix == f"adapters-kit merge {run.adapter} merged.gguf" and cli.main(fix.split()[1:]) == 0
        assert (folder / "merged.gguf").stat().st_size >= (folder / "model.gguf").stat().st_size
