"""compress(): AdapterDrop against peft's adapter with its lowest layers zeroed, and scores beside what was made."""

import json

import pytest
import torch
from peft import PeftModel

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import ShippingError
from tests.support import small

IDS = torch.tensor([[7, 8, 9, 10, 11]])


def saved(family, method, folder):
    base = small.model(family, num_hidden_layers=3)
    model = ak.wrap(ak.load(base, "causal-lm"), method)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return base, model.eval()


@pytest.mark.parametrize("method", ["lora", "dora", "houlsby", "pfeiffer", "prefix", "compacter"])
def test_without_the_lowest_layers(method, tmp_path):
    base, model = saved("llama", method, tmp_path / "a")
    report = ak.compress(tmp_path / "a", drop_layers=2)
    assert report.path == tmp_path / "a-small" and report.bytes_after < report.bytes_before
    small_one = ak.wrap(ak.load(base, "causal-lm"), str(report.path)).eval()
    plain = ak.load(base, "causal-lm").eval()
    streams = {}
    for name, one in (("small", small_one), ("whole", model), ("plain", plain)):
        with torch.no_grad():
            streams[name] = one(IDS, output_hidden_states=True).hidden_states
    # Up to the third layer it is the base itself; the third has the adapter that it had.
    assert torch.equal(streams["small"][2], streams["plain"][2])
    assert not torch.allclose(streams["small"][3], streams["plain"][3], atol=1e-3)
    third = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad and "layers.2." in n}
    left = {n.replace(".default", ""): p for n, p in small_one.named_parameters() if ".layers." in n}
    assert third and all(torch.equal(left[name], value) for name, value in third.items())
    assert PeftModel.from_pretrained(ak.load(base, "causal-lm"), str(report.path)) is not None


def test_what_cannot_be_left_without(tmp_path):
    saved("llama", "lora", tmp_path / "a")
    for n in (3, -1):
        with pytest.raises(ShippingError, match="1 to 2"):
            ak.compress(tmp_path / "a", tmp_path / "x", drop_layers=n)
    saved("llama", "ia3", tmp_path / "i")
    with pytest.raises(ShippingError, match="is ia3"):
        ak.compress(tmp_path / "i", tmp_path / "x", drop_layers=1)
    base = small.model("llama", num_hidden_layers=3)
    late = ak.wrap(ak.load(base, "causal-lm"), "lora", target_modules=["model.layers.2.mlp.up_proj"])
    late.save_pretrained(tmp_path / "late")
    with pytest.raises(ShippingError, match="nothing to leave out"):
        ak.compress(tmp_path / "late", tmp_path / "x", drop_layers=1)
    assert not (tmp_path / "x").exists()


def test_a_run_is_scored_before_and_after(tmp_path, capsys):
    data = small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(40))
    recipe = ak.Recipe(
        model=str(small.model("bert", num_hidden_layers=3)),
        task="text-classification",
        data=str(data),
        method="lora",
        training={"max_steps": 4, "samples": 0, "learning_rate": 1e-2},
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert (
        cli.main(["compress", str(run.path), str(tmp_path / "s"), "--drop-layers", "1", "--rank", "2", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["before"]["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    assert told["after"]["loss"] != told["before"]["loss"] and told["dropped"] == 1
    assert max(told["ranks"].values()) <= 2 and not any("layer.0." in path for path in told["ranks"])
    report = ak.compress(run, tmp_path / "same", energy=1.0)
    assert report.after["loss"] == pytest.approx(report.before["loss"], rel=1e-4)
    assert "accuracy: " in str(report)
    assert ak.compress(run.adapter, tmp_path / "quick").before == {}
