"""GGUF files quantized on the way, tensor by tensor: the same model as when transformers unpacks the whole file."""

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import adapters_kit as ak
from adapters_kit.loading import gguf as reading
from tests.support import tiny
from tests.support.quantized import paths

pytest.importorskip("gguf")
pytest.importorskip("bitsandbytes")
from tests.support.gguf_files import write


@contextmanager
def whole(*_):
    """`read_gguf_lazily` that finds nothing: transformers unpacks the file."""
    yield None


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q8_0"), ("llama", "F16"), ("llama", "BF16"), ("gpt2", "Q4_0"), ("qwen3-moe", "Q8_0")]
)
def test_tensor_by_tensor_is_the_same_model(name, kind, quantize, tmp_path, monkeypatch):
    file = tmp_path / f"{name}.gguf"
    write(name, file, kind)
    monkeypatch.setattr(reading, "AT_ONCE", 1000)  # several steps for each of these small tensors
    model = ak.load(file, quantize=quantize)
    read = []
    monkeypatch.setattr(reading, "read_gguf_lazily", lambda *given: read.append(given) or whole())
    expected = ak.load(file, quantize=quantize)
    assert read and paths(model) == paths(expected) and len(paths(model)) >= 8
    got, wanted = model.state_dict(), expected.state_dict()
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key
    assert model.name_or_path == expected.name_or_path == str(file)
    with torch.no_grad():
        batch = tiny.inputs(model)
        assert torch.equal(model(**batch).logits, expected(**batch).logits)
    # Like any other quantized model it trains, is saved, and loads again.
    wrapped = ak.wrap(model, "lora", r=2)
    wrapped(**tiny.inputs(model, labels=True)).loss.backward()
    assert any(entry.grad is not None and entry.grad.any() for entry in wrapped.parameters())
    wrapped.unload().save_pretrained(tmp_path / "saved")
    again = ak.load(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_the_config_is_that_of_transformers(name, tmp_path):
    """Read without the vocabulary, and so in a moment; transformers counts it where the file does not say its size."""
    write(name, tmp_path / "model.gguf", "F16")
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    found = reading.read_config(str(tmp_path), "model.gguf")
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()
    assert found._name_or_path == expected._name_or_path == str(tmp_path)
    assert found.vocab_size == tiny.VOCAB


@pytest.mark.slow
def test_the_tokenizer_is_that_of_transformers(real):
    file = real("smollm2")
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = ak.load_processor(file)
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template


def test_what_is_read_are_the_weights(tmp_path):
    """F32 tensors that llama.cpp stores as they are come back bit by bit."""
    file = tmp_path / "llama.gguf"
    write("llama", file, "F32")
    original = tiny.build("llama")
    with torch.device("meta"):
        skeleton = type(original)(original.config)
    with reading.read_gguf_lazily(file, skeleton) as state:
        assert set(state) == set(original.state_dict())
        for key, value in original.state_dict().items():
            if "q_proj" not in key and "k_proj" not in key:
                assert torch.equal(state[key][...], value), key
            else:
                # Rows change places within a head, nothing else.
                assert torch.equal(state[key][...].sort(0).values, value.sort(0).values), key


def test_a_new_head_on_a_gguf_body(tmp_path):
    write("llama", tmp_path / "llama.gguf", "Q8_0")
    model = ak.load(tmp_path / "llama.gguf", "text-classification", labels=["a", "b"], quantize="nf4")
    assert model.fresh_modules == ["score"] and type(model.score) is torch.nn.Linear
    assert len(paths(model)) == 14 and model(**tiny.inputs(model)).logits.shape == (2, 2)


def test_a_mapping_without_all_of_the_body_is_left_to_transformers(tmp_path):
    write("llama", tmp_path / "llama.gguf", "Q8_0")
    with torch.device("meta"):
        other = type(tiny.build("llama"))(tiny.config("llama", num_hidden_layers=3))
    with reading.read_gguf_lazily(tmp_path / "llama.gguf", other) as state:
        assert state is None
