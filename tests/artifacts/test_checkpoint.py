"""Readers of safetensors headers and indices: what is right is read, what is not is refused, with our error only."""

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters_kit.artifacts.checkpoint import (
    INDEX,
    MAX_HEADER,
    STORED,
    build_header,
    open_checkpoint,
    open_file,
    read_header,
    read_index,
)
from adapters_kit.errors import ShippingError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TABLES = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from(sorted(STORED)), SHAPES),
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def nbytes(table) -> int:
    return sum(torch.Size(shape).numel() * STORED[dtype].itemsize for dtype, shape in table.values())


def write(path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


@settings(max_examples=60, deadline=None)
@given(table=TABLES)
def test_a_header_reads_back(table, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "roundtrip.safetensors"
    path.write_bytes(build_header(table, {"format": "pt"}) + bytes(nbytes(table)))
    found, metadata = read_header(path)
    assert {name: (place.dtype, place.shape) for name, place in found.items()} == table
    assert metadata == {"format": "pt"}
    with open_file(path) as checkpoint:
        for name, (dtype, shape) in table.items():
            tensor = checkpoint.read(name)
            assert tensor.dtype == STORED[dtype] and tuple(tensor.shape) == shape
            assert sum(map(len, checkpoint.chunks(name, memoryview(bytearray(7))))) == tensor.nbytes


def test_the_librarys_files_are_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "d": torch.tensor(2.0),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with open_file(tmp_path / "x.safetensors") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_the_library_reads_our_headers(tmp_path):
    header = build_header({"é": ("F32", (2, 2)), "b": ("BF16", (3,))}, {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(22))
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "x.safetensors").items()} == {
        "é": (2, 2),
        "b": (3,),
    }


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "no JSON": (b"{not json", 0, "not valid JSON"),
    "no UTF-8": (b"\xff\xfe{}", 0, "not valid JSON"),
    "a list": (b"[]", 0, "not a JSON object"),
    "nested without end": (b"[" * 60_000, 0, "not valid JSON"),
    "a name twice": (b'{"a":1,"a":2}', 0, "twice"),
    "overlap": (json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}).encode(), 12, "overlaps"),
    "hole": (json.dumps({"a": entry(offsets=(8, 16))}).encode(), 16, "hole"),
    "data missing": (json.dumps({"a": entry()}).encode(), 4, "claims bytes"),
    "data too much": (json.dumps({"a": entry()}).encode(), 9, "the file at"),
    "size against shape": (json.dumps({"a": entry(shape=(3,))}).encode(), 8, "needs 12 bytes"),
    "negative shape": (json.dumps({"a": entry(shape=(-2,))}).encode(), 8, "shape"),
    "boolean shape": (json.dumps({"a": entry(shape=(True, 2))}).encode(), 8, "shape"),
    "offsets reversed": (json.dumps({"a": entry(offsets=(8, 0))}).encode(), 8, "claims bytes"),
    "unknown dtype": (json.dumps({"a": entry("F7")}).encode(), 8, "F7"),
    "no description": (json.dumps({"a": 3}).encode(), 0, "no description"),
    "strange metadata": (json.dumps({"__metadata__": {"a": 1}}).encode(), 0, "__metadata__"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_refused(case, tmp_path):
    header, data, message = DAMAGED[case]
    with pytest.raises(ShippingError, match=message):
        read_header(write(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize("length", [1 << 63, MAX_HEADER + 1, 3])
def test_a_length_that_leads_outside_is_refused(length, tmp_path):
    with pytest.raises(ShippingError, match="not a safetensors file"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), data=st.binary(max_size=16))
def test_no_header_gives_a_traceback_but_ours(raw, data, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", raw, data)
    try:
        found, _ = read_header(path)
    except ShippingError:
        return
    assert sum(place.nbytes for place in found.values()) == len(data)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", 4, None]),
            "shape": JSON,
            "data_offsets": JSON | st.lists(st.integers()),
        }
    )
)
def test_no_entry_gives_a_traceback_but_ours(fields, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "entry.safetensors", json.dumps({"a": fields}).encode(), bytes(8))
    with contextlib.suppress(ShippingError):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), bit=st.integers(0, 7))
def test_a_cut_or_flipped_file_is_read_or_refused(cut, flip, bit, tmp_path_factory):
    whole = bytearray(build_header({"a": ("F32", (4,)), "b": ("U8", (3,))}, {}) + bytes(19))
    flip %= len(whole)
    whole[flip] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with contextlib.suppress(ShippingError), open_file(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


@settings(max_examples=150, deadline=None)
@given(value=JSON | JSON.map(lambda inner: {"weight_map": inner}) | st.binary(max_size=60))
def test_no_index_gives_a_traceback_but_ours(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / INDEX
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    try:
        weight_map, _ = read_index(path)
    except ShippingError:
        return
    assert all("/" not in file and file not in {".", ".."} for file in weight_map.values())


def sharded(folder):
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


@pytest.mark.parametrize(
    "place", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "a\\b", "", "x\0y"]
)
def test_an_index_never_leads_out_of_its_folder(place, tmp_path):
    index = sharded(tmp_path)
    index["weight_map"]["a"] = place
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShippingError, match="bare file name"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    index = sharded(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.files == ["one.safetensors", "two.safetensors"] and checkpoint.nbytes == 20
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ShippingError, match=r"1 tensors are extra, such as 'c'"):
        open_checkpoint(tmp_path)
    save_file({"z": torch.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(ShippingError, match=r"1 tensors are missing, such as 'b'"):
        open_checkpoint(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ShippingError, match=r"names 'two.safetensors', which is not in"):
        open_checkpoint(tmp_path)
    assert index


def test_a_stale_single_file_beside_an_index_is_refused(tmp_path):
    sharded(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ShippingError, match="left over from an older save"):
        open_checkpoint(tmp_path)


def test_no_weights_says_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ShippingError, match=r"it has pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_what_mlx_writes_is_read_metadata_null_and_an_index_to_a_single_file(tmp_path):
    file = tmp_path / "model.safetensors"
    header = json.dumps({"__metadata__": None, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file.name}}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1.0, 2.0] and checkpoint.metadata[file.name] == {}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": file.name}}))
    with pytest.raises(ShippingError, match="holds both"):
        open_checkpoint(tmp_path)
