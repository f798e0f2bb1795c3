"""What an option of a method means, read from the source text of peft's configs and ours: importing them is slow."""

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def option_help() -> dict[str, dict[str, str]]:
    """Option -> name of each config that has it -> its help there; LoRA's first, then ours, then peft's others."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(_sources(), key=lambda path: (path.parent.name != "lora", "peft" in path.parts)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for option, text in _fields(node):
                    found.setdefault(option, {})[node.name] = text
    return found


def _sources() -> Iterator[Path]:
    peft = importlib.util.find_spec("peft")
    if peft and peft.origin:
        yield Path(peft.origin).parent / "config.py"
        yield from (Path(peft.origin).parent / "tuners").glob("*/config.py")
    yield from (Path(__file__).parent / "methods").glob("**/*.py")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass and their `metadata={"help": …}`."""
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(one.value, ast.Call):
            given = next((key.value for key in one.value.keywords if key.arg == "metadata"), None)
            try:
                text = ast.literal_eval(given).get("help") if given is not None else None
            except ValueError:  # put together when it is imported
                continue
            if isinstance(text, str):
                yield one.target.id, text
