"""The fast paths against the readable ones: the node against `reference.py`, narrow products against float64."""

import itertools

import pytest
import torch

from adapters_kit.errors import UnknownNameError
from adapters_kit.kernels import products, reference
from adapters_kit.kernels.dropout import draw_pattern, draw_seeds, zero_dropped
from adapters_kit.kernels.lora import lora_linear
from adapters_kit.kernels.projection import Projection, Quantized
from tests.support.fused import relative


def random_projection(wide, out, r, *, bias, up_bias, gain, quantized):
    def draw(*shape, grad=True):
        return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)

    weight, b = draw(out, wide, grad=False), draw(out) if bias else None
    base = Quantized(
        lambda x: torch.nn.functional.linear(x, weight, None if b is None else b.detach()), lambda dtype: weight
    )
    return Projection(
        None if quantized else weight,
        b,
        draw(r, wide),
        draw(out, r),
        draw(out) if up_bias else None,
        draw(out) if gain else None,
        base if quantized else None,
    )


OPTIONS = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize(("bias", "up_bias", "gain", "quantized"), OPTIONS)
def test_the_node_computes_what_the_reference_does(bias, up_bias, gain, quantized, p):
    """Values and all gradients, with trained biases, DoRA's gain and bases that are no plain matrix."""
    torch.manual_seed(3)
    options = {"bias": bias, "up_bias": up_bias, "gain": gain, "quantized": quantized}
    parts = [random_projection(6, out, r, **options) for out, r in ((5, 2), (4, 3))]
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(t for part in parts for t in part[1:6] if t is not None)]
    results = []
    torch.manual_seed(5)
    results.append(lora_linear(x, parts, 1.5, p))
    torch.manual_seed(5)
    seeds = draw_seeds(2).tolist()
    ones = torch.ones_like(x.detach().view(-1, 6))
    kept = [(zero_dropped(ones, draw_pattern(ones, seed, p)) / (1 - p)).view(x.shape) for seed in seeds] if p else None
    results.append(reference.lora_linear(x, parts, 1.5, kept))
    upstream = [torch.randn_like(y) for y in results[0]]
    ours, theirs = [torch.autograd.grad(ys, leaves, upstream, allow_unused=True) for ys in results]
    for a, b in zip((*results[0], *ours), (*results[1], *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", products.PATHS)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("tokens", "wide", "r"), [(70, 64, 4), (600, 1024, 16), (3, 8, 1)])
def test_narrow_products_are_exact_to_float32(path, dropped, tokens, wide, r, monkeypatch):
    """By either way on a CPU, far nearer than one bf16 product (2⁻⁹); sums onto bf16 lose its rounding and no more."""
    monkeypatch.setattr(products, "cpu_path", lambda: path)
    torch.manual_seed(1)
    x, y = torch.randn(tokens, wide).bfloat16(), torch.randn(tokens, wide).bfloat16()
    down, low = torch.randn(r, wide) * 0.02, torch.randn(tokens, r)
    positions = torch.arange(0, x.numel(), 19) if dropped else None
    exact = x.double()
    if positions is not None:
        exact.view(-1)[positions] = 0
    bound = 2e-5 if path == "tiles" else 1e-6
    found = products.narrow(x, down, positions)
    assert found.dtype == torch.float32 and relative(found, exact @ down.double().t()) < bound
    found = products.narrow_sum(low, x, positions)
    assert found.dtype == torch.float32 and relative(found, low.double().t() @ exact) < bound
    total = y.double() + 0.5 * low.double() @ down.double()
    assert relative(products.widen_(y.clone(), low, down, 0.5), total) < 1.02 * relative(total.bfloat16(), total)


def test_the_path_can_be_named(monkeypatch):
    for path in products.PATHS:
        monkeypatch.setenv(products.CPU_PATH, path)
        products.cpu_path.cache_clear()
        assert products.cpu_path() == path
    monkeypatch.setenv(products.CPU_PATH, "tile")
    products.cpu_path.cache_clear()
    with pytest.raises(UnknownNameError, match="tiles"):
        products.cpu_path()
    monkeypatch.delenv(products.CPU_PATH)
    products.cpu_path.cache_clear()
    assert products.cpu_path() in products.PATHS


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "amx_bf16": True}, "tiles"),
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": True}, "bf16"),
        ({"architecture": "aarch64", "sve": True}, "bf16"),
    ],
)
def test_the_path_follows_what_the_cpu_can_do(able, expected, monkeypatch):
    monkeypatch.delenv(products.CPU_PATH, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    products.cpu_path.cache_clear()
    try:
        assert products.cpu_path() == expected
    finally:
        products.cpu_path.cache_clear()
