"""The chunked loss is transformers' loss, without the logits."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

import adapters_kit as ak
from adapters_kit.kernels import cross_entropy
from adapters_kit.kernels.cross_entropy import ChunkedHead, LazyLogits, linear_cross_entropy, plain_loss
from adapters_kit.kernels.fuse import fuse
from tests.support import tiny
from tests.support.fused import gradients, lora, relative


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that tiny inputs need several chunks, the last one ragged."""
    monkeypatch.setattr(cross_entropy, "_CPU_LOGITS", 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0, 7, 50])
def test_value_and_gradient_to_float64_precision(smoothing, bias, cap, ignored):
    torch.manual_seed(0)
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight, shift = torch.randn(31, 12, dtype=torch.float64), torch.randn(31, dtype=torch.float64) if bias else None
    labels = torch.randint(0, 31, (50,))
    labels[torch.randperm(50)[:ignored]] = -100
    steps = () if cap is None else (("mul", 0.7), ("mul", 1 / cap), ("tanh", 0.0), ("mul", cap))
    loss = linear_cross_entropy(hidden, weight, labels, shift, steps=steps, label_smoothing=smoothing)
    logits = F.linear(hidden, weight, shift)
    if cap is not None:
        logits = cap * torch.tanh(logits * 0.7 / cap)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss * 3, hidden)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected * 3, hidden)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bit_is_that_of_plain_logits(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(64, 48).to(dtype).requires_grad_()
    weight, labels = (torch.randn(200, 48) / 5).to(dtype), torch.randint(0, 200, (64,))
    truth_x = hidden.detach().double().requires_grad_()
    truth = F.cross_entropy(truth_x @ weight.double().t(), labels, reduction="sum")
    plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, labels)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 1.1 * abs(plain - truth) + 1e-3
    expected, theirs = torch.autograd.grad(truth, truth_x)[0], torch.autograd.grad(plain, hidden)[0]
    found = torch.autograd.grad(ours, hidden)[0]
    assert found.dtype == dtype and relative(found, expected) <= 1.1 * relative(theirs, expected)


def losses_agree(plain, chunked, batch, **kwargs):
    found = []
    for model in (plain, chunked):
        output = model(**batch, **kwargs)
        output.loss.backward()
        found.append((output, gradients(model)))
    assert isinstance(found[1][0].logits, LazyLogits)
    torch.testing.assert_close(found[1][0].loss, found[0][0].loss, rtol=1e-5, atol=1e-6)
    assert found[0][1]
    for name, grad in found[0][1].items():
        assert (grad is None) == (found[1][1][name] is None)
        assert grad is None or relative(found[1][1][name], grad) < 1e-4, name
    return found


@pytest.mark.parametrize("name", tiny.names("decoder"))
def test_families(name):
    """Scales and caps (Gemma, Cohere, Granite) included, from the models' own code."""
    if name == "mamba":
        pytest.skip("peft refuses to adapt Mamba's linears")
    plain = lora(tiny.build(name), lora_dropout=0.0).train()
    chunked = copy.deepcopy(plain)
    report = ak.chunked_loss(chunked)
    assert report.chunked, report.reason
    batch = tiny.inputs(plain, labels=True)
    batch["labels"][0, :3] = -100
    losses_agree(plain, chunked, batch)


def both(**options):
    plain = lora(tiny.build("llama"), **options).train()
    chunked = copy.deepcopy(plain)
    assert ak.chunked_loss(chunked).chunked
    return plain, chunked, tiny.inputs(plain, labels=True)


def test_normalised_by_the_tokens_of_all_micro_batches():
    plain, chunked, batch = both()
    losses_agree(plain, chunked, batch, num_items_in_batch=torch.tensor(37))
    losses_agree(plain, chunked, batch, num_items_in_batch=37)


def test_label_smoothing_is_the_trainers():
    plain, chunked, batch = both()
    ak.chunked_loss(chunked, label_smoothing=0.2)
    expected = LabelSmoother(0.2)(plain(**batch), batch["labels"], shift_labels=True)
    torch.testing.assert_close(chunked(**batch).loss, expected, rtol=1e-5, atol=1e-6)
    chunked.eval(), plain.eval()  # evaluation does not smooth
    torch.testing.assert_close(chunked(**batch).loss, plain(**batch).loss)


def test_logits_that_are_asked_for_are_the_models():
    plain, chunked, batch = both()
    expected, lazy = plain(**batch).logits, chunked(**batch).logits
    assert lazy.shape == expected.shape and lazy.dtype == expected.dtype and lazy.device == expected.device
    assert len(lazy) == len(expected)
    torch.testing.assert_close(lazy[:, -1], expected[:, -1])
    torch.testing.assert_close(torch.softmax(lazy, -1), torch.softmax(expected, -1))
    torch.testing.assert_close(lazy.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close((lazy / 2).float().make(), expected / 2)
    torch.testing.assert_close(lazy * torch.ones(1), expected)
    torch.testing.assert_close(lazy + 1, expected + 1)
    torch.testing.assert_close(1 - lazy / 2, 1 - expected / 2)
    torch.testing.assert_close(torch.stack([lazy, lazy + lazy]), torch.stack([expected, expected * 2]))
    assert torch.equal(lazy > 0, expected > 0) and len(list(lazy)) == len(expected)
    lazy[..., 0].sum().backward()
    assert any(grad is not None and grad.norm() > 0 for grad in gradients(chunked).values())


def test_evaluation_generation_and_no_labels_are_untouched():
    plain, chunked, batch = both()
    labels = batch.pop("labels")
    assert isinstance(chunked(**batch).logits, torch.Tensor)
    with torch.no_grad():
        assert isinstance(chunked(**batch, labels=labels).logits, torch.Tensor)
    plain.eval(), chunked.eval()
    assert isinstance(chunked(**batch, labels=labels).logits, torch.Tensor)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(chunked.generate(**batch, **options), plain.generate(**batch, **options))


def test_heads_that_are_not_covered_are_named():
    adapted = lora(tiny.build("llama"), target_modules=["q_proj", "lm_head"])
    assert "adapted" in ak.chunked_loss(adapted).reason
    saved = lora(tiny.build("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not ak.chunked_loss(saved).chunked
    assert "trained" in ak.chunked_loss(tiny.build("llama")).reason
    tied = lora(tiny.build("llama", tie_word_embeddings=True), target_modules=["q_proj"])
    tied.get_input_embeddings().weight.requires_grad_()
    assert "tied" in str(ak.chunked_loss(tied))
    hooked = lora(tiny.build("llama"), target_modules=["q_proj"])
    hooked.base_model.model.lm_head.register_forward_hook(lambda *args: None)
    assert "hooks" in ak.chunked_loss(hooked).reason
    assert not ak.chunked_loss(lora(tiny.build("bert"))).chunked
    assert not ak.chunked_loss(lora(tiny.build("bart"))).chunked
    other = lora(tiny.build("llama"), target_modules=["q_proj"])
    other.base_model.model.loss_function = lambda *args, **kwargs: 0
    assert "loss" in ak.chunked_loss(other).reason


def test_a_head_that_is_trained_later_gets_its_gradient():
    plain, chunked, batch = both()
    for model in (plain, chunked):
        model.base_model.model.lm_head.weight.requires_grad_()
        model(**batch).loss.backward()
    torch.testing.assert_close(
        chunked.base_model.model.lm_head.weight.grad, plain.base_model.model.lm_head.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_a_head_that_is_adapted_later_is_used():
    plain, chunked, batch = both(target_modules=["q_proj"])
    from peft import LoraConfig

    for model in (plain, chunked):
        torch.manual_seed(0)
        model.add_adapter("more", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.set_adapter("more")
        model(**batch).loss.backward()
    theirs, ours = gradients(plain), gradients(chunked)
    trained = [name for name, grad in theirs.items() if grad is not None]
    assert len(trained) == 2
    for name in trained:
        assert relative(ours[name], theirs[name]) < 1e-5


def test_an_error_in_the_forward_leaves_nothing_behind():
    _, chunked, batch = both()
    with pytest.raises(Exception):  # noqa: B017 - whatever the embedding raises
        chunked(input_ids=batch["input_ids"] + 10**6, labels=batch["labels"])
    chunked.eval()
    assert isinstance(chunked(**batch).logits, torch.Tensor)
    assert isinstance(chunked.base_model.model.lm_head(torch.zeros(1, 1, chunked.config.hidden_size)), torch.Tensor)


def test_second_derivatives_are_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_nothing_of_vocabulary_size_is_kept():
    chunked = lora(tiny.build("llama", vocab_size=211)).train()
    assert ak.chunked_loss(chunked).chunked
    batch, vocabulary = tiny.inputs(chunked, labels=True), 211
    sizes = []
    own = {p.data_ptr() for p in chunked.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked(**batch).loss.backward()
    assert sizes and not [shape for shape in sizes if shape and shape[-1] == vocabulary]


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_fused_layers_checkpointing_and_autocast(reentrant):
    plain, chunked, batch = both(lora_dropout=0.0)
    fuse(chunked)
    for model in (plain, chunked):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    losses_agree(plain, chunked, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = plain(**batch).loss, chunked(**batch).loss
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compiled_without_graph_breaks():
    torch.compiler.reset()
    plain, chunked, batch = both()
    expected = plain(**batch).loss
    compiled = torch.compile(chunked.base_model.model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for name, grad in gradients(plain).items():
        assert relative(gradients(chunked)[name], grad) < 1e-4, name


def test_copies_pickles_and_undo():
    plain, chunked, batch = both()
    assert plain.state_dict().keys() == chunked.state_dict().keys()
    for other in (copy.deepcopy(chunked), pickle.loads(pickle.dumps(chunked))):
        output = other(**batch)
        assert isinstance(output.logits, LazyLogits)
        torch.testing.assert_close(output.loss, plain(**batch).loss)
    assert ak.chunked_loss(chunked).chunked  # again
    assert len(chunked.base_model.model._forward_hooks) == 1
    plain_loss(chunked)
    plain_loss(chunked)
    base = chunked.base_model.model
    assert type(base.lm_head) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks
    assert isinstance(chunked(**batch).logits, torch.Tensor)
    assert not any(isinstance(module, ChunkedHead) for module in chunked.modules())
