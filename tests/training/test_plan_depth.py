"""A plan runs the blocks that differ, and says what a run of all of them would have said."""

import pytest
import torch

import adapters_kit as ak
from adapters_kit.anatomy import blocks
from adapters_kit.anatomy.depth import shortened
from adapters_kit.errors import RecipeError
from adapters_kit.kernels.fuse import fuse
from adapters_kit.training.memory import kept_by_shapes
from tests.support import tiny

DEEP = {
    "bert": {"num_hidden_layers": 5},
    "deberta-v2": {"num_hidden_layers": 5},
    "modernbert": {"num_hidden_layers": 6, "global_attn_every_n_layers": 3},
    "gpt2": {"n_layer": 5},
    "gpt-neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "llama": {"num_hidden_layers": 5},
    "gemma3": {"num_hidden_layers": 9, "sliding_window_pattern": 3, "layer_types": None},
    "qwen3-moe": {"num_hidden_layers": 5},
    "deepseek-v3": {"num_hidden_layers": 6, "first_k_dense_replace": 2},
    "t5": {"num_layers": 5, "num_decoder_layers": 4},
    "bart": {"encoder_layers": 4, "decoder_layers": 6},
    "vit": {"num_hidden_layers": 5},
}


def on_meta(family: str, **options):
    """The family, deep, on the meta device."""
    with torch.device("meta"):
        return tiny.build(family, **options)


# Which blocks differ is the family's matter; the other methods take turns.
CASES = [(family, "lora") for family in DEEP]
CASES += [(family, ("houlsby", "ia3")[turn % 2]) for turn, family in enumerate(list(DEEP)[::2])]
CASES += [(family, "prefix") for family in ("llama", "gemma3", "t5", "bart")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_short_run_counts_what_a_whole_one_does(family, method):
    model = ak.wrap(on_meta(family, **DEEP[family]).to(torch.bfloat16), method, fuse=False).train()
    batch = tiny.inputs(tiny.build(family), batch=2, length=16, labels=True)
    depth = len(blocks(model))
    with shortened(model) as stands_for:
        assert sum(stands_for.values()) == depth and len(blocks(model)) == len(stands_for) < depth
        if method == "lora":
            fuse(model)
        found = kept_by_shapes(model, batch, torch.bfloat16)
        found.stands_for = stands_for
    assert len(blocks(model)) == depth
    if method == "lora":
        fuse(model)
    whole = kept_by_shapes(model, batch, torch.bfloat16)
    assert (found.total, found.checkpointed, found.largest) == (whole.total, whole.checkpointed, whole.largest)


@pytest.fixture
def config(tmp_path):
    """A folder with a config.json and nothing else."""
    tiny.build("llama", num_hidden_layers=7, max_position_embeddings=4096).config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_config_and_a_length_are_enough(config, quantize, monkeypatch):
    asked = {"model": config, "task": "causal-lm", "quantize": quantize, "training": {"batch_size": 2}}
    short = ak.plan(asked, "1GB", length=256)
    assert short.recipe.training.precision == "bf16", "as on a card"
    assert (short.batch_size, short.max_length, short.fits) == (2, 256, True)
    text = str(short)
    assert text.index("fits on a card") < text.index("memory of one step") < text.index("trains")
    assert "bf16" in text.splitlines()[0]
    monkeypatch.setattr("adapters_kit.anatomy.depth._prefix", len)  # nothing is cut
    whole = ak.plan(asked, "1GB", length=256)
    assert (short.memory, short.variants, short.groups) == (whole.memory, whole.variants, whole.groups)
    assert (short.largest_batch, short.longest) == (whole.largest_batch, whole.longest)


@pytest.mark.slow
def test_a_model_that_cannot_be_cut_is_run_whole(config, monkeypatch):
    asked = {"model": config, "task": "causal-lm", "training": {"batch_size": 2}}
    expected = ak.plan(asked, length=64)
    from transformers.models.llama.modeling_llama import LlamaModel

    real = LlamaModel.forward

    def counting(self, *args, **kwargs):
        self.layers[self.config.num_hidden_layers - 1]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counting)
    assert ak.plan(asked, length=64).memory == expected.memory


@pytest.mark.slow
def test_advice_is_worked_out(config):
    asked = {"model": config, "task": "causal-lm", "training": {"batch_size": 64, "precision": "fp32"}}
    roomy = ak.plan(asked, "24GB", length=1024)
    card = (3 << 28) + roomy.memory.total * 6 // 10
    tight = ak.plan(asked, card, length=1024)
    half = ak.plan({**asked, "training": {"batch_size": 64, "precision": "bf16"}}, card, length=1024)
    assert not tight.fits and 0 < tight.largest_batch < 64
    smaller = {**asked, "training": {"batch_size": tight.largest_batch, "precision": "fp32"}}
    assert f"training.batch_size: {tight.largest_batch} fits" in str(tight)
    assert ak.plan(smaller, card, length=1024).fits, "advice followed to the letter"
    assert any(text.startswith("training.precision: bf16") and ("fits" in text) == half.fits for text in tight.advice)
    with pytest.raises(RecipeError, match="takes 1 to 4096 tokens"):
        ak.plan(asked, length=5000)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering", "masked-lm"])
def test_every_task_from_a_length(task, tmp_path):
    tiny.build("bert", num_hidden_layers=4).config.save_pretrained(tmp_path)
    plan = ak.plan({"model": str(tmp_path), "task": task}, "8GB", length=32)
    assert plan.fits and plan.memory.activations > 0


def test_layer_norms_of_a_card_keep_float32():
    """CUDA's autocast makes norms in float32, a CPU's in bf16: BERT keeps more there, Llama as much."""
    for family, more in (("bert", True), ("llama", False)):
        model = ak.wrap(tiny.build(family).to(torch.bfloat16), "lora").train()
        batch = tiny.inputs(model, batch=2, length=16, labels=True)
        cpu, gpu = (kept_by_shapes(model, batch, torch.bfloat16, on_gpu=on).total for on in (False, True))
        assert (gpu > 1.05 * cpu) if more else (gpu == pytest.approx(cpu, rel=0.02))
