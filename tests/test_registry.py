"""Names, and methods that other packages add through the entry-point group."""

import subprocess
import sys

import pytest

from adapters_kit import registry
from adapters_kit.errors import UnknownNameError, did_you_mean, nearest

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny-method"
version = "1.0"
[project.entry-points."adapters_kit.methods"]
only-values = "tiny_method:ONLY_VALUES"
broken = "tiny_method:NOT_A_METHOD"
[tool.setuptools]
py-modules = ["tiny_method"]
""",
    "tiny_method.py": """
from adapters_kit.registry import Method
ONLY_VALUES = Method(
    name="only-values", config="peft:LoraConfig", trains="the value projections", paper="none", mergeable=True,
    defaults={"r": 2, "target_modules": ["v_proj"]},
)
NOT_A_METHOD = 3
""",
}

USE = """
import sys
sys.path[:0] = sys.argv[1:]
import pytest, tiny
import adapters_kit as ak
model = ak.wrap(tiny.build("llama"), "only-values")
print(sorted({name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}))
with pytest.raises(ak.AdapterError, match=r"'broken'.*3, not to an adapters_kit.registry.Method"):
    ak.wrap(tiny.build("llama"), "broken")
"""


def test_a_third_party_method_is_installed_and_used(tmp_path, request):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name, text in PACKAGE.items():
        (source / name).write_text(text)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True)
    command = [sys.executable, "-c", USE, str(site), str(request.config.rootpath / "tests")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['v_proj']"


def test_names_are_found_in_any_spelling_and_close_ones_offered():
    assert registry.canonical("P_Tuning") == "p-tuning"
    assert registry.get("lora").name == "lora"
    with pytest.raises(UnknownNameError, match=r"'lorra'.*Did you mean lora"):
        registry.get("lorra")


def test_names_from_peft_source_equal_peft_itself():
    from peft import PeftType

    ours = {"bottleneck", "prefix", "combined"}
    assert set(registry.peft_names()) == {registry.canonical(member.value) for member in PeftType} - ours


def test_did_you_mean():
    assert nearest("lroa", ["lora", "dora", "prefix"]) == ["lora", "dora"]
    assert did_you_mean("lroa", ["lora", "dora", "prefix"]) == "Did you mean lora or dora?"
    assert did_you_mean("zzz", ["lora", "dora"]) == "There are: dora, lora."
    assert did_you_mean("zzz", []) == "None exist here."
