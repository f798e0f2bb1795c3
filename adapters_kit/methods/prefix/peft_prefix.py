"""Prefixes of peft's own PREFIX_TUNING, to ours and back, where that is exact.

peft puts its prefix into the cache: it takes positions 0 to P-1, and the text starts at P. Ours takes no positions, and
the text starts at 0. With rotary positions only distances count, so turning the prefix keys back by P positions makes
both the same function. A model with learned positions reads other embeddings for its text; there, nothing is exact.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import nn

from adapters_kit.anatomy import base_model, probe_inputs
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.methods.prefix import holders as prefix_probe
from adapters_kit.methods.prefix.config import PrefixConfig
from adapters_kit.methods.prefix.layer import PrefixLayer
from adapters_kit.methods.prefix.model import PrefixModel, prefix_layers

assert PrefixModel.prefix == "prefix_"  # its import registers the method with peft


def from_peft_prefix(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load a PREFIX_TUNING adapter of peft as a prefix inside attention, with the same outputs.

    Args:
        model: the base model that it was trained on: a decoder with rotary positions.
        folder: where peft saved it. A reparametrised one is flat there, and stays flat.
        adapter_name: its name in the model.

    Returns:
        The model as a `PeftModel` with a trainable prefix.

    Raises:
        AdapterError: the folder holds something else, or its sizes do not fit the model.
        ModelError: the conversion would not be exact; says why.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, PrefixTuningConfig):
        raise AdapterError(f"{folder} holds a {config.peft_type} adapter of peft, not PREFIX_TUNING.")
    tokens = config.num_virtual_tokens
    modules = _decoder_attentions(model)
    turn = _Rotation(model, modules, -tokens)
    flat = load_peft_weights(str(folder), device="cpu")["prompt_embeddings"].float()
    shapes = {path: seen.shape for path, seen in turn.seen.items()}
    ours = PrefixConfig(
        num_virtual_tokens=tokens,
        shapes=shapes,
        task_type=config.task_type,
    )
    expected = sum(heads * (key + value) for heads, key, value, _ in shapes.values())
    if flat.shape != (tokens, expected):
        raise AdapterError(
            f"{folder} holds {tuple(flat.shape)} numbers; {tokens} tokens for this {type(base_model(model)).__name__} "
            f"need {(tokens, expected)}. Load the base model that it was trained on."
        )
    wrapped = get_peft_model(model, ours, adapter_name=adapter_name)
    with torch.no_grad():
        for layer, both in zip(_layers(wrapped, modules), flat.chunk(len(modules), dim=1), strict=True):
            heads, width, _ = layer.shape
            key, value = both.view(tokens, 2, heads, width).unbind(1)
            layer.prefix_key[adapter_name].copy_(turn(layer.home, key))
            layer.prefix_value[adapter_name].copy_(value)
    return wrapped


def to_peft_prefix(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> None:
    """Save a prefix as a PREFIX_TUNING adapter that plain peft loads, with the same outputs.

    Args:
        model: a model with a prefix in every decoder layer, ungated. One with an MLP is written out flat.
        folder: where to; made if it does not exist.
        adapter_name: which adapter; the active one by default.

    Raises:
        ModelError: the conversion would not be exact; says why.
    """
    name = adapter_name or model.active_adapters[0]
    if name not in model.peft_config:
        raise UnknownNameError(f"There is no adapter {name!r}. {did_you_mean(name, model.peft_config)}")
    config = model.peft_config[name]
    if not isinstance(config, PrefixConfig):
        raise AdapterError(f"{name!r} is a {config.peft_type.value} adapter, not a prefix.")
    modules = _decoder_attentions(model)
    if config.gate or set(config.shapes or ()) != set(modules):
        raise ModelError("peft's prefix is in every layer and has no gate; this one differs, so it cannot be written.")
    shapes = {tuple(layer.shape) for layer in prefix_layers(model)}
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        raise ModelError(
            f"peft's prefix has one size for keys and values of all layers; here they are {sorted(shapes)}."
        )
    ((heads, width, _),) = shapes
    with model.disable_adapter():
        turn = _Rotation(model, modules, config.num_virtual_tokens)
    rows = []
    with torch.no_grad():
        for layer in _layers(model, modules):
            key, value = layer.vectors(name)
            rows += [turn(layer.home, key.float()), value.float()]
    flat = torch.stack(rows, dim=1).flatten(1).cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=len(modules),
        token_dim=heads * width,
        num_attention_heads=heads,
        num_transformer_submodules=1,
        encoder_hidden_size=heads * width,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({"prompt_embeddings": flat}, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _decoder_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> attention, in the order of the layers, of a decoder that peft's prefix tuning can be exact on."""
    prefix_probe.check_model(model)
    base = base_model(model)
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder: peft's prefix reaches only a part of it, and shifts positions."
        )
    modules = prefix_probe.attention_modules(model)
    # The module decides for its layer; where it does not, the config decides for all.
    windows = [getattr(m, "sliding_window", getattr(m.config, "sliding_window", None)) for m in modules.values()]
    if any(windows):
        raise ModelError(
            f"{name} has a sliding window of {max(filter(None, windows))}: peft's prefix slides out of it, ours never."
        )
    return dict(sorted(modules.items(), key=lambda item: getattr(item[1], "layer_idx", 0)))


def _layers(model: nn.Module, modules: dict[str, nn.Module]) -> list[PrefixLayer]:
    by_home = {id(layer.home): layer for layer in prefix_layers(model)}
    return [by_home[id(module)] for module in modules.values()]


class _Rotation:
    """Turns keys by a number of positions, with the model's own angles and its own way of pairing dimensions.

    Args:
        model: its attentions must get `position_embeddings` (cos, sin) and apply them by `apply_rotary_pos_emb`.
        modules: those attentions.
        by: positions; negative turns back.

    Raises:
        ModelError: the positions are not rotary, or not ones that this can reproduce (checked on the model's own keys).
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], by: int) -> None:
        self.modules = modules
        self.name = type(base_model(model)).__name__
        if any(not hasattr(self._file(module), "apply_rotary_pos_emb") for module in modules.values()):
            raise ModelError(
                self._no("its positions are not rotary, so text after peft's prefix reads other positions")
            )
        kind = next((m.rope_type for m in model.modules() if isinstance(getattr(m, "rope_type", None), str)), "default")
        if kind in ("dynamic", "longrope"):
            raise ModelError(self._no(f"its {kind} rotary angles depend on the length, which peft's prefix adds to"))
        self.seen, _ = self._run(model, 0)
        _, self.angles = self._run(model, by)
        away, _ = self._run(model, -by)
        for path, module in modules.items():
            key = away[path].key.float().transpose(0, 1)
            expected = self.seen[path].key.float().transpose(0, 1)
            if not torch.allclose(self(module, key), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                raise ModelError(self._no("its keys do not follow plain rotary positions"))

    def _no(self, reason: str) -> str:
        return f"A prefix of {self.name} cannot be converted exactly: {reason}."

    @staticmethod
    def _file(module: nn.Module) -> Any:
        return sys.modules[inspect.unwrap(type(module).forward).__module__]

    def _run(self, model: nn.Module, position: int) -> tuple[dict[str, prefix_probe.Seen], dict[int, Any]]:
        """Keys of one token at `position`, and the cos and sin that each attention was given."""
        angles: dict[int, Any] = {}

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            angles[id(module)] = kwargs.get("position_embeddings")

        batch = {key: value[:, :1] for key, value in probe_inputs(model).items()}
        batch["position_ids"] = torch.full_like(batch["input_ids"], position)
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.modules.values()]
        try:
            seen = prefix_probe.run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if any(angle is None for angle in angles.values()):
            raise ModelError(self._no("its attention computes rotary angles by itself"))
        return seen, angles

    def __call__(self, module: nn.Module, key: torch.Tensor) -> torch.Tensor:
        """Keys (tokens, heads, width) of `module`, turned."""
        cos, sin = (angle.float().cpu() for angle in self.angles[id(module)])
        key = key.cpu()
        turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
        turned = turned.transpose(0, 1)[None]
        _, turned = self._file(module).apply_rotary_pos_emb(turned, turned, cos, sin)
        # Yarn stretches cos and sin; a rotation alone keeps lengths.
        length = (cos[..., :1].square() + sin[..., :1].square()).sqrt().item()
        return torch.cat([turned[0].transpose(0, 1) / length, rest], dim=-1)
