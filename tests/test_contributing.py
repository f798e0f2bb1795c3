"""CONTRIBUTING.md says what is true: its floors, the files that it names, the ways of adding things."""

import re
from pathlib import Path

from adapters_kit import arguments
from adapters_kit.quantization_table import KINDS, QUANTIZATIONS
from adapters_kit.serving import rules
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_floors_are_those_of_the_house():
    rows = re.findall(r"^\| (\d+) \| ([\w, ]+) \|", TEXT, re.MULTILINE)
    assert {room: int(floor) for floor, rooms in rows for room in rooms.split(", ")} == FLOORS


def test_every_file_that_is_named_is_there():
    quoted = re.findall(r"`((?:adapters_kit|tests|benchmarks|\.ci)/[\w./-]*|[\w.-]+\.(?:md|toml|yaml))`", TEXT)
    drawn = re.findall(r"\b((?:\w+/)*\w+\.py|(?:inference|merging|serving|loading)/)(?=[\s:,)\"|])", TEXT)
    files = {*quoted, *(name for name in drawn if not name.startswith(("tests/", "adapters_kit/")))}
    assert len(files) > 25
    inside = [ROOT, ROOT / "adapters_kit", ROOT / "adapters_kit" / "training"]
    assert not [name for name in files if not any((folder / name).exists() for folder in inside)]


def test_every_make_target_that_is_named_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        word for names in re.findall(r"^([a-z]+(?: [a-z]+)*):", makefile, re.MULTILINE) for word in names.split()
    }
    named = set(re.findall(r"`make (\w+)`", TEXT))
    assert named and named <= targets


def test_the_lists_of_servers_agree():
    assert rules.RULES.keys() == rules.VERSIONS.keys()
    _, verbs = arguments.make_parser()
    target = next(action for action in verbs["check"]._actions if action.dest == "target")
    assert set(target.choices or ()) == set(rules.RULES)


def test_the_lists_of_quantizations_agree():
    assert tuple(KINDS) == QUANTIZATIONS


def test_the_versions_with_hashes_are_those_without():
    def pins(file):
        lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in lines}

    hashed = pins("constraints.hashed.txt")
    assert pins("constraints.txt") <= hashed, "write it again: .ci/hashes"
    assert len({name for name, _ in hashed}) == len(hashed) - 1, "torch alone has two builds"
    text = (ROOT / "constraints.hashed.txt").read_text(encoding="utf-8")
    assert all("--hash=sha256:" in block for block in re.split(r"\n(?=\w)", text)[1:])
