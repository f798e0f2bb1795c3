"""Accelerators have one file; what a run does on one is decided there, and tried here with answers put in its mouth."""

import ast
import gc
import weakref
from pathlib import Path

import pytest
import torch

import adapters_kit as ak
from adapters_kit import devices
from adapters_kit.comparison import worker
from adapters_kit.errors import RecipeError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training import out_of_memory
from adapters_kit.training.callbacks import token_count
from adapters_kit.training.resolve import resolve
from tests.support import tiny
from tests.support.fused import live

PACKAGE = Path(ak.__file__).parent
KINDS = {"cuda", "xpu", "mps", "is_cuda", "is_xpu", "is_mps"}


def recipe(**training):
    fields = {"model": "x", "task": "text-classification", "data": "y", "method": "lora"}
    return Recipe(**fields, training=training)


@pytest.fixture
def card(monkeypatch):
    """`card(bf16=True, count=1)`: a machine that says it has such a card, which nothing is put on."""

    def has(bf16: bool = True, count: int = 1) -> None:
        monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(devices, "has_bf16", lambda: bf16)
        monkeypatch.setattr(devices, "count", lambda: count)
        monkeypatch.setattr(devices, "names", lambda: ["Tesla T4"] * count)

    return has


def named_kinds(source: str) -> list[int]:
    """Lines of code that name a kind of device; prose (docstrings, comments, messages) may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            word = node.attr if isinstance(node, ast.Attribute) else node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value.partition(":")[0]
        else:
            continue
        if word in KINDS:
            found.append(node.lineno)
    return found


def test_only_one_file_names_kinds_of_devices():
    assert named_kinds('x = "cuda:0"') and named_kinds("torch.mps.f()") and not named_kinds('x = "needs CUDA"')
    files = {path.relative_to(PACKAGE): named_kinds(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert files.pop(Path("devices.py"))
    assert not {str(path): lines for path, lines in files.items() if lines}


def test_on_a_machine_without_an_accelerator_everything_has_an_answer():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    assert devices.best() == torch.device("cpu") and devices.count() == 0
    assert devices.names() == devices.memory() == []
    assert devices.free_memory() is devices.peak_memory() is None
    assert not (devices.has_bf16() or devices.pins() or devices.quantizes_at_start())
    devices.forget_peak(), devices.empty_cache(), devices.synchronize()
    torch.manual_seed(3)
    state = devices.random_state()
    drawn = torch.rand(2)
    devices.set_random_state(state)
    assert torch.equal(torch.rand(2), drawn)
    with devices.quick_float32(True):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("quantize", "bf16", "expected"), [(None, True, "bf16"), (None, False, "fp16"), ("nf4", False, "fp16")]
)
def test_auto_precision_on_a_card(card, quantize, bf16, expected):
    """Turing and older say that they support bf16, which they imitate."""
    card(bf16=bf16)
    assert resolve(recipe().changed(quantize=quantize)).training.precision == expected
    if not bf16:
        with pytest.raises(RecipeError, match=r"Tesla T4 has no bf16\. Set it to fp16 or fp32"):
            resolve(recipe(precision="bf16"))


def test_several_cards_without_a_launcher_are_told_the_command(card, monkeypatch):
    card(count=2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RecipeError, match=r"2 GPUs.*launch --num_processes 2 -m.*CUDA_VISIBLE_DEVICES=0"):
        resolve(recipe())
    assert resolve(recipe(), trains=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve(recipe())


def test_float32_products_are_quick_on_a_card_and_exact_again_afterwards(card):
    card()
    with devices.quick_float32(True):
        assert torch.get_float32_matmul_precision() == "high"
    with devices.quick_float32(False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


class Scores:
    """A task that counts rows, with room for so many at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def run(self, model, features, rows):
        self.tried.append(rows)
        if rows > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return list(features)


def test_an_evaluation_goes_on_with_fewer_rows_where_the_recipe_lets_it():
    task, told = Scores(room=3), []
    given = recipe(batch_size=8, auto_batch=True)
    found, after = out_of_memory.evaluated(task, torch.nn.Linear(1, 1), [1, 2], given, told.append)
    assert found == [1, 2] and task.tried == [16, 8, 4, 2]
    assert after.training.eval_batch_size == 2 and after.training.batch_size == 8
    assert told[-1] == "out of memory: evaluating 2 rows at a time"
    with pytest.raises(TrainingError, match=r"evaluating 32 rows.*Lower training\.eval_batch_size.*auto_batch"):
        out_of_memory.evaluated(Scores(room=3), torch.nn.Linear(1, 1), [], recipe(), told.append)
    with pytest.raises(TrainingError, match=r"one row\. Lower training\.max_length .*, or set quantize: nf4\."):
        out_of_memory.evaluated(Scores(room=0), torch.nn.Linear(1, 1), [], given, told.append)


def test_beginning_again_lets_go_of_the_step_that_did_not_end():
    model = live(ak.wrap(tiny.build("llama"), "lora", r=4)).train()
    batch = tiny.inputs(model, batch=2, length=8, labels=True)
    group = [m for m in model.modules() if "_fused_siblings" in m.__dict__][-1].__dict__["_fused_siblings"]
    handle = group.members[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    kept = weakref.ref(next(iter(group.waiting.outputs.values()))[1])
    gc.collect()
    assert kept() is not None, "otherwise this shows nothing"
    out_of_memory.restart(model, {})
    assert kept() is None


def test_tokens_are_counted_on_the_cpu_without_padding():
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert token_count({"input_ids": ids}) == 10
    assert token_count({"input_ids": ids, "attention_mask": mask}) == 8
    places = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    assert token_count({"input_ids": ids, "position_ids": places}) == 7, "two examples, one, and padding"
    assert token_count({"pixel_values": torch.zeros(3, 3, 4, 4)}) == 3


def test_cells_do_not_fork_where_torch_is_built_for_a_card(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(devices, "may_have_one", lambda: True)
    monkeypatch.setattr(worker.os, "fork", lambda: pytest.fail("forked"))
    monkeypatch.setattr(worker.subprocess, "run", lambda command, **given: started.append(given["input"]))
    monkeypatch.setattr(worker.system, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker.sys, "stdin", iter(["{}\n"]))
    worker.serve()
    assert started == ["{}\n"]
