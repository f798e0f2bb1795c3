"""What README shows runs, names every file, and quotes the figures that the committed results hold."""

import re
import sys

import pytest

ROOT = __import__("pathlib").Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(real, tmp_path, monkeypatch):
    reviews = (real("reviews") / "train.csv").read_text(encoding="utf-8").splitlines()[:97]
    (tmp_path / "reviews.csv").write_text("\n".join(reviews) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks and any(HUB_ID in block for block in blocks)
    names = {}
    for block in blocks:
        exec(compile(block.replace(HUB_ID, str(real("minilm"))), "README.md", "exec"), names)
    assert names["run"].metrics["accuracy"] > 0 and (tmp_path / "merged" / "config.json").is_file()


def test_the_tree_names_every_file():
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "adapters_kit").rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py") and path.name not in README
    ]
    assert not missing


def test_every_command_of_the_readme_is_a_verb(capsys):
    from adapters_kit.cli import _parser

    used = set(re.findall(r"^adapters-kit ([a-z]+)", README, re.MULTILINE))
    assert used and used <= set(_parser()[1])


def test_every_table_is_the_measured_one():
    """And each table that can be drawn has its place."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import figures

    pages = [page.read_text(encoding="utf-8") for page in figures.PAGES]
    assert sorted(name for page in pages for name in figures.names(page)) == sorted(figures.TABLES)
    for page in pages:
        assert figures.filled(page) == page
    for name, table in figures.TABLES.items():
        assert table().count("\n") >= 3, name


def test_pictures_of_the_readme_are_committed():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).stat().st_size > 5_000
