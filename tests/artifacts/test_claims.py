"""Sizes that an adapter's config claims are compared with its tensors before anything is allocated."""

import json
import resource
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.support import small

# method -> the key that says how large its tensors are
SIZES = {
    "lora": "r",
    "adalora": "init_r",
    "vblora": "num_vectors",
    "fourierft": "n_frequency",
    "houlsby": "bottleneck_dim",
    "prefix": "num_virtual_tokens",
    "prefix-tuning": "num_virtual_tokens",
    "p-tuning": "num_virtual_tokens",
    "prompt": "token_dim",
    "cartridge": "num_layers",
}
NEEDED = {"adalora": {"total_step": 10}}


def saved(method: str | list[str], folder: Path) -> Path:
    ak.wrap(ak.load(small.model("llama")), method, **NEEDED.get(str(method), {})).save_pretrained(folder)
    return folder


def claim(folder: Path, key: str, value: int) -> None:
    """Sets the key, in whichever part of the config it stands."""
    place = folder / "adapter_config.json"
    raw = json.loads(place.read_text())
    parts = [raw, *(one for many in raw.values() if isinstance(many, list) for one in many if isinstance(one, dict))]
    chosen = next((part for part in parts if key in part), raw)
    chosen[key] = value
    place.write_text(json.dumps(raw))


@pytest.mark.parametrize("method", SIZES)
def test_a_size_that_no_tensor_has_is_refused_before_it_is_allocated(method, tmp_path):
    folder = saved(method, tmp_path / "adapter")
    model = ak.load(small.model("llama"))
    ak.wrap(model, folder)  # as it is, it loads
    claim(folder, SIZES[method], 3_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=rf"(?s){SIZES[method]}.* no tensor is longer than|and the file holds"):
        ak.wrap(ak.load(small.model("llama")), folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_the_parts_of_a_combination_are_looked_at(tmp_path):
    folder = saved(["lora", "prefix"], tmp_path / "adapter")
    claim(folder, "num_virtual_tokens", 3_000_000)
    with pytest.raises(AdapterError, match="num_virtual_tokens is 3,000,000"):
        ak.wrap(ak.load(small.model("llama")), folder)


def test_tables_whose_sizes_are_small_each_and_huge_together(tmp_path):
    folder = saved("prefix-tuning", tmp_path / "adapter")
    for key in ("num_virtual_tokens", "num_layers", "token_dim"):
        claim(folder, key, 4000)
    with pytest.raises(AdapterError, match="64,000,000,000 numbers or more, and the file holds 2,560"):
        ak.wrap(ak.load(small.model("llama")), folder)
