"""The config of several methods under one adapter name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, PromptLearningConfig
from peft.config import PeftConfig

from adapters_kit.errors import AdapterError
from adapters_kit.methods.beside import BesideConfig, OwnConfig
from adapters_kit.peft_plugin import peft_type, tuner_class


@dataclass
class CombinedConfig(OwnConfig):
    """Several peft methods that are trained, saved, switched and disabled as one adapter.

    Attributes:
        parts: a label such as "lora" -> the config of that part (or the dictionary it was saved as).
        gate: every part learns for each token how much it contributes (UniPELT, Mao et al. 2022, arXiv:2110.07577).
            The paper averages a gate over the sequence; here each token has its own, so that padding and later tokens
            change nothing.
        modules_to_save: modules outside the parts to train and save in full, such as a task head.

    Raises:
        AdapterError: parts that cannot go together.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    gate: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("combined")
        self.parts = {label: _as_config(label, part) for label, part in self.parts.items()}
        kinds: dict[str, str] = {}
        for label, part in self.parts.items():
            _check_part(label, part, self.gate)
            if part.peft_type in kinds:
                raise AdapterError(
                    f"{kinds[part.peft_type]!r} and {label!r} are both {part.peft_type.value} adapters, and one "
                    "adapter holds one of a kind. Train them as two adapters instead: see stack()."
                )
            kinds[part.peft_type] = label
            if self.gate and isinstance(part, BesideConfig):
                part.gate = True  # checked: a field of its own
        # Around weights first, then beside modules: each finds the base model's own modules where it expects them.
        order = sorted(self.parts, key=lambda label: _layer_of(self.parts[label]))
        self.parts = {label: self.parts[label] for label in order}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "parts"}
        return shallow | {"parts": {label: _plain(part.to_dict()) for label, part in self.parts.items()}}


def _layer_of(part: PeftConfig) -> int:
    """0: scales a weight's input or output (IA³), 1: adds to what a weight gives, 2: beside a module."""
    if isinstance(part, BesideConfig):
        return 2
    return 0 if part.peft_type == "IA3" else 1


def _as_config(label: str, part: Any) -> PeftConfig:
    if isinstance(part, PeftConfig):
        return part
    if isinstance(part, dict) and "peft_type" in part:
        return PeftConfig.from_peft_type(**part)
    raise AdapterError(f"parts[{label!r}] is neither a peft config nor one that was saved: {part!r}.")


def _check_part(label: str, part: PeftConfig, gate: bool) -> None:
    reason = None
    tuner = tuner_class(part.peft_type)
    if isinstance(part, CombinedConfig):
        reason = "is itself a combination; name its parts"
    elif isinstance(part, PromptLearningConfig) or part.is_prompt_learning or part.is_adaption_prompt:
        reason = "works on the model's input, not inside its layers; inside them there is 'prefix'"
    elif isinstance(part, AdaLoraConfig):
        reason = "needs a call of its own after each step; use 'lora'"
    elif getattr(tuner, "uses_shared_state", False):
        reason = "keeps weights that all layers share outside the layers; use 'lora'"
    elif getattr(part, "bias", "none") != "none":
        reason = "trains biases of the base model, which have no place in a combination; set bias='none'"
    elif gate and not (isinstance(part, BesideConfig) and hasattr(part, "gate")) and part.peft_type != "LORA":
        reason = "cannot be gated; gates are for 'lora', bottleneck adapters and 'prefix'"
    elif gate and (getattr(part, "use_dora", False) or getattr(part, "target_parameters", None)):
        reason = "cannot be gated with DoRA or target_parameters; leave those out"
    if reason:
        raise AdapterError(f"{label!r} ({part.peft_type.value}) cannot be part of a combination: it {reason}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
