"""What can go wrong, as one tree.

AdapterError (ValueError)
├── UnknownNameError     a method, option, target, key, task or file name that does not exist
├── RecipeError          a recipe; carries every problem found, not the first one only
├── DataError            the training data
├── ModelError           the base model: missing weights, wrong shapes, a part that is not there
├── TrainingError        a run that had to stop: a loss that is not a number, no memory left
│   └── ManyError        some of many runs that were trained together failed; the others are there
├── ShippingError        merging, exporting, checkpoint files
├── WriteError           a place that cannot be written: no space, no permission, another process at work
│                        (also a TrainingError and a ShippingError: both write)
└── MissingPackageError  an optional package (also an ImportError)

Every message says what was wrong (the user's own words repeated), where, and how to put it right.
No torch here: errors must be cheap to raise from the command line.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class AdapterError(ValueError):
    """Root of everything that adapters_kit raises on purpose."""


class UnknownNameError(AdapterError):
    """A name that stands for nothing; the message ends with the nearest names that do."""


class RecipeError(AdapterError):
    """All the problems of one recipe.

    Attributes:
        problems: one sentence each, in the order of the file.
        paths: the key that each is about, outermost name first; empty where a problem is no key's.
    """

    def __init__(
        self, problems: Sequence[str], source: str = "the recipe", paths: Sequence[tuple[str, ...]] = ()
    ) -> None:
        self.problems = list(problems)
        self.paths = list(paths)
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in {source}:\n{lines}")


class DataError(AdapterError):
    """The data cannot be used as given."""


class ModelError(AdapterError):
    """The base model cannot be used as given."""


class TrainingError(AdapterError):
    """A run that cannot start where it should, or had to stop."""


class ManyError(TrainingError):
    """Some of many trainings failed; the others have finished.

    Attributes:
        runs: of all recipes in their order; None for one that failed.
        failures: name of a run -> what stopped it.
    """

    def __init__(self, runs: Sequence[Any], failures: Mapping[str, BaseException]) -> None:
        self.runs, self.failures = list(runs), dict(failures)
        told = "\n".join(f"  - {name}: {type(error).__name__}: {error}" for name, error in self.failures.items())
        super().__init__(
            f"{len(self.failures)} of {len(self.runs)} trainings failed, the others have finished. What is wrong put "
            f"right, resume=True (--resume) goes on with those:\n{told}"
        )


class ShippingError(AdapterError):
    """A checkpoint cannot be read, merged, verified or exported."""


class WriteError(TrainingError, ShippingError):
    """An output folder or file cannot be written: no space, no permission, or another process writes there."""


class MissingPackageError(AdapterError, ImportError):
    """A package that only some features need is absent or too old."""


# What other libraries call the things that we have, where spelling alone leads to something else ("rank_pattern").
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "r": ("method.r", "bottleneck_dim"),
    "rank": ("r", "method.r", "bottleneck_dim"),
    "lora_r": ("r", "method.r"),
    "lora_rank": ("r", "method.r"),
    "alpha": ("lora_alpha", "method.lora_alpha"),
    "lora_alpha": ("method.lora_alpha",),
    "dropout": ("lora_dropout", "method.lora_dropout", "dropout"),
    "lora_dropout": ("method.lora_dropout",),
    "targets": ("target_modules", "method.target_modules"),
    "target_modules": ("method.target_modules",),
    "lora_target": ("target_modules", "method.target_modules"),
    "lr": ("learning_rate", "training.learning_rate", "--learning-rates"),
    "num_train_epochs": ("epochs", "training.epochs"),
    "num_epochs": ("epochs", "training.epochs"),
    "per_device_train_batch_size": ("batch_size", "training.batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size", "training.eval_batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation", "training.gradient_accumulation"),
    "cutoff_len": ("max_length", "training.max_length"),
    "max_seq_length": ("max_length", "training.max_length"),
    "bf16": ("precision", "training.precision"),
    "fp16": ("precision", "training.precision"),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "report_to": ("log_to", "training.log_to"),
    "dataset": ("data",),
    "base_model": ("model",),
    "model_name_or_path": ("model",),
    "output": ("out", "--out"),
    "output_dir": ("out", "--out"),
}


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that `name` may stand for, best first: what other libraries call them, then close spellings."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    flags = {key.removeprefix("--"): candidate for key, candidate in by_lower.items()}
    bare = name.lower().lstrip("-").replace("-", "_")
    others = [other.removeprefix("--") for other in _ELSEWHERE.get(bare.rpartition(".")[2], ())]
    meant = [flags[other] for other in others if other in flags]
    if meant:
        return meant[:1]
    found = difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=0.5)
    near = {key: difflib.SequenceMatcher(None, key, name.lower()).ratio() for key in found}
    # "trian" is train; that extract has three of its letters in order says nothing beside that.
    return [by_lower[key] for key in found if near[key] >= near[found[0]] - 0.25]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that ends an error about an unknown name.

    Example:
        >>> did_you_mean("lroa", ["lora", "dora", "prefix"])
        'Did you mean lora or dora?'
    """
    known = sorted(set(known))
    close = nearest(name, known)
    if close:
        return "Did you mean " + " or ".join([", ".join(close[:-1]), close[-1]] if close[1:] else close) + "?"
    if not known:
        return "None exist here."
    shown = ", ".join(known[:30]) + (f" … ({len(known)} in all)" if len(known) > 30 else "")
    return f"There are: {shown}."


def gist(error: BaseException) -> str:
    """What a library's long message says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
