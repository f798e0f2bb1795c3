"""build_optimizer: every name trains, on the parameters it should, with the state it says it has."""

import pytest
import torch

import adapters_kit as ak
from adapters_kit.errors import AdapterError, MissingPackageError, UnknownNameError
from adapters_kit.training.memory import OPTIMIZERS, fixed_bytes, state_bytes
from adapters_kit.training.optimizers import build_optimizer
from adapters_kit.training.resolve import resolve
from tests.support import small, tiny

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def wrapped(method: str = "lora", **options):
    torch.manual_seed(0)
    return ak.wrap(tiny.build("llama"), method, **options)


def measured(optimizer) -> int:
    """Bytes of the state that grows with the parameters (the two 1 KB code tables of 8-bit states are shared)."""
    tensors = [
        (key, value)
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and "qmap" not in key
    ]
    return sum(value.numel() * value.element_size() for _, value in tensors)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_and_takes_the_memory_it_says(name):
    model = wrapped(r=64)  # tensors of 4096 and more elements, which 8-bit optimizers hold in 8 bits
    if name.endswith("8bit") or name.startswith("paged"):
        pytest.importorskip("bitsandbytes")
    optimizer = build_optimizer(model, name, 1e-3)
    batch = tiny.inputs(model, labels=True)
    before = {path: entry.detach().clone() for path, entry in model.named_parameters()}
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {path for path, entry in model.named_parameters() if not torch.equal(entry, before[path])}
    part = "lora_B" if name == "lora-fa" else "lora_"
    assert moved == {path for path in before if part in path}
    sizes = [entry.numel() for entry in model.parameters() if entry.requires_grad]
    assert measured(optimizer) == state_bytes(name, sizes, on_gpu=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_of_a_step_counts_each(name):
    """What `plan` adds up: the adapter with its gradients, and this optimizer's state on a GPU."""
    model = wrapped(r=64)
    sizes = {path: entry.numel() for path, entry in model.named_parameters() if entry.requires_grad}
    if name == "lora-fa":  # A is frozen: a weight among weights
        sizes = {path: size for path, size in sizes.items() if "lora_B" in path}
    counted = fixed_bytes(model, name, None, [])
    assert counted.adapter == counted.gradients == 4 * sum(sizes.values())
    assert counted.optimizer == state_bytes(name, sizes.values())
    everything = 4 * sum(entry.numel() for entry in (*model.parameters(), *model.buffers()))
    assert counted.weights + counted.adapter == everything


def test_plan_shows_the_optimizer(tmp_path):
    data = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in small.sentiment(16)])
    method = {"name": "lora", "r": 64, "target_modules": ["q_proj"]}  # 64 x 64 twice, in two blocks
    recipe = ak.Recipe(
        model=str(small.model("llama")),
        task="causal-lm",
        data=str(data),
        method=method,
        training={"optimizer": "adamw-8bit"},
    )
    planned = ak.plan(recipe).memory
    assert planned.adapter == 4 * 4 * 64 * 64 and planned.optimizer == state_bytes("adamw-8bit", [64 * 64] * 4)
    assert planned.optimizer < 0.3 * state_bytes("adamw", [64 * 64] * 4)


def test_lora_plus_rates():
    model = wrapped(r=4)
    optimizer = build_optimizer(model, "adamw", 1e-4, 0.1, lora_plus_ratio=8.0)
    names = {id(entry): path for path, entry in model.named_parameters()}
    rates = {
        names[id(entry)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for entry in group["params"]
    }
    assert {rate for path, rate in rates.items() if "lora_A" in path} == {(1e-4, 0.1)}
    assert {rate for path, rate in rates.items() if "lora_B" in path} == {(8e-4, 0.1)}
    assert len(rates) == sum(entry.requires_grad for entry in model.parameters())


def test_vectors_are_not_decayed():
    model = wrapped("dora", r=4)
    groups = build_optimizer(model, "adamw", 1e-4, 0.1).param_groups
    assert {(group["weight_decay"], entry.ndim < 2) for group in groups for entry in group["params"]} == {
        (0.1, False),
        (0.0, True),
    }


@pytest.mark.parametrize(("rate", "given", "expected"), [(1e-4, None, 1e-4), (3e-2, None, 6e-4), (3e-2, 2e-3, 2e-3)])
def test_a_task_head_has_a_rate_of_its_own(rate, given, expected):
    model = ak.wrap(tiny.build("bert"), "ia3")
    names = {id(entry): path for path, entry in model.named_parameters()}
    groups = build_optimizer(model, "adamw", rate, head_learning_rate=given).param_groups
    rates = {names[id(entry)]: group["lr"] for group in groups for entry in group["params"]}
    assert set(rates) == {path for path, entry in model.named_parameters() if entry.requires_grad}
    heads = {path for path in rates if "modules_to_save" in path}
    assert {path.split(".modules_to_save")[0].split(".")[-1] for path in heads} == {"classifier", "dense"}
    assert {rates[path] for path in heads} == {expected}
    assert {rate for path, rate in rates.items() if path not in heads} == {rate}
    assert groups[0]["lr"] == rate  # the rate that training shows


def test_keys_of_a_prefix_go_faster_than_its_values():
    model = ak.wrap(tiny.build("llama"), "prefix")
    names = {id(entry): path for path, entry in model.named_parameters()}
    groups = build_optimizer(model, "adamw", 1e-3).param_groups
    rates = {names[id(entry)].split(".")[-2]: group["lr"] for group in groups for entry in group["params"]}
    assert rates == {"prefix_key": 4e-3, "prefix_value": 1e-3}
    assert groups[0]["lr"] == 1e-3


def test_state_bytes_by_hand():
    assert state_bytes("adamw", [10, 5000]) == 8 * 5010
    assert state_bytes("adamw-8bit", [10, 5000]) == 8 * 10 + 2 * 5000 + 2 * 4 * 20
    assert state_bytes("paged-adamw", [10, 200_000]) == 80
    assert state_bytes("paged-adamw", [10, 200_000], on_gpu=False) == 8 * 200_010


def test_refusals(monkeypatch):
    with pytest.raises(UnknownNameError, match=r"'adamw-8bits'.*Did you mean adamw-8bit"):
        build_optimizer(wrapped(), "adamw-8bits")
    with pytest.raises(AdapterError, match=r"LoRA\+ needs a trainable LoRA adapter"):
        build_optimizer(wrapped("ia3"), "lora+")
    with pytest.raises(AdapterError, match="LoRA-FA needs a trainable LoRA adapter"):
        build_optimizer(wrapped("ia3"), "lora-fa")
    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        build_optimizer(wrapped("dora"), "lora-fa")
    with pytest.raises(AdapterError, match="leave lora_plus_ratio out"):
        build_optimizer(wrapped(), "lora-fa", lora_plus_ratio=4.0)
    frozen = wrapped()
    frozen.requires_grad_(False)
    with pytest.raises(AdapterError, match="no trainable parameters"):
        build_optimizer(frozen)
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingPackageError, match="optimizer adamw-8bit needs bitsandbytes: pip install"):
        build_optimizer(wrapped(), "adamw-8bit")


@pytest.mark.parametrize(
    ("task", "method", "rate"),
    [
        ("text-classification", "prefix", 3e-2),
        ("causal-lm", "prefix", 5e-3),
        ("text-classification", "lora", 6e-4),
        ("causal-lm", ["lora", "prefix"], 6e-4),
        ("text-classification", ["lora", "prefix"], 6e-4),
    ],
)
def test_a_method_brings_the_rate_that_suits_the_task(task, method, rate):
    recipe = ak.Recipe(model="m", task=task, data="d.csv", method=method)
    assert resolve(recipe).training.learning_rate == rate
    assert resolve(recipe.changed(**{"training.learning_rate": 1e-5})).training.learning_rate == 1e-5
