"""Files of rows that no table can hold: refused in one sentence, soon."""

import gzip
import json
import os

import pytest

from adapters_kit.errors import DataError
from adapters_kit.tasks.images import open_image
from adapters_kit.training.data import read_rows


def test_far_too_many_columns_of_a_table(tmp_path):
    names = [f"c{number}" for number in range(20_000)]
    (tmp_path / "wide.csv").write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    with pytest.raises(DataError, match=r"20,000 columns, and 5,000 are the most\. Keep those that are used"):
        read_rows(tmp_path / "wide.csv")


def test_far_too_many_keys_of_objects(tmp_path):
    lines = (json.dumps({f"k{number}_{one}": 1 for one in range(20)}) for number in range(3000))
    (tmp_path / "keys.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 251: the rows have more than 5,000 keys"):
        read_rows(tmp_path / "keys.jsonl")


def test_a_zero_byte_in_a_name(tmp_path):
    (tmp_path / "zero.csv").write_bytes(b"te\x00xt,label\na,x\n")
    with pytest.raises(DataError, match="zero byte in its name"):
        read_rows(tmp_path / "zero.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "value", [{"bytes": "abc"}, {"bytes": 7}, {"bytes": None, "path": None}, {}, 5, b"", b"GIF89a"]
)
def test_what_is_no_picture(value):
    with pytest.raises(DataError, match=r"Row 3:? .*no image"):
        open_image(value, 2)


def test_a_packed_bomb(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        for _ in range(100):
            file.write(b" " * (1 << 20))
    with pytest.raises(DataError, match="unpacks to more than 300 times its size"):
        read_rows(tmp_path / "rows.jsonl.gz")
