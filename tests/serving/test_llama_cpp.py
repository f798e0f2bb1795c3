"""GGUF, proved against llama.cpp itself. Needs the optional package llama-cpp-python; the converters come from its
source archive, or from a checkout named by $LLAMA_CPP."""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import adapters_kit as ak
from adapters_kit.merging.base_folder import convert_gguf
from adapters_kit.serving import llama_cpp as gguf
from adapters_kit.serving.quantizer import quantizer, requantize
from tests.support import small
from tests.support.shipping import load, save_base, train_on

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
TEXTS = ["The capital of France is Paris, and", "def add(a, b):\n    return a + b\n"]

# Measured: 4e-6 to 5e-6, 7e-5 and 1e-3 to 2e-3 nats; the limits are about twice the largest, and below what leaving the
# adapter out costs (1.5e-2 to 2.3e-2). llama.cpp rounds activations to the weights' type as well.
LIMITS = {"float16": 1e-5, "bfloat16": 1.5e-4, "q8_0": 4e-3}


def test_a_wrong_type_or_a_taken_file_is_refused_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ak.AdapterError, match=r"q8_0.*q4_k_m"):
        ak.export(tmp_path, tmp_path / "x.gguf", format="gguf", dtype="q9_0")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(ak.AdapterError, match="overwrite"):
        ak.export(tmp_path, tmp_path / "x.gguf", format="gguf")
    with pytest.raises(ak.AdapterError, match="'peft', 'gguf' or 'kv-cache'"):
        ak.export(tmp_path, tmp_path / "x", format="onnx")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_a_folder_without_converters_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ak.AdapterError, match=r"convert_hf_to_gguf\.py.*checkout"):
        gguf.converters()


@pytest.mark.parametrize(
    ("name", "told"),
    [("LlamaForSequenceClassification", "Of classifiers it knows BertForSequenceClassification"),
     ("LlamoForCausalLM", "It knows LlamaForCausalLM")],
)  # fmt: skip
def test_a_class_that_the_converter_does_not_know_is_refused_with_those_that_it_knows(
    name, told, tmp_path, monkeypatch
):
    source = 'NAMES = "LlamaForCausalLM", "BertForSequenceClassification"\nraise SystemExit("it began")\n'
    (tmp_path / "convert_hf_to_gguf.py").write_text(source)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "llama"}))
    with pytest.raises(ak.AdapterError, match=f"does not know {name}.*{told}"):
        ak.export(model, tmp_path / "x.gguf", format="gguf")
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(ak.AdapterError, match="it began"):
        ak.export(model, tmp_path / "x.gguf", format="gguf")


def test_an_adapter_with_a_head_is_refused_with_what_to_do(tmp_path):
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}] * 8
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "data": rows, "training.max_steps": 1}
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(ak.AdapterError, match=r"saves whole modules \(.*classifier.*adapters-kit merge"):
        ak.export(run, tmp_path / "x.gguf", format="gguf")


@pytest.fixture(scope="module")
def llama_cpp():
    module = pytest.importorskip(
        "llama_cpp", reason="needs llama-cpp-python (a long build): pip install llama-cpp-python"
    )
    try:
        gguf.converters()
    except ak.AdapterError as error:
        pytest.skip(str(error))
    return module


def log_probs(llama_cpp, file: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """llama.cpp's log-probabilities after every token, float64 (tokens, vocabulary)."""
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "flash_attn": False, "verbose": False}
    model = llama_cpp.Llama(str(file), lora_path=adapter and str(adapter), **options)
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)])).double().log_softmax(-1)


@torch.no_grad()
def divergence(model, theirs: torch.Tensor, ids: list[int]) -> float:
    ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def smollm2(smollm2_blocks, tmp_path_factory):
    """A folder with base, adapter and merged, made from SmolLM2's file of eight blocks; and the tokenizer."""
    folder, file = tmp_path_factory.mktemp("smollm2"), smollm2_blocks(8)
    gguf_base = convert_gguf(file, folder / "base")
    config = peft.LoraConfig(r=8, use_rslora=True, target_modules="all-linear")
    train_on(gguf_base, config, folder / "adapter", scale=0.02)
    ak.merge(folder / "adapter", folder / "merged", base=file, verify="off")
    return folder, ak.load_processor(folder / "merged")


@pytest.mark.slow
def test_a_merged_model_computes_the_same_in_llama_cpp(llama_cpp, smollm2):
    folder, tokenizer = smollm2
    merged, untrained = load(folder / "merged"), load(folder / "base")
    for dtype, limit in LIMITS.items():
        ak.export(folder / "merged", folder / f"{dtype}.gguf", format="gguf", dtype=dtype)
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            theirs = log_probs(llama_cpp, folder / f"{dtype}.gguf", ids)
            assert divergence(merged, theirs, ids) < limit < divergence(untrained, theirs, ids)


@pytest.mark.slow
def test_an_adapter_computes_the_same_in_llama_cpp(llama_cpp, smollm2):
    """Rank-stabilised scaling, which llama.cpp ignores, is folded in."""
    folder, tokenizer = smollm2
    base = folder / "base"
    ak.export(base, folder / "base.gguf", format="gguf", dtype="float32")
    ak.export(folder / "adapter", folder / "adapter.gguf", format="gguf", dtype="float32", base=base)
    merged = load(folder / "merged")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        theirs = log_probs(llama_cpp, folder / "base.gguf", ids, folder / "adapter.gguf")
        assert divergence(merged, theirs, ids) < 1e-5


@pytest.mark.slow
def test_types_of_the_quantizer(llama_cpp, smollm2):
    """Smaller than q8_0, still the model, and better with more bits."""
    folder, tokenizer = smollm2
    merged, ids = load(folder / "merged"), tokenizer(TEXTS[0])["input_ids"]
    lost, sizes = [], []
    for dtype in ("q4_k_m", "q6_k"):
        file = folder / f"{dtype}.gguf"
        ak.export(folder / "merged", file, format="gguf", dtype=dtype)
        lost.append(divergence(merged, log_probs(llama_cpp, file, ids), ids))
        sizes.append(file.stat().st_size)
    assert lost[1] < lost[0] < 0.5 and sizes[0] < sizes[1] < 140e6, (lost, sizes)


def test_a_quantizer_on_path_goes_first_and_its_words_are_repeated(tmp_path, monkeypatch):
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "no $3 today" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ak.AdapterError, match="refuses q4_k_m: no q4_k_m today"):
        requantize(quantizer(), tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("adapters_kit.serving.quantizer.find_spec", lambda _: None)
    with pytest.raises(ak.AdapterError, match="put llama-quantize on PATH"):
        quantizer()


@pytest.mark.slow
def test_a_model_that_the_converter_refuses(llama_cpp, tmp_path):
    base = save_base("bert", tmp_path / "base")
    with pytest.raises(ak.AdapterError, match="converter refuses"):
        ak.export(base, tmp_path / "x.gguf", format="gguf")
    assert not (tmp_path / "x.gguf").exists()
