"""GGUF files for llama.cpp and Ollama, through llama.cpp's own converters.

The converters are scripts of llama.cpp's repository. The `gguf` package does not contain them; the source archive of
`llama-cpp-python` does. They are looked for in $LLAMA_CPP (a checkout), else fetched once with pip from that archive.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import transformers

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, read_adapter
from adapters_kit.artifacts.base_config import read_base_config
from adapters_kit.artifacts.dtypes import GGUF, as_dtype, name_of
from adapters_kit.artifacts.factors import canonicalise
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.side_files import side_files, write_side_files
from adapters_kit.artifacts.source import base_of
from adapters_kit.artifacts.staging import check_file, staged_file
from adapters_kit.errors import MissingPackageError, ShippingError, nearest
from adapters_kit.serving.quantizer import TYPES, quantizer, requantize

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
        dtype: "float16", "bfloat16", "float32" or "q8_0"; for a model also the types of llama.cpp's quantizer, where
            that is installed ("q4_k_m" and more).
        base: for an adapter, its base: a folder or the .gguf file; None takes the one that it names.

    Raises:
        ShippingError: the converter refuses the model (its own words are repeated).
        MissingPackageError: the converters are not here and cannot be fetched.
    """
    kind, packed = GGUF.get(name_of(dtype)), None
    if name_of(dtype) in TYPES and not (source / CONFIG).is_file():
        kind, packed = "auto", name_of(dtype)  # from 16 bit of the model's own kind
    if kind is None:
        more = "" if (source / CONFIG).is_file() else f"; by llama.cpp's quantizer {', '.join(TYPES)}"
        raise ShippingError(f"dtype={dtype!r}: GGUF files are written as {', '.join(GGUF)}{more}.")
    command_of_quantizer = quantizer() if packed else []
    check_file(out, overwrite)
    if (source / CONFIG).is_file():
        adapter = read_adapter(source)
        if whole := sorted(adapter.config.modules_to_save or ()):
            raise ShippingError(
                f"{source} saves whole modules ({', '.join(whole)}), which a GGUF adapter cannot hold. "
                f"adapters-kit merge {source} merged, then export that."
            )
        named = base_of(adapter, base)
        if named.suffix == ".gguf":
            from adapters_kit.serving.lora_gguf import write_lora_gguf

            write_lora_gguf(adapter, named, out, as_dtype(dtype), overwrite=overwrite)
            return out
    folder = converters()
    _check_known(folder, named if (source / CONFIG).is_file() else source)
    with staged_file(out, overwrite=overwrite) as made:
        work = made.parent
        if (source / CONFIG).is_file():
            config, weights, _ = canonicalise(read_adapter(source))
            write_json(work / "canonical" / CONFIG, config)
            write_tensors(work / "canonical" / WEIGHTS, weights)
            command = [
                folder / "convert_lora_to_gguf.py",
                work / "canonical",
                "--base",
                clean_folder(named, work / "base"),
            ]
        else:
            command = [folder / "convert_hf_to_gguf.py", clean_folder(source, work / source.resolve().name)]
        written = work / "plain.gguf" if packed else made
        _run([sys.executable, *map(str, command), "--outfile", str(written), "--outtype", kind], source, work)
        if packed:
            requantize(command_of_quantizer, written, made, packed)
    return out


def architectures(folder: Path) -> set[str]:
    """The model classes that the converters in `folder` name in their source text."""
    files = [folder / "convert_hf_to_gguf.py", *sorted((folder / "conversion").glob("*.py"))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return {name for text in texts for name in re.findall(r"""["']([A-Z]\w*[a-z]\w*)["']""", text)}


def _check_known(folder: Path, model: Path) -> None:
    """Refuses a model whose class llama.cpp does not know, before anything is read or written.

    Raises:
        ShippingError: which classes come near, and which classifiers it knows.
    """
    raw = read_base_config(model) if (model / "config.json").is_file() else {}
    both = [one for one in (raw, raw.get("text_config")) if isinstance(one, dict)]
    named = [name for one in both for name in one.get("architectures") or [] if isinstance(name, str)]
    known = architectures(folder)
    if not named or known & set(named):
        return
    if "Classification" in named[0]:
        heads = sorted(name for name in known if name.endswith("ForSequenceClassification"))
        others = f"Of classifiers it knows {', '.join(heads) or 'none'}"
    else:
        others = f"It knows {', '.join(nearest(named[0], known)) or 'none of a similar name'}"
    raise ShippingError(
        f"llama.cpp's converter does not know {named[0]}, the class of {model}. {others}, and the causal language "
        "models of most families. What `adapters-kit merge` writes, transformers loads."
    )


def clean_folder(source: Path, folder: Path) -> Path:
    """What a converter is shown of a model folder: weights, config and side files; no code, and nothing that names any.

    llama.cpp's converters trust what they read, and would run a tokenizer's own Python files.

    Raises:
        ShippingError: no model folder, or a model that only its own code can compute.
    """
    if not (source / "config.json").is_file():
        raise ShippingError(f"{source} holds no model (config.json), which the conversion needs.")
    raw = read_base_config(source)
    names = raw.get("architectures") or []
    if raw.get("auto_map") and not any(isinstance(name, str) and hasattr(transformers, name) for name in names):
        raise ShippingError(
            f"{source} needs code of its own ({', '.join(map(str, names)) or 'auto_map'}), which is not run here. "
            "Convert it "
            "with llama.cpp itself where you trust that code."
        )
    behind = next((name for path, name in side_files(source) if path.suffix in (".safetensors", ".bin")), None)
    if behind is not None:
        raise ShippingError(
            f"{source} computes its embeddings with {behind} behind the model, which a GGUF file would lack: they "
            "would be others. Serve the folder with sentence-transformers."
        )
    folder.mkdir()
    write_side_files(source, source, raw, folder)
    for path in sorted(source.iterdir()):
        weights = path.suffix in {".safetensors", ".bin"} or path.name.endswith(
            (".safetensors.index.json", ".bin.index.json")
        )
        if weights and path.is_file():
            _link(path.resolve(), folder / path.name)
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target)
    except OSError:  # Windows asks for a privilege
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


# What a converter's process gets to see of ours: enough to run Python, no tokens or keys.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")


def _run(command: list[str], source: Path, home: Path) -> None:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HOME": str(home)}
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**kept, **alone}, cwd=home)
    if result.returncode:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
        full = next((line for line in lines if "No space left" in line), None)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(home))
        raise ShippingError(
            f"llama.cpp's converter refuses {source}: {lines[-1][:500] if lines else 'no reason given'}"
        )


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
