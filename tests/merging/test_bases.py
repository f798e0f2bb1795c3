"""Bases of every kind that people have: merged into what was trained, or refused by name before work starts."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.errors import AdapterError
from tests.support import shipping, tiny

TEXT = {**tiny.TOKENS, **tiny.LAYERS, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16}
SIGHT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIGHT |= {"image_size": 16, "patch_size": 8}
IDS = torch.arange(9, 19)[None]
MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
PARTS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


def llava():
    sight = transformers.CLIPVisionConfig(**SIGHT)
    config = transformers.LlavaConfig(
        vision_config=sight, text_config=transformers.LlamaConfig(**TEXT), image_token_index=120
    )
    return "LlavaForConditionalGeneration", config


def qwen2vl():
    sight = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": MROPE}
    del text["head_dim"]
    return "Qwen2VLForConditionalGeneration", transformers.Qwen2VLConfig(text_config=text, vision_config=sight, **PARTS)


def gemma3():
    text = {**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=SIGHT, mm_tokens_per_image=4, image_token_index=120
    )
    return "Gemma3ForConditionalGeneration", config


def gemma3n():
    levels = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
    odd = {"laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2, "sliding_window": 8}
    kinds = ["sliding_attention", "full_attention"]
    return "Gemma3nForCausalLM", transformers.Gemma3nTextConfig(**TEXT, **levels, **odd, layer_types=kinds)


def rwkv():
    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    return "RwkvForCausalLM", transformers.RwkvConfig(**tiny.TOKENS, **sizes, context_length=64)


def llama4():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    return "Llama4ForCausalLM", transformers.Llama4TextConfig(**TEXT, **experts, interleave_moe_layer_step=1)


def blip2():
    """A model that runs on no invented inputs: every picture needs tokens of its own in the text."""
    former = {**tiny.TOKENS, **SIGHT, "encoder_hidden_size": 32}
    text = {"model_type": "opt", **tiny.TOKENS, **tiny.LAYERS, "ffn_dim": 128, "word_embed_proj_dim": 64}
    del former["image_size"], former["patch_size"], text["intermediate_size"]
    config = transformers.Blip2Config(
        vision_config=SIGHT, qformer_config=former, text_config=text, num_query_tokens=2, image_token_index=120
    )
    return "Blip2ForConditionalGeneration", config


def built(kind, config):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    tiny.perturb(model)
    return model


def said(model):
    with torch.no_grad():
        batch = {"input_ids": IDS}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = IDS[:, :5]
        if model.config.model_type == "blip-2":
            batch |= {
                "input_ids": torch.cat([torch.full((1, 2), 120), IDS], 1),
                "pixel_values": torch.ones(1, 3, 16, 16),
            }
        return model.eval()(**batch).logits.float()


def train(base, kind, out, **options):
    """An adapter on a saved base; the trained model."""
    torch.manual_seed(1)
    method = LoraConfig(r=4, **options) if options else "lora"
    model = ak.wrap(getattr(transformers, kind).from_pretrained(base), method)
    shipping.disturb(model)
    model.save_pretrained(out)
    return model


def rounding(expected):
    return {"rtol": 0, "atol": 1e-4 * max(1.0, expected.abs().max().item())}


def in_pickles(folder, parts):
    """The folder's weights as `pytorch_model.bin`, in so many shards."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {}
    for number in range(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        mine = list(state)[number::parts]
        torch.save({name: state[name] for name in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bart():
    return "BartForConditionalGeneration", tiny.config("bart")


BASES = {make.__name__: make for make in (bart, llava, qwen2vl, gemma3, gemma3n, rwkv, llama4)}


@pytest.mark.parametrize("base", BASES)
def test_odd_bases_merge_into_what_was_trained(base, tmp_path):
    kind, config = BASES[base]()
    built(kind, config).save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", kind, tmp_path / "a")
    ak.merge(tmp_path / "a", tmp_path / "merged")
    merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(merged), said(trained), **rounding(said(trained)))


@pytest.mark.parametrize("parts", [1, 2, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_pickled_bases(parts, tied, tmp_path):
    tiny.build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    in_pickles(tmp_path / "base", parts)
    trained = train(tmp_path / "base", "LlamaForCausalLM", tmp_path / "a", target_modules=["q_proj", "down_proj"])
    ak.merge(tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(said(shipping.load(tmp_path / "merged")), said(trained), **rounding(said(trained)))


@pytest.mark.parametrize(
    ("family", "stranger"),
    [
        ("bert", "bert.embeddings.position_ids"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("deepseek-v3", "model.layers.61.mlp.up_proj.weight"),
    ],
)
def test_what_no_reader_asks_for_is_copied(family, stranger, tmp_path):
    """Buffers that older versions saved, and layers that the class is told to ignore."""
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), stranger: torch.arange(8.0)[None]}, file, metadata={"format": "pt"})
    trained = train(tmp_path / "base", type(model).__name__, tmp_path / "a")
    ak.merge(tmp_path / "a", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[stranger], torch.arange(8.0)[None])
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(merged), said(trained), **rounding(said(trained)))


def test_a_base_in_sixteen_shards(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size=sum(p.nbytes for p in model.parameters()) // 16)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= 8
    trained = train(tmp_path / "base", "LlamaForCausalLM", tmp_path / "a", target_modules=["q_proj", "down_proj"])
    ak.merge(tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(said(shipping.load(tmp_path / "merged")), said(trained), **rounding(said(trained)))


@pytest.mark.parametrize("declared", [True, False])
def test_a_base_in_fp8_is_refused_by_name(declared, tmp_path):
    tiny.build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", "LlamaForCausalLM", tmp_path / "a", target_modules=["q_proj"])
    state = load_file(tmp_path / "base" / "model.safetensors")
    eight = {name: t.to(torch.float8_e4m3fn) if "proj" in name else t for name, t in state.items()}
    save_file(eight, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    if declared:
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"quantized weights|F8_E4M3"):
        ak.merge(tmp_path / "a", tmp_path / "merged", force=True)
    assert not (tmp_path / "merged").exists()


def older_llava(name):
    name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    return name.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.")


def older_qwen(name):
    name = name.replace("base_model.model.model.language_model.", "base_model.model.model.")
    return name.replace("base_model.model.model.visual.", "base_model.model.visual.")


OLD = {
    "llava": (llava, older_llava, ["q_proj", "v_proj"], None),
    "llava-expression": (llava, older_llava, r".*language_model.*\.q_proj", r"language_model\.model\.layers.*\.q_proj"),
    "qwen2vl": (qwen2vl, older_qwen, ["q_proj", "v_proj"], None),
    "qwen2vl-paths": (qwen2vl, older_qwen, r".*layers\.0\..*q_proj", ["model.layers.0.self_attn.q_proj"]),
}


@pytest.mark.parametrize("verb", ["wrap", "merge"])
@pytest.mark.parametrize("case", OLD)
def test_adapters_that_name_modules_as_transformers_4_did(case, verb, tmp_path):
    make, older, targets, wrote = OLD[case]
    kind, config = make()
    built(kind, config).save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", kind, tmp_path / "a", target_modules=targets)
    weights, settings = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    save_file({older(name): tensor for name, tensor in load_file(weights).items()}, weights)
    saved = json.loads(settings.read_text())
    settings.write_text(json.dumps(saved | ({} if wrote is None else {"target_modules": wrote})))
    if verb == "wrap":
        model = ak.wrap(getattr(transformers, kind).from_pretrained(tmp_path / "base"), tmp_path / "a")
    else:
        ak.merge(tmp_path / "a", tmp_path / "merged")
        model = getattr(transformers, kind).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(model), said(trained), **rounding(said(trained)))


def test_a_scale_for_a_module_of_an_older_name_is_not_lost(tmp_path):
    kind, config = qwen2vl()
    built(kind, config).save_pretrained(tmp_path / "base")
    pattern = {"model.language_model.layers.0.self_attn.q_proj": 64}
    train(tmp_path / "base", kind, tmp_path / "a", target_modules=["q_proj"], alpha_pattern=pattern)
    weights, settings = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    save_file({older_qwen(name): tensor for name, tensor in load_file(weights).items()}, weights)
    saved = json.loads(settings.read_text())
    settings.write_text(json.dumps(saved | {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}}))
    with pytest.raises(AdapterError, match="does not fit"):
        ak.wrap(getattr(transformers, kind).from_pretrained(tmp_path / "base"), tmp_path / "a")
    with pytest.raises(AdapterError, match="match nothing"):
        ak.merge(tmp_path / "a", tmp_path / "merged")


@pytest.mark.parametrize("verb", ["wrap", "merge"])
def test_adapters_of_experts_one_by_one(verb, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    built("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**TEXT, **experts)).save_pretrained(tmp_path / "base")
    state, shapes = {}, {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    stored = load_file(tmp_path / "base" / "model.safetensors")
    for place in (f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(2) for expert in range(4)):
        for name, (outputs, inputs) in shapes.items():
            a, b = torch.randn(3, inputs) * 0.1, torch.randn(outputs, 3) * 0.1
            state[f"base_model.model.{place}.{name}.lora_A.weight"] = a
            state[f"base_model.model.{place}.{name}.lora_B.weight"] = b
            stored[f"{place}.{name}.weight"] += b @ a
    (tmp_path / "a").mkdir()
    save_file(state, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": list(shapes), "task_type": "CAUSAL_LM"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    kind = transformers.Qwen3MoeForCausalLM
    if verb == "wrap":
        model = ak.wrap(kind.from_pretrained(tmp_path / "base"), tmp_path / "a")
    else:
        ak.merge(tmp_path / "a", tmp_path / "merged", base=tmp_path / "base")
        model = kind.from_pretrained(tmp_path / "merged")
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})  # summed by hand
    expected = said(kind.from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(said(model), expected, **rounding(expected))


def test_a_model_that_runs_on_nothing_made_up_is_read_again(tmp_path):
    kind, config = blip2()
    built(kind, config).save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", kind, tmp_path / "a", target_modules=["q_proj"])
    report = ak.merge(tmp_path / "a", tmp_path / "merged")
    assert report.check is None and "Outputs were not compared: Blip2" in str(report)
    merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(merged), said(trained), **rounding(said(trained)))


def test_the_language_part_is_no_base_for_the_whole(tmp_path):
    kind, config = gemma3()
    built(kind, config).save_pretrained(tmp_path / "base")
    text = built("Gemma3ForCausalLM", config.get_text_config())
    text.save_pretrained(tmp_path / "part")
    trained = train(tmp_path / "part", "Gemma3ForCausalLM", tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(
        AdapterError, match=r"trained on a Gemma3ForCausalLM.*Gemma3ForConditionalGeneration.*base=PART"
    ):
        ak.merge(tmp_path / "a", tmp_path / "merged", base=tmp_path / "base")
    ak.merge(tmp_path / "a", tmp_path / "merged", base=tmp_path / "part", force=True)
    merged = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(merged), said(trained), **rounding(said(trained)))
