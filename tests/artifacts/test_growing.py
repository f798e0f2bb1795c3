"""Columns of numbers that move to a file: what is read is what was written; features of many rows are small."""

import errno
import os
import tempfile
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset

from adapters_kit.artifacts import growing
from adapters_kit.artifacts.growing import Growing
from adapters_kit.artifacts.mapped_table import release_pages
from adapters_kit.errors import WriteError
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.labels import labels_of, named_labels
from adapters_kit.training.data import read, row_file, split
from adapters_kit.training.sampling import OrderedByEpoch


@pytest.mark.parametrize("code", ["H", "i", "q", "f"])
def test_a_column_reads_back_wherever_it_lies(code, monkeypatch):
    monkeypatch.setattr(growing, "_IN_MEMORY", 64)
    draw, column, wanted = np.random.default_rng(0), Growing(code), []
    for count in [1, 3, 40, 0, 7, 90, 2]:
        values = draw.integers(0, 1000, count)
        column.extend(values)
        wanted += values.tolist()
        assert len(column) == len(wanted)
        assert column[:].tolist() == wanted
        release_pages()
    for start, stop in [(0, 1), (30, 60), (len(wanted) - 3, len(wanted)), (44, 44)]:
        assert column[start:stop].tolist() == wanted[start:stop]
    column.append(5)
    assert column[len(wanted) : len(wanted) + 1].item() == 5


@pytest.mark.parametrize("at", [0, 5, 60])
def test_an_id_that_two_bytes_do_not_hold_stays_what_it_is(at, monkeypatch):
    """A vocabulary with holes has larger ids than entries."""
    monkeypatch.setattr(growing, "_IN_MEMORY", 64)
    rows = [np.arange(row, row + 3) for row in range(80)]
    rows[at] = np.asarray([5, 70_000, 65_536])
    features = Encoded(small=("input_ids",))
    for row, ids in enumerate(rows):
        features.append({"row": row, "input_ids": ids})
    assert [feature["input_ids"].tolist() for feature in features] == [ids.tolist() for ids in rows]


def test_rows_take_as_many_bytes_as_their_numbers(monkeypatch):
    """100,000 short rows: what stays in memory for each, and what is needed for a moment; a gigabyte of them fits."""
    rows = 100_000
    monkeypatch.setattr(growing, "_IN_MEMORY", 1 << 16)
    data = Dataset.from_dict({"label": [("good", "bad")[row % 2] for row in range(rows)]})
    labels_of(data.select(range(4)), "label")
    ids = np.arange(10, dtype=np.int32)
    tracemalloc.start()
    try:
        features = Encoded(small=("input_ids",))
        for row in range(rows):
            features.append({"row": row, "input_ids": ids, "labels": row % 2})
        kept, _ = tracemalloc.get_traced_memory()
        assert kept < 5 * rows
        lengths = features.lengths("input_ids").astype(np.int32)
        named_labels(data, "label")
        next(iter(OrderedByEpoch(lengths, 16, 0)))
        _, most = tracemalloc.get_traced_memory()
        assert most < 60 * rows
        tracemalloc.reset_peak()
        split(data, 0.1, 0)
        _, most = tracemalloc.get_traced_memory()
        assert most < 100 * rows
    finally:
        tracemalloc.stop()
    assert features[rows - 1]["input_ids"].tolist() == ids.tolist()
    assert (features[7]["row"], features[7]["labels"]) == (7, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_folder_for_rows_that_cannot_be_written_is_told(number, monkeypatch, tmp_path):
    def no_file(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(growing, "_IN_MEMORY", 64)
    monkeypatch.setattr(row_file, "_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", no_file)
    told = r"in a file without a name in .*cannot be written: .*TMPDIR=FOLDER"
    with pytest.raises(WriteError, match=told):
        Growing("q").extend(np.arange(100))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    with pytest.raises(WriteError, match=told):
        read(DataSpec(train=str(path)))
