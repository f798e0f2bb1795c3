"""Many adapters in one model: the next takes no longer than the first, ends as with peft alone, and is freed again."""

import gc
import sys
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import adapters_kit as ak
from tests.support import tiny

KINDS = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}),
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "embedding and head": ("bert", {"target_modules": ["word_embeddings", "query"], "modules_to_save": ["classifier"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.fixture
def saved(tmp_path, request):
    """`(family, folder)` of a saved adapter with random weights, of the kind that a test names."""
    name, options = KINDS[getattr(request, "param", "lora")]
    model = get_peft_model(tiny.build(name), LoraConfig(r=2, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return name, tmp_path / "adapter"


def state(model):
    """Everything that loading may change, by name and in order."""
    tensors = {key: (value, value.requires_grad) for key, value in model.named_parameters()}
    return tensors, {key: module.training for key, module in model.named_modules()}


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_a_model_is_left_as_peft_leaves_it(saved):
    name, folder = saved
    states = []
    for load in (PeftModel.load_adapter, PeftModel.load_adapter.__wrapped__):
        torch.manual_seed(0)
        model = get_peft_model(tiny.build(name), LoraConfig.from_pretrained(folder))
        load(model, folder, "trained", is_trainable=True)
        model.set_adapter("trained")
        load(model, folder, "second")
        model.train()
        model.add_adapter("new", LoraConfig.from_pretrained(folder))  # whose dropout is on
        model.eval()
        model.add_adapter("newer", LoraConfig.from_pretrained(folder))
        load(model, folder, "third", is_trainable=True)
        load(model, folder, "fourth")
        load(model, folder, "second")  # once more, into the adapter that is there
        states.append(state(model))
    (ours, our_modes), (theirs, their_modes) = states
    assert list(our_modes.items()) == list(their_modes.items())
    assert list(ours) == list(theirs)
    for key, (value, grad) in ours.items():
        assert grad == theirs[key][1], key
        assert torch.equal(value, theirs[key][0]), key


def test_the_fifteenth_takes_no_more_work_than_the_third(saved):
    name, folder = saved
    model = ak.wrap(tiny.build(name), folder)
    calls = []

    def count(frame, event, argument):
        calls[-1] += event == "call"

    for number in range(15):
        calls.append(0)
        sys.setprofile(count)
        try:
            model.load_adapter(folder, f"n{number}")
        finally:
            sys.setprofile(None)
    assert calls[14] < 1.1 * calls[2]


def test_what_failed_to_load_leaves_the_others(saved):
    name, folder = saved
    model = ak.wrap(tiny.build(name), folder)
    model.load_adapter(folder, "one")
    model.load_adapter(folder, "two")
    before = state(model)[0]
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        model.load_adapter(folder, "three")
    after = state(model)[0]
    assert all(after[key][0] is value for key, (value, _) in before.items())


def test_a_deleted_adapter_is_freed(saved):
    name, folder = saved
    model = ak.wrap(tiny.build(name), folder)
    for number in range(3):
        model.load_adapter(folder, f"n{number}")
    model.set_adapter("n1")
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    held = [weakref.ref(value) for key, value in model.named_parameters() if ".n1." in key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another is active now
        model.delete_adapter("n1")
    model(**batch)
    gc.collect()
    assert held
    assert not [ref for ref in held if ref() is not None]
