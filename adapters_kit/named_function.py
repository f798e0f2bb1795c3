"""A function of the user's that a recipe names as `module:function` or `path/file.py:function`. Floor 0, no torch.

Its code runs, as that of any Python file one starts: only for a training, never when a run or an adapter is opened.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters_kit.errors import RecipeError, did_you_mean

Scoring = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


def named_function(key: str, name: str, arguments: int = 2) -> Callable[..., Any]:
    """The function that a recipe's key names. Modules are looked for in the current folder too.

    Args:
        key: of the recipe, as it is told.
        name: "module:function", or "file.py:function".
        arguments: how many it has to take.

    Raises:
        RecipeError: no such module or function, one that fails while it is imported, or takes other arguments.
    """
    place, mark, function = name.rpartition(":")
    if not mark or not place or not function.isidentifier():
        raise RecipeError([f"{key}: {name!r} names no function: write module:function, or path/file.py:function."])
    module = _imported(key, place)
    found = getattr(module, function, None)
    if found is None:
        here = [one for one, value in vars(module).items() if inspect.isfunction(value) and not one.startswith("_")]
        raise RecipeError([f"{key}: {place} has no function {function!r}. {did_you_mean(function, here)}".rstrip()])
    if not callable(found):
        raise RecipeError([f"{key}: {function} in {place} is no function but {type(found).__name__}."])
    try:
        inspect.signature(found).bind(*[None] * arguments)
    except TypeError as error:
        told = f"{key}: {name} is called with {arguments} arguments (rows, answers), and does not take them: {error}."
        raise RecipeError([told]) from None
    except ValueError:  # built in: it has no signature to look at
        pass
    return found


def _imported(key: str, place: str) -> Any:
    path = Path(place).expanduser()
    by_file = path.suffix == ".py"
    if by_file and not path.is_file():
        near = did_you_mean(path.name, [one.name for one in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise RecipeError([f"{key}: there is no file {place!r}. {near}".rstrip()])
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent if by_file else Path.cwd()))
    try:
        if not by_file:
            return importlib.import_module(place)
        unique = f"adapters_kit_named_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(unique, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module  # what the file defines can be pickled, as a data class wants it
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name is not None and place.split(".")[0] == error.name.split(".")[0]:
            files = [one.stem for one in Path.cwd().glob("*.py")]
            told = f"{key}: there is no module {place!r} here ({Path.cwd()}). {did_you_mean(place, files)}"
            raise RecipeError([told.rstrip()]) from None
        raise RecipeError([f"{key}: {place} cannot be imported: {error}."]) from error
    except (Exception, SystemExit) as error:  # whatever the file's own lines raise
        raise RecipeError([f"{key}: {place} cannot be imported: {type(error).__name__}: {error}"]) from error
    finally:
        sys.path[:] = before


def scored(key: str, function: Scoring, rows: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """One finite number for each answer, as the function gives them.

    Raises:
        RecipeError: it fails, with the row at which it does; or gives something else.
    """
    if not rows:
        return []
    try:
        given = function(rows, answers)
    except Exception as error:
        where = _failing(function, rows, answers)
        told = f"{key}: the function fails{where}: {type(error).__name__}: {error}"
        raise RecipeError([told]) from error
    try:
        values = [given] if isinstance(given, int | float) and len(rows) == 1 else list(given)
    except TypeError:
        told = f"{key}: the function gives {type(given).__name__}; it has to give a list of numbers, one an answer."
        raise RecipeError([told]) from None
    if len(values) != len(rows):
        raise RecipeError([f"{key}: the function gives {len(values):,} numbers for {len(rows):,} answers."])
    found = []
    for number, value in enumerate(values, 1):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            answer = answers[number - 1][:60]
            told = f"{key}: the function gives {value!r} for row {number} (answer {answer!r}); it has to be a number."
            raise RecipeError([told])
    return found


def _failing(function: Scoring, rows: Sequence[Any], answers: Sequence[str]) -> str:
    """Where it fails: the first row at which it does alone; nothing where it fails on all together only."""
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
        try:
            function([row], [answer])
        except Exception:  # the one that is looked for
            return f" at row {number} (answer {answer[:60]!r})"
    return ""
