"""LoRA rounded into the blocks of its GGUF file: nearer to what was trained than the file was, and said how near."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import adapters_kit as ak
from adapters_kit.errors import ShippingError
from adapters_kit.merging import lora_rounding

gguf = pytest.importorskip("gguf")
from tests.support import tiny  # noqa: E402
from tests.support.gguf_files import write  # noqa: E402


def trained(base, folder, size=0.05, **options):
    model = ak.wrap(ak.load(base, quantize="keep", dtype="float32"), "lora", r=4, **options)
    torch.manual_seed(0)
    for name, entry in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(entry, std=size)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("Q4_1", 0.85), ("Q4_0", 0.75), ("Q8_0", 0.95)])
def test_most_of_the_change_arrives(kind, least, tmp_path):
    base, out = tmp_path / "model.gguf", tmp_path / "tuned.gguf"
    write("llama", base, kind)
    trained(base, tmp_path / "adapter")
    report = ak.merge(tmp_path / "adapter", out)
    assert 1 - report.kl / report.kl_base > least, str(report)
    assert report.tensors == 14 and f"{1 - report.kl / report.kl_base:.1%} of the change arrived" in str(report)
    before, after = np.fromfile(base, np.uint8), np.fromfile(out, np.uint8)
    inside = np.zeros(len(before), bool)
    for tensor in gguf.GGUFReader(base).tensors:
        if tensor.name.startswith("blk.") and "norm" not in tensor.name:
            inside[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = True
    assert len(before) == len(after) and not (before != after)[~inside].any()


def test_calibration_is_text_of_the_users(tmp_path, monkeypatch):
    """(The tiny file's vocabulary has no letters, so a tokenizer of letters stands in.)"""
    monkeypatch.setattr(
        lora_rounding,
        "load_processor",
        lambda _: lambda text: SimpleNamespace(input_ids=[3 + ord(c) % 100 for c in text]),
    )
    monkeypatch.setattr(lora_rounding, "TEXTS", 8)
    base = tmp_path / "model.gguf"
    write("llama", base, "Q4_1")
    trained(base, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("It was a long night, and nobody came. " * 40, encoding="utf-8")
    report = ak.merge(tmp_path / "adapter", tmp_path / "tuned.gguf", calibration=tmp_path / "text.txt")
    assert report.kl < report.kl_base
    with pytest.raises(ShippingError, match=r"calibration has \d+ tokens"):
        ak.merge(tmp_path / "adapter", tmp_path / "other.gguf", calibration=["Short."])
    assert not (tmp_path / "other.gguf").exists()


def test_layers_that_no_format_takes_are_named(tmp_path):
    base = tmp_path / "model.gguf"
    write("llama", base, "IQ4_NL")
    trained(base, tmp_path / "adapter")
    with pytest.raises(ShippingError, match="not evenly spaced"):
        ak.merge(tmp_path / "adapter", tmp_path / "tuned.gguf")
    assert not (tmp_path / "tuned.gguf").exists()


def test_what_a_file_cannot_take_is_refused(tmp_path, monkeypatch):
    """Nothing that was asked for is dropped: a second adapter, a dtype, a calibration."""
    monkeypatch.chdir(tmp_path)
    write("llama", tmp_path / "model.gguf", "Q4_1")
    trained("model.gguf", "adapter")
    with pytest.raises(ShippingError, match="takes in one adapter, and these are 2"):
        ak.merge(["adapter", "adapter"], "tuned.gguf")
    with pytest.raises(ShippingError, match=r"dtype=: tuned.gguf keeps"):
        ak.merge("adapter", "tuned.gguf", dtype="float16")
    with pytest.raises(
        ShippingError, match=r"calibration is for a LoRA that goes into a .gguf file, and merged is none"
    ):
        ak.merge("adapter", "merged", calibration=["a"])
    with pytest.raises(ShippingError, match=r"no-such.txt is no text file"):
        ak.merge("adapter", "tuned.gguf", calibration="no-such.txt")
    assert not (tmp_path / "tuned.gguf").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("between", [False, True], ids=["one after the other", "something between"])
def test_blocks_are_run_once_and_see_what_they_would_see(between):
    """Each block's inputs are those of the whole model, with the blocks before it as they are by then."""
    base = tiny.build("llama").eval().requires_grad_(False)
    layers = base.model.layers
    if between:
        layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
    tokens = torch.arange(3, 35).view(4, 8)
    chain = lora_rounding._Chain(base, tokens)
    assert chain._plain is not between
    for number, layer in enumerate(layers):
        inside = {name: layer.get_submodule(name) for name in ("self_attn.q_proj", "mlp.down_proj")}
        path = f"model.layers.{number}"
        expected = lora_rounding._hessians(inside, lambda: base(input_ids=tokens))
        got = lora_rounding._hessians(inside, chain.run(path))
        for name in inside:
            torch.testing.assert_close(got[name], expected[name])
        layer.mlp.down_proj.weight.data *= 1.2  # as if rounded
        chain.leave(path)
