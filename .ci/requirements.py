"""Requirements for a test environment at one end of what pyproject.toml allows.

python .ci/requirements.py lowest      each bound itself: `rich>=13.0` becomes `rich==13.0`
python .ci/requirements.py newest      upper bounds only: pip takes what is newest below them

torch is the pinned one at both ends: other releases come as CUDA builds of several gigabytes.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_FOR_TESTS = ("ruff", "mypy", "types-")
# trl 1.0 wants datasets 4.7. It is no requirement of the package: its tests skip themselves without it.
NOT_AT_ITS_LOWEST = ("trl",)


def bounds() -> dict[str, tuple[str, str]]:
    """Name -> `(lowest version, upper bound or "")` of everything that the package or its tests use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = re.findall(r"\[(.*)\]", next(line for line in extras["dev"] if line.startswith("adapters-kit[")))
    groups = [project["dependencies"], extras["dev"], *(extras[name] for name in own[0].split(","))]
    found = [re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", line) for group in groups for line in group]
    return {
        match[1]: (match[2], (match[3] or "").lstrip(","))
        for match in found
        if match and not match[1].startswith(NOT_FOR_TESTS)
    }


def main(which: str) -> None:
    """Prints the requirements."""
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch and which in ("lowest", "newest")
    print(torch[0])
    for name, (version, below) in bounds().items():
        if name == "torch" or (which == "lowest" and name in NOT_AT_ITS_LOWEST):
            continue
        print(f"{name}=={version}" if which == "lowest" else name + below)


if __name__ == "__main__":
    main(sys.argv[1])
