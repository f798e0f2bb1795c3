"""Small GGUF files of the families in tiny.py, for the tests that read them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from adapters_kit.kernels.ggml import FORMATS
from tests.support import tiny

# family -> architecture in the file, and in transformers' table of config keys
ARCHITECTURES = {"llama": ("llama", "llama"), "gpt2": ("gpt2", "gpt2"), "qwen3-moe": ("qwen3moe", "qwen3_moe")}
# What transformers takes every file of these architectures to have.
OVERRIDES = {"gpt2": {"n_positions": 1024}, "qwen3-moe": {"moe_intermediate_size": 768}}


def write(name: str, file: Path, kind: str, **overrides: Any) -> None:
    """A family of tiny.py as a GGUF file; matrices packed as `kind`, vectors in fp32.

    q and k are not permuted as llama.cpp would: another model, but the same one for every reader.

    Args:
        overrides: options of the family's config. K-quants need widths that are multiples of 256.
    """
    model = tiny.build(name, **OVERRIDES.get(name, {}) | overrides)
    architecture, known_as = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("llama")
    letters = ["▁", *map(chr, range(33, 127))]  # without merges, a text is its letters
    words = ["<unk>", "<s>", "</s>", *letters, *(f"t{index}" for index in range(tiny.VOCAB))]
    writer.add_token_list(words[: tiny.VOCAB])
    writer.add_token_scores([-float(index) for index in range(tiny.VOCAB)])
    writer.add_token_types([2, 3, 3, *[1] * (tiny.VOCAB - 3)])  # unknown, control, normal
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(tiny.EOS)
    for key, option in GGUF_CONFIG_MAPPING[known_as].items():
        value = getattr(model.config, option, None) if option else None
        if key == "rope.freq_base":
            value = 10_000.0
        if isinstance(value, int | float) and not isinstance(value, bool):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    weights = model.state_dict()
    packed = gguf.GGMLQuantizationType[kind]
    for stored, key in get_gguf_hf_weights_map(model, processor).items():
        if key not in weights or (key == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        value = weights[key].numpy()
        if "_exps" in stored:  # gate and up are one tensor in transformers, two in the file
            stored = stored.removesuffix(".weight") + ".weight"
            if "gate" in stored or "up" in stored:
                value = np.split(value, 2, axis=1)["up" in stored]
        if name == "gpt2" and value.ndim == 2 and ("attn" in stored or "ffn" in stored):
            value = value.T
        value = np.ascontiguousarray(value)
        block = gguf.GGML_QUANT_SIZES[packed][0]
        fits = value.ndim > 1 and "gate_inp" not in stored and value.shape[-1] % block == 0
        if fits and kind != "F32":
            writer.add_tensor(stored, pack(value, packed), raw_dtype=packed)
        else:
            writer.add_tensor(stored, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut(file: Path, blocks: int, out: Path) -> Path:
    """The model of a file with its first blocks alone; all else is copied as it is."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kind, *inner = field.types
            value = blocks if name.endswith(".block_count") else field.contents()
            writer.add_key_value(name, value, kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        _, _, rest = tensor.name.partition("blk.")
        if not rest or int(rest.partition(".")[0]) < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def pack(value: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """`value` in blocks. The package cannot write K-quants: those get random codes and scales of a sensible size."""
    try:
        return gguf.quantize(value, kind)
    except NotImplementedError:
        given = FORMATS[int(kind)]
        random = np.random.default_rng(value.size)
        blocks = random.integers(0, 256, (value.size // given.weights, given.nbytes), np.uint8)
        for offset in (given.scale, given.minimum):
            if offset is not None:
                small = random.uniform(0.5, 1.5, (len(blocks), 1)) * 2e-4
                blocks[:, offset : offset + 2] = small.astype(np.float16).view(np.uint8)
        return blocks.reshape(*value.shape[:-1], -1)
