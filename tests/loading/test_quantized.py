"""quantize=: what is quantized, training after evaluation, saving, refusals, QLoRA on a real model."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import adapters_kit as ak
from adapters_kit import quantization
from adapters_kit.anatomy import block_linears, expert_parameters, routers
from adapters_kit.errors import ModelError
from adapters_kit.loading.lazy import read_lazily
from adapters_kit.wrapping import build_config
from tests.support import small, tiny
from tests.support.quantized import CLASSES, cosine, dequantized, fill
from tests.support.quantized import paths as quantized_paths

pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "fp4", "int8")
TASKS = {
    "decoder": "causal-lm",
    "encoder": "text-classification",
    "encoder-decoder": "seq2seq",
    "vision": "image-classification",
}
FAMILIES = (
    "llama",
    "gpt2",
    "qwen3",
    "gemma2",
    "mixtral",
    "qwen3-moe",
    "bert",
    "deberta-v2",
    "modernbert",
    "t5",
    "vit",
)


def task_of(name: str) -> str:
    return TASKS[tiny.FAMILIES[name].kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_linears_of_the_blocks(name, kind):
    plain = tiny.build(name)
    model = ak.load(small.model(name), task_of(name), quantize=kind)
    kept = set(model._keep_in_fp32_modules or ())  # transformers never quantizes these (T5's `wo`)
    linears = {path for path in block_linears(plain) if type(plain.get_submodule(path)) in (nn.Linear, Conv1D)}
    wanted = {path for path in linears if not kept & set(path.split("."))}
    assert quantized_paths(model) == wanted - set(routers(plain)) and wanted
    assert {type(model.get_submodule(path)).__name__ for path in wanted} == {CLASSES[kind]}
    # Head, embeddings, norms, routers: in the compute dtype, none left in fp32.
    rest = {path: entry.dtype for path, entry in model.named_parameters() if path.rpartition(".")[0] not in wanted}
    assert {dtype for path, dtype in rest.items() if not kept & set(path.split("."))} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(model(**tiny.inputs(model)).logits).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_skip(kind):
    folder = small.model("llama")
    model = ak.load(folder, quantize=kind, skip=["down_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp"])
    left = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {
        "lm_head",
        *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    }


def test_fused_experts_stay_and_are_told_of(caplog):
    model = ak.load(small.model("mixtral"), quantize="int8")
    experts = expert_parameters(model)
    kept = sum(model.get_parameter(path).nbytes for path in experts)
    (said,) = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert f"{kept / 1e6:.1f} MB in {len(experts)} fused tensors such as {experts[0]}" in said
    assert "quantize='int8'" in said and "bfloat16" in said and "device_map='auto'" in said
    caplog.clear()
    ak.load(small.model("llama"), quantize="int8")
    assert "experts" not in caplog.text


def test_fp32_compute_and_norms(caplog):
    model = ak.load(small.model("llama"), quantize="nf4", dtype="fp32")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32 == model.lm_head.weight.dtype
    model = ak.load(small.model("llama"), quantize="nf4", norms_fp32=True, compute_dtype="fp16")
    assert "take 0.00 MB more" in caplog.text  # four norms of 64 weights, 2 bytes more each
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.compute_dtype == torch.float16 and layer.input_layernorm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_the_rounded_ones(kind, double):
    """Against rounding done here: the nearest code of each block of 64, scaled by its largest weight."""
    from bitsandbytes.functional import get_4bit_type

    model = ak.load(small.model("llama"), quantize=kind, double_quant=double, dtype="fp32")
    original = tiny.build("llama")
    got = dequantized(model)
    codes = get_4bit_type(kind, device="cpu")
    for path in block_linears(original):
        blocks = original.get_submodule(path).weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        expected = codes[(blocks / scale).unsqueeze(-1).sub(codes).abs().argmin(-1)] * scale
        error = got.get_submodule(path).weight.reshape(-1, 64) - expected
        # Double quantization moves the scales by less than a percent of the largest.
        assert error.abs().max() <= (0.02 if double else 1e-5) * scale.max(), path


def journey(model, reference, batches, put=ak.wrap):
    """evaluate, train, evaluate, merge: the same on a quantized model and on its dequantized fp32 twin.

    `put(model, "lora", ...)` puts the adapter on the quantized one. Returns gradient cosine, and largest differences of
    evaluated and of merged logits over the largest logit.
    """
    first, second = batches
    pair = []
    for entry, method in ((model, put), (reference, ak.wrap)):
        torch.manual_seed(0)
        pair.append(method(entry, "lora", r=4, lora_alpha=8))
    for wrapped in pair:
        wrapped.eval()
        with torch.no_grad():
            wrapped(**first)
        fill(wrapped)
    gradients = []
    for wrapped in pair:
        wrapped.train()
        wrapped(**first).loss.backward()
        gradients.append([entry.grad for entry in wrapped.parameters() if entry.requires_grad])
    agreement = cosine(*gradients)
    for wrapped, gradient in zip(pair, [gradients[1]] * 2, strict=True):
        with torch.no_grad():
            for entry, step in zip([e for e in wrapped.parameters() if e.requires_grad], gradient, strict=True):
                entry -= 0.1 * step
            wrapped.eval()
    with torch.no_grad():
        evaluated = [wrapped(**second).logits.float() for wrapped in pair]
        merged = [_merged(pair[0]), pair[1].merge_and_unload()]
        finally_ = [entry.eval()(**second).logits for entry in merged]
    return (
        agreement,
        float((evaluated[0] - evaluated[1]).abs().max() / evaluated[1].abs().max()),
        float((finally_[0] - finally_[1]).abs().max() / finally_[1].abs().max()),
    )


def _merged(wrapped: PeftModel) -> nn.Module:
    """The dequantized base with the update added in fp32: merging into the weights that were trained on."""
    updates = {
        path.removeprefix("base_model.model."): module.get_delta_weight("default").float()
        for path, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }
    base = dequantized(wrapped.unload())
    for path, update in updates.items():
        base.get_submodule(path).weight.data += update
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_train_evaluate_merge(kind):
    load = lambda: ak.load(small.model("llama"), quantize=kind, dtype="fp32")  # noqa: E731
    model, reference = load(), dequantized(load())
    batches = [tiny.inputs(model, labels=True, seed=seed) for seed in (0, 1)]
    agreement, evaluated, merged = journey(model, reference, batches)
    assert agreement > 0.9999
    # int8 rounds activations too, in evaluation.
    assert evaluated < (0.1 if kind == "int8" else 1e-4)
    assert merged < 1e-4


def by_plain_transformers(folder: Path) -> nn.Module:
    """The llama in nf4 as transformers loads it: bitsandbytes chooses the layout."""
    how = quantization.bnb_config("nf4", compute_dtype=torch.float32, skip=["lm_head"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


def by_plain_peft(model: nn.Module, method: str, **options) -> PeftModel:
    """What `wrap` would put on, without what `wrap` does to 4-bit layers."""
    return get_peft_model(model, build_config(model, method, **options))


def test_without_the_fix_the_same_journey_goes_wrong():
    """Shows that the test above would notice; and wrap() alone puts it right, for whoever did not use load()."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-bf16 only")
    plain = lambda: by_plain_transformers(small.model("llama"))  # noqa: E731
    reference = lambda: dequantized(ak.load(small.model("llama"), quantize="nf4", dtype="fp32"))  # noqa: E731
    batches = [tiny.inputs(plain(), labels=True, seed=seed) for seed in (0, 1)]
    try:
        agreement, _, merged = journey(plain(), reference(), batches, by_plain_peft)
    except RuntimeError:
        pass
    else:
        assert agreement < 0.9 or merged > 0.1
    agreement, evaluated, merged = journey(plain(), reference(), batches)
    assert agreement > 0.9999 and evaluated < 1e-4 and merged < 1e-4


def test_a_model_that_was_repacked_elsewhere_is_put_right(caplog):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-bf16 only")
    model = by_plain_transformers(small.model("llama"))
    expected = ak.load(small.model("llama"), quantize="nf4", dtype="fp32")
    count, expected = len(quantized_paths(expected)), dequantized(expected)
    with torch.no_grad():
        model(**tiny.inputs(model))
    wrapped = ak.wrap(model, "lora", r=2)
    assert f"{count} 4-bit layers had been repacked" in caplog.text
    assert quantization.keep_layout(wrapped) == 0
    again = dequantized(wrapped.unload())
    for path in block_linears(expected):
        want = expected.get_submodule(path).weight
        assert (again.get_submodule(path).weight - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3-moe"])
def test_saved_and_loaded_twice(name, kind, tmp_path):
    model = ak.load(small.model(name), task_of(name), quantize=kind)
    batch = tiny.inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = ak.load(folder, task_of(name))
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)
    assert quantized_paths(model) == quantized_paths(ak.load(small.model(name), task_of(name), quantize=kind))
    assert ak.load(folder, task_of(name), quantize=kind).config.quantization_config is not None
    other = "int8" if kind != "int8" else "nf4"
    with pytest.raises(ModelError, match=f"already quantized \\({kind}\\).*{other}"):
        ak.load(folder, task_of(name), quantize=other)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_new_head_on_a_quantized_checkpoint_is_not_quantized(kind, tmp_path):
    ak.load(small.model("llama"), quantize=kind).save_pretrained(tmp_path)
    model = ak.load(tmp_path, "text-classification", labels=["a", "b"])
    assert type(model.score) is nn.Linear and model.score.weight.is_floating_point()
    assert len(quantized_paths(model)) == 14 and model.fresh_modules == ["score"]
    wrapped = ak.wrap(model, "lora", r=2)
    wrapped(**tiny.inputs(model, labels=True)).loss.backward()
    assert any("score" in path and entry.grad is not None for path, entry in wrapped.named_parameters())


def test_an_adapter_of_the_quantized_model_loads_by_plain_peft(tmp_path):
    base = tmp_path / "base"
    ak.load(small.model("llama"), quantize="nf4", dtype="fp32").save_pretrained(base)
    wrapped = ak.wrap(ak.load(base), "lora", r=2)
    fill(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    batch = tiny.inputs(wrapped)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    quantization.keep_layout(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, wrapped(**batch).logits)


def test_reading_tensor_by_tensor(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with read_lazily(sorted(map(str, tmp_path.glob("*.safetensors")))) as state:
        for key, value in model.state_dict().items():
            assert torch.equal(state[key][...], value) and state[key].get_shape() == list(value.shape)
    shutil.copy(small.model("llama") / "tokenizer.json", tmp_path)
    sharded, whole = (ak.load(path, quantize="nf4") for path in (tmp_path, small.model("llama")))
    for (path, one), (_, other) in zip(sharded.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(one, other), path
    assert sharded.name_or_path == str(tmp_path) and sharded.generation_config.eos_token_id is not None
