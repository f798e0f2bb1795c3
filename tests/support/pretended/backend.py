"""Makes torch take "cuda" for a device that is there. Imported before torch, which asks once.

A CPU build has no device guard, streams and generators for CUDA, without which autograd aborts on the first tensor that
says it is there. card.cpp has ones that do nothing; it is compiled when it is first needed, in some five seconds.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_loaded: list[ctypes.CDLL] = []
SOURCE = Path(__file__).with_name("card.cpp")


def why_not() -> str | None:
    """Why there can be no pretended card here; None if there can."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        return "no C++ compiler, which builds the pretended card"
    if (_root() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built for CUDA"
    return None if sys.platform == "linux" else "the pretended card is for Linux"


def _root() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def built() -> Path:
    """The library, compiled for this torch and this text unless it has been."""
    tag = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"adapters-kit-card-{os.getuid()}"
    path = folder / f"card-{tag}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        root, part = _root(), folder / f"{tag}.{os.getpid()}.part"
        include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        link = [f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        compiler = shutil.which("g++") or "c++"
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(part), *link]
        subprocess.run(command, check=True)
        part.rename(path)
    return path


def load() -> None:
    """Registers it, once. Before torch is imported."""
    if _loaded:
        return
    assert "torch" not in sys.modules, "the card has to be there before torch is imported"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_root() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    _loaded.append(ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL))
