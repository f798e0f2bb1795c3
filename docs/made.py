"""What the pages take from the code: `<!-- made: NAME -->` in a page becomes the text of the function of that name.

A hook of mkdocs. Nothing that is made is committed, so that nothing can be out of date.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- made: (\w+) -->")


def python_names() -> str:
    """Every public name of the package, with its docstring."""
    import adapters_kit

    lines = []
    for name in adapters_kit.__all__:
        if name == "__version__":
            continue
        value = getattr(adapters_kit, name)
        where = f"{value.__name__}.table" if name == "methods" else f"{value.__module__}.{value.__qualname__}"
        lines += [f"::: {where}", ""]
    return "\n".join(lines)


def recipe_keys() -> str:
    """Every key of a recipe, its default and its meaning, by section."""
    from pydantic_core import PydanticUndefined

    from adapters_kit.recipe import _SECTIONS

    parts = []
    for section, model in _SECTIONS.items():
        parts += [f"## {section or 'At the top'}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = "" if default is PydanticUndefined or key in _SECTIONS else f"`{_plain(default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            parts.append(f"| `{f'{section}.' if section else ''}{key}` | {shown} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _plain(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, list | dict)
        else (str(value) if value else "none")
    )


def commands() -> str:
    """The help of every verb."""
    import os

    from adapters_kit.arguments import make_parser

    os.environ["COLUMNS"] = "100"
    parts = []
    for name, verb in make_parser()[1].items():
        shown = io.StringIO()
        with redirect_stdout(shown):
            verb.print_help()
        parts += [f"## {name}", "", "```text", shown.getvalue().rstrip(), "```", ""]
    return "\n".join(parts)


def method_cards() -> str:
    """A card a method: what it trains, when to use it, whether it merges, its rate, what was measured, the paper."""
    from adapters_kit import registry

    measured = _measured()
    merges = {True: "yes", False: "no: ship the adapter", None: "as peft does"}
    parts = []
    for name in registry.names():
        method = registry.get(name)
        rate = f"{method.learning_rate:g}"
        if method.classifier_learning_rate:
            rate += f"; {method.classifier_learning_rate:g} where nothing is generated"
        parts += [
            f"## {name}",
            "",
            f"- trains: {method.trains}",
            f"- when: {method.when}",
            f"- config: `{method.config.partition(':')[2]}`",
            f"- merges into the base: {merges[method.mergeable]}",
            *([f"- needs: {method.needs}"] if method.needs else []),
            f"- default learning rate: {rate}",
            *([f"- defaults of its own: `{dict(method.defaults)}`"] if method.defaults else []),
            f"- measured: {measured.get(name) or f'not in the tables, since it needs {method.needs}'}",
            f"- paper: {method.paper}" if method.paper else "- paper: see peft",
            "",
        ]
    return "\n".join(parts)


def _measured() -> dict[str, str]:
    """Method to its line in the comparisons that the benchmarks keep: the large one where it is in it."""
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import comparison

    kept = comparison.read()
    told = {}
    for document in filter(None, (kept["others"], kept["combinations"])):
        for name, score, trained, size, rate in _cells(comparison.movies_table(document)):
            told[name] = (
                f"accuracy {score} on movies, {trained} trained, {size} MB, at {rate} ([table](../measured.md))"
            )
    for name, *scores, gap, trained, size, _ in _cells(comparison.sentiment_table(kept)):
        against = "" if gap == "–" else f", {gap} points to full fine-tuning"
        told[name] = f"mean accuracy {scores[-1]}{against}; {trained} trained, {size} MB ([table](../measured.md))"
    return told


def _cells(table: str) -> list[list[str]]:
    """The body of a Markdown table, without bold."""
    lines = table.replace("**", "").splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def house() -> str:
    """The package's files, each with the first sentence of its docstring."""
    lines = ["adapters_kit/"]
    package = ROOT / "adapters_kit"
    files = [path for path in package.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    top = sorted(path for path in files if path.parent == package)
    rooms = sorted({path.parent for path in files} - {package})
    for path in top:
        lines.append(_file_line(path, 1))
    for room in rooms:
        depth = len(room.relative_to(package).parts)
        about = _first_sentence(room / "__init__.py") if (room / "__init__.py").is_file() else ""
        lines.append(f"{'  ' * depth}{room.name}/".ljust(26) + about)
        lines += [_file_line(path, depth + 1) for path in sorted(path for path in files if path.parent == room)]
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def _file_line(path: Path, depth: int) -> str:
    return f"{'  ' * depth}{path.name}".ljust(26) + _first_sentence(path)


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


MADE: dict[str, Callable[[], str]] = {
    "python_names": python_names,
    "recipe_keys": recipe_keys,
    "commands": commands,
    "method_cards": method_cards,
    "house": house,
}


def filled(markdown: str) -> str:
    """A page with everything that is made in it; an unknown name is a KeyError of the author's."""
    return _MARK.sub(lambda found: MADE[found[1]](), markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """mkdocs calls this once: the measured plots stand beside our own pictures."""
    from mkdocs.structure.files import File

    for path in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return filled(markdown).replace("](../benchmarks/results/", "](pictures/")  # where `on_files` puts them
