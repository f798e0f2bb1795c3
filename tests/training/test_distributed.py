"""Two CPU processes (gloo) under accelerate launch: the same losses as one process on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DeepSpeedPlugin

import adapters_kit as ak
from adapters_kit.errors import TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training import sharding
from tests.support import small, tiny

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


def launch(kind: str, recipe: Path, out: Path, tmp_path: Path, *more: str, fail_at: int | None = None) -> list[int]:
    """The example's accelerate config, made to run on CPUs. How many parameters were sharded, and of how many."""
    config = yaml.safe_load((EXAMPLES / f"{kind}.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config |= {"main_process_ip": "127.0.0.1", "main_process_port": port}
    # accelerate does not use DeepSpeed where it is asked for a CPU; DeepSpeed has a switch of its own.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    if kind != "deepspeed":
        config["use_cpu"] = True
        environment["ACCELERATE_USE_CPU"] = "true"
    path = tmp_path / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    seen = tmp_path / f"{out.name}.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "-m"]
    command += ["tests.support.launched", str(seen), *([] if fail_at is None else ["--fail-at", str(fail_at)])]
    command += ["train", str(recipe), "--out", str(out), *more]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False, cwd=root)
    assert (done.returncode == 0) == (fail_at is None), done.stderr[-3000:]
    return json.loads(seen.read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed"])
def test_the_example_configs_are_what_accelerate_takes(kind):
    """Every key is known, also where DeepSpeed is not installed."""
    config = ClusterConfig.from_yaml_file(EXAMPLES / f"{kind}.yaml")
    assert config.num_processes == 2
    if kind == "deepspeed":
        made = DeepSpeedPlugin(**config.deepspeed_config).deepspeed_config
        assert made["zero_optimization"]["stage"] == 2
        assert made["gradient_accumulation_steps"] == made["gradient_clipping"] == "auto", "the recipe decides"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed"])
def test_two_processes_train_as_one(kind, tmp_path):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    small.write_jsonl(tmp_path / "data" / "train.jsonl", small.sentiment(32))
    small.write_jsonl(tmp_path / "data" / "test.jsonl", small.sentiment(17, seed=1))
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3, "log_every": 1, "samples": 0}
    fields = {"model": str(small.model("bert")), "task": "text-classification", "data": str(tmp_path / "data")}
    recipe = Recipe(**fields, method={"name": "lora", "r": 4}, training=training)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    one = ak.train(recipe.changed(**{"training.batch_size": 8}), tmp_path / "one", quiet=True)
    sharded, parameters = launch(kind, path, tmp_path / "two", tmp_path)
    assert sharded == (parameters if kind == "fsdp2" else 0), "what the config says, not plain copies"
    two = ak.Run.open(tmp_path / "two")

    def losses(run: ak.Run) -> list[float]:
        return [line["loss"] for line in run.history() if "loss" in line]

    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.metrics["steps"] == one.metrics["steps"] == 8
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
    assert two.metrics["test_examples"] == 17
    assert two.metrics["trainable_params"] == one.metrics["trainable_params"]
    first, second = (peft.load_peft_weights(str(run.adapter)) for run in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)
    assert ak.evaluate(two.path)["loss"] == pytest.approx(two.metrics["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_of_two_processes_goes_on_and_merges(kind, tmp_path):
    """A causal model: stopped behind a checkpoint, resumed, the same as one process; merged as any other."""
    # Sixteen to train on: where the last batch of an epoch is not full, two processes repeat rows to share it evenly.
    small.write_jsonl(tmp_path / "data" / "train.jsonl", small.sentiment(16))
    small.write_jsonl(tmp_path / "data" / "test.jsonl", small.sentiment(5, seed=1))
    training = {"max_steps": 6, "batch_size": 2, "learning_rate": 3e-3, "log_every": 1, "samples": 0, "save_every": 2}
    fields = {"model": str(small.model("llama")), "task": "causal-lm", "data": str(tmp_path / "data")}
    recipe = Recipe(**fields, method={"name": "lora", "r": 4}, training=training)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    one = ak.train(recipe.changed(**{"training.batch_size": 4}), tmp_path / "one", quiet=True)
    launch(kind, path, tmp_path / "two", tmp_path, fail_at=5)
    sharded, parameters = launch(kind, path, tmp_path / "two", tmp_path, "--resume")
    assert sharded == (parameters if kind == "fsdp2" else 0)
    two = ak.Run.open(tmp_path / "two")
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
    assert two.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=1e-4)
    assert ak.merge(two.adapter, tmp_path / "merged").check is not None, "verified"


def test_fsdp_that_would_be_plain_copies_is_refused(monkeypatch):
    state = SimpleNamespace(num_processes=2, distributed_type="MULTI_CPU")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"says FSDP, and accelerate would train .*MULTI_CPU.*fsdp_version: 2"):
        sharding.shard(SimpleNamespace(state=state))


def test_what_blocks_share_is_refused_before_it_is_sharded(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    with pytest.raises(TrainingError, match=r"shared_phm_rule: false \(compacter\), or launch with .*ddp\.yaml"):
        sharding.prepare_shards(ak.wrap(tiny.build("bert"), "compacter", phm_dim=2))
    assert os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "BertLayer"
    sharding.prepare_shards(ak.wrap(tiny.build("bert"), "compacter", phm_dim=2, shared_phm_rule=False))
