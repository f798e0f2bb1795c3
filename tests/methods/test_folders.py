"""`wrap(model, folder)` goes the way of `wrap(model, name)`: any kind, beside any other kind."""

import itertools

import pytest
import torch

import adapters_kit as ak
from tests.methods.test_combinations import fill
from tests.support import tiny

KINDS = ("lora", "houlsby", "prefix", "ia3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder with a trained adapter of it, and the logits that it gives."""
    made = {}
    for kind in KINDS:
        model = ak.wrap(tiny.build("llama"), kind).eval()
        fill(model)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = folder, logits(model)
    return made


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny.inputs(model)).logits


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_folders_of_two_kinds_share_a_model(folders, first, second):
    if {first, second} == {"lora", "ia3"}:
        pytest.skip("both stand around the same weights, which is refused: see test_combinations")
    model = ak.wrap(
        ak.wrap(tiny.build("llama"), folders[first][0], adapter_name="a"), folders[second][0], adapter_name="b"
    )
    for name, kind in (("b", second), ("a", first)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), folders[kind][1])
    ak.activate(model, ["a", "b"])
    assert not torch.allclose(logits(model), folders[first][1])


def test_a_folder_joins_a_method_that_was_named(folders):
    model = ak.wrap(ak.wrap(tiny.build("llama"), "lora"), folders["houlsby"][0], adapter_name="saved")
    torch.testing.assert_close(logits(model), folders["houlsby"][1])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".saved." in name for name in trained)
