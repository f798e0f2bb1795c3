"""The base's parameters by their names in the model, with the values that the adapter was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.merging.roundtrip import Rounding
from adapters_kit.merging.weightless import Origin, read_parameter


@dataclass(frozen=True)
class BaseWeights:
    """Reads one parameter after the other; nothing is kept.

    Attributes:
        bare: the model without weights, for its structure.
        checkpoint: where the tensors are stored.
        origins: parameter -> how the base stores it; every name of a tied parameter leads to the one that is stored.
        brought: parameters that the adapter brings along as a whole (biases, resized embeddings) instead of the base's.
        rounding: how the base was quantized in training; None reads it as it is stored.
        resized: vocabulary matrices that training resized -> their shape then.
    """

    bare: PreTrainedModel
    checkpoint: Checkpoint
    origins: Mapping[str, Origin]
    brought: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rounding: Rounding | None = None
    resized: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def rounded(self) -> set[str]:
        """Parameters that the quantized base held in 4 or 8 bit."""
        modules = self.rounding.modules if self.rounding is not None else ()
        return {f"{path}.weight" for path in modules}

    def __call__(self, name: str) -> torch.Tensor:
        """The parameter `name` as training started from it."""
        if name in self.brought:
            return self.brought[name]
        origin = self.origins[name]
        made = read_parameter(self.bare, origin, self.checkpoint.read)
        value = made[name] if name in made else made[origin.parameters[0]]
        if name in self.resized:
            value = resize(value, self.resized[name])
        if self.rounding is None or name not in self.rounded:
            return value
        if isinstance(self.bare.get_submodule(name.rpartition(".")[0]), Conv1D):  # stored as (in, out)
            return self.rounding(value.T).T
        return self.rounding(value)


def resize(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A vocabulary matrix (or bias) with more or fewer rows. New ones hold the mean of the old ones, which is what
    transformers' `resize_token_embeddings` starts them with, but for a draw of 1e-9 of the variance (Hewitt 2021). A
    buffer (1, words) has new columns of zeros."""
    if shape[0] == value.shape[0]:
        grown = value.new_zeros(shape)
        kept = min(shape[-1], value.shape[-1])
        grown[..., :kept] = value[..., :kept]
        return grown
    if shape[0] <= value.shape[0]:
        return value[: shape[0]]
    mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(shape[0] - value.shape[0], *value.shape[1:])])
