"""Weights in an adapter's folder that peft did not write: none is left out in silence, by wrap or by merge."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.methods.test_combinations import fill
from tests.methods.test_folders import logits
from tests.support import shipping, small, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
PART = {"x.weight": torch.ones(2, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter's folder, and what the model says with it."""
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.build("llama"), config).eval()
    fill(model)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder, logits(model)


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".pkl":
        path.write_bytes(b"not opened")
    else:
        torch.save(tensors, path)


def read_by(verb, folder, out):
    """What the model says with the adapter of a folder, by way of `wrap` or of `merge`."""
    if verb == "wrap":
        return logits(ak.wrap(tiny.build("llama"), folder))
    ak.merge(folder, out, base=small.model("llama"), verify="off")
    return logits(shipping.load(out))


both = pytest.mark.parametrize("verb", ["wrap", "merge"])


@both
@pytest.mark.parametrize(
    ("file", "tensors", "words"),
    [
        ("value_head.safetensors", HEAD, "value head.*LLaMA-Factory"),
        ("value_head.bin", HEAD, "v_head.summary"),
        ("non_lora_trainables.bin", PART, "LLaVA"),
        ("new_embeddings.safetensors", PART, "embeddings.*trainable_token_indices"),
        ("embed_tokens.pt", PART, "embeddings"),
        ("score.pt", PART, "head.*modules_to_save"),
        ("model_head.pkl", PART, "SetFit"),
        ("2_Dense/model.safetensors", PART, "sentence-transformers"),
        ("classifier/weights.pth", PART, "head"),
        ("pytorch_model.bin", PART, "whole model"),
        ("something.npz", PART, "not known here"),
        ("adapter_model.bin", PART, "Remove the stale one"),
    ],
)
def test_weights_that_nobody_reads_are_refused(saved, tmp_path, verb, file, tensors, words):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    write(folder / file, tensors)
    with pytest.raises(AdapterError, match=rf"(?s){file}.*{words}|{words}"):
        read_by(verb, folder, tmp_path / "out")
    (folder / file).unlink()  # as the message advises
    torch.testing.assert_close(read_by(verb, folder, tmp_path / "out"), saved[1], rtol=1e-4, atol=1e-4)


@both
def test_a_trainers_state_copies_and_models_of_their_own_are_no_loss(saved, tmp_path, verb):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    state = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "random_states_0.pkl", "optimizer.bin")
    for name in (*state, "global_step7/mp_rank_00_model_states.pt", "merged/model.safetensors"):
        write(folder / name, PART)
    torch.save({"learning_rate": 1e-3}, folder / "training_args.bin")
    (folder / "merged" / "config.json").write_text('{"model_type": "llama"}')
    write(folder / "adapter_model.bin", load_file(folder / WEIGHTS))
    shutil.copytree(saved[0], folder / "checkpoint-7")
    torch.testing.assert_close(read_by(verb, folder, tmp_path / "out"), saved[1], rtol=1e-4, atol=1e-4)


def test_a_file_of_other_tensors_is_told(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    torch.save({"x": {"input_ids": torch.ones(2, 3)}, "y": torch.ones(2)}, folder / "reference.pt")
    with pytest.warns(UserWarning, match=r"reference\.pt is not read"):
        torch.testing.assert_close(logits(ak.wrap(tiny.build("llama"), folder)), saved[1])


def test_other_adapters_in_the_folder_are_told(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    shutil.copytree(saved[0], folder / "reference")
    with pytest.warns(UserWarning, match="'reference'.*was not read"):
        ak.wrap(tiny.build("llama"), folder)
    report = ak.merge(folder, tmp_path / "out", base=small.model("llama"), verify="off")
    assert any("'reference'" in note for note in report.notes)


@both
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["ddp", "compiled", "compiled-base", "fsdp", "no-prefix"],
)
def test_names_of_wrappers_are_read_over(saved, tmp_path, verb, rename):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    save_file({rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    torch.testing.assert_close(read_by(verb, folder, tmp_path / "out"), saved[1], rtol=1e-4, atol=1e-4)


@both
def test_tensors_that_zero3_did_not_gather_are_named(saved, tmp_path, verb):
    folder = shutil.copytree(saved[0], tmp_path / "a")
    save_file({name: torch.empty(0) for name in load_file(folder / WEIGHTS)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="ZeRO-3"):
        read_by(verb, folder, tmp_path / "out")


@both
@pytest.mark.parametrize(
    ("file", "config", "words"),
    [
        ("adapters.npz", False, "MLX-LM.*mlx_lm.fuse"),
        ("adapter_model.pt", False, "torchtune"),
        ("epoch_1/adapter_model.pt", False, "torchtune"),
        ("lit_model_lora_finetuned.pth", False, "LitGPT.*merge_lora"),
        ("lit_model.pth.adapter_v2", False, "LitGPT.*no file format in peft"),
        ("global_step5/mp_rank_00_model_states.pt", True, "DeepSpeed.*zero_to_fp32"),
        ("pytorch_model_fsdp_0/__0_0.distcp", True, "FSDP.*FULL_STATE_DICT"),
        ("adapter_model-00001-of-00002.safetensors", True, "several files.*Join them"),
        ("lora_model_state.pdparams", False, "PaddleNLP"),
        ("gemma.lora.h5", False, "Keras"),
        ("pytorch_lora_weights.safetensors", False, "diffusers"),
        ("adapter.gguf", False, "llama.cpp"),
        ("ckpt_lora.pt", False, "a tool that cannot be told"),
        ("my_style.safetensors", False, "nothing tells what these weights are"),
    ],
)
def test_folders_of_other_kinds_are_named(saved, tmp_path, verb, file, config, words):
    write(tmp_path / "a" / file, PART)
    if config:
        shutil.copy(saved[0] / CONFIG, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        read_by(verb, tmp_path / "a", tmp_path / "out")


@both
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_the_state_of_a_whole_peft_model_is_named(saved, tmp_path, verb, file):
    state = {name.replace(".weight", ".default.weight"): t for name, t in load_file(saved[0] / WEIGHTS).items()}
    write(tmp_path / "a" / file, state)
    with pytest.raises(AdapterError, match=rf"whole peft model.*{file}|{file}.*save_pretrained"):
        read_by(verb, tmp_path / "a", tmp_path / "out")


@both
def test_a_folder_of_checkpoints_names_the_last(saved, tmp_path, verb):
    for step in (90, 100):
        shutil.copytree(saved[0], tmp_path / "a" / f"checkpoint-{step}")
    with pytest.raises(AdapterError, match=r"Name one: '.*checkpoint-100'"):
        read_by(verb, tmp_path / "a", tmp_path / "out")


@both
def test_a_run_folder_stands_for_its_adapter(saved, tmp_path, verb):
    shutil.copytree(saved[0], tmp_path / "run" / "adapter")
    torch.testing.assert_close(read_by(verb, tmp_path / "run", tmp_path / "out"), saved[1], rtol=1e-4, atol=1e-4)


def test_a_file_and_nothing_are_told_apart(saved, tmp_path):
    with pytest.raises(AdapterError, match=r"is a file.*name the folder"):
        ak.merge(saved[0] / WEIGHTS, tmp_path / "out", base="unused")
    with pytest.raises(AdapterError, match="There is no"):
        ak.merge(tmp_path / "nowhere", tmp_path / "out", base="unused")


def test_an_adapterhub_folder_says_which_verb_converts_it(tmp_path):
    about = {"config": {"reduction_factor": 2}, "name": "a", "model_type": "llama"}
    (tmp_path / CONFIG).write_text(json.dumps(about))
    write(tmp_path / "pytorch_adapter.bin", PART)
    with pytest.raises(AdapterError, match=r"AdapterHub.*adapters-kit convert .* BASE OUT"):
        ak.merge(tmp_path, tmp_path / "out", base="unused")
