"""Merging the wrong base or the wrong adapter is refused."""

import json
import os
import pickle
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.artifacts.identity import check_base
from adapters_kit.artifacts.record import record_base
from tests.merging.test_integrity import rewrite
from tests.support.shipping import gap, load, save_base

# --- the wrong base ---


def test_another_base_is_refused(pair):
    base, adapter, tmp = pair
    record_base(adapter, base)
    check_base(adapter, base)
    ak.merge(adapter, tmp / "merged", base=base, verify="off")
    other = tmp / "other"
    save_base("llama", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3  # one value, in a tensor that the adapter does not even touch
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ak.AdapterError, match=r"1 of 21 tensors have other values: model\.norm\.weight"):
        ak.merge(adapter, tmp / "wrong", base=other)
    with pytest.raises(ak.AdapterError, match=r"is not the base"):
        check_base(adapter, other)
    assert not (tmp / "wrong").exists()
    report = ak.merge(adapter, tmp / "wrong", base=other, force=True)
    assert any("model.norm.weight" in note for note in report.notes)


def test_loading_checks_the_base_too(pair):
    base, adapter, tmp = pair
    record_base(adapter, base)
    assert gap(ak.wrap(load(base), adapter).eval(), peft.PeftModel.from_pretrained(load(base), adapter).eval()) < 1e-5
    other = save_base("llama", tmp / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    model = load(other)
    before = set(dict(model.named_modules()))
    with pytest.raises(ak.AdapterError, match=r"is not the base.*model\.norm\.weight.*force=True"):
        ak.wrap(model, adapter)
    assert set(dict(model.named_modules())) == before and all(p.requires_grad for p in model.parameters())
    wrapped = ak.wrap(load(other), "lora", target_modules=["k_proj"])
    with pytest.raises(ak.AdapterError, match="is not the base"):
        ak.wrap(wrapped, adapter, adapter_name="second")
    ak.wrap(model, adapter, force=True)
    unknown = load(base)
    unknown.config._name_or_path = "somewhere/else"  # nothing to compare with
    ak.wrap(unknown, adapter)


def test_hashes_are_taken_again_when_a_file_changes(pair):
    base, adapter, _ = pair
    record_base(adapter, base)
    check_base(adapter, base)
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x01" * 8)
    with pytest.raises(ak.AdapterError, match="is not the base"):
        check_base(adapter, base)


def test_a_zeroed_payload_is_noticed(pair):
    base, adapter, tmp = pair
    record_base(adapter, base)
    size = (base / "model.safetensors").stat().st_size
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(size - 4096)
        file.write(bytes(4096))
    with pytest.raises(ak.AdapterError, match="have other values"):
        ak.merge(adapter, tmp / "merged", base=base)


def test_another_sharding_is_the_same_base(pair):
    base, adapter, tmp = pair
    record_base(adapter, base)
    save_base("llama", tmp / "shards", max_shard_size="60KB")
    assert len(list((tmp / "shards").glob("*.safetensors"))) > 1
    trained = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    ak.merge(adapter, tmp / "merged", base=tmp / "shards")
    assert gap(trained, load(tmp / "merged")) < 1e-5


def test_no_base(pair):
    _, adapter, tmp = pair
    with pytest.raises(ak.AdapterError, match=r"does not exist|neither a folder"):
        ak.merge(adapter, tmp / "merged", base=str(tmp / "nowhere"))


# --- the wrong adapter ---


def first(tensors: dict, part: str) -> str:
    return next(name for name in tensors if part in name)


GATE = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
WRONG = {
    "missing": (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, "adapter tensors are missing"),
    "foreign": (
        lambda t: t | {"base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight": torch.ones(8, 64)},
        "only one of lora_A and lora_B",
    ),
    "stranger": (lambda t: t | {"base_model.model.model.layers.0.mlp.scale": torch.ones(8)}, "match nothing"),
    "shape": (lambda t: t | {first(t, "lora_B"): torch.ones(3, 3)}, "share no rank"),
    "width": (lambda t: t | {first(t, "lora_B"): torch.ones(3, 8)}, "size mismatch"),
    "rank": (
        lambda t: t | {first(t, "lora_A"): torch.ones(5, 64), first(t, "lora_B"): torch.ones(64, 5)},
        "rank 8 for .* has 5 rows",
    ),
    "nan": (lambda t: t | {first(t, "lora_B"): torch.full((64, 8), torch.nan)}, "NaN or infinite"),
    "infinite": (lambda t: t | {first(t, "lora_A"): torch.full((8, 64), torch.inf)}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_refused(case, pair):
    base, adapter, tmp = pair
    change, message = WRONG[case]
    rewrite(adapter, change)
    with pytest.raises(ak.AdapterError, match=message):
        ak.merge(adapter, tmp / "merged", base=base)
    assert not (tmp / "merged").exists()


def test_values_that_do_not_fit_float16_are_refused(pair):
    base, adapter, tmp = pair
    rewrite(adapter, lambda t: {name: tensor * 1e5 for name, tensor in t.items()})
    with pytest.raises(ak.AdapterError, match=r"do not fit.*bfloat16"):
        ak.merge(adapter, tmp / "merged", base=base, dtype="float16")


def test_truncated_weights_are_refused(pair):
    base, adapter, tmp = pair
    for file in (adapter / "adapter_model.safetensors", base / "model.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        with pytest.raises(ak.AdapterError, match="damaged or incomplete"):
            ak.merge(adapter, tmp / "merged", base=base)
        file.write_bytes(whole)


def test_an_unknown_method_is_refused(pair):
    base, adapter, tmp = pair
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOOORA"}))
    with pytest.raises(ak.AdapterError, match=r"'LOOORA'.*LORA"):
        ak.merge(adapter, tmp / "merged", base=base)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/adapters_kit_bomb",))


def test_a_pickle_with_code_is_refused(pair):
    base, adapter, tmp = pair
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(ak.AdapterError):
        ak.merge(adapter, tmp / "merged", base=base)
    torch.save({"a": Bomb()}, adapter / "adapter_model.bin")
    with pytest.raises(ak.AdapterError, match="run code"):
        ak.merge(adapter, tmp / "merged", base=base)
    assert not Path("/tmp/adapters_kit_bomb").exists()


def test_a_plain_pickle_is_merged(pair):
    base, adapter, tmp = pair
    trained = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    ak.merge(adapter, tmp / "merged", base=base)
    assert gap(trained, load(tmp / "merged")) < 1e-5


def test_a_model_folder_is_not_an_adapter(pair):
    base, _, tmp = pair
    with pytest.raises(ak.AdapterError, match="looks like a whole model"):
        ak.merge(base, tmp / "merged")
