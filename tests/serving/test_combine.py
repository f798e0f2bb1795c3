"""Several adapters into one: the weighted sum is exact, TIES and DARE are peft's own on the updates."""

import json

import peft
import pytest
import torch
from peft.utils.merge_utils import ties
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit import cli
from tests.support.shipping import gap, load, save_base, train_on

WEIGHTS = [0.7, -1.3]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """A base and two adapters: other ranks, other scales, other targets."""
    folder = tmp_path_factory.mktemp("combine")
    base = save_base("llama", folder / "base")
    configs = [
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"]),
        peft.LoraConfig(r=6, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}),
    ]
    for index, config in enumerate(configs):
        train_on(base, config, folder / f"a{index}", seed=index)
        path = folder / f"a{index}" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return base, [folder / "a0", folder / "a1"]


def updates(base, adapter) -> dict[str, torch.Tensor]:
    """path -> update, by peft."""
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def expected(base, adapters, mix) -> dict[str, torch.Tensor]:
    tables = [updates(base, adapter) for adapter in adapters]
    paths = {path for table in tables for path in table}
    return {p: mix([(t[p], w) for t, w in zip(tables, WEIGHTS, strict=True) if p in t]) for p in paths}


def test_the_weighted_sum_is_exact(trio, tmp_path):
    base, adapters = trio
    report = ak.combine(adapters, tmp_path / "sum", weights=WEIGHTS)
    assert report.rank == 10 and not report.errors
    found = updates(base, tmp_path / "sum")
    wanted = expected(base, adapters, lambda parts: sum(update * weight for update, weight in parts))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[path], wanted[path], atol=1e-5) for path in wanted)
    ak.merge(tmp_path / "sum", tmp_path / "merged")
    live = peft.PeftModel.from_pretrained(load(base), tmp_path / "sum").eval()
    assert gap(live, load(tmp_path / "merged")) < 1e-5


def test_a_lower_rank_tells_its_loss(trio, tmp_path):
    base, adapters = trio
    report = ak.combine(adapters, tmp_path / "small", weights=WEIGHTS, rank=5)
    found = updates(base, tmp_path / "small")
    wanted = expected(base, adapters, lambda parts: sum(update * weight for update, weight in parts))
    for path, error in report.errors.items():
        assert ((wanted[path] - found[path]).norm() / wanted[path].norm()).item() == pytest.approx(
            error, rel=1e-3, abs=1e-6
        )
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {5}


def test_ties_is_pefts(trio, tmp_path):
    base, adapters = trio
    report = ak.combine(adapters, tmp_path / "ties", weights=WEIGHTS, method="ties", density=0.3, rank=64)
    assert max(report.errors.values()) < 1e-6  # full rank: nothing is lost
    found, wanted = updates(base, tmp_path / "ties"), expected(base, adapters, ties_of)
    assert all(torch.allclose(found[path], wanted[path], atol=1e-5) for path in wanted)


def test_dare_keeps_the_sum_on_average_and_repeats(trio, tmp_path):
    base, adapters = trio
    total = None
    for seed in range(12):
        ak.combine(adapters, tmp_path / f"d{seed}", weights=WEIGHTS, method="dare", density=0.8, rank=64, seed=seed)
        found = updates(base, tmp_path / f"d{seed}")
        total = found if total is None else {path: total[path] + found[path] for path in total}
    wanted = expected(base, adapters, lambda parts: sum(update * weight for update, weight in parts))
    for path in wanted:
        assert ((total[path] / 12 - wanted[path]).norm() / wanted[path].norm()).item() < 0.25
    ak.combine(adapters, tmp_path / "again", weights=WEIGHTS, method="dare", density=0.8, rank=64, seed=11)
    again = updates(base, tmp_path / "again")
    assert all(torch.equal(again[path], found[path]) for path in again)


def test_what_does_not_add_up_is_refused(trio, tmp_path):
    base, adapters = trio
    train_on(base, peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), tmp_path / "dora")
    train_on(base, peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "plain")
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other"}))
    for folders, options, message in (
        (adapters[:1], {}, "two adapters or more"),
        (adapters, {"weights": [1.0]}, "1 weights for 2 adapters"),
        (adapters, {"method": "tie"}, "Did you mean ties"),
        (adapters, {"density": 0.0}, "density"),
        ([adapters[0], tmp_path / "plain"], {}, "other"),
        ([tmp_path / "dora", tmp_path / "dora"], {}, "DoRA"),
    ):
        with pytest.raises(ak.AdapterError, match=message):
            ak.combine(folders, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_and_others_merge_into_their_exact_sum(family, tmp_path):
    """base + Σ weight · (merged − base), each merged by peft alone in float64; DoRA with its magnitudes."""
    base = save_base(family, tmp_path / "base")
    one = ["q_proj", "up_proj"] if family == "llama" else ["c_attn"]
    other = ["q_proj", "v_proj"] if family == "llama" else ["c_attn", "c_fc"]
    configs = [
        peft.LoraConfig(use_dora=True, r=4, lora_alpha=12, target_modules=one),
        peft.LoraConfig(use_dora=True, use_rslora=True, target_modules=other),
        peft.LoraConfig(r=3, target_modules=other),
        peft.IA3Config(target_modules=one[:1], feedforward_modules=[]),
    ]
    weights = [0.7, -1.3, 0.4, 2.0]
    start = load(base).double().state_dict()
    wanted = {name: value.clone() for name, value in start.items()}
    for index, (config, weight) in enumerate(zip(configs, weights, strict=True)):
        train_on(base, config, tmp_path / f"a{index}", seed=index)
        model = peft.PeftModel.from_pretrained(load(base, dtype=torch.float64), tmp_path / f"a{index}")
        for name, value in model.merge_and_unload().state_dict().items():
            wanted[name] += weight * (value - start[name])
    report = ak.merge([tmp_path / f"a{index}" for index in range(4)], tmp_path / "sum", weights=weights, base=base)
    merged = load(tmp_path / "sum").state_dict()
    moved = 0
    for name, value in wanted.items():
        assert torch.allclose(merged[name].double(), value, atol=1e-5), name
        moved += (value - start[name]).abs().max() > 1e-2
    assert 0 < moved <= report.changed and "computed again" in str(report) and "-1.3 ×" in str(report)
    manifest = json.loads((tmp_path / "sum" / "manifest.json").read_text())
    assert manifest["weights"] == weights and len(manifest["adapters"]) == 4


def ties_of(parts):
    """peft's TIES at density 0.3; it needs two updates to vote on."""
    parts = parts if len(parts) > 1 else [*parts, (torch.zeros_like(parts[0][0]), 0.0)]
    return ties([update for update, _ in parts], torch.tensor([weight for _, weight in parts]), 0.3)


def moved(base, merged) -> dict[str, torch.Tensor]:
    """path -> what was added to the weight, for weights that changed."""
    before, after = load(base).state_dict(), load(merged).state_dict()
    gaps = {name.removesuffix(".weight"): after[name] - value for name, value in before.items()}
    return {path: gap for path, gap in gaps.items() if gap.any()}


def test_ties_and_dare_straight_into_the_weights(trio, tmp_path):
    """On the whole updates, so that nothing is lost to a rank."""
    base, adapters = trio
    report = ak.merge(adapters, tmp_path / "ties", weights=WEIGHTS, method="ties", density=0.3)
    found, wanted = moved(base, tmp_path / "ties"), expected(base, adapters, ties_of)
    assert found.keys() == wanted.keys() and "TIES at density 0.3" in str(report)
    assert all(torch.allclose(found[path], wanted[path], atol=1e-5) for path in wanted)
    plain = expected(base, adapters, lambda parts: sum(update * weight for update, weight in parts))
    ak.merge(adapters, tmp_path / "all", weights=WEIGHTS, method="dare", density=1.0)
    found = moved(base, tmp_path / "all")
    assert all(torch.allclose(found[path], plain[path], atol=1e-5) for path in plain)
    for seed, name in ((3, "one"), (3, "again"), (4, "other")):
        ak.merge(adapters, tmp_path / name, weights=WEIGHTS, method="dare", density=0.5, seed=seed, verify="off")
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")}
    assert files["one"] == files["again"] != files["other"]
    path = "model.layers.0.self_attn.v_proj"  # of one adapter alone: dropped, or twice as large
    kept, whole = moved(base, tmp_path / "one")[path], plain[path]
    assert torch.allclose(torch.where(kept == 0, 2 * whole, kept), 2 * whole, atol=1e-5)
    assert 0.3 < (kept != 0).float().mean() < 0.7
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["combined"] == {"method": "dare", "density": 0.5, "seed": 3}


def test_the_command_line_takes_several_adapters(trio, tmp_path, capsys):
    base, adapters = trio
    words, options = [str(adapter) for adapter in adapters], ["--weights", *map(str, WEIGHTS)]
    for name, more, kinds in (
        ("sum", [], {}),
        ("ties", ["--method", "ties", "--density", "0.3"], {"method": "ties", "density": 0.3}),
    ):
        assert cli.main(["merge", *words, str(tmp_path / name), *options, *more, "--base", str(base)]) == 0
        assert "-1.3 ×" in capsys.readouterr().out
        ak.merge(adapters, tmp_path / f"{name}-ours", weights=WEIGHTS, **kinds)
        files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in (name, f"{name}-ours")]
        assert files[0] == files[1]
    assert cli.main(["combine", *words, str(tmp_path / "one"), *options, "--rank", "5"]) == 0
    assert "r = 5" in capsys.readouterr().out
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {5}
    for verb, arguments, message in (
        ("merge", [*words, str(tmp_path / "x"), "--weights", "1"], "1 weights for 2 adapters"),
        ("merge", [words[0], str(tmp_path / "x"), "--method", "ties"], "--method ties is for several adapters"),
        ("merge", [*words, str(tmp_path / "x"), "--density", "0"], "--density 0.0"),
        ("combine", [words[0], str(tmp_path / "x")], "two adapters or more"),
    ):
        assert cli.main([verb, *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_has_no_sum_is_not_merged(trio, tmp_path):
    base, adapters = trio
    train_on(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "head")
    for folders, options, message in (
        (adapters, {"weights": [1.0]}, "1 weights for 2 adapters"),
        (adapters, {"quantize": "nf4"}, "leave out quantize"),
        ([adapters[0], tmp_path / "head"], {}, "a trained head"),
        (adapters[0], {"weights": [1.0]}, "weights is for several adapters"),
        (adapters, {"method": "tie"}, "Did you mean ties"),
        (adapters, {"density": 1.5}, r"density=1\.5"),
    ):
        with pytest.raises(ak.AdapterError, match=message):
            ak.merge(folders, tmp_path / "out", base=base, **options)
        assert not (tmp_path / "out").exists()
