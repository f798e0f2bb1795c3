"""plan(): its bytes equal those of a real step, and it knows what fits."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import ModelError, RecipeError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.cross_entropy import chunk_bytes, is_chunked
from adapters_kit.loading import skeleton
from adapters_kit.recipe import Recipe
from adapters_kit.training.assembly import add_adapter, load_base
from adapters_kit.training.inputs import recipe_from
from adapters_kit.training.memory import kept_for_backward, step_bytes, storage_of
from adapters_kit.training.plan import parse_size
from adapters_kit.training.resolve import prepare, resolve
from tests.support import small, tiny

TASKS = {"encoder": "text-classification", "decoder": "causal-lm", "encoder-decoder": "seq2seq"}
FAMILIES = ["bert", "gpt2", "llama", "t5", "bart"]


@pytest.mark.parametrize(("dtype", "fuse"), [(torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_kept_for_backward_are_those_of_a_real_step(family, dtype, fuse):
    """Counted on fake tensors from the config, and on a real model with real tensors: the same to the byte."""
    model = ak.wrap(tiny.build(family).to(dtype), "lora", r=4, fuse=fuse).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    batch = tiny.inputs(model, batch=3, length=16, labels=True, padding="right")
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        real = kept_for_backward(model, batch)

    made = ak.wrap(skeleton(small.model(family), TASKS[tiny.FAMILIES[family].kind]).to(dtype), "lora", r=4, fuse=fuse)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    options = {"dtype": dtype, "checkpointing": False, "optimizer": "adamw", "quantize": None}
    memory, kept = step_bytes(made, batch, **options)
    # BART drops one more mask when it can look at the values.
    assert real.total <= kept.total <= real.total * (1.01 if family == "bart" else 1)
    assert memory.activations == kept.total
    assert kept.checkpointed < kept.total
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (memory.adapter, memory.gradients, memory.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}
    assert memory.weights == sum(held.values())


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in small.questions(64)]
    path = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    return Recipe(model=str(small.model("llama")), task="causal-lm", data=str(path), training={"batch_size": 4})


def test_counting_holds_nothing_afterwards():
    model = tiny.build("bert")
    seen = []
    model.bert.pooler.activation.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    kept_for_backward(model, tiny.inputs(model, labels=True))  # tanh keeps its own output
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


@pytest.mark.slow
def test_plan_says_what_is_trained_and_marks_the_answer(recipe):
    plan = ak.plan(recipe)
    model = ak.wrap(tiny.build("llama"), "lora")
    assert (plan.trainable, plan.total) == model.get_nb_trainable_parameters()
    assert sum(count for _, count in plan.groups.values()) == plan.trainable
    assert all("layers.*" in path for path in plan.groups)
    counted = [token for token, answer in plan.example if answer]
    assert len(counted) == 2
    assert counted[0] in small.PLACES
    assert counted[1] == "[EOS]"
    assert sum(count for *_, count in plan.lengths) == 58
    text = str(plan)
    assert "does NOT fit" not in text
    assert f"[{counted[0]}]" in text


@pytest.mark.slow
def test_what_fits_and_what_to_change(recipe):
    recipe = recipe.changed(**{"training.precision": "fp32"})  # a card's rules and a CPU's are the same then
    roomy = ak.plan(recipe, gpu="24GB")
    assert roomy.memory == ak.plan(recipe).memory
    assert roomy.fits
    assert roomy.longest == 64, "the model's own limit"
    assert roomy.largest_batch > 1000
    tight = ak.plan(recipe, gpu=ak.plan(recipe).memory.weights + (3 << 28) + 200_000)
    assert not tight.fits
    assert tight.largest_batch < roomy.largest_batch
    assert tight.advice
    assert "does NOT fit" in str(tight)
    at = recipe.changed(**{"training.batch_size": 1})
    card = ak.plan(at).memory.total * 3 // 2 + (3 << 28)
    most = ak.plan(at, gpu=card).largest_batch
    assert 2 < most < 58
    assert ak.plan(recipe.changed(**{"training.batch_size": most}), gpu=card).fits
    assert not ak.plan(recipe.changed(**{"training.batch_size": most + 1}), gpu=card).fits
    larger = recipe.changed(**{"training.batch_size": 32})
    assert ak.plan(larger).memory.activations > 4 * ak.plan(recipe).memory.activations


@pytest.mark.slow
def test_the_command(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert cli.main(["plan", str(tmp_path / "recipe.yaml"), "--gpu", "24GB", "--training.batch_size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "memory of one step, 2 x " in shown
    assert "fits on a card of 24.00 GiB" in shown
    for part in ("activations", "with cheap recomputing", "without chunked loss", "of the batches is padding"):
        assert part in shown


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_variants_are_the_bytes_of_a_real_step(recipe, precision):
    """Each switch of the recipe by itself: what the plan says for it, and what a real model keeps when trained so."""
    recipe = recipe.changed(**{"training.precision": precision})
    plan = ak.plan(recipe)
    switches = {
        "without fused layers": {"fuse": False},
        "without chunked loss": {"chunked_loss": False},
        "with cheap recomputing": {"recompute": "cheap"},
    }
    recipe = resolve(recipe)
    task, splits = prepare(recipe)
    base, _ = load_base(recipe, task)
    features = sorted(task.encode(splits.train), key=task.length)[-4:]
    batch = {name: tensor for name, tensor in task.collate(features).items() if name != "row"}
    kept = {}
    for name, changes in {"": {}, **switches}.items():
        given = recipe.changed(**{f"training.{key}": value for key, value in changes.items()})
        model = add_adapter(copy.deepcopy(base), given, steps=1).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            kept[name] = kept_for_backward(model, batch)
        if name:
            own = ak.plan(given)
            # The chunked loss keeps a row like the hidden states for each token that counts; a plan sees no labels.
            rows = 0 if "chunked" in name else batch["input_ids"].numel()
            unseen = rows * base.config.hidden_size * base.dtype.itemsize
            assert 0 <= own.memory.activations - kept[name].total <= unseen, name
            assert own.memory.total == plan.variants[name], "the switch turned alone, or in a recipe of its own"
            back = name.replace("without", "WITH").replace("with ", "without ").replace("WITH", "with")
            assert own.variants[back] == plan.memory.total
    assert kept["with cheap recomputing"].total < kept[""].total < kept["without chunked loss"].total
    if precision == "bf16":  # in fp32, without dropout, peft's layers keep no copy that the fused ones do not
        assert kept[""].total < kept["without fused layers"].total


@pytest.mark.slow
def test_quantized_weights_take_less(recipe):
    plain, quantized = ak.plan(recipe), ak.plan(recipe.changed(quantize="nf4"))
    assert quantized.memory.weights < 0.6 * plain.memory.weights


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 << 30), ("80", 80 << 30), ("512 MiB", 512 << 20), (24, 24 << 30), (1 << 33, 1 << 33)]
)
def test_amounts_of_memory(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "0", 0, -1, None])
def test_an_amount_that_is_none(text):
    with pytest.raises(RecipeError, match="write 24GB"):
        parse_size(text)


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, parameters and buffers left out, and the most there ever were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage, key = tensor.untyped_storage(), storage_of(tensor)
            if key not in self.own and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@pytest.mark.slow
@pytest.mark.parametrize("asset", ["minilm", "smollm2"])
def test_within_a_tenth_of_a_real_model(real, smollm2_blocks, asset):
    """Parameters, what a real step keeps for its backward pass, and its peak: on real text, in every variant."""
    task, dropout = ("causal-lm", 0.0) if asset == "smollm2" else ("text-classification", 0.1)
    data = {"train": str(real("reviews")), "limit": 64, "test_limit": 4}
    training = {"batch_size": 4, "max_length": 32}
    method = {"name": "lora", "lora_dropout": dropout}
    # Twelve of SmolLM2's thirty blocks; that depth only multiplies is test_plan_depth.py's.
    model = smollm2_blocks(12) if asset == "smollm2" else real(asset)
    recipe = Recipe(model=str(model), task=task, data=data, method=method, training=training)
    plan = ak.plan(recipe)
    recipe = resolve(recipe)
    kind, splits = prepare(recipe)
    base, _ = load_base(recipe, kind)
    features = sorted(kind.encode(splits.train), key=kind.length)[-4:]
    batch = {name: tensor for name, tensor in kind.collate(features).items() if name != "row"}
    cases = {"": {}, "with gradient checkpointing": {}, "without fused layers": {"training.fuse": False}}
    cases["with cheap recomputing"] = {"training.recompute": "cheap"}
    if task == "causal-lm":
        cases["without chunked loss"] = {"training.chunked_loss": False}
    for name, changes in cases.items():
        model = add_adapter(copy.deepcopy(base), recipe.changed(**changes), steps=1).train()
        held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        assert plan.memory.weights + plan.memory.adapter == pytest.approx(held, rel=0.01)
        if "checkpointing" in name:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Live(model) as live:
            loss = model(**batch).loss
            kept = live.now
            if not name:
                assert plan.memory.activations == pytest.approx(kept, rel=0.01)
            loss.backward()
        if is_chunked(model):  # one operation: what it holds for a moment is not seen from outside
            kept += chunk_bytes(batch["labels"].numel(), base.config.vocab_size, gpu=False)
        planned = plan.variants.get(name, plan.memory.total) - plan.memory.optimizer
        # Where recomputing makes a step small, scoring with its logits is what needs the most.
        assert planned == pytest.approx(held + max(live.peak, kept, plan.memory.evaluation), rel=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("lora", "Q4_1"), ("blocks", "Q4_1"), ("blocks", "Q4_K")])
def test_a_base_kept_in_its_blocks(method, kind, tmp_path):
    """The file's own bytes for the weights, and what a loaded model keeps for its backward pass."""
    pytest.importorskip("gguf")
    from tests.support.gguf_files import write

    file = tmp_path / "model.gguf"
    write("llama", file, kind, **({"hidden_size": 256, "intermediate_size": 256} if kind == "Q4_K" else {}))
    training = {"precision": "fp32", "batch_size": 2, "base_dropout": 0.0}
    options = {"task": "causal-lm", "quantize": "keep", "method": method, "training": training}
    recipe = recipe_from({"model": str(file), "data": "-", **options})
    planned = ak.plan(recipe, length=8)
    base = ak.load(file, quantize="keep", dtype="float32")
    model = add_adapter(base, resolve(recipe, trains=False), 10).train()
    ids = torch.zeros(2, 8, dtype=torch.long)
    kept = kept_for_backward(model, {"input_ids": ids, "labels": ids}).total
    frozen = [p for p in model.parameters() if not p.requires_grad]
    expected = sum(p.packed_bytes if isinstance(p, BlockTensor) else p.nbytes for p in frozen)
    assert sum(isinstance(p, BlockTensor) for p in frozen) >= 14
    assert expected <= planned.memory.weights <= expected + sum(b.nbytes for b in model.buffers())
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.memory.activations == pytest.approx(kept, rel=0.01)


def test_only_a_gguf_file_has_blocks_to_keep(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\.gguf"):
        ak.plan({"model": str(tmp_path), "task": "causal-lm", "quantize": "keep", "method": "lora"}, length=8)


def test_a_teacher_is_held_beside_the_student(tmp_path):
    given = {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "data": str(small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in small.sentiment(20)])),
    }
    alone = ak.plan(given)
    taught = ak.plan({**given, "objective": {"name": "distill", "teacher": given["model"]}})
    assert taught.memory.weights - alone.memory.weights == 4 * (alone.total - alone.trainable)


@pytest.mark.parametrize("method", ["houlsby", "parallel", ["lora", "houlsby"]])
def test_what_reads_beside_a_branch_is_refused_where_two_streams_run(tmp_path, method):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in small.sentiment(20)])
    given = {"model": str(small.model("xlnet")), "task": "permutation-lm", "data": str(rows), "method": method}
    with pytest.raises(ModelError, match=r"two streams run through XLNetLMHeadModel.*Take pfeiffer"):
        ak.plan(given)
