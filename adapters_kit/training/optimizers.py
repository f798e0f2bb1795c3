"""The optimizers that adapters are trained with, by name. What their state takes is in memory.py."""

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.quantization import check_bitsandbytes
from adapters_kit.training.memory import OPTIMIZERS

# Name -> class of bitsandbytes.optim; None is torch's AdamW.
_ADAMW: dict[str, str | None] = {
    "adamw": None,
    "adamw-8bit": "AdamW8bit",
    "paged-adamw": "PagedAdamW",
    "paged-adamw-8bit": "PagedAdamW8bit",
}
LORA_PLUS_RATIO = 16.0
# Full copies (a task head, embeddings) are ordinary weights, which do not stand the rates that suit IA³ or a prefix.
HEAD_RATE = 6e-4


def build_optimizer(
    model: nn.Module,
    name: str = "adamw",
    learning_rate: float = 2e-4,
    weight_decay: float = 0.0,
    *,
    head_learning_rate: float | None = None,
    lora_plus_ratio: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """An optimizer for the trainable parameters of `model`, as `Trainer(optimizers=(optimizer, None))` takes it.

    Args:
        model: a `PeftModel`. "lora-fa" freezes its A matrices.
        name: one of `OPTIMIZERS`. "adamw-8bit": both moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861).
            "paged-…": the state moves to host memory when the GPU is full; on a CPU the same as without. "lora+":
            AdamW with a higher rate for B (Hayou et al. 2024, arXiv:2402.12354). "lora-fa": A stays as drawn, gradients
            of B are corrected for it (Zhang et al. 2023, arXiv:2308.03303).
        learning_rate: peak rate; for LoRA+ that of the A matrices. A layer may ask for multiples of it with
            `rate_factors`, as the keys of a prefix do.
        head_learning_rate: of what is trained as a full copy beside the adapter (`modules_to_save`: a task head); by
            default `learning_rate`, at most 6e-4. LoRA+ and LoRA-FA, which are peft's, have none of their own.
        weight_decay: decoupled, for matrices; vectors (biases, norms, scales) are not decayed.
        lora_plus_ratio: rate of B over rate of A, with any AdamW; 16 for "lora+" if not given.

    Raises:
        UnknownNameError: no such optimizer.
        MissingPackageError: bitsandbytes is needed and absent.
        AdapterError: nothing to train, or LoRA+ and LoRA-FA for a method without A and B matrices.
    """
    if name not in OPTIMIZERS:
        raise UnknownNameError(f"Unknown optimizer {name!r}. {did_you_mean(name, OPTIMIZERS)}")
    if name == "lora+":
        name, lora_plus_ratio = "adamw", lora_plus_ratio or LORA_PLUS_RATIO
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise AdapterError("The model has no trainable parameters: wrap it with a method first.")
    if name == "lora-fa":
        if lora_plus_ratio is not None:
            raise AdapterError("LoRA-FA freezes A, so that a LoRA+ ratio means nothing: leave lora_plus_ratio out.")
        return _lora_fa(model, learning_rate, weight_decay)
    optimizer_class = _adamw_class(name)
    options: dict[str, Any] = {"betas": betas, "eps": eps}
    if optimizer_class is torch.optim.AdamW and all(one.device.type not in ("cpu", "meta") for one in trainable):
        options["fused"] = True  # one launch for all parameters
    if lora_plus_ratio is not None:
        _need_lora(model, "LoRA+")
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model,
            optimizer_class,
            lr=learning_rate,
            loraplus_lr_ratio=lora_plus_ratio,
            loraplus_weight_decay=weight_decay,
            loraplus_lr_embedding=learning_rate,
            **options,
        )
    rates = _rates(model, learning_rate, head_learning_rate or min(learning_rate, HEAD_RATE))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in trainable:
        key = rates.get(id(parameter), learning_rate), parameter.ndim >= 2
        groups.setdefault(key, []).append(parameter)
    return optimizer_class(
        [
            {"params": parameters, "lr": rate, "weight_decay": weight_decay if matrix else 0.0}
            # The method's own rate comes first: training shows the first group's.
            for (rate, matrix), parameters in sorted(groups.items(), key=lambda group: group[0][0] != learning_rate)
        ],
        lr=learning_rate,
        **options,
    )


def _rates(model: nn.Module, learning_rate: float, head_rate: float) -> dict[int, float]:
    """id(parameter) -> its rate, of those that have another one than the adapter's."""
    found: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            found |= {id(parameter): head_rate for parameter in module.parameters()}
        for name, factor in getattr(module, "rate_factors", {}).items():
            found |= {id(parameter): factor * learning_rate for parameter in getattr(module, name).parameters()}
    return found


def _adamw_class(name: str) -> Any:
    attribute = _ADAMW[name]
    if attribute is None:
        return torch.optim.AdamW
    check_bitsandbytes(f"optimizer {name}")
    import bitsandbytes.optim

    return getattr(bitsandbytes.optim, attribute)


def _need_lora(model: nn.Module, what: str) -> None:
    if not any("lora_B" in path and entry.requires_grad for path, entry in model.named_parameters()):
        raise AdapterError(f"{what} needs a trainable LoRA adapter (matrices A and B); use adamw for this method.")


def _lora_fa(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    _need_lora(model, "LoRA-FA")
    extra = {
        path.split("lora_")[1].partition(".")[0]
        for path, entry in model.named_parameters()
        if "lora_" in path and entry.requires_grad and "lora_A" not in path and "lora_B" not in path
    }
    if extra:
        # peft pairs whatever has "lora" in its name with what follows it.
        raise AdapterError(
            f"LoRA-FA trains plain LoRA only; this adapter also has lora_{', lora_'.join(sorted(extra))}."
        )
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config[model.active_adapter]
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=learning_rate, weight_decay=weight_decay
    )
