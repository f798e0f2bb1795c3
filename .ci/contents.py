"""Whether a wheel and a source distribution hold what they must, and what a package index shows of them.

python .ci/contents.py dist/*.whl dist/*.tar.gz
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = {
    ".pre-commit-config.yaml",
    ".gitignore",
}  # of use in a repository only; the source distribution may lack them


def tracked() -> set[str]:
    """The files of the repository."""
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines())


def main(wheel: str, sdist: str) -> None:
    """Raises SystemExit with what is missing."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = archive.read(next(name for name in inside if name.endswith(".dist-info/METADATA"))).decode()
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    problems = [f"wheel lacks {name}" for name in sorted(tracked() - inside) if name.startswith("adapters_kit/")]
    problems += [f"wheel holds {name}" for name in sorted(inside) if not re.match(r"adapters_kit[/-]", name)]
    problems += [f"sdist lacks {name}" for name in sorted(tracked() - source - NOT_SHIPPED)]
    relative = re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", metadata)
    problems += [f"README has a link that no package index can follow: {link}" for link in relative]
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{wheel}: {len(inside)} files; {sdist}: {len(source)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
