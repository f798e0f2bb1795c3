"""CSV and TSV: fields stay as the file spells them; separators, quotes and encodings are found, said, or refused."""

import csv
import io
import random

import pytest

from adapters_kit.errors import DataError, RecipeError
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.notes import Notes
from adapters_kit.training import data
from adapters_kit.training.data.row_file import Format

WORDS = ["alpha", "beta", "gamma", "delta", "it's", "no; yes", "a|b", "007", "1e3", "NA", "", "2024-01-01", "true"]


def read(path, content, written="utf-8", **form):
    """The rows of a file with that content, and what was noted."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode(written))
    notes = Notes()
    return data.read_table(path, Format(notes=notes, **form)), notes.sentences


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("seed", range(4))
def test_what_a_writer_wrote_is_read(tmp_path, separator, quoting, seed):
    """Random tables: separators, quotes and line breaks inside fields, whatever the separator."""
    draw = random.Random(seed)
    parts = [*WORDS, "say", '"so"', "two\nlines", separator]
    rows = [
        {"text": " ".join(draw.choices(parts, k=5)), "code": draw.choice(["007", "7", "1.0"])}
        for _ in range(draw.randint(2, 30))
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "code"], delimiter=separator, quoting=quoting, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    found, notes = read(tmp_path / "rows.csv", out.getvalue())
    assert found.to_list() == rows
    assert any("separated by" in note for note in notes) == (separator != ",")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('"He began\tgood', '"He began'),
        ('"Yes" was all\tgood', '"Yes" was all'),
        ('so he said "no"\tgood', 'so he said "no"'),
        ('an end"\tgood', 'an end"'),
    ],
)
def test_stray_quotes_of_a_tsv_swallow_no_lines(tmp_path, line, text):
    lines = [f"row {i}\t{'good' if i % 2 else 'bad'}" for i in range(30)]
    lines[3], lines[20] = line, 'and it ended" there\tbad'
    found, _ = read(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    assert len(found) == 30
    assert found[3]["text"] == text


def test_two_stray_quotes_that_would_close_each_other(tmp_path):
    """Between them stand whole records: read as one quoted field, fifteen rows would be lost."""
    lines = [f"row {i},good" for i in range(30)]
    lines[3], lines[18] = '"row 3,good', 'row 18",good'
    found, notes = read(tmp_path / "a.csv", "text,label\n" + "\n".join(lines) + "\n")
    assert len(found) == 30
    assert "double quotes are part of the text" in notes[0]


def test_an_unclosed_quote_where_quotes_are_needed(tmp_path):
    text = 'text,label\n"one, two",a\n"three, four,a\n"five, six",b\n'
    with pytest.raises(DataError, match=r"line 3: a field begins with a double quote that is not closed"):
        read(tmp_path / "a.csv", text)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8-sig", "naïve – 東京"),
        ("utf-16", "naïve – 東京"),
        ("utf-16-le", "naïve"),
        ("utf-32", "naïve – 東京"),
        ("cp1252", "naïve café – “très” bon"),
        ("latin-1", "Straße über größer"),
        ("cp1251", "хороший фильм"),
        ("gb18030", "这部电影很好看"),
        ("cp1250", "żółw wąchał źdźbło"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt", "tsv"])
def test_encodings(tmp_path, encoding, text, suffix):
    separator = "\t" if suffix == "tsv" else ","
    rows = [text + f" {i}" for i in range(8)]
    content = {
        "jsonl": "".join(f'{{"text": "{row}"}}\n' for row in rows),
        "txt": "\n".join(rows),
    }.get(suffix, f"text{separator}label\n" + "".join(f"{row}{separator}a\n" for row in rows))
    found, notes = read(tmp_path / f"a.{suffix}", content, encoding)
    assert found["text"][:] == rows
    assert any(" read as " in note for note in notes) == (encoding != "utf-8-sig")
    given, quiet = read(tmp_path / f"b.{suffix}", content, encoding, encoding=encoding)
    assert given["text"][:] == rows
    assert not any("read as" in note for note in quiet)


def test_encodings_that_do_not_fit(tmp_path):
    good = "text,label\n" + "".join(f"héhé {i},a\n" for i in range(20))
    broken = good.encode().replace("héhé 7".encode(), "héhé 7".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 9: the byte 0xe9 is not UTF-8, though the rest of the file is"):
        read(tmp_path / "a.csv", broken)
    with pytest.raises(DataError, match=r"line 2: the byte 0xc3 does not fit data\.encoding: ascii"):
        read(tmp_path / "a.csv", good, encoding="ascii")
    with pytest.raises(RecipeError, match=r"data\.encoding.*knows no such encoding"):
        from adapters_kit.recipe import Recipe

        Recipe(model="m", task="causal-lm", data={"train": "a", "encoding": "utf-99"})


def test_the_recipe_names_the_separator(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text~label\none, two; three~a\nfour~b\n")
    assert data.read(DataSpec(train=str(path), delimiter="~")).train[0] == {"text": "one, two; three", "label": "a"}
    assert DataSpec(train="x", delimiter="tab").delimiter == DataSpec(train="x", delimiter="\\t").delimiter == "\t"
    with pytest.raises(ValueError, match="one character"):
        DataSpec(train="x", delimiter="::")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,text,label\na,b,c\n", "the name 'text' 2 times .columns 1, 2."),
        ("text,label\na,b\nc,d,e\n", "line 3: 3 fields, where the header .line 1. has 2"),
        ("text,label\na,b\nc\n", "line 3: 1 fields"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", content)


def test_what_offices_write(tmp_path):
    """Excel's first line, empty columns behind the last, empty lines, remarks above, old line ends."""
    assert read(tmp_path / "a.csv", "sep=;\ntext;label\na;b\n")[0].to_list() == [{"text": "a", "label": "b"}]
    found, notes = read(tmp_path / "b.csv", "text,label\na,b,,\n,\n\nc,d,,\n")
    assert found.to_list() == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    assert any("1 lines without any text" in note for note in notes)
    assert any("behind the last column" in note for note in notes)
    assert read(tmp_path / "c.csv", "# made by x\n# on a day\ntext,label\na,b\n")[0].to_list() == [
        {"text": "a", "label": "b"}
    ]
    assert read(tmp_path / "d.csv", "#,text\r1,a\r2,b\r")[0].to_list() == [
        {"#": "1", "text": "a"},
        {"#": "2", "text": "b"},
    ]
    assert read(tmp_path / "e.csv", ",text\n0,a\n")[0].column_names == ["column 1", "text"]


def test_a_blank_behind_every_separator_is_no_part_of_the_field(tmp_path):
    lines = [f'"film, {i}", "{"ab"[i % 2]}"' for i in range(8)]
    found, notes = read(tmp_path / "a.csv", "text, label\n" + "\n".join(lines) + "\n")
    assert found.to_list()[1] == {"text": "film, 1", "label": "b"} and "blank behind every separator" in notes[0]
    found, notes = read(
        tmp_path / "b.csv", "text,label\n" + "\n".join(f"film {i}, {'ab'[i % 2]}" for i in range(8)) + "\n"
    )
    assert found.to_list()[1] == {"text": "film 1", "label": " b"} and not notes  # the header has none


@pytest.mark.parametrize("encoding", ["shift_jis", "euc_jp"])
def test_japanese_is_told_from_korean_and_chinese(tmp_path, encoding):
    lines = [f"この映画はとても面白い {i},{'良い' if i % 2 else '悪い'}" for i in range(20)]
    found, notes = read(tmp_path / "a.csv", "text,label\n" + "\n".join(lines) + "\n", encoding)
    assert found[1] == {"text": "この映画はとても面白い 1", "label": "良い"} and encoding in notes[0]
    for other, text in (
        ("cp949", "이 영화는 아주 재미있다"),
        ("gb18030", "这部电影很好看"),
        ("big5", "這部電影很好看"),
    ):
        found, _ = read(tmp_path / "b.csv", "text,label\n" + f"{text},a\n" * 20, other)
        assert found[0]["text"] == text
