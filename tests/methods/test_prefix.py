"""Prefix tuning inside attention: right on every family that goes through transformers' attention interface."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from transformers.models.auto import modeling_auto as auto

import adapters_kit as ak
from adapters_kit.methods.prefix.holders import attention_modules
from adapters_kit.methods.prefix.model import prefix_layers
from tests.support import tiny

# Attention of their own, not through the interface; transformers 5.24 moves GPT-J onto it, and others may follow.
OWN = ["mpnet", "deberta", "deberta-v2", "xlnet", "gpt-neo", "gptj", "bloom", "falcon", "mpt", "mamba"]
OFF = [name for name in OWN if not attention_modules(tiny.build(name))]
ON = [name for name in tiny.NAMES if name not in OFF]
DECODERS = [name for name in tiny.names("decoder") if name in ON]
TEXT = [*[name for name in tiny.names("encoder") if name in ON], *DECODERS, *tiny.names("encoder-decoder")]
SEQ2SEQ = [*tiny.names("encoder-decoder"), "whisper"]
GENERATORS = [*DECODERS, *SEQ2SEQ]
EAGER_ONLY = ["gpt-oss", "gemma2"]  # sinks and soft-capping have no sdpa form in transformers
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def fill(model, adapter="default", seed=7, scale=0.7):
    """Give an adapter large random weights, so that a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".prefix_" in name and f".{adapter}" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def wrapped(name, *, attn=None, seed=7, model_class=None, **options):
    model = tiny.build(name, model_class=model_class)
    if attn:
        model.set_attn_implementation(attn)
    return fill(ak.wrap(model, "prefix", **{"num_virtual_tokens": 3, **options}), seed=seed).eval()


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def test_the_list_of_families_is_complete():
    found = [name for name in tiny.NAMES if attention_modules(tiny.build(name))]
    assert found == ON


@pytest.mark.parametrize("name", ON)
def test_trains_every_prefix_and_nothing_of_the_base(name):
    model = wrapped(name)
    model(**tiny.inputs(model, labels=True)).loss.backward()
    ours = {key: p for key, p in model.named_parameters() if ".prefix_" in key}
    assert ours and all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.values())
    others = [key for key, p in model.named_parameters() if p.grad is not None and key not in ours]
    assert all("modules_to_save" in key for key in others)


@pytest.mark.parametrize("name", ON)
def test_disabled_is_the_base_model_and_unload_gives_it_back(name):
    base = tiny.build(name)
    batch = tiny.inputs(base)
    before, implementation = logits(base, **batch), base.config._attn_implementation
    model = wrapped(name)
    assert (logits(model, **batch) - before).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **batch), before, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == implementation
    assert model.get_base_model().config.to_dict() == base.config.to_dict()
    bare = model.unload()
    torch.testing.assert_close(logits(bare, **batch), before, rtol=1e-5, atol=1e-5)
    assert not prefix_layers(bare)
    assert not any(hasattr(module.config, "_view_layer") for module in attention_modules(bare).values())


@pytest.mark.parametrize("name", [name for name in ON if name not in EAGER_ONLY])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_eager_equals_sdpa(name, padding):
    model = wrapped(name, attn="eager")
    if padding and model.get_base_model().main_input_name != "input_ids":
        pytest.skip("no padding in images and audio")
    batch = tiny.inputs(model, padding=padding, batch=3)
    eager = logits(model, **batch)
    model.get_base_model().set_attn_implementation("sdpa")
    sdpa = logits(model, **batch)
    if padding and eager.dim() == 3 and name in DECODERS:
        real = batch["attention_mask"].bool()
        eager, sdpa = eager[real], sdpa[real]
    torch.testing.assert_close(eager, sdpa, **CLOSE)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(name, padding):
    model = wrapped(name)
    batch = tiny.inputs(model, padding=padding, batch=3)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    takes_positions = name in DECODERS and name != "opt"
    if takes_positions:
        batch["position_ids"] = positions
    elif padding == "left" and name not in ("opt", "t5", "flan-t5"):
        pytest.skip("counts positions from the left edge")
    padded = logits(model, **batch)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = {key: value[row : row + 1] for key, value in batch.items() if key != "position_ids"}
        for key in ("input_ids", "attention_mask"):
            alone[key] = alone[key][:, real]
        expected = logits(model, **alone)[0]
        got = padded[row][real] if name in DECODERS else padded[row]
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_later_tokens_do_not_reach_earlier_ones(name):
    model = wrapped(name)
    batch = tiny.inputs(model)
    first = logits(model, **batch)
    changed = batch["input_ids"].clone()
    changed[:, 5:] = (changed[:, 5:] + 11) % (tiny.VOCAB - 3) + 3
    second = logits(model, input_ids=changed, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(first[:, :5], second[:, :5], **CLOSE)
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", OFF)
def test_families_off_the_interface_are_refused_by_name(name):
    model = tiny.build(name)
    keys = list(model.state_dict())
    with pytest.raises(ak.AdapterError, match=rf"{type(model).__name__}.*'lora'"):
        ak.wrap(model, "prefix")
    assert list(model.state_dict()) == keys and not prefix_layers(model)


@pytest.mark.parametrize("name", ON)
def test_save_and_load(name, tmp_path):
    model = wrapped(name)
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for low in (False, True):
            again = PeftModel.from_pretrained(tiny.build(name), tmp_path, low_cpu_mem_usage=low)
            torch.testing.assert_close(logits(again, **batch), expected)
            assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", ON)
def test_copies_and_pickles_work_alone(name):
    model = wrapped(name)
    implementation = model.config._attn_implementation
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    twins = [copy.deepcopy(model)]
    if name != "wav2vec2":  # torch pickles no module with a weight norm
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        torch.testing.assert_close(logits(twin, **batch), expected)
        fill(twin, seed=8)
        assert (logits(twin, **batch) - expected).abs().max() > 1e-3
        twin.get_base_model().set_attn_implementation("eager")
        inner = next(iter(attention_modules(twin).values())).config
        with twin.disable_adapter():
            assert inner._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, **batch), expected)
    assert model.config._attn_implementation == implementation


TABLES = [
    table
    for key, table in vars(auto).items()
    if re.fullmatch(r"MODEL_FOR_(?!ZERO_SHOT).*(LM|CLASSIFICATION|ANSWERING|CHOICE|CTC)_MAPPING_NAMES", key)
]


def other_heads(name):
    """The classes that transformers has for this family and any task, beside the one of tiny.py."""
    family = tiny.FAMILIES[name]
    kind = getattr(transformers, family.config).model_type
    found = {entry for table in TABLES for entry in [table.get(kind)] if isinstance(entry, str)}
    return sorted(found - {family.model})


@pytest.mark.parametrize("name", ON)
def test_disabled_is_the_base_model_for_every_task_head(name):
    for head in other_heads(name):
        model = tiny.build(name, model_class=head)
        batch = tiny.inputs(model)
        if head.endswith("ForCausalLM"):  # the decoder of an encoder-decoder, alone
            ids = batch.get("input_ids", batch.get("decoder_input_ids"))
            batch = {"input_ids": ids}
        if head.endswith("ForMultipleChoice"):
            batch = {key: value.reshape(1, *value.shape) for key, value in batch.items()}
        with torch.no_grad():
            before = model(**batch)
        model = fill(ak.wrap(model, "prefix", num_virtual_tokens=3)).eval()
        with torch.no_grad():
            ours = model(**batch)
            with model.disable_adapter():
                disabled = model(**batch)
        for key in {"logits", "start_logits", "end_logits"} & set(before):
            torch.testing.assert_close(disabled[key], before[key], rtol=1e-5, atol=1e-5)
            assert (ours[key] - before[key]).abs().max() > 1e-4
