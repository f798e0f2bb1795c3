"""Runs peft's own tests with fused layers in place of peft's, and counts how often the node ran.

    python tests/peft_suite.py                       # its custom-model and variant tests that name LoRA (hours)
    python tests/peft_suite.py -k merge -x           # further pytest arguments; the last -k counts
    python tests/peft_suite.py --record              # SELECTED, a few minutes, into benchmarks/results/peft_suite.json

The test files come with peft's source archive, fetched with `pip download` for the installed version. Every LoRA model
is fused as soon as peft has injected its adapters. Tests that need a model hub are left out. What fails runs again with
peft's own layers, so that the record tells our failures from peft's.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

SUITES = ["tests/test_custom_models.py", "tests/test_lora_variants.py", "tests/test_lora_conversion.py"]
CHOSEN = "(lora or Lora or LoRA) and not adalora and not Bone and not XLora"
# LoRA on linear layers, its variants too, through every test of the suites that needs no model from a hub.
SELECTED = "Vanilla and MLP-LoraConfig or TestLoraVariants or TestActivatedLora and not checkpointing"
RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "peft_suite.json"
_PLAIN, _TALLY = "PEFT_SUITE_PLAIN", "PEFT_SUITE_TALLY"


def pytest_configure(config):
    """As a pytest plugin: fuse after injection, and count."""
    try:
        import diffusers  # noqa: F401
    except ImportError:  # its test helpers import a class from there that these tests do not use
        stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stand_in
    config.counts, config.reasons, config.began = Counter(), Counter(), time.monotonic()
    if _PLAIN not in os.environ:
        _fuse_and_count(config.counts, config.reasons)


def _fuse_and_count(counts, reasons):
    from peft.tuners.lora import LoraModel

    from adapters_kit.kernels import fuse as fusing
    from adapters_kit.kernels.lora import LoraLinear

    inject, apply, plan, forward = LoraModel.inject_adapter, LoraLinear.apply, fusing._plan, fusing._Fused.forward

    def inject_and_fuse(self, *args, **kwargs):
        result = inject(self, *args, **kwargs)
        counts["models"] += 1
        for module in self.modules():
            if type(module) in fusing._CLASSES:
                module.__class__ = fusing._CLASSES[type(module)]
                module.__dict__[fusing._SHARED_MASK] = False
                counts["layers"] += 1
        return result

    def counted_forward(self, x, *args, **kwargs):
        counts["calls of a fused layer"] += 1
        if args or any(value is not None for value in kwargs.values()):
            reasons["adapters are chosen sample by sample"] += 1
        return forward(self, x, *args, **kwargs)

    def counted_plan(layer, x):
        call = plan(layer, x)
        if isinstance(call, str):
            reasons[call] += 1
        return call

    def counted_apply(*args):
        counts["calls computed by the node"] += len(args[5])
        return apply(*args)

    LoraModel.inject_adapter, LoraLinear.apply = inject_and_fuse, counted_apply
    fusing._plan, fusing._Fused.forward = counted_plan, counted_forward


def pytest_terminal_summary(terminalreporter, config):
    """How much of the run was ours."""
    terminalreporter.write_line("fused: " + ", ".join(f"{count} {name}" for name, count in config.counts.items()))
    if _TALLY not in os.environ:
        return
    stats = terminalreporter.stats
    tally = {
        **{kind: len(stats.get(kind, [])) for kind in ("passed", "skipped", "xfailed", "deselected")},
        "failed": sorted({report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])}),
        "seconds": round(time.monotonic() - config.began),
        "fused": dict(config.counts),
        "calls left to peft's forward": dict(config.reasons.most_common()),
    }
    Path(os.environ[_TALLY]).write_text(json.dumps(tally))


def run(root: Path, arguments: list[str], **environment: str) -> tuple[int, dict]:
    """pytest in peft's source tree; its exit status and the tally."""
    tally = root / "tally.json"
    tally.unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "HF_HUB_OFFLINE": "1", _TALLY: str(tally)}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "peft_suite", *arguments]
    status = subprocess.run(command, cwd=root, env={**os.environ, **paths, **environment}).returncode
    return status, json.loads(tally.read_text()) if tally.exists() else {}


def main(arguments: list[str]) -> int:
    """Fetch, unpack, run, and record if asked to."""
    version = importlib.metadata.version("peft")
    record = "--record" in arguments
    arguments = [argument for argument in arguments if argument != "--record"]
    chosen = SELECTED if record else CHOSEN
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*download, f"peft=={version}"], check=True)
        with tarfile.open(next(Path(folder).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        root = Path(folder) / f"peft-{version}"
        (root / "tests" / "__init__.py").touch()  # its files import each other
        status, tally = run(root, ["-k", chosen, *SUITES, *arguments])
        if tally.get("failed"):
            _, again = run(root, tally["failed"], **{_PLAIN: "1"})
            tally["failed with peft's own layers too"] = again["failed"]
            print("failed with peft's own layers too:", *again["failed"] or ["none"], sep="\n  ")
    if record:
        found = {"peft": version, "suites": SUITES, "chosen": chosen, "arguments": arguments, **tally}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        print(f"recorded in {RESULT}")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
