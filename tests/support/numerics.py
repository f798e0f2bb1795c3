"""How near two fp32 results of one function can be expected to be: measured on this CPU, not guessed.

The same products summed in another order (fused or not, another thread count, another instruction set) differ by about
as much as either differs from float64. Models differ a lot in that: T5 does not scale its attention scores, and its
outputs are ten times as sensitive as Llama's.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

MARGIN = 8.0


def close(
    model: nn.Module,
    batch: dict[str, Any],
    least: float = 1e-5,
    read: Callable[[Any], torch.Tensor] = lambda output: output.logits,
) -> dict[str, float]:
    """`rtol` and `atol` for `torch.testing.assert_close` on the outputs of `model`.

    Args:
        model: fp32; any adapter on it active.
        batch: what it is run on.
        least: of the bound, for models that happen to be right to the last bit.
        read: the tensor to compare, from the model's output.
    """
    with torch.no_grad():
        rough = read(model(**batch))
        wide = copy.deepcopy(model).double()
        bare = wide.get_base_model() if isinstance(wide, PeftModel) else wide
        bare.set_experts_implementation("eager")  # grouped products know no float64
        floats = {key: value.double() if torch.is_floating_point(value) else value for key, value in batch.items()}
        exact = read(wide(**floats))
    return {"rtol": 0.0, "atol": max(least, MARGIN * (rough.double() - exact).abs().max().item())}
