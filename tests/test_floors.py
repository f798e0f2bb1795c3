"""The house has floors: a file of adapters_kit imports only lower floors, or its own folder. Read from the source.

Imports inside functions count: they are as much a dependency as those at the top, only later.
"""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapters_kit

ROOT = Path(adapters_kit.__file__).parent
FLOORS = {
    "errors": 0,
    "registry": 0,
    "method_options": 0,
    "recipe": 0,
    "recipe_sections": 0,
    "recipe_checks": 0,
    "recipe_text": 0,
    "recipe_changes": 0,
    "names": 0,
    "named_function": 0,
    "task_table": 0,
    "quantization_table": 0,
    "noise": 0,
    "system": 0,
    "devices": 1,
    "anatomy": 1,
    "peft_plugin": 1,
    "peft_hook": 3,
    "artifacts": 2,
    "pages": 3,
    "kernels": 2,
    "methods": 3,
    "quantization": 3,
    "loading": 4,
    "wrapping": 4,
    "tasks": 5,
    "merging": 5,
    "serving": 6,
    "training": 7,
    "inference": 8,
    "compression": 9,
    "comparison": 8,
    "ui": 9,
    "verbs": 10,
    "arguments_shipping": 11,
    "arguments": 12,
    "cli": 13,
    "__main__": 14,
}
# The ground floor is one folder, whose files may use each other. What it is for: nothing there imports these.
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy"}
# What `import adapters_kit` runs.
FROM_THE_ROOT = {"errors", "noise", "peft_hook"}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    """`adapters_kit.methods.lora` -> `methods`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def imported_modules(source: str, package: str, is_module=lambda name: False) -> Iterator[tuple[int, str]]:
    """`(line, module)` of every import of adapters_kit in `source`, wherever it stands, by absolute name.

    Args:
        package: the package that holds the file, which relative imports start from.
        is_module: whether an absolute name is a module: `from adapters_kit import cli` imports `adapters_kit.cli`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else base for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == "adapters_kit")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def forbidden(room: str, module: str) -> str | None:
    """Why a file of `room` may not import `module`; None if it may."""
    target = room_of(module)
    if target == room:
        return None
    if not target:
        return "nothing inside the package imports the root: name the module that holds it"
    if target not in FLOORS:
        return f"the room {target!r} has no floor: give it one in CONTRIBUTING.md and here"
    if FLOORS[target] < FLOORS[room] or FLOORS[target] == FLOORS[room] == 0:
        return None
    return f"{target} is on floor {FLOORS[target]}, {room} on floor {FLOORS[room]}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_only_lower_floors(file):
    room = file.parts[0].removesuffix(".py")
    package = ".".join(["adapters_kit", *file.parent.parts])
    imports = list(imported_modules((ROOT / file).read_text(encoding="utf-8"), package, is_module))
    if room == "__init__":
        rooms = {room_of(module) for _, module in imports if module not in for_type_checkers().values()}
        assert rooms <= {*FROM_THE_ROOT, ""}, "public names are found when first used"
        return
    assert room in FLOORS, f"{file}: the room {room!r} has no floor: give it one in CONTRIBUTING.md and here"
    wrong = [f"{file}:{line} imports {module}: {why}" for line, module in imports if (why := forbidden(room, module))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", sorted({room for room, floor in FLOORS.items() if floor == 0} | FROM_THE_ROOT))
def test_the_ground_floor_is_light(room):
    """Errors, names and recipes are for the command line, which answers before torch is imported."""
    path = ROOT / f"{room}.py"
    if not path.exists():
        pytest.fail(f"{room} has a floor but does not exist")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not HEAVY & {name.partition(".")[0] for name in names}, f"{path.name}:{node.lineno}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement behind the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_fit(file):
    """A file past 400 lines is usually two rooms; a function's body fits a screen, or says why not."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f for f in functions if body_lines(f) > 60]
    assert not [f.name for f in long if "# Longer than a screen: " not in (ast.get_source_segment(text, f) or "")]


def test_the_walk_sees_every_kind_of_import():
    source = """
import adapters_kit
import torch, adapters_kit.cli as c
from adapters_kit import errors, wrap
from adapters_kit.training.train import train
from . import base
from ..loading import load
def late():
    from adapters_kit.compare import compare
    importlib.import_module("adapters_kit.memory")
if TYPE_CHECKING:
    import adapters_kit.tasks.base
"""
    known = {"adapters_kit.errors", "adapters_kit.methods.base"}
    found = [module for _, module in sorted(imported_modules(source, "adapters_kit.methods", known.__contains__))]
    late = ["compare", "memory", "tasks.base"]
    expected = ["cli", "errors", "training.train", "methods.base", "loading", *late]
    assert sorted(found) == sorted(["adapters_kit"] * 2 + [f"adapters_kit.{name}" for name in expected])


@pytest.mark.parametrize(
    ("room", "module", "allowed"),
    [
        ("methods", "adapters_kit.anatomy.structure", True),
        ("methods", "adapters_kit.methods.targets", True),
        ("registry", "adapters_kit.errors", True),
        ("recipe", "adapters_kit.registry", True),
        ("errors", "adapters_kit.anatomy", False),
        ("kernels", "adapters_kit.methods", False),
        ("anatomy", "adapters_kit.wrapping", False),
        ("loading", "adapters_kit.wrapping", False),
        ("cli", "adapters_kit", False),
        ("cli", "adapters_kit.attic", False),
    ],
)
def test_the_rule_itself(room, module, allowed):
    assert (forbidden(room, module) is None) == allowed


def test_only_peft_plugin_touches_the_registries_of_peft():
    registries = {"register_peft_method"} | {f"PEFT_TYPE_TO_{kind}_MAPPING" for kind in ("CONFIG", "TUNER", "PREFIX")}
    wrong = [
        f"{file}:{node.lineno} imports {alias.name}"
        for file in FILES
        if file.name != "peft_plugin.py"
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in registries
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_public_names_are_the_namespace():
    assert adapters_kit.__all__ == sorted(set(adapters_kit.__all__))
    assert set(dir(adapters_kit)) == set(adapters_kit.__all__)
    assert {"__version__", *adapters_kit._HOME} == set(adapters_kit.__all__)
    starred: dict = {}
    exec("from adapters_kit import *", starred)
    assert set(starred) - {"__builtins__"} == set(adapters_kit.__all__)


@pytest.mark.parametrize("name", adapters_kit.__all__)
def test_every_public_name_is_there_and_lives_where_it_is_said_to(name):
    value = getattr(adapters_kit, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert callable(value)
    assert value.__name__.rpartition(".")[2] == name, "the public name is the name in the code"
    assert (getattr(value, "__module__", None) or value.__name__).partition(".")[0] == "adapters_kit"
    assert value.__doc__, f"{name} has no docstring"


def for_type_checkers() -> dict[str, str]:
    """Public name -> module, as the `TYPE_CHECKING` block of the root has them."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in imports for alias in node.names}


def test_editors_see_the_public_names():
    assert for_type_checkers() == adapters_kit._HOME


def test_importing_every_module_hides_no_public_name():
    """Python binds an imported submodule to its package: `compare` the module could take the place of the function."""
    for module in pkgutil.walk_packages(adapters_kit.__path__, "adapters_kit."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            if missing.name != "gradio":  # the extra of ui/page.py
                raise
    assert not [name for name in adapters_kit._HOME if not callable(getattr(adapters_kit, name))]


def test_a_name_that_is_not_public_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match=r"no 'wrpa'.*wrap"):
        _ = adapters_kit.wrpa
