"""Block formats: read as the gguf package reads them, taken apart into codes and fields, and put together again."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from adapters_kit.errors import ModelError
from adapters_kit.kernels import block_tensor
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.ggml import FORMATS, codes, dequantize, read_field, write_field

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import pack  # noqa: E402

ROWS, COLUMNS = 6, 512
WITH_SCALE = [kind for kind, given in FORMATS.items() if given.scale is not None]


def raw(kind: int, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    value = np.random.default_rng(kind).normal(size=(rows, columns)).astype(np.float32)
    return torch.from_numpy(pack(value, gguf.GGMLQuantizationType(kind)).copy())


def named(kinds):
    return [pytest.param(kind, id=FORMATS[kind].name) for kind in kinds]


@pytest.mark.parametrize("kind", named(FORMATS))
def test_weights_are_those_of_the_gguf_package(kind):
    packed = raw(kind)
    expected = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(dequantize(packed, kind, torch.float32).numpy(), expected)


@pytest.mark.parametrize("kind", named(WITH_SCALE))
def test_codes_and_fields_make_up_the_weights(kind):
    packed, given = raw(kind), FORMATS[kind]
    d = read_field(packed, kind, given.scale).float().repeat_interleave(given.weights, 1)
    total = d * codes(packed, kind, minimum=False, dtype=torch.float32)
    if given.minimum is not None:
        v = codes(packed, kind, minimum=True, dtype=torch.float32)
        runs = v.unflatten(1, (-1, given.run))
        assert torch.equal(runs, runs[..., :1].expand_as(runs)), "one v for each run"
        total += read_field(packed, kind, given.minimum).float().repeat_interleave(given.weights, 1) * v
    torch.testing.assert_close(total, dequantize(packed, kind, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("kind", named(WITH_SCALE))
def test_writing_a_field_changes_two_bytes_of_a_block(kind):
    packed, given = raw(kind), FORMATS[kind]
    changed = packed.clone()
    value = torch.rand(ROWS, COLUMNS // given.weights)
    write_field(changed, kind, given.scale, value)
    assert torch.equal(read_field(changed, kind, given.scale), value.half())
    different = (changed != packed).view(ROWS, -1, given.nbytes).any(0).any(0).nonzero().flatten()
    assert set(different.tolist()) <= {given.scale, given.scale + 1}


def layer(kind: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(COLUMNS, ROWS)
    linear.weight = nn.Parameter(BlockTensor(raw(kind), kind, torch.float32), requires_grad=False)
    return linear.to(dtype)


@pytest.mark.parametrize("at_once", [1 << 22, COLUMNS * 2], ids=["whole", "in pieces"])
@pytest.mark.parametrize("kind", named([3, 8, 12, 14]))
def test_a_linear_in_blocks_computes_and_differentiates_like_its_unpacked_twin(kind, at_once, monkeypatch):
    monkeypatch.setattr(block_tensor, "AT_ONCE", at_once)
    linear = layer(kind)
    weight = linear.weight.unpack()
    x = torch.randn(2, 5, COLUMNS, requires_grad=True)
    y = linear(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(y, x.detach() @ weight.t() + linear.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-4, atol=1e-4)


def test_backward_keeps_the_blocks_and_no_unpacked_weight():
    linear, kept = layer(3), []
    x = torch.randn(4, COLUMNS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    assert kept and all(isinstance(t, BlockTensor) for t in kept if t.ndim == 2 and t.numel() == ROWS * COLUMNS)


def test_it_is_a_parameter_like_any_other():
    linear = layer(3)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert isinstance(twin.weight, BlockTensor) and isinstance(twin.weight, nn.Parameter)
        assert torch.equal(twin.weight.raw, linear.weight.raw) and not twin.weight.requires_grad
    assert linear.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert linear.weight.packed_bytes == ROWS * COLUMNS // 32 * 20
    table = nn.Embedding(ROWS, COLUMNS)
    table.weight = linear.weight
    index = torch.tensor([[0, 5], [3, 3]])
    assert torch.equal(table(index), linear.weight.unpack()[index])
    with pytest.raises(ModelError, match="Q4_1 blocks"):
        linear.weight.data.mul_(2)


def test_experts_are_taken_one_by_one_or_turned():
    packed = BlockTensor(raw(3, rows=12).view(3, 4, -1), 3, torch.float32)
    whole = packed.unpack()
    assert whole.shape == packed.shape == (3, 4, COLUMNS)
    assert isinstance(packed[1], BlockTensor) and torch.equal(packed[1].unpack(), whole[1])
    assert torch.equal(packed.transpose(-1, -2)[2].unpack(), whole[2].t())
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(packed[chosen], whole[chosen])
    assert torch.equal(packed.transpose(0, 1), whole.transpose(0, 1))
    assert torch.equal(packed.select(1, 2), whole[:, 2])
    assert torch.equal(packed[:, 1:, chosen], whole[:, 1:, chosen])


@pytest.mark.parametrize("kind", named(FORMATS))
def test_a_plan_asks_for_shapes_alone(kind):
    """transformers' tables of codes are real tensors, which fake ones do not meet."""
    packed = raw(kind)
    with FakeTensorMode():
        made = dequantize(torch.empty(packed.shape, dtype=torch.uint8), kind, torch.bfloat16)
    assert made.shape == (ROWS, COLUMNS) and made.dtype == torch.bfloat16
