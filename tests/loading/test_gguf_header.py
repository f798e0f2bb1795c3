"""GGUF files that are cut off, or claim what no file holds: refused from the header alone."""

import struct
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit.errors import ModelError
from tests.support import gguf_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_files.write("llama", file, "Q8_0")
    return file.read_bytes()


def head(tensors: int, fields: int, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, fields)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
TENSOR = text(b"token_embd.weight") + struct.pack("<I", 2)
CLAIMS = {
    "tensors": head(1 << 60, 1) + ARCHITECTURE,
    "fields": head(0, 1 << 60),
    "a text": head(0, 1) + struct.pack("<Q", 1 << 63),
    "an array": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60),
    "an array of numbers": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 62),
    "more entries than any vocabulary": head(0, 1)
    + text(b"a")
    + struct.pack("<IIQ", 9, 0, 5_000_000)
    + bytes(5_000_000),
    "arrays in arrays": head(0, 1) + text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + bytes(64),
    "a type": head(0, 1) + text(b"a") + struct.pack("<I", 99),
    "dimensions": head(1, 0) + text(b"a") + struct.pack("<I", 1 << 31),
    "a kind of tensor": head(1, 0) + TENSOR + struct.pack("<QQIQ", 4, 4, 9999, 0),
    "an offset": head(1, 0) + TENSOR + struct.pack("<QQIQ", 4, 4, 0, 1 << 62),
    "a shape": head(1, 0) + TENSOR + struct.pack("<QQIQ", 1 << 40, 1 << 40, 0, 0),
    "a version": head(0, 0, 1),
    "another magic": b"GGML" + bytes(60),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_no_file_holds(claim, tmp_path):
    (tmp_path / "m.gguf").write_bytes(CLAIMS[claim])
    for use in (lambda: ak.load(tmp_path / "m.gguf"), lambda: ak.load(tmp_path / "m.gguf", quantize="keep")):
        with pytest.raises(ModelError, match="is no whole GGUF file"):
            use()


@pytest.mark.parametrize("part", [0.999, 0.5, 0.05, 0.01, 0.001])
def test_a_file_that_was_cut_off(part, whole, tmp_path):
    file = Path(tmp_path / "m.gguf")
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ModelError, match=r"is no whole GGUF file: .*Fetch it again"):
        ak.load(file)


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count"])
def test_counts_that_no_model_has(key, tmp_path):
    fields = {key: 10**9, "llama.vocab_size": 8, "llama.context_length": 8, "llama.embedding_length": 8}
    numbers = b"".join(text(name.encode()) + struct.pack("<II", 4, value) for name, value in fields.items())
    (tmp_path / "m.gguf").write_bytes(head(0, 1 + len(fields)) + ARCHITECTURE + numbers)
    with pytest.raises(ModelError, match=rf"{key} is 1000000000, which no model has"):
        ak.load(tmp_path / "m.gguf")


def test_a_whole_one_is_taken(whole, tmp_path):
    (tmp_path / "m.gguf").write_bytes(whole)
    assert ak.load(tmp_path / "m.gguf").num_parameters() > 0
