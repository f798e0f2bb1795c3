"""What a folder that is to be shipped would tell about the machine it was made on, and how it is taken out.

A leak is an absolute path, the name of the user or of the machine, or an access token.
"""

import getpass
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEXTS = {
    *("", ".md", ".rst", ".txt", ".log", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".xml", ".html"),
    *(".csv", ".tsv", ".jinja", ".py", ".sh", ".ipynb"),
}
_LARGEST = 16 << 20  # bytes of one file that are looked at; vocabularies are larger and hold no paths
# Paths that start at the root of a disk and have two parts or more. Addresses and fractions do not look like that.
# JSON writes each backslash of Windows twice.
_PATH = re.compile(
    r"""(?:(?<![\w./\\])|(?<=file://))
    (?:[A-Za-z]:(?:\\{1,2}|/) | /)(?:[\w.\-+@ ]+(?:/|\\{1,2}))+[\w.\-+@]+
    | (?<![\w\\])\\{2}[\w.\-]+(?:\\(?!\\)[\w.\-+@$ ]+)+ | (?<![\w\\])\\{4}[\w.\-]+(?:\\{2}[\w.\-+@$ ]+)+
    | (?<![\w./~])~(?:[A-Za-z_][\w\-]*)?(?:/[\w.\-+@]+)+""",
    re.VERBOSE,
)
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{20,}"
    r"|xox[abprs]-[\w\-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w\-]{35})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_ROOTS = {
    *("home", "Users", "Volumes", "root", "mnt", "media", "data", "datasets", "tmp", "private", "var", "srv", "opt"),
    *("scratch", "workspace", "work", "content", "gpfs", "lustre", "nfs", "fsx", "efs", "cluster", "storage"),
    *("project", "projects", "dbfs", "kaggle", "usr", "etc", "run"),
}


ACCESS_TOKEN = "an access token"


@dataclass(frozen=True)
class Leak:
    """One place.

    Attributes:
        file: relative to the folder.
        line: from 1.
        kind: "a path", "the user's name", "the machine's name", "samples of data" or `ACCESS_TOKEN`.
        text: what is there.
    """

    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        shown = self.text if self.kind != ACCESS_TOKEN else self.text[:6] + "…"
        return f"{self.file}:{self.line} holds {self.kind}: {shown}"


def find_leaks(folder: Path) -> list[Leak]:
    """Every leak in the text files of a folder, and samples of training data that a card or file shows."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _TEXTS or not path.is_file() or path.stat().st_size > _LARGEST:
            continue
        name = path.relative_to(folder).as_posix()
        if path.name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [Leak(name, number, kind, what) for number, kind, what in _in_text(text)]
        if path.name == "samples.jsonl" or (path.name == "README.md" and _samples(text)):
            found.append(Leak(name, 1, "samples of data", "rows that the model was trained or tested on"))
    return found


def _samples(text: str) -> bool:
    return bool(re.search(r"(?m)^## Samples\s*$", text))


def _in_text(text: str) -> Iterator[tuple[int, str, str]]:
    people = _people()
    for number, line in enumerate(text.splitlines(), 1):
        for match in _PATH.finditer(line):
            if _is_path(match[0]):
                yield number, "a path", match[0]
        for match in _TOKEN.finditer(line):
            yield number, ACCESS_TOKEN, match[0]
        for kind, word in people:
            if re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", line):
                yield number, kind, word


def _people() -> list[tuple[str, str]]:
    found = [("the machine's name", socket.gethostname())]
    with suppress(KeyError, OSError):  # no such user, as in a container
        found.append(("the user's name", getpass.getuser()))
    plain = {"root", "user", "localhost", "ubuntu", "admin", "runner", "model", "test", "data"}
    return [(kind, word) for kind, word in found if len(word) > 3 and word.lower() not in plain]


def _is_path(text: str) -> bool:
    return text[0] != "/" or text.split("/")[1] in _ROOTS or os.path.exists(text)


def scrubbed(value: Any) -> Any:
    """What JSON holds, with every text in it as `scrub` leaves it."""
    if isinstance(value, dict):
        return {key: scrubbed(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [scrubbed(inside) for inside in value]
    return scrub(value) if isinstance(value, str) else value


def scrub(text: str) -> str:
    """The text with every absolute path cut to its last name."""
    return _PATH.sub(lambda match: re.split(r"[/\\]", match[0])[-1] if _is_path(match[0]) else match[0], text)
