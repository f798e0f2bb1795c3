"""Prompt tuning and p-tuning: peft's own, with a default number of virtual tokens."""

from typing import Any

from torch import nn

from adapters_kit.anatomy import blocks
from adapters_kit.errors import ModelError
from adapters_kit.registry import Method


def _shapes(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The sizes that peft otherwise reads from config fields which not every architecture has."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for speech and some vision models
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(
            f"Virtual tokens are put before a text's token embeddings, and {type(model).__name__} has none. "
            "Use 'lora' or another method that works inside the layers."
        )
    # The width of the table, not of the layers: ELECTRA and ALBERT project up from a narrower one.
    shapes = {"token_dim": embedding.embedding_dim, "num_layers": len(blocks(model)), "num_attention_heads": 1}
    return {**shapes, **{name: value for name, value in options.items() if value is not None}}


# Soft prompts move far from their start and tolerate no small rate: Lester et al. use 0.3 with Adafactor.
PROMPT = Method(
    name="prompt",
    config="peft:PromptTuningConfig",
    trains="virtual tokens before the input",
    when="on large language models, for many tasks in one batch; it needs many steps",
    paper="Lester et al. 2021, arXiv:2104.08691",
    mergeable=False,
    defaults={"num_virtual_tokens": 20},
    prepare=_shapes,
    learning_rate=3e-2,
)

P_TUNING = Method(
    name="p-tuning",
    config="peft:PromptEncoderConfig",
    trains="an MLP that writes virtual tokens",
    when="as prompt, where plain virtual tokens learn too slowly",
    paper="Liu et al. 2021, arXiv:2103.10385",
    mergeable=False,
    defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    prepare=_shapes,
    learning_rate=1e-3,
)
