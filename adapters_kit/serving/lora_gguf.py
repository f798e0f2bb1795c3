"""A LoRA adapter for the very .gguf file that it was trained on, as llama.cpp's `--lora` takes it.

llama.cpp's own converter starts from the model's original folder. Here the file itself tells what each weight is called
in it, and in which order its rows lie (those of q and k are interleaved): B's rows are put in the same order.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers.integrations.gguf import read_gguf_metadata

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.factors import canonicalise, pairs
from adapters_kit.artifacts.staging import staged_file
from adapters_kit.errors import ShippingError
from adapters_kit.loading import skeleton
from adapters_kit.loading.gguf import kept_weights


def write_lora_gguf(
    adapter: Adapter, base: Path, out: Path, dtype: torch.dtype = torch.float16, *, overwrite: bool = False
) -> None:
    """Write the file `out`.

    Args:
        adapter: LoRA in any form that has a canonical one.
        base: the .gguf file.
        dtype: of the factors: float16 or float32.
        overwrite: replace `out`.

    Raises:
        ShippingError: no LoRA, a dtype that the format lacks here, or a module that is no tensor of the file.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ShippingError(f"dtype={dtype}: adapters for a .gguf file are written as float16 or float32.")
    config, weights, _ = canonicalise(adapter)
    found, rest = pairs(weights)
    if rest:
        raise ShippingError(
            f"{adapter.folder} also holds {next(iter(rest))}, which llama.cpp's adapters cannot carry. Merge it into a "
            f"folder and export that: adapters-kit merge {adapter.folder} merged/"
        )
    table = kept_weights(base, skeleton(base))
    strange = [path for path, pair in found.items() if f"{path}.weight" not in table or pair.embedding]
    if strange:
        raise ShippingError(
            f"{strange[0]} is not one tensor of {base.name} that llama.cpp adapts ({len(strange)} of {len(found)} such "
            f"modules). Merge it into a folder and export that: adapters-kit merge {adapter.folder} merged/"
        )
    metadata, _ = read_gguf_metadata(str(base))
    with staged_file(out, overwrite=overwrite) as made:
        writer = gguf.GGUFWriter(made, metadata["general.architecture"])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        for path, pair in found.items():
            kept = table[f"{path}.weight"]
            a, b = (factor.to(dtype).numpy() for factor in (pair.a, pair.b))
            if kept.order is not None:
                in_file = np.empty_like(b)
                in_file[kept.order] = b
                b = in_file
            writer.add_tensor(f"{kept.stored.name}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{kept.stored.name}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
