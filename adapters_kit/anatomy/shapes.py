"""Models of shapes alone that run all the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adapters_kit.anatomy.structure import expert_parameters


def shapes_alone(model: nn.Module) -> bool:
    """Whether parameters are on the meta device, some or all."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


@contextmanager
def fake(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """Inside, the model's tensors (usually on the meta device) are fake ones on the CPU; afterwards they are its own.

    Fake tensors are dispatched and never computed. transformers knows them and asks no questions about values, such as
    whether a mask is all ones, which it does ask of tensors on the meta device.

    Args:
        dtype: that of the fake floats; None keeps each tensor's.
    """
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}
    own: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        # What models keep from call to call (anchors of boxes) must not be of shapes alone, and not be used here.
        with mode, mock.patch("transformers.pytorch_utils.is_torchdynamo_compiling", return_value=True):
            for module in model.modules():
                stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for store in stores:
                    for name, tensor in store.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in made:
                            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                            new = _twin(tensor, kind)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                        own.append((store, name, tensor))
                        store[name] = made[id(tensor)]
            yield mode
    finally:
        for store, name, tensor in own:
            store[name] = tensor


def _twin(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor of that dtype; one that is made of others (`BlockTensor`) is made of fakes and keeps its own."""
    if not is_traceable_wrapper_subclass(tensor):
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    names, about = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    made = {name: torch.empty(part.shape, dtype=part.dtype, device="cpu") for name, part in parts.items()}
    return type(tensor).__tensor_unflatten__(made, about, tensor.size(), tensor.stride())


def fake_batch(batch: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A batch of the same shapes and dtypes, to be called inside `fake`; None stays None."""
    if batch is None:
        return None
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="cpu") if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def shape_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype to give `fake` where only shapes matter: fused experts have no product of shapes alone but in bf16."""
    return torch.bfloat16 if any("expert" in path for path in expert_parameters(model)) else None
