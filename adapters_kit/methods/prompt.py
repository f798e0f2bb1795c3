"""Prompt tuning and p-tuning: peft's own, with a default number of virtual tokens."""

from adapters_kit.registry import Method

# Soft prompts move far from their start and tolerate no small rate: Lester et al. use 0.3 with Adafactor.
PROMPT = Method(
    name="prompt",
    config="peft:PromptTuningConfig",
    trains="virtual tokens before the input",
    paper="Lester et al. 2021, arXiv:2104.08691",
    mergeable=False,
    defaults={"num_virtual_tokens": 20},
    learning_rate=3e-2,
)

P_TUNING = Method(
    name="p-tuning",
    config="peft:PromptEncoderConfig",
    trains="an MLP that writes virtual tokens",
    paper="Liu et al. 2021, arXiv:2103.10385",
    mergeable=False,
    defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    learning_rate=1e-3,
)
