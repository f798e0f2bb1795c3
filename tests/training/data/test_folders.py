"""Folders: all shards of every part, nothing that only begins like one; images by class or by list; other formats."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from pyarrow import parquet

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.notes import Notes
from adapters_kit.training import data
from adapters_kit.training.resolve import prepare
from tests.support import small


def put(folder, **files):
    for name, rows in files.items():
        made = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(rows)]
        small.write_jsonl(folder / f"{name.replace('__', '-').replace('S', '/')}.jsonl", made)
    return folder


def read(folder, **spec):
    notes = Notes()
    found = data.read(DataSpec(train=str(folder), **spec), notes)
    return len(found.train), found.test and len(found.test), " ".join(notes.sentences)


@pytest.mark.parametrize(
    ("files", "sizes"),
    [
        ({"train__00000__of__00002": 4, "train__00001__of__00002": 6, "test__00000__of__00001": 2}, (10, 2)),
        ({"train": 4, "val": 2}, (4, 2)),
        ({"train": 4, "dev": 2}, (4, 2)),
        ({"train": 4, "validation": 2, "test": 3}, (4, 3)),
        ({"reviews__train": 4, "reviews__test": 2}, (4, 2)),
        ({"train": 4, "testing_notes": 2, "developer": 1}, (4, None)),
        ({"trainSpart__1": 4, "trainSpart__2": 4, "devSx": 2}, (8, 2)),
        ({"dataStrain__00000__of__00001": 4, "dataStest__00000__of__00001": 2}, (4, 2)),
        ({"part__00000": 4, "part__00001": 6}, (10, None)),
    ],
)
def test_parts_of_a_folder(tmp_path, files, sizes):
    train, test, notes = read(put(tmp_path, **files))
    assert (train, test) == sizes
    assert ("testing_notes.jsonl" in notes) == ("testing_notes" in files)


def test_parts_that_are_not_clear(tmp_path):
    with pytest.raises(DataError, match="one of 3 shards, 2 are here"):
        read(put(tmp_path / "a", train__00000__of__00003=2, train__00002__of__00003=2))
    folder = put(tmp_path / "b", train=2)
    (folder / "train.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match="could each be the same part"):
        read(folder)
    folder = put(tmp_path / "c", train__1=2)
    small.write_jsonl(folder / "train-2.jsonl", [{"body": "x", "class": "a"}])
    with pytest.raises(DataError, match=r"train-2\.jsonl has the columns body, class"):
        read(folder)


def test_folders_of_images(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for kind in ("cats", "dogs"):
            (tmp_path / "by_class" / part / kind).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / "by_class" / part / kind / f"{i}.tif")
    assert read(tmp_path / "by_class")[:2] == (6, 4)
    listed = tmp_path / "listed"
    listed.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(listed / f"{i}.png")
    (listed / "metadata.csv").write_text("file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    Image.new("RGB", (8, 8)).save(listed / "extra.png")
    notes = Notes()
    found = data.read(DataSpec(train=str(listed)), notes).train
    assert found["file_name"][:] == [str(listed / f"{i}.png") for i in range(4)]
    assert notes.counts == {"files_not_named": 1} and "the first extra.png" in notes.sentences[0]


def test_files_among_images_that_cannot_be_read_are_named(tmp_path):
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for suffix in ("png", "jfif", "jp2"):
            Image.new("RGB", (8, 8)).save(tmp_path / kind / f"0.{suffix}", "JPEG" if suffix == "jfif" else None)
        (tmp_path / kind / "1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / ".DS_Store").write_bytes(b"")
    notes = Notes()
    assert len(data.read(DataSpec(train=str(tmp_path)), notes).train) == 6
    assert notes.counts == {"files_not_read": 2} and "cats/1.heic, dogs/1.heic" in notes.sentences[0]


def test_paths_of_images_start_at_their_table(tmp_path):
    rows = []
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": "ab"[i % 2]})
    path = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    task, splits = prepare(Recipe(model="m", task="image-classification", data=str(path)))
    assert all(name.startswith(str(tmp_path)) for name in splits.train["image"][:])
    assert task.labels == ["a", "b"]


def test_conll_and_fasttext(tmp_path):
    (tmp_path / "a.conll").write_text("-DOCSTART- X O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\n")
    notes = Notes()
    found = data.read(DataSpec(train=str(tmp_path / "a.conll")), notes).train
    assert found.to_list() == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    assert "3 columns" in notes.sentences[0]
    (tmp_path / "b.conll").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(DataError, match="line 2: 1 columns"):
        read(tmp_path / "b.conll")
    (tmp_path / "c.txt").write_text("__label__good a fine film\n__label__bad no\n")
    assert data.read(DataSpec(train=str(tmp_path / "c.txt"))).train.to_list()[0] == {
        "text": "a fine film",
        "label": "good",
    }
    (tmp_path / "d.ft").write_text("__label__a __label__b one\n__label__c two\n")
    assert data.read(DataSpec(train=str(tmp_path / "d.ft"))).train["label"][:] == [["a", "b"], ["c"]]


def test_parquet_of_every_kind(tmp_path):
    """Categories keep the order that the data gives them; a hub data set's classes keep theirs and their names."""
    texts = [f"t{i}" for i in range(40)]
    categories = pa.DictionaryArray.from_arrays(pa.array([i % 3 for i in range(40)]), pa.array(["low", "mid", "high"]))
    parquet.write_table(pa.table({"text": texts, "label": categories}), tmp_path / "a.parquet")
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(40)]}, kinds).to_parquet(tmp_path / "b.parquet")
    frame = {"text": texts, "label": [float(i % 2) for i in range(40)], "when": [None] * 40}
    parquet.write_table(pa.table(frame), tmp_path / "c.parquet")
    expected = {"a": ["low", "mid", "high"], "b": ["neg", "pos"], "c": ["0", "1"]}
    for name, labels in expected.items():
        task, _ = prepare(Recipe(model="m", task="text-classification", data=str(tmp_path / f"{name}.parquet")))
        assert task.labels == labels
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (content[:-9], content[: len(content) // 2], content[:40] + b"\xff" * 60 + content[100:]):
        (tmp_path / "d.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"d\.parquet"):
            data.read(DataSpec(train=str(tmp_path / "d.parquet"))).train.to_list()


@pytest.mark.parametrize(("offsets", "content"), [([0, 1, 2], b"\xe1b"), ([0, 2**30, 2], b"ab"), ([0, -7, 2], b"ab")])
def test_text_that_is_none_is_refused_as_it_is_read(tmp_path, offsets, content):
    """Arrow keeps what a file says unseen; used, it would end the process or come from elsewhere in memory."""
    buffers = [None, pa.py_buffer(np.array(offsets, dtype=np.int32)), pa.py_buffer(content)]
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers), "label": [0, 1]})
    path = tmp_path / "d.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"Cannot read .*d\.arrow: the column 'text' is damaged"):
        data.read(DataSpec(train=str(path)))


def test_files_of_other_kinds_say_what_to_do(tmp_path):
    for name, advice in (("a.xlsx", "Save the sheet as CSV"), ("a.zip", "Unpack it"), ("a.jsonl.gz", "Cannot unpack")):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=advice):
            read(tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps({"train": [], "test": []}))
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path / "a.json")


TABLE = "text,label\n" + "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(6))


def lay(folder, **files):
    """Files by path, of text or bytes."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


class _Kept(io.BytesIO):
    def close(self) -> None:
        """Its bytes are still to be read."""


def packed(text, kind):
    made = _Kept()
    with pa.CompressedOutputStream(pa.PythonFile(made, mode="w"), kind) as stream:
        stream.write(text.encode())
    return made.getvalue()


@pytest.mark.parametrize(("suffix", "kind"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd"), ("lz4", "lz4")])
def test_compressed_files(tmp_path, suffix, kind):
    content = packed(TABLE, kind)
    lay(tmp_path / "a", **{"train.csv": TABLE, f"test.csv.{suffix}": content})
    assert read(tmp_path / "a") == (6, 6, "")
    assert read(tmp_path / "a" / f"test.csv.{suffix}")[0] == 6
    bad = lay(tmp_path / "b", **{f"x.csv.{suffix}": packed("text,label\na,b,c\n", kind)}) / f"x.csv.{suffix}"
    with pytest.raises(DataError, match=rf"x\.csv\.{suffix}, line 2: 3 fields"):
        read(bad)
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"x\.csv\.{suffix}"):
        read(bad)


def test_parts_as_files_and_as_folders(tmp_path):
    assert read(lay(tmp_path / "a", **{"train.csv": TABLE, "test/one.csv": TABLE}))[:2] == (6, 6)
    assert read(lay(tmp_path / "b", **{"train/one.csv": TABLE, "test.csv": TABLE}))[:2] == (6, 6)
    train, test, notes = read(lay(tmp_path / "c", **{"train.csv": TABLE, "pictures/a.txt": "x", "README.md": "x"}))
    assert (train, test) == (6, None) and "pictures/ belong to no part" in notes and "README" not in notes
    with pytest.raises(DataError, match=r"train\.csv, train/ could each be the same part") as told:
        read(lay(tmp_path / "d", **{"train.csv": TABLE, "train/one.csv": TABLE}))
    assert f"data: {{train: {tmp_path / 'd' / 'train.csv'}}}" in str(told.value)
    with pytest.raises(DataError, match=r"test\.xlsx: .* Save the sheet as CSV"):
        read(lay(tmp_path / "e", **{"train.csv": TABLE, "test.xlsx": "PK"}))
    with pytest.raises(DataError, match=r"several kinds: a\.csv, b\.zip"):
        read(lay(tmp_path / "f", **{"train/a.csv": TABLE, "train/b.zip": "PK"}))
    with pytest.raises(DataError, match=r"name it: data: .*reviews\.csv") as told:
        read(lay(tmp_path / "g", **{"reviews.csv": TABLE, "README.md": "x"}))
    assert read(str(told.value).split("name it: data: ")[1])[0] == 6


def test_texts_in_a_folder_a_class(tmp_path):
    texts = {
        f"{part}/{kind}/{i}.txt": f"{kind}\n\nfilm {i}" for part in ("train", "test") for kind in "pn" for i in "123"
    }
    lay(tmp_path, **texts, **{"train/unsup/1.txt": "hm", "train/urls.txt": "x", "README": "x"})
    (tmp_path / "test" / "n" / "1.txt").write_bytes("mal gemütlich und hübsch".encode("cp1252"))
    notes = Notes()
    found = data.read(DataSpec(train=str(tmp_path)), notes)
    assert found.train.to_list()[0] == {"text": "n\n\nfilm 1", "label": "n"}
    assert found.train["label"][:] == ["n"] * 3 + ["p"] * 3 and found.test["text"][0] == "mal gemütlich und hübsch"
    told = " ".join(notes.sentences)
    assert "train/unsup: 1 texts without a class" in told and notes.counts == {"rows_left_out": 1}
    assert "urls.txt lie beside" in told and "1 of 6 files are not UTF-8 and are read as cp1252" in told
    assert "n (3), p (3)" in told


def test_folders_named_after_values_are_a_column(tmp_path):
    lay(tmp_path / "a", **{"label=good/a.csv": "text\nx\n", "label=not%20good/b.csv": "text\ny\n", "_SUCCESS": ""})
    rows = data.read(DataSpec(train=str(tmp_path / "a"))).train.to_list()
    assert rows == [{"text": "x", "label": "good"}, {"text": "y", "label": "not good"}]
    lay(tmp_path / "b", **{"split=train/a.csv": TABLE, "split=test/b.csv": TABLE})
    assert read(tmp_path / "b")[:2] == (6, 6)
    lay(tmp_path / "c", **{"train/label=1/a.csv": "text\nx\n", "train/label=0/b.csv": "text\ny\n"})
    assert data.read(DataSpec(train=str(tmp_path / "c"))).train["label"][:] == ["0", "1"]


def test_a_configuration_of_a_data_set_in_a_folder(tmp_path):
    lay(tmp_path, **{"small/train.csv": TABLE, "small/test.csv": TABLE, "large/train.csv": TABLE})
    assert read(tmp_path, subset="small")[:2] == (6, 6)
    with pytest.raises(DataError, match=r"no folder 'smal'\. Did you mean small"):
        read(tmp_path, subset="smal")
    with pytest.raises(DataError, match=r"Leave data\.subset out"):
        read(tmp_path / "small" / "train.csv", subset="small")


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        (
            "https://x.org/a/rows.csv?raw=1",
            r"curl -L -o rows\.csv 'https://x\.org/a/rows\.csv\?raw=1', then data: rows\.csv",
        ),
        ("hf://datasets/org/name", "data: org/name$"),
        ("https://huggingface.co/datasets/name", "data: name$"),
        (
            "hf://datasets/org/name@main/x/y.csv",
            r"org/name x/y\.csv --local-dir data, then data: data/x/y\.csv",
        ),
        ("https://huggingface.co/datasets/org/name/resolve/main/y.csv", r"dataset org/name y\.csv --local-dir data"),
        ("file:///tmp/x.csv", r"data: /tmp/x\.csv$"),
        ("s3://bucket/x.parquet", "tool of that service"),
    ],
)
def test_addresses_say_how_to_fetch_them(address, advice):
    with pytest.raises(DataError, match=advice):
        read(address)


def test_images_deeper_in_a_class_and_beside_the_classes(tmp_path):
    for name in ("train/cat/1.png", "train/cat/more/2.png", "train/dog/3.png", "train/4.png", "val/dog/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    notes = Notes()
    found = data.read(DataSpec(train=str(tmp_path)), notes)
    assert found.train["label"][:] == ["cat", "cat", "dog"] and found.test["label"][:] == ["dog"]
    assert notes.counts == {"files_without_class": 1}


def test_paths_of_images_of_which_one_is_missing_or_windows_own(tmp_path):
    lay(tmp_path, **{"pictures/1.png": "x"})
    rows = [{"image": "pictures\\1.png"}, {"image": None}, {"image": "pictures/2.png"}]
    found = data.located(Dataset.from_list(rows), "image", tmp_path)["image"][:]
    assert found == [str(tmp_path / "pictures/1.png"), None, "pictures/2.png"]
