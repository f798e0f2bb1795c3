"""A model with layers of sentence-transformers behind it: they stay with what is merged."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.support import shipping, small

LAYERS = ["Transformer", "Pooling", "Dense"]


@pytest.fixture
def merged(tmp_path):
    """The merged folder, and its base."""
    base = shutil.copytree(small.model("bert"), tmp_path / "base")
    transformers.BertModel.from_pretrained(base).save_pretrained(base)
    places = ["", "1_Pooling", "2_Dense"]
    modules = [
        {"idx": n, "name": str(n), "path": place, "type": f"sentence_transformers.models.{layer}"}
        for n, (place, layer) in enumerate(zip(places, LAYERS, strict=True))
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    for place in places[1:]:
        (base / place).mkdir()
        (base / place / "config.json").write_text(json.dumps({"word_embedding_dimension": 64}))
    save_file({"linear.weight": torch.ones(8, 64)}, base / "2_Dense" / "model.safetensors")
    model = ak.wrap(transformers.BertModel.from_pretrained(base), "lora", r=2)
    shipping.disturb(model)
    model.save_pretrained(tmp_path / "a")
    ak.merge(tmp_path / "a", tmp_path / "merged")
    return tmp_path / "merged", base


def test_every_layer_that_modules_json_names_is_there(merged):
    folder, base = merged
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        assert (folder / module["path"] / "config.json").is_file()
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    assert torch.equal(dense["linear.weight"], load_file(base / "2_Dense" / "model.safetensors")["linear.weight"])


def test_a_gguf_file_that_would_lack_a_layer_is_refused(merged, tmp_path):
    with pytest.raises(AdapterError, match=r"2_Dense/model.safetensors behind the model"):
        ak.export(merged[0], tmp_path / "x.gguf", format="gguf")
