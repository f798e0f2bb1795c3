"""LoRA into the blocks of a GGUF file: new codes and minima, layer by layer, on inputs like those of the model.

Block after block of the model, the inputs of its linears are seen with all earlier blocks rounded already, so that each
layer makes up for what those before it lost.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adapters_kit.anatomy import blocks
from adapters_kit.errors import ShippingError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.rounding import can_round, rounded
from adapters_kit.loading import load_processor

TEXTS, TOKENS = 32, 64  # of a calibration, half of it to choose by and half to judge by
_log = logging.getLogger(__name__)


def calibration_tokens(model: nn.Module, base: Path, texts: Sequence[str] | str | Path | None) -> Tensor:
    """Token ids `(rows, tokens)` to choose the codes by.

    Args:
        model: the tuned model, which writes the texts itself if none are given.
        base: the .gguf file, for its tokenizer.
        texts: a text file, or some texts.

    Raises:
        ShippingError: too little text.
    """
    if texts is None:
        start = model.config.bos_token_id or model.config.eos_token_id or 0
        first = torch.full((TEXTS, 1), start if isinstance(start, int) else start[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options: dict[str, Any] = {"do_sample": True, "min_new_tokens": TOKENS - 1, "max_new_tokens": TOKENS - 1}
            return model.generate(first, attention_mask=torch.ones_like(first), **options)
    given = [_read(Path(texts))] if isinstance(texts, str | Path) else list(texts)
    ids = [token for text in given for token in load_processor(base)(text).input_ids]
    rows = min(TEXTS, len(ids) // TOKENS)
    if rows < 2:
        raise ShippingError(
            f"calibration has {len(ids)} tokens, and {2 * TOKENS} are needed at least: give more text like that which "
            "the model will see, or leave it out."
        )
    return torch.tensor(ids[: rows * TOKENS]).view(rows, TOKENS)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShippingError(f"calibration: {path} is no text file in UTF-8 ({error}).") from error


class _Stop(Exception):
    """Raised when a forward pass has come far enough."""


def round_in(model: PeftModel, tokens: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """Round the active LoRA adapter of `model` into the blocks of its base, in place.

    Args:
        model: whose base was loaded with quantize="keep".
        tokens: `(rows, tokens)` ids.

    Returns:
        Path in the base model -> its new blocks; and the paths whose update was left out, since their weight lies in
        no blocks, or in a format with an uneven grid.
    """
    base = model.get_base_model()
    (name,) = model.active_adapters
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    fit = {path: layer for path, layer in layers.items() if _fits(layer)}
    made: dict[str, Tensor] = {}
    for inside in _groups(base, fit):
        hessians = _hessians(base, {path: fit[path] for path in inside}, tokens)
        for path in inside:
            layer, weight = fit[path], fit[path].get_base_layer().weight
            target = weight.unpack(torch.float32) + layer.get_delta_weight(name).float()
            made[path] = rounded(weight.raw, weight.kind, target, hessians[path])
            new = BlockTensor(made[path], weight.kind, weight.dtype)
            layer.get_base_layer().weight = nn.Parameter(new, requires_grad=False)
            layer.lora_B[name].weight.data.zero_()
        _log.info("rounded %d of %d layers", len(made), len(fit))
    return made, [path for path in layers if path not in fit]


def _fits(layer: LoraLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, BlockTensor) and can_round(weight.kind)


def _groups(base: nn.Module, layers: dict[str, LoraLayer]) -> Iterator[list[str]]:
    """The layers of each block of the model, in its order; then those outside."""
    left = dict.fromkeys(layers)
    for block in blocks(base):
        inside = [path for path in left if path.startswith(f"{block}.")]
        for path in inside:
            del left[path]
        if inside:
            yield inside
    if left:
        yield list(left)


def _hessians(base: nn.Module, layers: dict[str, LoraLayer], tokens: Tensor) -> dict[str, Tensor]:
    """XᵀX of each layer's inputs, `(in, in)`; the model runs until all of them were seen."""
    found: dict[str, Tensor] = {}

    def seen(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            found[path] = x.t() @ x
            if len(found) == len(layers):
                raise _Stop

        return hook

    handles = [layer.register_forward_pre_hook(seen(path)) for path, layer in layers.items()]
    try:
        base(input_ids=tokens)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
