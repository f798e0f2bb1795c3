"""A trained prefix as a key/value cache that plain transformers starts from, without adapters_kit or peft.

A cache takes positions: its P entries stand before the text, which then begins at position P. The adapter's prefix
takes none, and the text begins at 0. With rotary positions only distances count, so prefix keys turned by P positions
make both the same function. Where that does not hold (learned positions, sliding windows that the cache would slide out
of, encoder-decoders) the export is refused by name.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, read_adapter
from adapters_kit.artifacts.files import write_tensors, write_text
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.source import base_of
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import AdapterError, ShippingError
from adapters_kit.loading import load
from adapters_kit.methods.prefix.config import PrefixConfig
from adapters_kit.methods.prefix.peft_prefix import to_peft_prefix
from adapters_kit.wrapping import wrap

FILE = "prefix_cache.safetensors"
_CARD = """---
library_name: transformers
tags:
- kv-cache
---

# A trained prefix of {tokens} tokens as a key/value cache

For `{base}`, and for no other model. `{file}` holds `layers.N.key` and `layers.N.value`, each (heads, {tokens}, width):
what the cache of layer N starts with. Keys are turned to positions 0 to {last}; the text begins at position {tokens}.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

model = AutoModelForCausalLM.from_pretrained("{base}")
parts = load_file("{file}")
cache = DynamicCache([(parts[f"layers.{{i}}.key"][None], parts[f"layers.{{i}}.value"][None]) for i in range({layers})])

logits = model(ids, past_key_values=cache).logits  # ids: (1, length)
# generate() takes the ids of everything that is cached, too; which ones stand for the prefix does not matter.
# Every call needs a fresh cache, since it grows.
padded = torch.cat([torch.zeros(1, {tokens}, dtype=torch.long), ids], dim=1)
text = model.generate(padded, past_key_values=cache)[:, {tokens}:]
```

With adapters_kit: `cache = ak.load_cache("this folder", model, batch_size=1)`.
"""


def export_cache(
    source: Path, out: Path, *, base: str | os.PathLike | None, dtype: torch.dtype, overwrite: bool
) -> int:
    """Write the prefix of the adapter folder `source` as a cache. The base model is loaded for it, in float32.

    Returns:
        The number of prefix tokens.

    Raises:
        ShippingError: not a prefix adapter, another base, or a model for which a cache would not be exact; says why.
    """
    adapter = read_adapter(source)
    if not isinstance(adapter.config, PrefixConfig):
        raise ShippingError(f"{source} is a {adapter.method} adapter; only a prefix can be written as a KV cache.")
    place = base_of(adapter, base)
    with staged(out, overwrite=overwrite) as stage:
        model = wrap(load(place, "causal-lm", dtype="float32"), source, fuse=False).eval()
        with tempfile.TemporaryDirectory(dir=stage) as work:
            try:
                to_peft_prefix(model, work)
            except AdapterError as error:
                raise ShippingError(f"{source} cannot be shipped as a KV cache. {error}") from error
            flat = load_file(Path(work, WEIGHTS))["prompt_embeddings"]
            made = read_adapter(Path(work)).config
        tokens, layers = made.num_virtual_tokens, made.num_layers
        pairs = flat.view(tokens, layers, 2, made.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
        parts = {
            f"layers.{index}.{kind}": pair[side].to(dtype)
            for index, pair in enumerate(pairs)
            for side, kind in enumerate(("key", "value"))
        }
        about = {"base": describe(adapter.base or place), "num_virtual_tokens": str(tokens)}
        write_tensors(stage / FILE, parts, **about)
        card = _CARD.format(base=about["base"], tokens=tokens, last=tokens - 1, layers=layers, file=FILE)
        write_text(stage / "README.md", card)
        write_manifest(stage, {"adapter": describe(source), "base": describe(place)})
    return tokens


def load_cache(folder: str | os.PathLike, model: Any, *, batch_size: int = 1) -> DynamicCache:
    """The cache that `export(..., format="kv-cache")` wrote, ready for one forward or `generate` of `model`.

    Args:
        folder: what `export` wrote.
        model: the base model, with nothing on it; gives dtype and device.
        batch_size: rows of the batch.

    Returns:
        A `DynamicCache`. It grows with use: load a fresh one for every text.

    Raises:
        ShippingError: no such cache there, or not one of this model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        hint = (
            " It holds an adapter: write its cache with export(..., format='kv-cache')."
            if (Path(folder) / CONFIG).is_file()
            else ""
        )
        raise ShippingError(f"No {FILE} in {folder}.{hint}")
    with safe_open(path, "pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    layers = len(parts) // 2
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    found = parts["layers.0.key"].shape[0]
    if layers != config.num_hidden_layers or found != heads:
        raise ShippingError(
            f"{path} is for {layers} layers with {found} key/value heads; this {type(model).__name__} has "
            f"{config.num_hidden_layers} with {heads}. Load the model that it was made for."
        )

    def rows(name: str) -> torch.Tensor:
        return parts[name].to(model.device, model.dtype)[None].repeat(batch_size, 1, 1, 1)

    return DynamicCache([(rows(f"layers.{index}.key"), rows(f"layers.{index}.value")) for index in range(layers)])
