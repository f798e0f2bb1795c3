"""GGUF files for llama.cpp and Ollama, through llama.cpp's own converters.

The converters are scripts of llama.cpp's repository. The `gguf` package does not contain them; the source archive of
`llama-cpp-python` does. They are looked for in $LLAMA_CPP (a checkout), else fetched once with pip from that archive.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, read_adapter
from adapters_kit.artifacts.dtypes import GGUF, as_dtype, name_of
from adapters_kit.artifacts.factors import canonicalise
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.source import locate
from adapters_kit.artifacts.staging import explain
from adapters_kit.errors import MissingPackageError, ShippingError

ARCHIVE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


def write_gguf(
    source: Path,
    out: Path,
    *,
    dtype: str | torch.dtype = "float16",
    base: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a model folder, or a LoRA adapter, to one GGUF file.

    Args:
        source: a model folder with its tokenizer, or an adapter folder (it is brought into canonical form first, since
            llama.cpp ignores rank-stabilised scaling and patterns).
        out: the file.
        dtype: "float16", "bfloat16", "float32" or "q8_0".
        base: for an adapter, its base: a folder or the .gguf file; None takes the one that it names.

    Raises:
        ShippingError: the converter refuses the model (its own words are repeated).
        MissingPackageError: the converters are not here and cannot be fetched.
    """
    kind = GGUF.get(name_of(dtype))
    if kind is None:
        raise ShippingError(f"dtype={dtype!r}: GGUF files are written as {', '.join(GGUF)}.")
    out = Path(os.path.abspath(out))
    if out.exists() and not overwrite:
        raise ShippingError(f"{out} exists. Choose another file, or allow it with overwrite=True.")
    if (source / CONFIG).is_file():
        adapter = read_adapter(source)
        named = locate(base if base is not None else adapter.base or "")
        if named.suffix == ".gguf":
            from adapters_kit.serving.lora_gguf import write_lora_gguf

            write_lora_gguf(adapter, named, out, as_dtype(dtype))
            return out
    folder = converters()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise explain(error, out) from error
    try:
        made = work / "made.gguf"
        if (source / CONFIG).is_file():
            config, weights, _ = canonicalise(adapter)
            write_json(work / "canonical" / CONFIG, config)
            write_tensors(work / "canonical" / WEIGHTS, weights)
            command = [folder / "convert_lora_to_gguf.py", work / "canonical", "--base", named]
        else:
            command = [folder / "convert_hf_to_gguf.py", source]
        _run([sys.executable, *map(str, command), "--outfile", str(made), "--outtype", kind], source)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, out)
    except OSError as error:
        raise explain(error, out) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _run(command: list[str], source: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if result.returncode:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
        raise ShippingError(f"llama.cpp's converter refuses {source}: {lines[-1] if lines else 'no reason given'}")


def converters() -> Path:
    """The folder with llama.cpp's converters: $LLAMA_CPP, else a cached copy, fetched if need be.

    Raises:
        MissingPackageError: $LLAMA_CPP has none, or fetching failed.
    """
    given = os.environ.get("LLAMA_CPP")
    if given:
        if not (Path(given) / "convert_hf_to_gguf.py").is_file():
            raise MissingPackageError(f"LLAMA_CPP={given} has no convert_hf_to_gguf.py: name a checkout of llama.cpp.")
        return Path(given)
    root = Path(os.environ.get("ADAPTERS_KIT_CACHE") or Path.home() / ".cache" / "adapters_kit")
    folder = root / f"llama.cpp-{ARCHIVE.rpartition('=')[2]}"
    if not folder.is_dir():
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    """Unpack the converters out of the source archive, which pip brings (its metadata step builds nothing)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".llama.cpp-", dir=folder.parent))
    try:
        requirement = work / "requirements.txt"
        requirement.write_text(f"{ARCHIVE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ARCHIVE.partition("=")[0]]
        result = subprocess.run([*command, "--dest", work, "-r", requirement], capture_output=True, text=True)
        archive = next(work.glob("*.tar.gz"), None)
        if result.returncode or archive is None:
            reason = (result.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise MissingPackageError(
                f"GGUF needs llama.cpp's converters, and fetching {ARCHIVE} with pip failed: {reason} Clone "
                "https://github.com/ggml-org/llama.cpp and set LLAMA_CPP to that folder."
            )
        unpack(archive, work / "converters")
        os.replace(work / "converters", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def unpack(archive: Path, folder: Path) -> None:
    """The converters, their library and its licence out of the archive of llama-cpp-python."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            wanted = name.startswith(("conversion/", "gguf-py/gguf/")) or name in {
                "convert_hf_to_gguf.py",
                "convert_lora_to_gguf.py",
                "LICENSE",
            }
            if wanted and member.isfile() and ".." not in name:
                member.name = name
                tar.extract(member, folder, filter="data")
