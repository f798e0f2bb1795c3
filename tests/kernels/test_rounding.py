"""Updates that single weights cannot hold, kept in a layer's outputs."""

import numpy as np
import pytest
import torch

from adapters_kit.kernels.ggml import FORMATS, dequantize
from adapters_kit.kernels.rounding import can_round, grid, rounded, with_codes

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import pack  # noqa: E402

KINDS = [pytest.param(kind, id=FORMATS[kind].name) for kind in FORMATS if can_round(kind)]


def layer(kind: int, rows: int = 48, columns: int = 512):
    """Blocks, and inputs with a few strong directions, as hidden states have them."""
    random = np.random.default_rng(kind)
    value = random.normal(size=(rows, columns)).astype(np.float32) * 0.05
    raw = torch.from_numpy(pack(value, gguf.GGMLQuantizationType(kind)).copy())
    torch.manual_seed(0)
    x = torch.randn(800, 96) @ torch.randn(96, columns) + 0.1 * torch.randn(800, columns)
    return raw, x


@pytest.mark.parametrize("kind", KINDS)
def test_codes_written_are_codes_read(kind):
    raw, _ = layer(kind)
    lowest, step = grid(raw, kind)
    top = {"Q4_0": 16, "Q4_1": 16, "Q4_K": 16, "Q6_K": 64, "Q8_0": 256}[FORMATS[kind].name]
    q = torch.randint(0, top, lowest.shape, dtype=torch.uint8)
    got = dequantize(with_codes(raw, kind, q), kind, torch.float32)
    torch.testing.assert_close(got, lowest + q.float() * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_update_nothing_changes(kind):
    raw, x = layer(kind)
    base = dequantize(raw, kind, torch.float32)
    again = rounded(raw, kind, base, x.t() @ x)
    torch.testing.assert_close(dequantize(again, kind, torch.float32), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_most_of_an_update_reaches_outputs_on_new_inputs(kind):
    """A third of a step: plain rounding loses most of it in the outputs."""
    raw, x = layer(kind)
    base = dequantize(raw, kind, torch.float32)
    lowest, step = grid(raw, kind)
    update = torch.randn(len(base), 4) @ torch.randn(4, base.shape[1])
    update *= 0.3 * step.abs().mean() / update.square().mean().sqrt()
    seen, unseen = x[:600], x[600:]

    def lost(weight: torch.Tensor, inputs: torch.Tensor) -> float:
        return ((inputs @ (base + update - weight).t()).norm() / (inputs @ update.t()).norm()).item()

    made = dequantize(rounded(raw, kind, base + update, seen.t() @ seen), kind, torch.float32)
    nearest = lowest + ((base + update - lowest) / torch.where(step == 0, 1.0, step)).round() * step
    assert lost(nearest, unseen) > 0.6 and lost(made, unseen) < 0.45 * lost(nearest, unseen)


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_never_further_off_than_plain_rounding(kind, size):
    raw, x = layer(kind)
    lowest, step = grid(raw, kind)
    target = dequantize(raw, kind, torch.float32) + size * step * torch.randn_like(step)
    top = round(float(((dequantize(raw, kind, torch.float32) - lowest) / torch.where(step == 0, 1.0, step)).max()))
    made = dequantize(rounded(raw, kind, target, x.t() @ x), kind, torch.float32)
    nearest = lowest + ((target - lowest) / torch.where(step == 0, 1.0, step)).round().clamp(0, top) * step
    off, off_nearest = ((x @ (target - weight).t()).norm() for weight in (made, nearest))
    assert off <= off_nearest * 1.001
