"""A kind of quantization is one row: a toy one, added here, is loaded, counted and rounded with."""

import pytest
import torch

import adapters_kit as ak
from adapters_kit.anatomy import block_linears
from adapters_kit.merging.roundtrip import Rounding
from adapters_kit.quantization_table import BLOCK, KINDS, QUANTIZATIONS, Coded, EightBit, FourBit
from adapters_kit.training.memory import fixed_bytes
from tests.support import small

pytest.importorskip("bitsandbytes")


class Halved(FourBit):
    """fp4 whose weights come back half as large: nothing else does that."""

    def code(self, weight, name="weight", *, blocksize=BLOCK, nested=True):
        coded = super().code(weight, name, blocksize=blocksize, nested=nested)
        return Coded(coded.parts, coded.weight / 2)


def test_the_names_are_those_of_the_rows():
    assert tuple(KINDS) == QUANTIZATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_recognised_by_one_kind(kind):
    model = ak.load(small.model("llama"), quantize=kind)
    settings = model.config.quantization_config.to_dict()
    assert [name for name, row in KINDS.items() if row.is_saved_as(settings)] == [kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_as_the_layer_holds_it(kind):
    """`code` against the layer that transformers made, bit for bit."""
    model = ak.load(small.model("llama"), quantize=kind, dtype="float32")
    plain = ak.load(small.model("llama"), dtype="float32")
    path = block_linears(plain)[0]
    weight = plain.get_submodule(path).weight.data
    parts = KINDS[kind].code(weight).parts
    assert torch.equal(
        parts["weight"].flatten(), model.get_submodule(path).weight.data.flatten().view(parts["weight"].dtype)
    )


def test_a_new_row_is_all_it_takes(monkeypatch):
    monkeypatch.setitem(KINDS, "halved", Halved("fp4"))
    model = ak.load(small.model("llama"), quantize="halved", dtype="float32")
    linears = block_linears(model)
    assert type(model.get_submodule(linears[0])).__name__ == "Linear4bit"
    plain = ak.load(small.model("llama"), dtype="float32").requires_grad_(False)
    as_fp4, as_halved = (fixed_bytes(plain, "adamw", kind, linears).weights for kind in ("fp4", "halved"))
    assert as_fp4 == as_halved < fixed_bytes(plain, "adamw", "int8", linears).weights

    weight = torch.randn(8, BLOCK)
    paths = frozenset(["x"])
    assert torch.equal(
        Rounding("halved", paths, torch.float32)(weight) * 2, Rounding("fp4", paths, torch.float32)(weight)
    )


def test_eight_bits_name_what_transformers_reads():
    parts = EightBit().code(torch.randn(4, 16), "a.weight").parts
    assert set(parts) == {"a.weight", "a.SCB", "a.weight_format"}
    assert [part.dtype for part in parts.values()] == [torch.int8, torch.float32, torch.uint8]
