"""llama.cpp's own quantizer, where it is installed: its types are its affair, and it knows which tensor gets which."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from adapters_kit.errors import MissingPackageError, ShippingError

# Those that need no importance matrix.
TYPES = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"),
    *("q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)
# Another process: the library ends the one that it fails in, and writes to its stderr.
_IN_PYTHON = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options))
"""


def quantizer() -> list[str]:
    """The command that takes a file, a file to write and a type: a program on PATH or in $LLAMA_CPP, or the package.

    Raises:
        MissingPackageError: neither is here.
    """
    checkout = os.environ.get("LLAMA_CPP")
    places = [os.environ.get("PATH", ""), *([f"{checkout}/build/bin", checkout] if checkout else [])]
    program = shutil.which("llama-quantize", path=os.pathsep.join(places))
    if program:
        return [program]
    if find_spec("llama_cpp"):
        return [sys.executable, "-c", _IN_PYTHON]
    raise MissingPackageError(
        f"GGUF files of the types {', '.join(TYPES)} are written by llama.cpp's quantizer, which is not here: put "
        "llama-quantize on PATH, or pip install 'adapters-kit[llama-cpp]' (which builds for minutes)."
    )


def requantize(command: list[str], source: Path, out: Path, kind: str) -> None:
    """Write the GGUF file `source`, of 16 or 32 bit, as `out` in blocks of the type `kind`.

    Raises:
        ShippingError: llama.cpp refuses; its last words are repeated.
    """
    done = subprocess.run([*command, str(source), str(out), kind], capture_output=True, text=True, errors="replace")
    if done.returncode or not out.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ShippingError(f"llama.cpp's quantizer refuses {kind}: {said[-1][:500] if said else 'no reason given'}")
