"""Options of a method with values that mean nothing: not finite, or of another type than peft's config has there.

peft takes what it is given: `bias: ["all"]` trains nothing, `layers_to_transform: "0"` is compared with numbers, a
dropout of -0.5 is none, and a table where a name belongs is found out in the middle of a run. The annotations are read
from the source text, so that the options of LoRA can be told without importing peft.
"""

import ast
import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_SCALES = ("alpha", "lambda")  # whole numbers by their annotation, and only ever multiplied with
_LARGEST = 3.4e38
"""About the largest number of float32, in which adapters compute."""
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "dict": "a table",
}


def unfit(types: Mapping[str, ast.expr], options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first option whose value means nothing, and what it has to be; None if all do.

    Args:
        types: what `types_of` or `lora_types` found. Options that are not in it may be of any type.
    """
    for key, value in options.items():
        wanted = _wanted(key, value, types.get(key))
        if wanted is not None:
            return key, wanted
    return None


def _wanted(key: str, value: Any, node: ast.expr | None) -> str | None:
    if not _computable(value):
        return "a finite number, one that float32 holds"
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if "dropout" in key and is_number and not 0 <= value < 1:
        return "0 or more, and less than 1"
    is_pattern = key in ("rank_pattern", "alpha_pattern") and value is not None
    if is_pattern and not _are_numbers(value) and not (key == "rank_pattern" and _are_kept_ranks(value)):
        return "a table of numbers"
    if node is None or _fits(value, node):
        return None
    words = list(dict.fromkeys(_words(node)))
    is_scale = any(part in key for part in _SCALES) and is_number
    is_empty = value is None and any(word.startswith(("a list", "a table")) for word in words)
    return None if is_scale or is_empty else " or ".join(words)


def _computable(value: Any) -> bool:
    """Whether every number in a value is one that can be computed with: neither NaN, nor infinite, nor huge."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_computable, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, int | float) or (value == value and abs(value) <= _LARGEST)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(one) in (int, float) for one in value.values())


def _are_kept_ranks(value: Any) -> bool:
    """AdaLoRA's pattern is another: which of a layer's ranks are kept, yes or no for each."""
    lists = isinstance(value, Mapping) and all(isinstance(one, list) for one in value.values())
    return lists and all(type(kept) is bool for one in value.values() for kept in one)


def types_of(config: type) -> dict[str, ast.expr]:
    """Option -> annotation of a config class and those it is made from; empty for a class without source text."""
    found: dict[str, ast.expr] = {}
    for one in reversed(config.__mro__[:-1]):
        file = getattr(sys.modules.get(one.__module__), "__file__", None)
        found |= _annotations(file).get(one.__name__, {}) if file else {}
    return found


@cache
def lora_types() -> dict[str, ast.expr]:
    """As `types_of` for LoRA's config, with peft not imported."""
    found: dict[str, ast.expr] = {}
    package = importlib.util.find_spec("peft")
    folder = Path(package.origin).parent if package and package.origin else None
    for file, name in (
        ("config.py", "PeftConfigMixin"),
        ("config.py", "PeftConfig"),
        ("tuners/lora/config.py", "LoraConfig"),
    ):
        found |= _annotations(str(folder / file)).get(name, {}) if folder else {}
    return found


@cache
def _annotations(file: str) -> dict[str, dict[str, ast.expr]]:
    """Class -> field -> its annotation; "or None" where None is the default."""
    try:
        body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return {}
    return {node.name: dict(_fields(node)) for node in body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for one in node.body:
        match one:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                if isinstance(value, ast.Call):
                    value = next((given.value for given in value.keywords if given.arg == "default"), None)
                is_none = isinstance(value, ast.Constant) and value.value is None
                yield name, ast.BinOp(annotation, ast.BitOr(), ast.Constant(None)) if is_none else annotation


def _fits(value: Any, node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or _fits(value, inner)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=several)):
            return any(_fits(value, one) for one in several)
        case ast.Subscript(value=ast.Name(id="Literal")):  # which texts, peft knows better than its annotation
            return isinstance(value, str)
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            return _is_list(value) and all(_fits(one, inner) for one in value)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=several)):
            return _is_list(value) and len(value) == len(several) and all(map(_fits, value, several))
        case ast.Subscript(value=ast.Name(id="dict" | "Dict"), slice=ast.Tuple(elts=[_, inner])):
            return isinstance(value, Mapping) and all(_fits(one, inner) for one in value.values())
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, Integral) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, Real) and not isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="list"):
            return _is_list(value)
        case ast.Name(id="dict"):
            return isinstance(value, Mapping)
        case ast.Name(id=name) if name.endswith(("Config", "Type", "Init", "Variant")):  # an object, or its table
            return value is not None and not isinstance(value, str | bytes | Real) and not _is_list(value)
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _words(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=None):
            yield "null"
        case ast.BinOp(left=left, right=right):
            yield from _words(left)
            yield from _words(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            yield from _words(inner)
            yield "null"
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=several)):
            for one in several:
                yield from _words(one)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=several):
            yield "one of " + ast.unparse(several).strip("()").rstrip(",")
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=ast.Name(id="str")):
            yield "a list of names"
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=ast.Name(id="int")):
            yield "a list of whole numbers"
        case ast.Subscript(value=ast.Name(id="list" | "List" | "tuple")):
            yield "a list of lists"
        case ast.Subscript(value=ast.Name(id="dict" | "Dict")):
            yield "a table"
        case ast.Name(id=name):
            yield _WORDS.get(name, "a table")
