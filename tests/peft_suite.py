"""Runs peft's own tests with fused layers in place of peft's, and counts how often the node ran.

    python tests/peft_suite.py                       # its custom-model and variant tests that name LoRA
    python tests/peft_suite.py -k merge -x           # further pytest arguments

The plain linear layers alone (ten minutes), with what ran last recorded in benchmarks/results/peft_suite.json:

    python tests/peft_suite.py -k "(lora or Lora or LoRA) and Vanilla and MLP and not adalora and not (DoRA or dora)"

The test files come with peft's source archive, fetched with `pip download` for the installed version. Every LoRA model
is fused as soon as peft has injected its adapters. Tests that need a model hub are left out.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

SUITES = ["tests/test_custom_models.py", "tests/test_lora_variants.py", "tests/test_lora_conversion.py"]
CHOSEN = "(lora or Lora or LoRA) and not adalora and not Bone and not XLora"


def pytest_configure(config):
    """As a pytest plugin: fuse after injection, and count."""
    try:
        import diffusers  # noqa: F401
    except ImportError:  # its test helpers import a class from there that these tests do not use
        stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stand_in
    from peft.tuners.lora import LoraModel

    from adapters_kit.kernels import fuse as fusing
    from adapters_kit.kernels.lora import LoraLinear

    inject, apply = LoraModel.inject_adapter, LoraLinear.apply
    config.counts = {"models": 0, "layers": 0, "nodes": 0, "projections": 0}

    def inject_and_fuse(self, *args, **kwargs):
        result = inject(self, *args, **kwargs)
        config.counts["models"] += 1
        for module in self.modules():
            if type(module) in fusing._CLASSES:
                module.__class__ = fusing._CLASSES[type(module)]
                module.__dict__[fusing._SHARED_MASK] = False
                config.counts["layers"] += 1
        return result

    def counted(*args):
        config.counts["nodes"] += 1
        config.counts["projections"] += len(args[5])
        return apply(*args)

    LoraModel.inject_adapter, LoraLinear.apply = inject_and_fuse, counted


def pytest_terminal_summary(terminalreporter, config):
    """How much of the run was ours."""
    terminalreporter.write_line("fused: " + ", ".join(f"{count} {name}" for name, count in config.counts.items()))


def main(arguments: list[str]) -> int:
    """Fetch, unpack, run."""
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*download, f"peft=={version}"], check=True)
        with tarfile.open(next(Path(folder).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / f"peft-{version}" / "tests" / "__init__.py").touch()  # its files import each other
        here = Path(__file__).resolve().parent
        paths = [str(here), str(here.parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "peft_suite",
            "-k",
            CHOSEN,
            *SUITES,
            *arguments,
        ]
        return subprocess.run(command, cwd=Path(folder) / f"peft-{version}", env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
