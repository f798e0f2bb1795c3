"""`blocks`: gradients against plain autograd, saving and switching like any peft method, and a merge into the file."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import adapters_kit as ak
from adapters_kit.errors import AdapterError, ShippingError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.ggml import FORMATS, codes, read_field
from adapters_kit.methods.blocks.layer import BlocksLayer
from tests.support import tiny

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import pack, write  # noqa: E402

ROWS, COLUMNS = 8, 512
# What the installed transformers reads: older versions know fewer K-quants.
KNOWN = {given.name for given in FORMATS.values()}
MINIMA = [kind for kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") if kind in KNOWN]
SCALES = [kind for kind in (*MINIMA, "Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "IQ4_NL") if kind in KNOWN]
WIDE = {"hidden_size": 256, "intermediate_size": 256}


def number(kind: str) -> int:
    return int(gguf.GGMLQuantizationType[kind])


def one_layer(kind: str, train: str, r: int | None) -> PeftModel:
    raw = pack(
        np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32), gguf.GGMLQuantizationType[kind]
    )
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    packed = BlockTensor(torch.from_numpy(raw.copy()), number(kind), torch.float32)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    model = nn.ModuleDict({"proj": linear})
    model.forward = lambda x: model["proj"](x)
    from peft import get_peft_model

    from adapters_kit.methods.blocks.config import BlocksConfig

    wrapped = get_peft_model(model, BlocksConfig(train=train, r=r, target_modules=["proj"]))
    for entry in wrapped.parameters():
        if entry.requires_grad:
            nn.init.normal_(entry, std=0.1)
    return wrapped


def by_definition(layer: BlocksLayer, x: torch.Tensor) -> torch.Tensor:
    """The output with the whole weight written down in float64: (d + d s) u + (m + Δm) v."""
    weight = layer.base_layer.weight
    given, minima, scales = FORMATS[weight.kind], *layer.changes("default")
    wide = weight.unpack(torch.float32).double()
    if minima is not None:
        v = codes(weight.raw, weight.kind, minimum=True, dtype=torch.float64)
        wide = wide + minima.double().repeat_interleave(given.weights, 1) * v
    if scales is not None:
        u = codes(weight.raw, weight.kind, minimum=False, dtype=torch.float64)
        d = read_field(weight.raw, weight.kind, given.scale).double() * scales.double()
        wide = wide + d.repeat_interleave(given.weights, 1) * u
    return x.double() @ wide.t()


@pytest.mark.parametrize("r", [2, None])
@pytest.mark.parametrize(
    ("kind", "train"), [(k, "minima") for k in MINIMA] + [(k, "scales") for k in SCALES] + [("Q4_1", "both")]
)
def test_output_and_gradients_are_those_of_the_definition(kind, train, r):
    model = one_layer(kind, train, r)
    layer = model.base_model.model["proj"]
    x = torch.randn(3, 4, COLUMNS, requires_grad=True)
    y = model(x)
    upstream = torch.randn_like(y)
    trained = [entry for entry in model.parameters() if entry.requires_grad]
    got = torch.autograd.grad(y, [x, *trained], upstream)
    twin = x.detach().clone().requires_grad_()
    expected = by_definition(layer, twin)
    wanted = torch.autograd.grad(expected, [twin, *trained], upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q8_0"])
def test_merging_in_memory_writes_fp16_and_unmerging_takes_it_back(kind):
    train = "scales" if kind == "Q8_0" else "both"
    model = one_layer(kind, train, None)
    layer = model.base_model.model["proj"]
    for change in [*layer.blocks_minima.values(), *layer.blocks_scales.values()]:
        change.full.data *= 0.02
    x = torch.randn(4, COLUMNS)
    with torch.no_grad():
        expected, before = model(x), layer.base_layer.weight.raw.clone()
        layer.merge(safe_merge=True)
        merged = model(x)
        torch.testing.assert_close(merged, expected, rtol=2e-2, atol=2e-3 * float(expected.abs().max()))
        assert not torch.equal(layer.base_layer.weight.raw, before)
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight.raw, before) and torch.equal(model(x), expected)


def trained(file, **options) -> PeftModel:
    model = ak.wrap(ak.load(file, quantize="keep", dtype="float32"), "blocks", **options)
    torch.manual_seed(3)
    for name, entry in model.named_parameters():
        if entry.requires_grad:
            nn.init.normal_(entry, std=0.2 if "scales" in name and options.get("train") != "both" else 0.02)
    return model


def test_auto_trains_of_each_layer_what_its_format_stores(tmp_path):
    """Files mix formats: minima where there are some, scales elsewhere, and layers with neither are left alone."""
    models = {}
    for kind in ("Q4_1", "Q8_0", "MXFP4"):
        write("llama", tmp_path / f"{kind}.gguf", kind)
        models[kind] = ak.load(tmp_path / f"{kind}.gguf", quantize="keep", dtype="float32")
    model = models["Q4_1"]
    model.model.layers[0].mlp = models["Q8_0"].model.layers[0].mlp
    model.model.layers[1].mlp = models["MXFP4"].model.layers[1].mlp
    names = [name for name, entry in ak.wrap(model, "blocks", r=2).named_parameters() if entry.requires_grad]
    in_mlp = [name for name in names if "layers.0.mlp" in name]
    assert in_mlp and all("scales" in name for name in in_mlp)
    assert not any("layers.1.mlp" in name for name in names)
    assert sum("minima" in name for name in names) == 2 * 4  # q, k, v, o


@pytest.mark.parametrize(
    ("kind", "options", "train"),
    [("Q4_1", {}, "auto"), ("Q4_1", {}, "both"), ("Q8_0", {}, "auto"), ("Q4_K", WIDE, "both")],
)
def test_the_file_computes_what_was_trained_and_differs_in_nothing_else(kind, options, train, tmp_path):
    base, out = tmp_path / "model.gguf", tmp_path / "tuned.gguf"
    write("llama", base, kind, **options)
    model = trained(base, train=train, r=4)
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    for name, entry in model.named_parameters():
        assert (entry.grad is not None and entry.grad.any()) == entry.requires_grad, name
    model.save_pretrained(tmp_path / "adapter")
    report = ak.merge(tmp_path / "adapter", out)
    assert report.kl < 0.02 * report.kl_base and "every other byte" in str(report)

    reader = gguf.GGUFReader(base)
    before, after = np.fromfile(base, np.uint8), np.fromfile(out, np.uint8)
    assert len(before) == len(after)
    given = FORMATS[number(kind)]
    fields = [given.minimum if kind == "Q4_1" else given.scale] if train == "auto" else [given.scale, given.minimum]
    allowed = np.zeros(len(before), bool)
    for tensor in reader.tensors:
        if int(tensor.tensor_type) == number(kind) and tensor.name.startswith("blk."):
            blocks = allowed[tensor.data_offset : tensor.data_offset + tensor.n_bytes].reshape(-1, given.nbytes)
            for offset in fields:
                blocks[:, offset : offset + 2] = True
    assert (before != after).any() and not (before != after)[~allowed].any()

    with torch.no_grad():
        again = ak.load(out, quantize="keep", dtype="float32")
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
        reloaded = ak.wrap(ak.load(base, quantize="keep", dtype="float32"), tmp_path / "adapter").eval()
        assert torch.equal(reloaded(**batch).logits, expected)
    told = json.loads((tmp_path / "tuned.gguf.adapters_kit.json").read_text())
    assert told["base"] == "model.gguf" and len(told["tensors"]) == 14 and told["trained"] == train


def test_refusals_say_what_to_do(tmp_path):
    base = tmp_path / "model.gguf"
    write("llama", base, "Q8_0")
    with pytest.raises(AdapterError, match=r"store no minima.*train='scales'"):
        trained(base, train="minima")
    with pytest.raises(AdapterError, match=r"q_proj lies in Q8_0 blocks.*train='auto'"):
        trained(base, train="minima", target_modules=["q_proj"])
    write("llama", tmp_path / "fp4.gguf", "MXFP4")
    with pytest.raises(AdapterError, match=r"\(MXFP4\) store no fp16 scales.*LoRA"):
        trained(tmp_path / "fp4.gguf")
    with pytest.raises(AdapterError, match='quantize="keep"'):
        ak.wrap(tiny.build("llama"), "blocks")
    with pytest.raises(AdapterError, match=r"train='codes'"):
        trained(base, train="codes")
    trained(base, train="scales").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ShippingError, match="the base itself"):
        ak.merge(tmp_path / "adapter", base, overwrite=True)
    with pytest.raises(ShippingError, match=r"merged\.gguf"):
        ak.merge(tmp_path / "adapter", tmp_path / "folder")
    ak.wrap(ak.load(base, quantize="keep"), "ia3").save_pretrained(tmp_path / "ia3")
    with pytest.raises(ShippingError, match="export"):
        ak.merge(tmp_path / "ia3", tmp_path / "out.gguf")
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(ShippingError, match="overwrite"):
        ak.merge(tmp_path / "adapter", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
