"""check(): will a folder load in a server, and load right? Every reason if not, and the command that helps. And what it
would tell of the machine and the data that it was made with.

The rules are in `rules`; each report names the version whose source they were read from.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import CONFIG, Adapter, adapter_folder, read_adapter
from adapters_kit.artifacts.base_config import read_base_config
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.leaks import Leak, find_leaks
from adapters_kit.artifacts.unread import PEFTS
from adapters_kit.errors import ShippingError, UnknownNameError, did_you_mean
from adapters_kit.serving.rules import RULES, VERSIONS, VLLM_RANKS, Problem, missing_base, model_problems, other_version
from adapters_kit.serving.start import modelfile, vllm_command

MOST_LEAKS = 20
"""So many are shown; `leaks` has all."""


@dataclass
class CheckReport:
    """What `check` found; true in a condition if nothing stands in the way."""

    path: Path
    """The folder that was checked."""
    target: str
    """The server that it was checked for."""
    problems: list[Problem] = field(default_factory=list)
    """What stands in the way."""
    leaks: list[Leak] = field(default_factory=list)
    """What its text files tell about the machine and the data; it loads in any case."""
    start: str = ""
    """How the folder is started there, ready to paste: vLLM's command line, Ollama's Modelfile."""
    other: str | None = None
    """The version of the server that is installed here, where the rules are of another: for it nothing is known."""

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rules = f"rules of {VERSIONS[self.target]}"
        if self.ok:
            lines = [f"{self.path} loads in {self.target} ({rules}; of other versions it is not known)."]
            lines += [self.start] * bool(self.start)
        else:
            count = len(self.problems)
            lines = [f"{self.path} in {self.target}: {count} problem{'s' * (count > 1)} ({rules})"]
            lines += [f"  - {problem}" for problem in self.problems]
        if self.other is not None:
            lines.append(
                f"Not known for {self.other}, which is installed here: the rules are of {VERSIONS[self.target]}."
            )
        if self.leaks:
            lines.append(f"Whoever gets {self.path} can read there ({len(self.leaks)}; take out what should stay):")
            lines += [f"  - {leak}" for leak in self.leaks[:MOST_LEAKS]]
            lines += [f"  - … and {len(self.leaks) - MOST_LEAKS} more"] * (len(self.leaks) > MOST_LEAKS)
        return "\n".join(lines)


def check(folder: str | os.PathLike, target: str = "vllm", *, max_lora_rank: int = 16) -> CheckReport:
    """Whether an adapter or a merged model loads in `target`, and computes there what it should.

    Args:
        folder: an adapter folder, a run folder or a model folder.
        target: "peft", "transformers", "vllm", "sglang", "llama.cpp" or "ollama".
        max_lora_rank: for vLLM, the value of its option of that name (its default is 16).

    Returns:
        A report with every reason against it. Nothing is loaded or changed.

    Raises:
        UnknownNameError: no such target.
        ShippingError: the folder holds neither an adapter nor a model.
    """
    if target not in VERSIONS:
        raise UnknownNameError(f"Unknown target {target!r}. {did_you_mean(target, VERSIONS)}")
    path = adapter_folder(folder)
    foreign.check_either(path)
    report = CheckReport(path, target, leaks=find_leaks(path), other=other_version(target))
    if not (path / CONFIG).is_file():
        report.problems += _model_problems(path, target)
        report.start = _start(path, target, None) if report else ""
        return report
    try:
        adapter = read_adapter(path)
    except ShippingError as error:
        report.problems.append(Problem(str(error), "take another checkpoint, or save the adapter again"))
        return report
    report.problems += _common(adapter, target)
    report.problems += RULES[target](adapter, max_lora_rank)
    report.start = _start(path, target, adapter) if report else ""
    return report


def _start(path: Path, target: str, adapter: Adapter | None) -> str:
    if target == "vllm":
        return vllm_command(path, adapter, VLLM_RANKS)
    return modelfile(path, adapter) if target == "ollama" else ""


def _model_problems(path: Path, target: str) -> Iterator[Problem]:
    try:
        with open_checkpoint(path):
            pass
    except ShippingError as error:
        yield Problem(str(error), "merge or save the model again")
        return
    yield from model_problems(path, target, read_base_config(path))


def _common(adapter: Adapter, target: str) -> Iterator[Problem]:
    """What breaks an adapter everywhere."""
    if not any((adapter.folder / name).is_file() for name in PEFTS):
        yield Problem(
            f"it is in another tool's format, which adapters_kit reads and {target} does not",
            f"adapters-kit export {adapter.folder} peft/ (and check that)",
        )
    yield from missing_base(adapter)
    sizes = {name: tensor.shape[0] for name, tensor in adapter.weights.items() if ".lora_A." in name}
    zero = [n for n, t in adapter.weights.items() if (".lora_B." in n or "lora_embedding_B" in n) and not t.any()]
    if zero and len(zero) == len(sizes):
        yield Problem("every lora_B is zero: the adapter changes nothing", "train it, or take a later checkpoint", True)
