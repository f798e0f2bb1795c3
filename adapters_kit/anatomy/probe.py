"""The smallest inputs that make a model run once."""

import inspect
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from adapters_kit.anatomy.structure import CONVOLUTIONS, base_model, walk
from adapters_kit.errors import ModelError

TOKENS = 4


def probe_inputs(model: nn.Module, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Dummy inputs of one row for a forward: text, images, video or audio; both sides of an encoder-decoder.

    What the model reads is its `main_input_name`; sizes come from its configuration. Values are fixed, so that
    two calls agree; no gradient is asked for.

    Args:
        model: a transformers model, bare or under a task head, quantized or wrapped by peft or not.
        tokens: text length; images and audio are as small as the model takes.

    Returns:
        Keyword arguments of `model(...)` on the model's device: int64 ids and masks `(1, tokens)`; in the model's dtype
        `pixel_values` `(1, [frames,] channels, height, width)`, `input_features` or `input_values`.
        Multiple choice gets one choice: ids `(1, 1, tokens)`.

    Raises:
        ModelError: the model reads something else (it names what).
    """
    base = base_model(model)
    main = getattr(base, "main_input_name", None)
    signature = inspect.signature(base.forward).parameters
    result: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        result |= _text(base, tokens)
        towers = hasattr(base, "get_image_features") and hasattr(base, "get_text_features")  # CLIP
        if towers or (getattr(base.config, "image_size", None) and "pixel_values" in signature):  # ViLT: one tower
            result["pixel_values"] = _image(base)
    elif main == "pixel_values":
        result["pixel_values"] = _image(base)
        if "input_ids" in signature and "decoder_input_ids" not in signature:
            result |= _text(base, tokens)
    elif main in ("input_features", "input_values"):
        result[main] = _audio(base, main)
    else:
        raise ModelError(
            f"Cannot make inputs for {type(base).__name__}: it reads {main!r}, not text, images or audio. "
            "Give a batch that it runs on: map_model(model, inputs={...})."
        )
    if "decoder_input_ids" in signature:
        result["decoder_input_ids"] = _ids(base, tokens, decoder=True)
    if getattr(base.config, "add_cross_attention", False) and "encoder_hidden_states" in signature:
        result["encoder_hidden_states"] = _noise(base, 1, tokens, _text_config(base).hidden_size)
    if type(base).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():  # reads (rows, choices, tokens)
        result = {key: value[:, None] for key, value in result.items()}
    return result


def _text_config(base: Any) -> Any:
    return base.config.get_text_config()


def _ids(base: Any, tokens: int, decoder: bool = False) -> torch.Tensor:
    config = base.config.get_text_config(decoder=True) if decoder else _text_config(base)
    named = {**base.config.to_dict(), **config.to_dict()}
    # Image placeholders, padding and the like have a meaning of their own.
    special: set[int] = set()
    for key, value in named.items():
        if key.endswith(("token_id", "token_index", "pad_index")):
            special.update(value if isinstance(value, list) else [value])
    vocabulary = getattr(config, "vocab_size", None) or 1000  # CANINE reads characters and has none
    plain = [token for token in range(min(vocabulary, 1000)) if token not in special]
    ids = [plain[position % len(plain)] for position in range(7, 7 + tokens)]
    ends = named.get("eos_token_id")
    ends = ends[0] if isinstance(ends, list) and ends else ends
    # BART's classification head reads the state of the last end-of-sentence token.
    if isinstance(ends, int) and 0 <= ends < vocabulary:
        ids[-1] = ends
    return torch.tensor([ids], device=_device(base))


def _text(base: Any, tokens: int) -> dict[str, torch.Tensor]:
    ids = _ids(base, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(base: Any) -> torch.Tensor:
    config = getattr(base.config, "vision_config", None) or base.config
    size = getattr(config, "image_size", None) or 64  # fully convolutional models take any size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = [1, getattr(config, "num_channels", None) or 3, height, width]
    if getattr(config, "num_frames", None):
        shape.insert(1, config.num_frames)
    return _noise(base, *shape)


def _audio(base: Any, main: str) -> torch.Tensor:
    config = base.config
    config = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = next((getattr(config, key) for key in _BINS if isinstance(getattr(config, key, None), int)), None)
    frames = getattr(config, "max_source_positions", None)
    if main == "input_features" and bins is not None:
        # Whisper takes exactly its full window; models whose positions are made as they go declare it too.
        if frames is not None and "num_mel_bins" in config.to_dict():
            return _noise(base, 1, bins, 2 * frames)
        return _noise(base, 1, 64, bins)
    if bins is not None and getattr(config, "max_length", None):  # audio spectrogram transformer: an image of frames
        return _noise(base, 1, config.max_length, bins)
    # A waveform: enough samples for a few frames after the strided convolutions.
    strides = getattr(config, "conv_stride", None) or [
        module.stride[0] for path, module in walk(base) if isinstance(module, nn.Conv1d) and module.stride[0] > 1
    ]
    kernels = getattr(config, "conv_kernel", None) or [10]
    samples = prod(strides) * 8 + max(kernels) * prod(strides[:-1])
    return _noise(base, 1, samples)


_BINS = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")


def _device(base: nn.Module) -> torch.device:
    return next(base.parameters()).device


def _noise(base: Any, *shape: int) -> torch.Tensor:
    """Seeded normal noise in the dtype that the first layer computes in."""
    dtype = next((module.weight.dtype for _, module in walk(base) if isinstance(module, CONVOLUTIONS)), None)
    dtype = dtype or getattr(base, "dtype", None) or torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    # A plan builds its models under `torch.device("meta")`.
    return torch.randn(*shape, generator=generator, device="cpu").to(device=_device(base), dtype=dtype)
