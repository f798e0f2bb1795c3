"""What virtual tokens in front of a text displace: labels of tokens, places of answers, the token a decoder is read at.

peft puts the vectors of prompt tuning before the text's own. It moves the labels of language models along, and nothing
else: tags would not fit the outputs any more, an answer would be learned as many places too early as there are virtual
tokens, and a decoder with a classifier, which finds the last token by its id, would read the padding. The hooks here
mend all three on a model that `wrap` made; they are functions of this module, so that copies of a model use their own.
"""

from typing import Any

import torch
from peft import PeftModel, PeftType, PromptLearningConfig, TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from adapters_kit.anatomy import head

IGNORED = -100
_INSIDE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # keys and values, not tokens


def in_front(config: Any) -> int:
    """How many virtual tokens stand before a text with this peft config; 0 for methods without."""
    if not isinstance(config, PromptLearningConfig) or config.peft_type in _INSIDE:
        return 0
    return int(config.num_virtual_tokens or 0)


def keep_places(model: PeftModel) -> None:
    """Let labels, places and pooling of `model` follow the text behind its virtual tokens. Once is enough."""
    if not isinstance(model.active_peft_config, PromptLearningConfig) or _move in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_move, with_kwargs=True)
    base = model.get_base_model()
    if model.active_peft_config.task_type != TaskType.SEQ_CLS:
        return
    for path in head(base):
        layer = base.get_submodule(path)
        if isinstance(layer, nn.Linear | ModulesToSaveWrapper):
            layer.register_forward_hook(_pool)


def _move(model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    config = model.active_peft_config
    count = in_front(config)
    kwargs = dict(kwargs)
    if not count:
        return args, kwargs
    labels = kwargs.get("labels")
    if config.task_type == TaskType.TOKEN_CLS and labels is not None:
        kwargs["labels"] = torch.cat([labels.new_full((len(labels), count), IGNORED), labels], dim=1)
    for name in ("start_positions", "end_positions"):
        if config.task_type == TaskType.QUESTION_ANS and kwargs.get(name) is not None:
            kwargs[name] = kwargs[name] + count
    if config.task_type == TaskType.SEQ_CLS:
        mask = kwargs.get("attention_mask")
        for module in model.get_base_model().modules():
            if _pool in module._forward_hooks.values():
                module.__dict__["text_mask"] = mask
    return args, kwargs


def _pool(layer: nn.Module, args: tuple, scores: torch.Tensor) -> torch.Tensor | None:
    """The scores (rows, tokens, classes) with those of each row's last token at the end, where a decoder is read."""
    mask = layer.__dict__.pop("text_mask", None)
    if mask is None or scores.dim() != 3:
        return None
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)  # (rows,)
    last = last + scores.shape[1] - mask.shape[1]
    rows = torch.arange(len(scores), device=scores.device)
    return torch.cat([scores[:, :-1], scores[rows, last][:, None]], dim=1)
