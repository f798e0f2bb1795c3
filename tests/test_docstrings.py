"""Public fields are documented where they stand: a docstring below, the class's docstring, or the config's help."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_floors import FILES, ROOT


def undocumented(source: str) -> Iterator[str]:
    """`Class.field` of dataclasses, named tuples and pydantic models that nothing says a word about."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        made = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        if not made and not {ast.unparse(base) for base in node.bases} & {"BaseModel", "NamedTuple", "TypedDict"}:
            continue
        told = ast.get_docstring(node) or ""
        for item, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            name, text = item.target.id, ast.unparse(item)
            own = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found = own or "'help':" in text or re.search(rf"\b{name}\b", told)
            if not (found or name.startswith("_") or "ClassVar" in text):
                yield f"{node.name}.{name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_public_field_is_documented(file):
    assert list(undocumented((ROOT / file).read_text(encoding="utf-8"))) == []


def test_what_is_not_documented_is_found():
    source = (
        "@dataclass\nclass A:\n    '''Has a.'''\n    a: int\n    b: int\n    '''Text.'''\n    c: int\n    _d: int\n"
    )
    assert list(undocumented(source)) == ["A.c"]
