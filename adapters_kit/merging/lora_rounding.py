"""LoRA into the blocks of a GGUF file: new codes and fp16 numbers, on texts like those of the model.

Block after block of the model, the inputs of its linears are seen with all earlier blocks rounded already, and each
linear is rounded for these inputs. At last the fp16 numbers of all of them learn together what is still missing.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adapters_kit.anatomy import blocks
from adapters_kit.errors import ShippingError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.rounding import can_round, rounded
from adapters_kit.loading import load_processor
from adapters_kit.methods.blocks.config import BlocksConfig

TEXTS, TOKENS = 48, 64  # of a calibration, three quarters of it to choose by and the rest to judge by
EPOCHS, ROWS, RATE = 4, 4, 3e-4  # of settling in: passes over the texts, texts a step, Adam's learning rate
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


def takes_in(model: PeftModel) -> tuple[dict[str, LoraLayer], list[str]]:
    """The LoRA layers whose blocks take an update in; and the paths of the others: whose weight lies in no blocks, or
    in a format with an uneven grid."""
    layers = {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    fit = {path: layer for path, layer in layers.items() if _fits(layer)}
    return fit, [path for path in layers if path not in fit]


def round_in(model: PeftModel, tokens: Tensor) -> dict[str, Tensor]:
    """Round the active LoRA adapter of `model` into the blocks of its base, in place.

    Args:
        model: whose base was loaded with quantize="keep".
        tokens: `(rows, tokens)` ids.

    Returns:
        Path in the base model -> its new blocks, for the layers that take them in.
    """
    base = model.get_base_model()
    (name,) = model.active_adapters
    fit, _ = takes_in(model)
    expected = [log_probs(model, rows).half() for rows in tokens.split(ROWS)]
    made: dict[str, Tensor] = {}
    chain = _Chain(base, tokens)
    for block in (*blocks(base), ""):  # at last what lies outside of them
        inside = {path: layer for path, layer in fit.items() if path.startswith(f"{block}." if block else "")}
        inside = {path: layer for path, layer in inside.items() if path not in made}
        hessians = _hessians(inside, chain.run(block)) if inside else {}
        for path, layer in inside.items():
            weight = layer.get_base_layer().weight
            target = weight.unpack(torch.float32) + layer.get_delta_weight(name).float()
            made[path] = rounded(weight.raw, weight.kind, target, hessians[path])
            new = BlockTensor(made[path], weight.kind, weight.dtype)
            layer.get_base_layer().weight = nn.Parameter(new, requires_grad=False)
            layer.lora_B[name].weight.data.zero_()
        chain.leave(block)
        _log.info("rounded %d of %d layers", len(made), len(fit))
    return _settled(model.unload(), list(made), tokens, expected)


def log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of every next token: `(rows, tokens, vocabulary)` float32."""
    return model(input_ids=tokens).logits.float().log_softmax(-1)


def _settled(base: nn.Module, paths: list[str], tokens: Tensor, expected: list[Tensor]) -> dict[str, Tensor]:
    """The blocks after their fp16 numbers have learned to predict what base + adapter predict: codes were chosen layer
    by layer, and what is left of their errors adds up over the layers.

    Args:
        base: with the new codes; changed in place.
        paths: its layers that have them.
        expected: log-probabilities of `tokens`, `ROWS` of them at a time.
    """
    config = BlocksConfig(train="both", r=None, target_modules=paths)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(base, config)
        trained = [entry for entry in tuned.parameters() if entry.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=RATE)
        batches = tokens.split(ROWS)
        steps = EPOCHS * len(batches)
        for step in range(steps):
            which = step % len(batches)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            got, wanted = log_probs(tuned, batches[which]), expected[which].float()
            loss = (wanted.exp() * (wanted - got)).sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _log.info("settling in: step %d of %d, KL %.2e nats", step + 1, steps, loss)
    made = {}
    for path in paths:
        layer = tuned.base_model.model.get_submodule(path)
        layer.merge(safe_merge=True)
        made[path] = layer.get_base_layer().weight.raw
    return made


def _fits(layer: LoraLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, BlockTensor) and can_round(weight.kind)


class _Chain:
    """The blocks of a model, run one after the other from what the one before gave, so that none runs for all others.

    Where a model does something between its blocks, it runs from its beginning each time.
    """

    def __init__(self, base: nn.Module, tokens: Tensor) -> None:
        self._base, self._tokens = base, tokens
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hidden: Tensor | None = None  # what the next block is given
        self._plain = True
        last: Any = None

        def before(path: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._calls[path] = args[1:], kwargs
                if self._hidden is None and args:
                    self._hidden = args[0]
                else:
                    self._plain &= bool(args) and args[0] is last

            return hook

        def after(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal last
            last = _first(output)

        handles = []
        for path in blocks(base):
            block = base.get_submodule(path)
            handles.append(block.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        try:
            self._whole()
        finally:
            for handle in handles:
                handle.remove()
        self._plain &= self._hidden is not None

    def _whole(self) -> None:
        self._base(input_ids=self._tokens, use_cache=False)

    def run(self, path: str) -> Callable[[], Any]:
        """Runs a block, or what comes before it as well; without a path the whole model."""
        if not path or not self._plain or path not in self._calls:
            return self._whole
        rest, kwargs = self._calls[path]
        return lambda: self._base.get_submodule(path)(self._hidden, *rest, **kwargs)

    def leave(self, path: str) -> None:
        """The block is as it shall be: the next one gets what it gives now."""
        if path and self._plain and path in self._calls:
            self._hidden = _first(self.run(path)())


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _hessians(layers: dict[str, LoraLayer], run: Callable[[], Any]) -> dict[str, Tensor]:
    """XᵀX of each layer's inputs, `(in, in)`; the run ends when all of them were seen."""
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
        run()
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
