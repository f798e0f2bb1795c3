"""LoRA of several adapters in one node: the numbers, the gradients and the bytes of each adapter's own node."""

import pytest
import torch

from adapters_kit.kernels.dropout import draw_seeds
from adapters_kit.kernels.even import is_even
from adapters_kit.kernels.grouped import Base, Share, grouped_lora
from adapters_kit.kernels.lora import lora_linear
from adapters_kit.kernels.projection import Projection, Quantized

IN, OUT, TOKENS = 24, 40, 9
# rows and own tokens of each, rank, dropout, whether it has c and g; the third has no adapter here
ADAPTERS = [(2, 9, 4, 0.0, False, False), (1, 5, 8, 0.1, True, False), (2, 7, 0, 0.0, False, False),
            (3, 6, 2, 0.4, False, False), (1, 9, 4, 0.0, True, True)]  # fmt: skip


def made(dtype: torch.dtype, quantized: bool, bias: bool, adapters=ADAPTERS) -> tuple[torch.Tensor, Base, list[Share]]:
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN, dtype=dtype)
    b = torch.randn(OUT, dtype=dtype) if bias else None
    unpacked = Quantized(lambda x: torch.nn.functional.linear(x, weight, b), weight.to) if quantized else None
    shares, start = [], 0
    fine = torch.float32 if dtype == torch.bfloat16 else dtype

    def trained(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=fine).requires_grad_()

    for rows, tokens, r, p, has_bias, has_gain in adapters:
        share = Share(start, start + rows, tokens)
        if r:
            share = share._replace(down=trained(r, IN), up=trained(OUT, r), scale=0.5 + r, p=p)
            share = share._replace(up_bias=trained(OUT) if has_bias else None, gain=trained(OUT) if has_gain else None)
            share = share._replace(seed=draw_seeds(1) if p else None)
        shares.append(share)
        start += rows
    x = torch.randn(start, TOKENS, IN, dtype=dtype).requires_grad_()
    return x, Base(None if quantized else weight, b, unpacked), shares


def alone(x: torch.Tensor, base: Base, share: Share, monkeypatch) -> torch.Tensor:
    """The node of one adapter on its own rows and tokens."""
    own = x[share.start : share.stop, : share.tokens]
    if share.down is None:
        weight = base.weight if base.quantized is None else base.quantized.dense(x.dtype)
        return torch.nn.functional.linear(own, weight, base.bias)
    monkeypatch.setattr("adapters_kit.kernels.lora.draw_seeds", lambda _: share.seed)
    one = Projection(base.weight, base.bias, share.down, share.up, share.up_bias, share.gain, base.quantized)
    return lora_linear(own, [one], share.scale, share.p)[0]


EVEN = [(2, TOKENS, 4, p, False, False) for p in (0.0, 0.1, 0.4)]  # one call for all


@pytest.mark.parametrize("adapters", [ADAPTERS, EVEN, [(2, TOKENS, 4, 0.0, False, False)] * 3])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_each_adapter_gets_what_its_own_node_gives(dtype, close, quantized, bias, adapters, monkeypatch):
    x, base, shares = made(dtype, quantized, bias, adapters)
    assert is_even(shares, x, OUT) == (adapters is not ADAPTERS)
    together = grouped_lora(x, base, shares)
    trained = [tensor for share in shares for tensor in share[3:7] if tensor is not None]
    upstream = torch.randn_like(together)
    for share in shares:
        upstream[share.start : share.stop, share.tokens :] = 0  # nothing reads the padding
    found = torch.autograd.grad(together, [x, *trained], upstream)
    parts = [alone(x, base, share, monkeypatch) for share in shares]
    grads = [upstream[share.start : share.stop, : share.tokens] for share in shares]
    expected = torch.autograd.grad(parts, [x, *trained], grads)
    for share, part in zip(shares, parts, strict=True):
        ours = together[share.start : share.stop, : share.tokens]
        assert (ours - part).norm() <= close * part.norm()
    assert len(found) == 1 + (11 if adapters is ADAPTERS else 6)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and other.norm() > 0
        assert (one - other).norm() <= close * other.norm()


def test_nothing_of_one_adapter_reaches_another():
    x, base, shares = made(torch.float64, quantized=False, bias=True)
    with torch.no_grad():
        shares[1].down.fill_(torch.nan)
    together = grouped_lora(x, base, shares)
    trained = [share.up for share in shares if share.up is not None]
    together.sum().backward()
    bad = [bool(tensor.grad.isnan().any()) for tensor in trained]
    assert bad == [False, True, False, False]
    assert x.grad.isnan().any(-1).any(-1).tolist() == [False, False, True, False, False, False, False, False, False]


def kept(compute) -> int:
    """Bytes that the backward pass keeps, each storage once."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    del result
    return sum(storages.values())


def test_what_is_kept_is_the_sum_of_what_the_adapters_own_nodes_keep(monkeypatch):
    adapters = [(2, TOKENS, 4, 0.1, False, False), (1, TOKENS, 8, 0.1, False, False), (3, TOKENS, 2, 0.0, False, False)]
    x, base, shares = made(torch.float32, quantized=False, bias=False, adapters=adapters)
    weight = base.weight.untyped_storage().nbytes()
    each = [kept(lambda share=share: alone(x, base, share, monkeypatch)) - weight for share in shares]
    shared = x.untyped_storage().nbytes()  # all rows of x are one storage, of which each keeps a part
    seeds = 2 * 8  # two int64, which the node holds outside of what autograd keeps
    assert kept(lambda: grouped_lora(x, base, shares)) + seeds - weight == sum(each) - (len(each) - 1) * shared
