"""Recipe text in and out: YAML with the line of every key, and command-line flags. Floor 0, no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from adapters_kit.errors import did_you_mean, nearest

MOST_CHARACTERS, MOST_LEVELS, MOST_VALUES = 1_000_000, 20, 100_000
"""A recipe that is larger is none: it is refused before anything is made of it."""
_TOO_DEEP = f"It is nested more than {MOST_LEVELS} levels deep."


class _ExcessError(Exception):
    """Says what is too much."""


class Place(NamedTuple):
    """Where something was written: "line 7" or "--method.r", and its rank for sorting."""

    text: str
    """As it is told."""
    order: int
    """Its rank for sorting."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; here it is a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers, and escapes what it would take for a line's end."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """YAML takes a few characters besides the newline for line breaks and folds them; escapes keep them."""
    style = '"' if any(character in value for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {key: list(value) for key, value in _class.yaml_implicit_resolvers.items()}
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )

Path = tuple[str, ...]


def parse_yaml(text: str) -> tuple[dict[str, Any], dict[Path, Place], list[tuple[Place, str]]]:
    """The mapping in `text`, the line of each of its keys, and what is wrong with the text itself."""
    problems: list[tuple[Place, str]] = []
    places: dict[Path, Place] = {}
    if len(text) > MOST_CHARACTERS:
        told = f"It has {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}."
        return {}, places, [(Place("", 0), told)]
    if _is_too_deep(text):
        return {}, places, [(Place("", 0), _TOO_DEEP)]
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that no YAML holds
        return {}, places, [(Place("", 0), f"This is not valid YAML: {' '.join(str(error).split())}.")]
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, places, [(Place("", 0), "The file is empty.")]
        if not isinstance(node, yaml.MappingNode):
            return {}, places, [(_line(node), "A recipe is a mapping of keys to values, like `model: path`.")]
        if excess := _excess(node):
            return {}, places, [(Place("", 0), excess)]
        _collect(node, (), places, problems)
        return loader.construct_document(node), places, problems
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, a date that is none
        return {}, places, [(Place("", 0), f"A value in it cannot be read: {error}.")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(f"line {mark.line + 1}", mark.line + 1) if mark else Place("", 0)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        return {}, places, [(place, f"This is not valid YAML: {reason}.")]
    finally:
        loader.dispose()


def _is_too_deep(text: str) -> bool:
    """Reads no further than to the level that is too deep: what comes after may be meant to take forever."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_LEVELS:
                return True
    except yaml.YAMLError:
        pass  # said by whoever reads it whole
    return False


def _excess(root: yaml.Node) -> str | None:
    """What no recipe needs and a trap may have: aliases that lead back to themselves, or multiply."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        """Values under a node once its aliases are written out."""
        if id(node) in above:
            raise _ExcessError("An alias in it leads back to itself.")
        if id(node) not in sizes:
            inside = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                inside = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, (*above, id(node))) for part in inside)
        if sizes[id(node)] > MOST_VALUES:
            raise _ExcessError(f"Written out, its aliases make more than {MOST_VALUES:,} values.")
        return sizes[id(node)]

    try:
        size(root, ())
    except _ExcessError as error:
        return str(error)
    return None


def _line(node: yaml.Node) -> Place:
    return Place(f"line {node.start_mark.line + 1}", node.start_mark.line + 1)


def _collect(node: yaml.MappingNode, path: Path, places: dict, problems: list) -> None:
    for key, value in node.value:
        here = (*path, str(key.value))
        if here in places:
            problems.append((_line(key), f"{'.'.join(here)}: given twice, first on {places[here].text}."))
        places[here] = _line(key)
        if isinstance(value, yaml.MappingNode):
            _collect(value, here, places, problems)
        elif isinstance(value, yaml.SequenceNode):
            for index, item in enumerate(value.value):
                places[(*here, str(index))] = _line(item)


def parse_value(text: str) -> Any:
    """One flag's value, read as YAML would read it: numbers, true/false, null, [lists]; everything else is a string."""
    try:
        value = text if len(text) > MOST_CHARACTERS or _is_too_deep(text) else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError):
        return text
    return value if isinstance(value, int | float | bool | list | dict | type(None)) else text


def parse_flags(
    flags: Sequence[str], fields: dict[str, Any], places: dict[Path, Place], known: Mapping[str, str]
) -> list[tuple[Place, str]]:
    """Lays flags over `fields` (and `places`), in place; returns the problems.

    Args:
        flags: words such as "--method.r", "16", "--model=path", "--training.packing".
        known: the dotted keys that exist; anything below `method` and `data.columns` is free.
    """
    problems = []
    words = list(flags)
    order = 10**6
    while words:
        order += 1
        word = words.pop(0)
        place = Place(word.partition("=")[0], order)
        if not word.startswith("--"):
            problems.append((Place("", order), f"{word!r} stands alone: flags are --key value."))
            continue
        key, equals, raw = word[2:].partition("=")
        if equals:
            value = parse_value(raw)
        elif words and not words[0].startswith("--"):
            value = parse_value(words.pop(0))
        else:
            value = True
        path = tuple(key.split("."))
        free = (path[0] == "method" and len(path) == 2) or (path[:2] == ("data", "columns") and len(path) == 3)
        if key not in known and not free:
            leaves = {name.rpartition(".")[2]: name for name in known}
            close = [leaves[leaf] for leaf in nearest(path[-1], leaves)] or list(known)
            problems.append((place, f"there is no such key. {did_you_mean(key, close) if close else ''}"))
            continue
        _put(fields, path, value)
        for known_path in [p for p in places if p[: len(path)] == path]:
            del places[known_path]
        places[path] = place
    return problems


def _put(fields: dict[str, Any], path: Path, value: Any) -> None:
    for part in path[:-1]:
        inside = fields.get(part)
        if isinstance(inside, str):  # `method: lora` or `data: file.csv`: the short spelling of a mapping
            inside = {("name" if part == "method" else "train"): inside}
        fields[part] = dict(inside) if isinstance(inside, Mapping) else {}
        fields = fields[part]
    fields[path[-1]] = value


def dump(fields: Mapping[str, Any]) -> str:
    """YAML in the order given."""
    return yaml.dump(dict(fields), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
