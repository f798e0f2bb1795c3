"""`predict` on a merged folder asks what its proof.json was asked: a folder that is not the tuned model is told."""

import shutil
import warnings

import pytest

import adapters_kit as ak
from tests.support import shipping, small


def test_a_merged_folder_whose_weights_are_the_bases_is_told(tmp_path):
    base = small.model("llama")
    model = ak.wrap(ak.load(base), "lora", r=4)
    shipping.disturb(model, 0.2)
    model.save_pretrained(tmp_path / "a")
    ak.merge(tmp_path / "a", tmp_path / "merged")
    assert (tmp_path / "merged" / "proof.json").is_file()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*proof.json.*")
        ak.predict(tmp_path / "merged", [{"prompt": "say hello ?"}], max_new_tokens=1)
    shutil.copy(base / "model.safetensors", tmp_path / "merged" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"merged does not answer as .*proof\.json.*: the base"):
        ak.predict(tmp_path / "merged", [{"prompt": "say hello ?"}], max_new_tokens=1)
