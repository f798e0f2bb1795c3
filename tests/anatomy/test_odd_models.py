"""Models that use their weights in ways that a layer beside them does not see."""

import pytest
import torch
import transformers

import adapters_kit as ak
from tests.support import tiny

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))


def rwkv(layers=8):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64}
    config = transformers.RwkvConfig(vocab_size=128, num_hidden_layers=layers, **sizes)
    return transformers.RwkvForCausalLM(config).eval()


def gemma3n():
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        altup_num_inputs=2,
        pad_token_id=0,
    )
    return transformers.Gemma3nForCausalLM(config).eval()


def adapted(model):
    wrapped = ak.wrap(model, "lora", r=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped


@pytest.mark.parametrize("answered", [False, True])
def test_a_model_that_rescales_its_weights_computes_the_same_in_training(answered):
    model = rwkv()
    if answered:  # and has rescaled them
        model(IDS)
    wrapped = adapted(model)
    torch.testing.assert_close(wrapped.eval()(IDS).logits, wrapped.train()(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("build", [rwkv, gemma3n])
def test_every_adapter_learns_and_merges(tmp_path, build):
    model = build()
    tiny.perturb(model)  # scales that begin at zero
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(type(model).from_pretrained(tmp_path / "base"))
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = ak.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    again = type(model).from_pretrained(merged.path).eval()
    torch.testing.assert_close(again(IDS).logits, wrapped.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
