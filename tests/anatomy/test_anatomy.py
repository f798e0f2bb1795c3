"""What is found in a model, held against tables written by hand and against what the model computes."""

import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit.anatomy import (
    block_linears,
    blocks,
    embeddings,
    head,
    output_embeddings,
)
from tests.support import tiny

# The last block of each stack. A line reads: kind: where x is read + the module that returns h [place in its tuple]
# -> norm that ends the branch -> (sandwich) or -> norm of x + h (post-norm) | role=linear of the branch ...
QKVO = "q=self_attn.q_proj k=self_attn.k_proj v=self_attn.v_proj o=self_attn.o_proj"
KVQO = "k=self_attn.k_proj v=self_attn.v_proj q=self_attn.q_proj o=self_attn.out_proj"
CROSS = "k=encoder_attn.k_proj v=encoder_attn.v_proj q=encoder_attn.q_proj o=encoder_attn.out_proj"
GLU = "gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj"
BERT = """
    attention: block.in + attention.output.dropout -> attention.output.LayerNorm \
        | q=attention.self.query k=attention.self.key v=attention.self.value o=attention.output.dense
    ffn: attention.output.LayerNorm.out + output.dropout -> output.LayerNorm | up=intermediate.dense down=output.dense
"""
LLAMA = f"""
    attention: input_layernorm.in + self_attn[0] | {QKVO}
    ffn: post_attention_layernorm.in + mlp | {GLU}
"""
GEMMA2 = f"""
    attention: input_layernorm.in + self_attn[0] -> post_attention_layernorm -> | {QKVO}
    ffn: pre_feedforward_layernorm.in + mlp -> post_feedforward_layernorm -> | {GLU}
"""
BART = f"""
    attention: block.in + self_attn[0] -> self_attn_layer_norm | {KVQO}
    ffn: self_attn_layer_norm.out + fc2 -> final_layer_norm | up=fc1 down=fc2
    attention: block.in + self_attn[0] -> self_attn_layer_norm | {KVQO}
    cross-attention: self_attn_layer_norm.out + encoder_attn[0] -> encoder_attn_layer_norm | {CROSS}
    ffn: encoder_attn_layer_norm.out + fc2 -> final_layer_norm | up=fc1 down=fc2
"""
PEGASUS = f"""
    attention: self_attn_layer_norm.in + self_attn[0] | {KVQO}
    ffn: final_layer_norm.in + fc2 | up=fc1 down=fc2
    attention: self_attn_layer_norm.in + self_attn[0] | {KVQO}
    cross-attention: encoder_attn_layer_norm.in + encoder_attn[0] | {CROSS}
    ffn: final_layer_norm.in + fc2 | up=fc1 down=fc2
"""


def t5(encoder_ffn: str, decoder_ffn: str) -> str:
    attention = "q=layer.{0}.{1}.q k=layer.{0}.{1}.k v=layer.{0}.{1}.v o=layer.{0}.{1}.o"
    return f"""
        attention: layer.0.layer_norm.in + layer.0.dropout | {attention.format(0, "SelfAttention")}
        ffn: layer.1.layer_norm.in + layer.1.dropout | {encoder_ffn}
        attention: layer.0.layer_norm.in + layer.0.dropout | {attention.format(0, "SelfAttention")}
        cross-attention: layer.1.layer_norm.in + layer.1.dropout | {attention.format(1, "EncDecAttention")}
        ffn: layer.2.layer_norm.in + layer.2.dropout | {decoder_ffn}
    """


EXPECTED = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "distilbert": """
        attention: block.in + attention[0] -> sa_layer_norm \
            | q=attention.q_lin k=attention.k_lin v=attention.v_lin o=attention.out_lin
        ffn: sa_layer_norm.out + ffn -> output_layer_norm | up=ffn.lin1 down=ffn.lin2
    """,
    "albert": """
        attention: block.in + attention.output_dropout -> attention.LayerNorm \
            | q=attention.query k=attention.key v=attention.value o=attention.dense
        ffn: attention.LayerNorm.out + ffn_output -> full_layer_layer_norm | up=ffn down=ffn_output
    """,
    "mpnet": """
        attention: block.in + attention.dropout -> attention.LayerNorm \
            | q=attention.attn.q k=attention.attn.k v=attention.attn.v o=attention.attn.o
        ffn: attention.LayerNorm.out + output.dropout -> output.LayerNorm | up=intermediate.dense down=output.dense
    """,
    "deberta": """
        attention: block.in + attention.output.dropout -> attention.output.LayerNorm \
            | qkv=attention.self.in_proj -=attention.self.pos_proj -=attention.self.pos_q_proj o=attention.output.dense
        ffn: attention.output.LayerNorm.out + output.dropout -> output.LayerNorm \
            | up=intermediate.dense down=output.dense
    """,
    "deberta-v2": """
        attention: block.in + attention.output.dropout -> attention.output.LayerNorm \
            | q=attention.self.query_proj k=attention.self.key_proj v=attention.self.value_proj o=attention.output.dense
        ffn: attention.output.LayerNorm.out + output.dropout -> output.LayerNorm \
            | up=intermediate.dense down=output.dense
    """,
    # Its attention adds a bare einsum, behind a dropout that also serves the attention probabilities.
    "xlnet": """
        attention: block.in + raw -> rel_attn.layer_norm |
        ffn: rel_attn.layer_norm.out + ff.layer_2 -> ff.layer_norm | up=ff.layer_1 down=ff.layer_2
    """,
    "modernbert": """
        attention: attn_norm.in + attn[0] | qkv=attn.Wqkv o=attn.Wo
        ffn: mlp_norm.in + mlp | gate_up=mlp.Wi down=mlp.Wo
    """,
    "gpt2": """
        attention: ln_1.in + attn[0] | qkv=attn.c_attn o=attn.c_proj
        ffn: ln_2.in + mlp | up=mlp.c_fc down=mlp.c_proj
    """,
    "gpt-neo": """
        attention: ln_1.in + attn[0] \
            | k=attn.attention.k_proj v=attn.attention.v_proj q=attn.attention.q_proj o=attn.attention.out_proj
        ffn: ln_2.in + mlp | up=mlp.c_fc down=mlp.c_proj
    """,
    # Parallel: both branches read and are added to the same x (also GPT-J, Falcon, Phi, Cohere).
    "gpt-neox": """
        attention: input_layernorm.in + post_attention_dropout | qkv=attention.query_key_value o=attention.dense
        ffn: input_layernorm.in + post_mlp_dropout | up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h
    """,
    "gptj": """
        attention: ln_1.in + attn[0] | k=attn.k_proj v=attn.v_proj q=attn.q_proj o=attn.out_proj
        ffn: ln_1.in + mlp | up=mlp.fc_in down=mlp.fc_out
    """,
    "opt": f"""
        attention: self_attn_layer_norm.in + self_attn[0] | {KVQO}
        ffn: final_layer_norm.in + fc2 | up=fc1 down=fc2
    """,
    # Its attention and its MLP take x as an argument and return x + h: what is added is their last linear.
    "bloom": """
        attention: input_layernorm.in + self_attention.dense \
            | qkv=self_attention.query_key_value o=self_attention.dense
        ffn: post_attention_layernorm.in + mlp.dense_4h_to_h | up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h
    """,
    "falcon": """
        attention: input_layernorm.in + self_attention[0] | qkv=self_attention.query_key_value o=self_attention.dense
        ffn: input_layernorm.in + mlp | up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h
    """,
    "mpt": """
        attention: norm_1.in + resid_attn_dropout | qkv=attn.Wqkv o=attn.out_proj
        ffn: norm_2.in + ffn.down_proj | up=ffn.up_proj down=ffn.down_proj
    """,
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"], LLAMA),
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "phi": f"""
        attention: input_layernorm.in + self_attn[0] | {QKVO.replace("o_proj", "dense")}
        ffn: input_layernorm.in + mlp | up=mlp.fc1 down=mlp.fc2
    """,
    "phi3": """
        attention: input_layernorm.in + resid_attn_dropout | o=self_attn.o_proj qkv=self_attn.qkv_proj
        ffn: post_attention_layernorm.in + resid_mlp_dropout | gate_up=mlp.gate_up_proj down=mlp.down_proj
    """,
    "stablelm": f"""
        attention: input_layernorm.in + self_attn[0] | {QKVO}
        ffn: post_attention_layernorm.in + dropout | {GLU}
    """,
    "starcoder2": f"""
        attention: input_layernorm.in + self_attn[0] | {QKVO}
        ffn: post_attention_layernorm.in + mlp | up=mlp.c_fc down=mlp.c_proj
    """,
    # Sandwich norms without norms before the branches.
    "olmo2": f"""
        attention: block.in + self_attn[0] -> post_attention_layernorm -> | {QKVO}
        ffn: mlp.in + mlp -> post_feedforward_layernorm -> | {GLU}
    """,
    "cohere": f"""
        attention: input_layernorm.in + self_attn[0] | {QKVO}
        ffn: input_layernorm.in + mlp | {GLU}
    """,
    "mixtral": LLAMA.replace(GLU, ""),
    "qwen3-moe": LLAMA.replace(GLU, ""),
    "deepseek-v3": f"""
        attention: input_layernorm.in + self_attn[0] | q=self_attn.q_a_proj q=self_attn.q_b_proj \
            kv=self_attn.kv_a_proj_with_mqa kv=self_attn.kv_b_proj o=self_attn.o_proj
        ffn: post_attention_layernorm.in + mlp | {GLU.replace("mlp.", "mlp.shared_experts.")}
    """,
    "gpt-oss": LLAMA.replace(GLU, "").replace("+ mlp", "+ mlp[0]"),
    "mamba": "mixer: norm.in + mixer | -=mixer.in_proj -=mixer.x_proj -=mixer.out_proj",
    "t5": t5(*(f"up=layer.{n}.DenseReluDense.wi down=layer.{n}.DenseReluDense.wo" for n in (1, 2))),
    "flan-t5": t5(
        *(
            f"gate=layer.{n}.DenseReluDense.wi_0 up=layer.{n}.DenseReluDense.wi_1 down=layer.{n}.DenseReluDense.wo"
            for n in (1, 2)
        )
    ),
    "bart": BART,
    "marian": BART,
    "pegasus": PEGASUS,
    "whisper": PEGASUS,
    "vit": """
        attention: layernorm_before.in + attention[0] \
            | q=attention.q_proj k=attention.k_proj v=attention.v_proj o=attention.o_proj
        ffn: layernorm_after.in + mlp | up=mlp.fc1 down=mlp.fc2
    """,
    "dinov2": """
        attention: norm1.in + layer_scale1 | q=attention.q_proj k=attention.k_proj v=attention.v_proj o=attention.o_proj
        ffn: norm2.in + layer_scale2 | up=mlp.fc1 down=mlp.fc2
    """,
    "clip-vision": f"""
        attention: layer_norm1.in + self_attn[0] | {KVQO}
        ffn: layer_norm2.in + mlp | up=mlp.fc1 down=mlp.fc2
    """,
    "wav2vec2": """
        attention: block.in + dropout -> layer_norm \
            | k=attention.k_proj v=attention.v_proj q=attention.q_proj o=attention.out_proj
        ffn: layer_norm.out + feed_forward -> final_layer_norm \
            | up=feed_forward.intermediate_dense down=feed_forward.output_dense
    """,
}

TEXT = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL = {**TEXT, **LAYERS}
GQA = {**SMALL, "num_key_value_heads": 2}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
SEQ2SEQ = {"d_model": 64, **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDES.items()}}
RESNET = {"hidden_sizes": [16, 32], "depths": [1, 1], "out_features": ["stage2"]}
# Shapes that tests/support/tiny.py has none of: model class, options of its config.
FURTHER = {
    "two towers": ("CLIPModel", {"text_config": SMALL, "vision_config": IMAGE}),
    "two lists for one layer": ("XLMWithLMHeadModel", {"vocab_size": 96, "emb_dim": 64, "n_layers": 2, "n_heads": 4}),
    "windows": (
        "SwinForImageClassification",
        {"image_size": 32, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "lists of lists": (
        "FunnelForSequenceClassification",
        {"vocab_size": 96, "d_model": 64, "block_sizes": [1, 1], "n_head": 4, "d_head": 16, "d_inner": 96},
    ),
    "mamba between attention": (
        "JambaForCausalLM",
        {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 0},
    ),
    "convolutions between attention": ("Lfm2ForCausalLM", {**GQA, "layer_types": ["conv", "full_attention"]}),
    "recurrence between attention": (
        "RecurrentGemmaForCausalLM",
        {**GQA, "num_hidden_layers": 3, "lru_width": 64},
    ),
    "shared expert with a gate": ("Qwen2MoeForCausalLM", {**GQA, **MOE}),
    "routed linears": (
        "SwitchTransformersForConditionalGeneration",
        {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2}
        | {"num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "four branches": ("Wav2Vec2BertForSequenceClassification", LAYERS),
    "positions added to queries": (
        "DetrForObjectDetection",
        {**SEQ2SEQ, "backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
        | {"backbone_config": {"model_type": "resnet", "embedding_size": 16, **RESNET}},
    ),
    "cross-attention switched on": ("BertLMHeadModel", {**SMALL, "is_decoder": True, "add_cross_attention": True}),
    "norms below containers": (
        "DbrxForCausalLM",
        {"vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 96}},
    ),
    "sandwich norms of other names": ("Glm4ForCausalLM", {**GQA, "head_dim": 16}),
    "no attention but feed-forwards": ("FNetForSequenceClassification", SMALL),
    "a vision tower": (
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama", **GQA}, "vision_config": {"model_type": "clip_vision_model", **IMAGE}}
        | {"image_token_index": 95},
    ),
    "one write for a whole layer": (
        "MobileBertForSequenceClassification",
        {**SMALL, "intra_bottleneck_size": 32, "embedding_size": 32, "intermediate_size": 64},
    ),
    "video": ("VideoMAEForVideoClassification", {**IMAGE, "num_frames": 4}),
}


def further(name: str):
    class_name, options = FURTHER[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**options))
    tiny.perturb(model)
    return model.eval()


def model_of(name: str):
    return further(name) if name in FURTHER else tiny.build(name)


def below(block, path: str) -> str:
    return "block" if path == block.path else path.removeprefix(block.path + ".")


def describe(block, branch) -> str:
    """A line of the tables above."""
    source = branch.inner or branch.module
    index = branch.inner_index if branch.inner else branch.index
    text = f"{branch.kind}: {below(block, branch.residual.path)}.{branch.residual.side.removesuffix('put')} + "
    text += "raw" if source is None else below(block, source) + ("" if index is None else f"[{index}]")
    text += f" -> {below(block, branch.branch_norm)} ->" if branch.branch_norm else ""
    text += f" -> {below(block, branch.norm)}" if branch.norm else ""
    inside = [linear for linear in block.linears if linear.path in branch.linears]
    return " ".join([text, "|", *(f"{linear.role or '-'}={below(block, linear.path)}" for linear in inside)])


def last_blocks(amap):
    return list({block.stack: block for block in amap.blocks}.values())


# what is found


def test_the_table_holds_every_family():
    assert set(EXPECTED) == set(tiny.NAMES)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_branches_and_roles(name):
    amap = ak.map_model(tiny.build(name))
    found = [describe(block, branch) for block in last_blocks(amap) for branch in block.branches]
    assert found == [" ".join(line.split()) for line in EXPECTED[name].strip().splitlines()]
    assert amap.hidden_size == 64
    assert (amap.reason is None) == (name != "mamba")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", 2),
        ("gpt2", 4),
        ("falcon", 1),
        ("phi3", 2),
        ("t5", 4),
        ("deepseek-v3", 4),
        ("qwen3", 2),
        ("mamba", None),
    ],
)
def test_key_value_heads(name, heads):
    assert ak.map_model(tiny.build(name)).key_value_heads == heads


def test_blocks_in_order_and_shared_layers_once():
    assert list(blocks(tiny.build("bart"))) == [
        f"model.{side}.layers.{n}" for side in ("encoder", "decoder") for n in (0, 1)
    ]
    shared = ak.map_model(tiny.build("albert", num_hidden_layers=5)).blocks
    assert [(block.path, block.calls) for block in shared] == [
        ("albert.encoder.albert_layer_groups.0.albert_layers.0", 5)
    ]
    swin = list(blocks(further("windows")))
    assert swin == [f"swin.encoder.layers.{n}" for n in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    lists = [block.path for block in ak.map_model(further("two lists for one layer")).blocks]
    assert lists == [f"transformer.{part}.{n}" for n in (0, 1) for part in ("attentions", "ffns")]


@pytest.mark.parametrize(
    ("name", "heads", "vocabulary", "first_embedding"),
    [
        ("llama", ["lm_head"], "lm_head", "model.embed_tokens"),
        ("distilbert", ["pre_classifier", "classifier"], None, "distilbert.embeddings.word_embeddings"),
        ("t5", ["lm_head"], "lm_head", "shared"),
        ("whisper", ["proj_out"], "proj_out", "model.decoder.embed_tokens"),
        ("clip-vision", ["classifier"], None, "vision_model.embeddings.patch_embedding"),
        ("wav2vec2", ["projector", "classifier"], None, None),
    ],
)
def test_head_and_embeddings(name, heads, vocabulary, first_embedding):
    model = tiny.build(name)
    assert head(model) == heads
    assert output_embeddings(model) == vocabulary
    assert next(iter(embeddings(model)), None) == first_embedding
    assert not {*block_linears(model)} & {*heads, vocabulary}


def test_a_bare_model_has_no_head():
    for name in ("bert", "gpt2", "vit", "t5"):
        model = tiny.build(name, model_class=tiny.FAMILIES[name].config.replace("Config", "Model"))
        assert head(model) == []
        assert output_embeddings(model) is None


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_linear_of_the_blocks_and_none_else(name):
    model = tiny.build(name)
    classes = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    every = {path for path, module in model.named_modules() if isinstance(module, classes)}
    inside = {path for path in every if path.startswith(tuple(block + "." for block in blocks(model)))}
    found = block_linears(model)
    assert len(found) == len(set(found))
    assert set(found) == inside  # none of these families has a router that is a linear
    assert found == [linear.path for linear in ak.map_model(model).linears]
    for linear in ak.map_model(model).linears:
        weight = model.get_submodule(linear.path).weight
        assert sorted(weight.shape) == sorted((linear.in_features, linear.out_features))
