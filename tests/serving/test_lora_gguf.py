"""A LoRA adapter as GGUF for the .gguf file that it was trained on: names, row orders and scales of that file."""

import numpy as np
import pytest
import torch
from torch import nn

import adapters_kit as ak
from adapters_kit.errors import ShippingError, WriteError
from adapters_kit.loading.gguf import kept_weights
from tests.support import stopping, tiny

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import write  # noqa: E402


def trained(base, folder, **options):
    model = ak.wrap(ak.load(base, quantize="keep", dtype="float32"), "lora", **options)
    torch.manual_seed(0)
    for name, entry in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(entry, std=0.05)
    model.save_pretrained(folder)
    return model


def test_the_factors_are_the_updates_of_the_files_tensors(tmp_path):
    base, out = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    write("llama", base, "Q4_1")
    model = trained(base, tmp_path / "adapter", r=4, lora_alpha=12, use_rslora=True)
    ak.export(tmp_path / "adapter", out, format="gguf", dtype="float32")
    reader = gguf.GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    table = kept_weights(base, tiny.build("llama"))
    assert len(tensors) == 2 * 14
    permuted = 0
    for path, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        kept = table[f"{path}.weight"]
        a, b = (tensors[f"{kept.stored.name}.lora_{side}"] for side in "ab")
        scale = fields["adapter.lora.alpha"] / a.shape[0]
        in_file = b @ a * scale  # llama.cpp adds this to the stored rows
        in_model = in_file if kept.order is None else in_file[kept.order]
        permuted += kept.order is not None
        np.testing.assert_allclose(in_model, module.get_delta_weight("default").detach().numpy(), rtol=1e-4, atol=1e-6)
    assert permuted == 4, "q and k of two blocks"


def test_what_llama_cpp_cannot_carry_is_refused(tmp_path):
    base = tmp_path / "model.gguf"
    write("llama", base, "Q8_0")
    trained(base, tmp_path / "adapter", modules_to_save=["norm"])
    with pytest.raises(ShippingError, match=r"norm.*merge"):
        ak.export(tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    trained(base, tmp_path / "plain")
    with pytest.raises(ShippingError, match="float16 or float32"):
        ak.export(tmp_path / "plain", tmp_path / "out.gguf", format="gguf", dtype="bfloat16")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_a_full_disk_or_a_kill_leaves_the_old_file_and_nothing_else(verb, tmp_path):
    base, adapter, out = tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "out" / "x.gguf"
    write("llama", base, "Q8_0")
    trained(base, adapter, target_modules=["q_proj"])

    def make():
        if verb == "export":
            ak.export(adapter, out, format="gguf", overwrite=True)
        else:
            ak.merge(adapter, out, base=base, overwrite=True, verify="off")

    make()
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    counter = stopping.Writes(out.parent)
    with counter.watched():
        make()
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
    for number in range(1, counter.count + 1):
        with (
            pytest.raises(WriteError, match=r"Could not write .*x\.gguf: the disk is full"),
            stopping.Writes(out.parent, number, stopping.full_disk).watched(),
        ):
            make()
        assert out.read_bytes() == before[out.name]
    killed = out.parent / ".x.gguf.partial-0a1b2c3d"
    killed.mkdir()
    make()
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
