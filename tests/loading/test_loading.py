"""load() and load_processor(): every task, labels, dtypes, GGUF files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import MissingPackageError, ModelError, UnknownNameError
from tests.support import small, tiny

CASES = [
    ("llama", "causal-lm", None),
    ("gpt2", "causal-lm", None),
    ("llama", "text-classification", ["no", "yes"]),
    ("bert", "text-classification", ["a", "b", "c", "d"]),
    ("bert", "token-classification", ["O", "PER"]),
    ("bert", "question-answering", None),
    ("bert", "masked-lm", None),
    ("t5", "seq2seq", None),
    ("vit", "image-classification", ["cat", "dog"]),
]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize(("name", "task", "labels"), CASES)
def test_every_task(name, task, labels, tmp_path):
    model = ak.load(small.model(name), task, labels=labels)
    assert not model.training
    batch = tiny.inputs(model, labels=True)
    assert torch.isfinite(model(**batch).loss)
    if labels:
        assert list(model.config.id2label.values()) == labels
        model.save_pretrained(tmp_path / "saved")
        again = ak.load(tmp_path / "saved", task)
        assert list(again.config.id2label.values()) == labels and again.fresh_modules == []
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_the_body_is_the_checkpoint_and_the_head_is_new():
    folder = small.model("bert")
    model = ak.load(folder, "text-classification", labels=["a", "b", "c", "d", "e"])
    saved = load_file(folder / "model.safetensors")
    for key, value in model.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(value, saved[key]), key
    assert model.fresh_modules == ["classifier"]
    assert model.classifier.out_features == 5


def test_labels_of_the_checkpoint_keep_their_order(tmp_path):
    folder = tmp_path / "trained"
    trained = ak.load(small.model("bert"), "text-classification", labels=["pos", "neg", "so-so"])
    trained.save_pretrained(folder)
    model = ak.load(folder, "text-classification", labels=["neg", "pos", "so-so"])
    assert model.config.label2id == {"pos": 0, "neg": 1, "so-so": 2}
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.float32, "torch.bfloat16"])
def test_dtype(dtype):
    model = ak.load(small.model("llama"), dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else {"f": torch.float16}.get(dtype[0], torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_processor_of_every_kind():
    tokenizer = ak.load_processor(small.model("llama"))
    assert tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")["input_ids"].shape == (2, 3)
    assert isinstance(ak.load_processor(small.model("vit")), transformers.BaseImageProcessor)


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    folder = copy(small.model("llama"), tmp_path / "m")
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    raw.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = ak.load_processor(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "[EOS]"


def test_classifier_over_a_decoder_without_padding_token(tmp_path):
    folder = copy(small.model("llama"), tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(raw))
    model = ak.load(folder, "text-classification", labels=["no", "yes"])
    assert model.config.pad_token_id == model.config.eos_token_id
    assert model(**tiny.inputs(model)).logits.shape == (2, 2)


def test_refusals_of_names(tmp_path):
    copy(small.model("llama"), tmp_path / "tiny-llama")
    with pytest.raises(UnknownNameError, match="Did you mean tiny-llama"):
        ak.load(tmp_path / "tiny-lama")
    with pytest.raises(UnknownNameError, match="does not exist"):
        ak.load(tmp_path / "nowhere" / "model.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UnknownNameError, match="is a file"):
        ak.load(tmp_path / "weights.bin")
    with pytest.raises(UnknownNameError, match="no name"):
        ak.load("")
    with pytest.raises(UnknownNameError, match=r"'text-clasification'.*Did you mean text-classification"):
        ak.load(tmp_path / "tiny-llama", "text-clasification")
    with pytest.raises(UnknownNameError, match=r"'bf8'.*Did you mean"):
        ak.load(tmp_path / "tiny-llama", dtype="bf8")
    with pytest.raises(UnknownNameError, match=r"'nf5'.*Did you mean nf4"):
        ak.load(tmp_path / "tiny-llama", quantize="nf5")
    with pytest.raises(UnknownNameError, match=r"skip=.*needs quantize"):
        ak.load(tmp_path / "tiny-llama", skip=["o_proj"])


def test_refusals_of_folders(tmp_path):
    whole = small.model("llama")
    folder = copy(whole, tmp_path / "no-weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights .*It holds: config.json"):
        ak.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json\. It is empty"):
        ak.load(tmp_path / "empty")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter, not a model.*ak\.wrap"):
        ak.load(adapter)
    bare = copy(whole, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="No tokenizer or processor"):
        ak.load_processor(bare)


def test_refusals_of_weights(tmp_path):
    folder = copy(small.model("llama"), tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors.*not in the checkpoint.*layers.1.mlp.up_proj"):
        ak.load(folder)
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj"):
        ak.load(folder, quantize="nf4")
    other = copy(small.model("bert"), tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    raw["intermediate_size"] = 96
    (other / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"another shape|size mismatch|mismatch"):
        ak.load(other, "text-classification")
    with pytest.raises(ModelError, match="another shape"):
        ak.load(other, "text-classification", labels=["a", "b"])


def test_refusals_of_tasks_and_labels():
    with pytest.raises(ModelError, match=r"vit model, which has no head for 'causal-lm'.*image-classification"):
        ak.load(small.model("vit"))
    with pytest.raises(UnknownNameError, match="'causal-lm' has no labels"):
        ak.load(small.model("llama"), labels=["a"])
    with pytest.raises(ModelError, match="give a list of names"):
        ak.load(small.model("bert"), "text-classification", labels="positive")
    with pytest.raises(ModelError, match="'a' is there twice"):
        ak.load(small.model("bert"), "text-classification", labels=["a", "b", "a"])
    with pytest.raises(ModelError, match="empty"):
        ak.load(small.model("bert"), "text-classification", labels=[])


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        ak.load(tmp_path / "model.gguf")


def test_a_broken_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"model\.gguf"):
        ak.load(tmp_path / "model.gguf")


@pytest.mark.slow
def test_a_gguf_model_trains_and_is_saved(real, tmp_path):
    file = real("smollm2")
    model = ak.load(file, dtype="bf16")
    tokenizer = ak.load_processor(file)
    assert getattr(model.config, "quantization_config", None) is None
    wrapped = ak.wrap(model, "lora", r=2, target_modules=["q_proj"])
    batch = tokenizer(["The capital of France is Paris."], return_tensors="pt")
    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    rows = [{"input_ids": batch["input_ids"][0], "labels": batch["input_ids"][0]}]
    assert transformers.Trainer(wrapped, arguments, train_dataset=rows).train().training_loss > 0
    merged = wrapped.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "saved")
    again = ak.load(tmp_path / "saved")
    with torch.no_grad():
        logits = again(**tokenizer("The capital of France is", return_tensors="pt")).logits
        torch.testing.assert_close(again(**batch).logits, merged(**batch).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
