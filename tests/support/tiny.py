"""Every model family in miniature: built from its config, no network, two blocks, width 64, 128 tokens.

    model = tiny.build("llama")                      # LlamaForCausalLM, eval, fp32; the same weights at every call
    batch = tiny.inputs(model, labels=True)          # what `model(**batch)` takes; a loss comes with it
    for name in tiny.names("encoder"): ...

Weights are random and nowhere zero or one (norms and biases too), so that a bug does not hide behind a neutral value.
Dropout is off unless asked for, so that train mode is as repeatable as eval mode. Widths are multiples of 64, which
is what 4-bit blocks need. Sliding windows span 4 tokens: shorter than the default length of 8, so that they matter.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCAB = 128
PAD, BOS, EOS = 0, 1, 2
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODER = {**TOKENS, **LAYERS, "max_position_embeddings": 128}
MHA = {**TOKENS, **LAYERS, "max_position_embeddings": 128}
GQA = {**MHA, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
SEQ2SEQ = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}
T5 = {**TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 8, "num_labels": 3}
GPT2 = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


@dataclass(frozen=True)
class Family:
    kind: str
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def encoder(stem: str, /, **options: Any) -> Family:
    model = f"{stem}ForSequenceClassification"
    return Family("encoder", f"{stem}Config", model, {**ENCODER, "num_labels": 3, **options})


def decoder(stem: str, base: dict[str, Any], /, *, model: str = "", config: str = "", **options: Any) -> Family:
    return Family("decoder", config or f"{stem}Config", model or f"{stem}ForCausalLM", {**base, **options})


FAMILIES: dict[str, Family] = {
    # encoders, with a sequence classification head
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta", type_vocab_size=1),
    "distilbert": Family(
        "encoder",
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {**TOKENS, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
        | {"num_labels": 3},
    ),
    "electra": encoder("Electra", embedding_size=32),
    "albert": encoder("Albert", embedding_size=32, classifier_dropout_prob=0.0),
    "mpnet": encoder("MPNet"),
    "deberta": encoder(
        "Deberta",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        pooler_hidden_size=64,
    ),
    "deberta-v2": encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        pooler_hidden_size=64,
    ),
    "xlnet": Family(
        "encoder",
        "XLNetConfig",
        "XLNetForSequenceClassification",
        {**TOKENS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "num_labels": 3},
    ),
    "modernbert": encoder(
        "ModernBert", local_attention=8, global_attn_every_n_layers=2, cls_token_id=BOS, sep_token_id=EOS
    ),
    # decoders, with a language-model head
    "gpt2": decoder("GPT2", GPT2, model="GPT2LMHeadModel"),
    "gpt-neo": decoder(
        "GPTNeo",
        {**TOKENS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "window_size": 4},
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128,
    ),
    "gpt-neox": decoder("GPTNeoX", MHA),
    "gptj": decoder("GPTJ", GPT2, rotary_dim=8),
    "opt": decoder("OPT", MHA, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": decoder("Bloom", {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": decoder("Falcon", MHA),
    "mpt": decoder(
        "Mpt", {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, expansion_ratio=2
    ),
    "llama": decoder("Llama", GQA),
    "mistral": decoder("Mistral", GQA, **WINDOW),
    "qwen2": decoder("Qwen2", GQA),
    "qwen3": decoder("Qwen3", GQA, head_dim=32),
    "gemma": decoder("Gemma", GQA, head_dim=32),
    "gemma2": decoder("Gemma2", GQA, head_dim=32, query_pre_attn_scalar=32, **WINDOW),
    "gemma3": decoder(
        "Gemma3",
        GQA,
        config="Gemma3TextConfig",
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window_pattern=2,
        **WINDOW,
    ),
    "phi": decoder("Phi", MHA),
    "phi3": decoder("Phi3", GQA),
    "stablelm": decoder("StableLm", GQA, use_qkv_bias=True),
    "starcoder2": decoder("Starcoder2", GQA, **WINDOW),
    "olmo2": decoder("Olmo2", GQA),
    "cohere": decoder("Cohere", GQA),
    "granite": decoder("Granite", GQA, residual_multiplier=0.5, attention_multiplier=0.25),
    "smollm3": decoder("SmolLM3", GQA, no_rope_layer_interval=2),
    # decoders with a mixture of experts
    "mixtral": decoder("Mixtral", GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": decoder("Qwen3Moe", GQA, num_experts=4, head_dim=16, norm_topk_prob=True, **MOE),
    "deepseek-v3": decoder(
        "DeepseekV3",
        {**MHA, "num_key_value_heads": 4, **MOE},
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt-oss": decoder(
        "GptOss",
        GQA,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **WINDOW,
    ),
    # state-space models: no attention at all
    "mamba": decoder("Mamba", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}),
    # encoder-decoders
    "t5": Family("encoder-decoder", "T5Config", "T5ForConditionalGeneration", T5),
    "flan-t5": Family(
        "encoder-decoder",
        "T5Config",
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": Family("encoder-decoder", "BartConfig", "BartForConditionalGeneration", SEQ2SEQ),
    "pegasus": Family("encoder-decoder", "PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ),
    "marian": Family("encoder-decoder", "MarianConfig", "MarianMTModel", SEQ2SEQ),
    # vision, with an image classification head
    "vit": Family("vision", "ViTConfig", "ViTForImageClassification", IMAGE),
    "dinov2": Family("vision", "Dinov2Config", "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
    "clip-vision": Family(
        "vision",
        "CLIPConfig",
        "CLIPForImageClassification",
        {"vision_config": {**LAYERS, "image_size": 16, "patch_size": 8}, "text_config": {**TOKENS, **LAYERS}}
        | {"projection_dim": 64, "num_labels": 3},
    ),
    # audio
    "whisper": Family(
        "audio",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 8, "max_target_positions": 64}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "wav2vec2": Family(
        "audio",
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {
            **LAYERS,
            "num_labels": 3,
            "vocab_size": 32,
            "conv_dim": [32, 32],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 8],
        }
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
        | {"classifier_proj_size": 64, "mask_time_prob": 0.0, "apply_spec_augment": False},
    ),
}
NAMES: list[str] = list(FAMILIES)


def names(kind: str | None = None) -> list[str]:
    """The families of one kind: decoder, encoder, encoder-decoder, vision or audio; all of them without a kind."""
    found = [name for name, family in FAMILIES.items() if kind in (None, family.kind)]
    if not found:
        raise ValueError(f"No families of kind {kind!r}; kinds: {sorted({f.kind for f in FAMILIES.values()})}.")
    return found


def config(name: str, **overrides: Any) -> transformers.PretrainedConfig:
    """The config of a family; `overrides` are options of that config class."""
    family = FAMILIES[name]
    built = getattr(transformers, family.config)(**family.options | overrides)
    for part in [built, *(getattr(built, key) for key in built.sub_configs)]:
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float) and key not in overrides:
                setattr(part, key, 0.0)
    return built


def build(name: str, *, model_class: str | None = None, **overrides: Any) -> transformers.PreTrainedModel:
    """A model of the family, in eval mode and fp32; equal arguments give equal weights.

    Args:
        name: one of `NAMES`.
        model_class: another class for the same config, e.g. "BertForTokenClassification".
        overrides: options of the config, e.g. `num_hidden_layers=3`.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    with torch.random.fork_rng(devices=[]):  # tests keep their own random state
        torch.manual_seed(seed)
        chosen = model_class or FAMILIES[name].model
        if chosen.endswith("ForQuestionAnswering"):
            overrides = {"num_labels": 2, **overrides}  # a start and an end
        model = getattr(transformers, chosen)(config(name, **overrides))
    perturb(model, seed)
    return model.eval()


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Add seeded noise to every parameter: 0.1 to vectors; to matrices what keeps activations near unit variance."""
    generator = torch.Generator().manual_seed(seed)
    # DeepSeek's routing bias is a buffer, and zero when fresh.
    buffers = [tensor for key, tensor in model.named_buffers() if key.endswith("e_score_correction_bias")]
    # Fixed position tables are parameters without gradient: some are computed anew when a checkpoint is loaded.
    for tensor in [*(p for p in model.parameters() if p.requires_grad), *buffers]:
        fan_in = tensor[0].numel() if tensor.dim() in (2, 4) else tensor.shape[-1] if tensor.dim() else 1
        std = 0.1 if tensor.dim() < 2 else 0.7 / fan_in**0.5
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=scale * std)


def inputs(
    model: Any, batch: int = 2, length: int = 8, labels: bool = False, padding: str | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch that `model(**batch)` takes; the model may be wrapped by peft.

    Args:
        batch: rows.
        length: tokens a row, of encoder and decoder alike; images and audio have the size that the config fixes.
        labels: add labels that fit the head, so that the output carries a loss.
        padding: "left" or "right": every row but the first ends (or starts) with padding, the last row most.
            Text only.
        seed: of the random tokens, pixels or frames.

    Returns:
        input_ids and attention_mask, int64 of (batch, length); or pixel_values, input_features or input_values, fp32.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    conf, head = base.config, type(base).__name__
    generates = conf.is_encoder_decoder and "Classification" not in head
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> torch.Tensor:
        return torch.randint(EOS + 1, conf.vocab_size, (batch, length), generator=generator)

    result: dict[str, torch.Tensor] = {}
    if base.main_input_name == "pixel_values":
        vision = getattr(conf, "vision_config", conf)
        shape = (batch, 3, vision.image_size, vision.image_size)
        result["pixel_values"] = torch.randn(shape, generator=generator)
    elif base.main_input_name == "input_features":
        frames = 2 * conf.max_source_positions
        result["input_features"] = torch.randn(batch, conf.num_mel_bins, frames, generator=generator)
    elif base.main_input_name == "input_values":
        result["input_values"] = torch.randn(batch, 400, generator=generator)
    else:
        result["input_ids"] = tokens()
        result["attention_mask"] = mask = torch.ones(batch, length, dtype=torch.long)
        for row in range(batch):
            pads = (length // 2) * row // max(batch - 1, 1) if padding else 0
            mask[row, :pads] = 0
        if padding == "right":
            result["attention_mask"] = mask = mask.flip(1)
        result["input_ids"] = result["input_ids"].masked_fill(mask == 0, PAD)
        if conf.is_encoder_decoder:  # classifiers of this kind read the last EOS
            last = (mask * torch.arange(length)).argmax(1)
            result["input_ids"][torch.arange(batch), last] = EOS
    if labels:
        result |= _labels(head, conf, result, tokens)
    elif generates:  # with labels, the model makes them itself: the labels, shifted
        result["decoder_input_ids"] = tokens()
    return {key: value.to(base.device) for key, value in result.items()}


def _labels(head: str, conf: Any, batch: dict[str, torch.Tensor], tokens: Any) -> dict[str, torch.Tensor]:
    rows = len(next(iter(batch.values())))
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if conf.is_encoder_decoder and "Classification" not in head:
        return {"labels": tokens()}
    if head.endswith("ForTokenClassification"):
        return {"labels": (ids % conf.num_labels).masked_fill(mask == 0, -100)}
    if head.endswith("ForQuestionAnswering"):
        return {"start_positions": torch.zeros(rows, dtype=torch.long), "end_positions": mask.sum(1) - 1}
    if head.endswith(("SequenceClassification", "ImageClassification", "AudioClassification")):
        return {"labels": torch.arange(rows) % conf.num_labels}
    return {"labels": ids.masked_fill(mask == 0, -100)}
