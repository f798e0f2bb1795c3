"""Plain LoRA merged without a model: the same bytes, in a few megabytes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file

import adapters_kit as ak
from adapters_kit.artifacts.adapter import open_adapter
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.merging.plain_lora import find_direct
from adapters_kit.merging.update import changed, match
from tests.support import tiny
from tests.support.shipping import save_base, train_on

LORA = peft.LoraConfig


@pytest.mark.parametrize("way", ["direct", "by peft"])
def test_a_wrong_merge_is_caught(way, tmp_path, monkeypatch):
    """The check is worth something: a merge with half the scale does not pass it."""
    from adapters_kit.merging import deltas
    from adapters_kit.merging.plain_lora import Direct

    def halved(unit, adapter, read):
        merged, base = merge_unit(unit, adapter, read), {name: read(name).float() for name in unit.shapes}
        return {name: (value + base[name]) / 2 for name, value in merged.items()}

    merge_unit, changed = deltas.merge_unit, Direct.changed
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    patterns = {} if way == "direct" else {"rank_pattern": {"q_proj": 4}}
    train_on(base, LORA(target_modules=["q_proj"], **patterns), tmp_path / "adapter")
    monkeypatch.setattr(deltas, "merge_unit", halved)
    monkeypatch.setattr(Direct, "changed", lambda self, base: changed(replace(self, scale=self.scale / 2), base))
    with pytest.raises(ak.AdapterError, match="not the trained one"):
        ak.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


DIRECT = {
    "plain": ("llama", {"target_modules": "all-linear"}, True),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, True),
    "a regular expression": ("llama", {"target_modules": r".*\.1\..*\.(up|down)_proj"}, True),
    "patterns": ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}}, False),
    "stored transposed": ("gpt2", {"target_modules": ["c_proj"]}, False),
    "a tied head": ("gpt2", {"target_modules": ["lm_head"]}, False),
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, False),
    "moved base": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, False),
}


@pytest.mark.parametrize("case", DIRECT)
def test_plain_lora_needs_no_model(case, tmp_path):
    """Without a model exactly where the files leave no doubt; the bytes are those of the way through peft."""
    family, options, direct = DIRECT[case]
    base = save_base(family, tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(**options), tmp_path / "adapter", dtype=torch.bfloat16)
    adapter = open_adapter(tmp_path / "adapter")
    with open_checkpoint(base) as checkpoint:
        found = find_direct(adapter, checkpoint, json.loads((base / "config.json").read_text()))
        assert (found is not None) == direct
        if found:
            update = match(adapter, checkpoint, None, None, False)
            assert update.computed == found.factors.keys()
            ours = {name: torch.cat([block.clone() for block in blocks]) for name, blocks in found.changed(checkpoint)}
            theirs = {name: value.clone() for name, value in changed(update)}
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("rank", [1, 5, 16, 300])
@pytest.mark.parametrize("scale", [2.0, 1.7])
def test_a_merge_in_blocks_of_rows_is_that_of_the_whole(rank, scale, tmp_path, monkeypatch):
    """To the bit, wherever the blocks end; matrices are read, multiplied and written a few rows at a time."""
    from adapters_kit.merging import plain_lora as direct

    shapes = {f"{rows}.weight": (rows, columns) for rows, columns in ((1, 64), (65, 33), (129, 96), (993, 40))}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    factors = {name: (torch.randn(rank, c), torch.randn(r, rank)) for name, (r, c) in shapes.items()}
    monkeypatch.setattr(direct, "BLOCK", 1300)
    with open_checkpoint(tmp_path) as checkpoint:
        found = direct.Direct(scale, factors).changed(checkpoint)
        merged = {name: [block.clone() for block in blocks] for name, blocks in found}
        assert merged.keys() == shapes.keys() and max(map(len, merged.values())) > 20
        for name, (a, b) in factors.items():
            assert torch.equal(torch.cat(merged[name]), checkpoint.read(name) + (b @ a) * scale), name


@pytest.mark.slow
def test_a_plain_merge_imports_neither_peft_nor_transformers(tmp_path):
    base = save_base("llama", tmp_path / "base")
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter")
    code = (
        "import sys, adapters_kit as ak; ak.merge(*sys.argv[1:3], base=sys.argv[3], verify='off');"
        "assert not {'peft', 'transformers', 'accelerate'} & sys.modules.keys()"
    )
    paths = [tmp_path / name for name in ("adapter", "merged", "base")]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


MEASURED = """
import sys
from pathlib import Path
import adapters_kit as ak

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

root = Path(sys.argv[1])
for size in ("small", "large"):  # the first imports what is needed
    for way in ("direct", "peft"):
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        ak.merge(root / size / way, root / size / f"merged-{way}", base=root / size / "base", verify="off")
        print(size, way, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not reset the peak here")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """100 MB of weights, tensors of 1 MB, a small adapter: with a model's skeleton or without, never the model."""
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    for size, shape in (("small", {}), ("large", large)):
        base = tmp_path / size / "base"
        tiny.build("llama", **shape).save_pretrained(base)
        train_on(base, LORA(r=1, target_modules="all-linear"), tmp_path / size / "direct")
        train_on(base, LORA(r=1, target_modules="all-linear", rank_pattern={"q_proj": 2}), tmp_path / size / "peft")
    assert (tmp_path / "large" / "base" / "model.safetensors").stat().st_size > 90e6
    run = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], check=True, capture_output=True, text=True)
    peaks = {tuple(line.split()[:2]): int(line.split()[2]) for line in run.stdout.splitlines()}
    assert peaks["large", "direct"] < 16e6 and peaks["large", "peft"] < 40e6, peaks
