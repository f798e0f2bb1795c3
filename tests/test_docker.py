"""The Dockerfile, read where there may be no Docker: what it names is there, and its steps work outside a container."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adapters_kit.arguments import make_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    (line.partition(" ")[0], line.partition(" ")[2].strip())
    for line in TEXT.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of(kind: str) -> list[str]:
    return [text for word, text in STEPS if word == kind]


def copied() -> list[str]:
    """What goes into the image, relative to the repository."""
    return [source for text in of("COPY") for source in shlex.split(text)[:-1]]


def installed() -> list[Requirement]:
    """What its pip installs."""
    names = [word for text in of("RUN") for word in re.findall(r'pip install "([^"]+)"', text)]
    return [Requirement(name.replace(".[", "adapters-kit[")) for name in names]


def test_the_steps_are_of_a_kind_that_docker_knows():
    assert {word for word, _ in STEPS} <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    assert STEPS[0][0] == "FROM" and len(of("FROM")) == 1
    used = {name for _, text in STEPS for name in re.findall(r"\$\{?(\w+)", text)}
    assert used <= {text.partition("=")[0] for text in of("ARG")}


def test_its_python_and_its_torch_are_those_that_the_package_allows():
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", of("FROM")[0])[1]
    assert version in SpecifierSet(PROJECT["requires-python"])
    wanted = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    torch = next(one for one in installed() if one.name == "torch")
    assert torch.specifier == wanted["torch"], "else pip would replace it by one of another index"


def test_every_extra_is_one_of_the_package():
    ours = next(one for one in installed() if one.name == "adapters-kit")
    assert ours.extras and ours.extras <= set(PROJECT["optional-dependencies"])


def test_what_is_copied_is_there_and_is_sent_to_docker():
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.strip()]
    for name in copied():
        assert (ROOT / name).exists(), name
        kept = False
        for rule in ignored:  # the last rule that fits decides
            if fnmatch.fnmatch(name, rule.removeprefix("!")):
                kept = rule.startswith("!")
        assert kept, f"{name} is left out by .dockerignore"


def test_the_command_is_one_of_the_package_and_its_examples_parse():
    assert shlex.split(of("ENTRYPOINT")[0].strip("[]")) == list(PROJECT["scripts"])
    parser, verbs = make_parser()
    examples = re.findall(r"^# +docker run .*? adapters-kit(?::cuda)? (.+)$", TEXT, re.MULTILINE)
    assert len(examples) > 2
    for line in examples:
        words = shlex.split(line)
        assert words[0] in verbs
        parser.parse_args(words)


@pytest.mark.slow
def test_it_installs_from_what_is_copied_alone_and_runs_from_elsewhere(tmp_path):
    """The steps without the downloads: only the copied files, pip, and the command in an empty folder."""
    source, there, data = tmp_path / "src", tmp_path / "there", tmp_path / "data"
    source.mkdir(), data.mkdir()
    for name in copied():
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(there), str(source)], check=True, capture_output=True, timeout=300)
    script = there / "bin" / of("ENTRYPOINT")[0].strip('[]"')
    environment = {"PYTHONPATH": str(there), "HOME": "/tmp", "USER": "adapters-kit", "PATH": "/usr/bin:/bin"}
    for words in (shlex.split(of("CMD")[0].strip("[]")), ["methods"]):
        ran = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=data,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0 and ran.stdout, (words, ran.stderr)
    where = [sys.executable, "-c", "import adapters_kit; print(adapters_kit.__file__)"]
    told = subprocess.run(where, cwd=data, env=environment, capture_output=True, text=True, timeout=300).stdout
    assert told.startswith(str(there)), "it was this checkout that answered"
