"""The only file that touches peft's private registries.

peft (0.21) has no public way to add a method from outside: `PeftType` is a closed enum, and mixed models carry their
own hard-coded lists. What had to be reached into is here, so that one file breaks if peft moves.
"""

from typing import Any

from peft import LoraConfig, PeftConfig, mixed_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import mixed as mixed_package
from peft.tuners.mixed import model as mixed
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.peft_types import PeftType, register_peft_method
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name`, added if it is not there yet."""
    key = name.upper()
    if key not in PeftType.__members__:
        member = str.__new__(PeftType, key)
        member._name_ = member._value_ = key
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType)
        PeftType._member_names_.append(key)
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
        # EnumType forbids setting members; `type` does not ask it.
        type.__setattr__(PeftType, key, member)
    return PeftType[key]


def register(
    name: str, config_class: type[PeftConfig], model_class: type[BaseTuner], layer_class: type[BaseTunerLayer]
) -> PeftType:
    """Make `config_class` / `model_class` a peft method called `name`, usable in mixed models too.

    Saving, loading, `add_adapter`, `set_adapter`, `AutoModel.from_pretrained(adapter_dir)` then work as for peft's own.
    Calling it again with the same name replaces the classes (module reloads).

    Args:
        name: lower case, e.g. "bottleneck". Parameter names start with `model_class.prefix`, which is `name + "_"`.
    """
    kind = peft_type(name)
    if kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_class
    else:
        register_peft_method(
            name=name,
            config_cls=config_class,
            model_cls=model_class,
            prefix=model_class.prefix,
            is_mixed_compatible=True,
        )
    if kind not in mixed.COMPATIBLE_TUNER_TYPES:
        # The package around the module holds a reference of its own, and that is the one which is checked.
        mixed.COMPATIBLE_TUNER_TYPES = mixed_package.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, kind)
        mixed.Layers = (*mixed.Layers, layer_class)
        mixed.PREFIXES.append(model_class.prefix)
        mixed.Configs = mixed.Configs | config_class
        mixed_model.MixedModel = MixedModel
    _OURS[config_class] = model_class
    return kind


_OURS: dict[type[PeftConfig], type[BaseTuner]] = {}


def register_container(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> PeftType:
    """Make a peft method of a model class that only delegates to other methods, and has no parameters of its own.

    It gets no entry in peft's table of parameter prefixes: `AutoModel.from_pretrained(adapter_dir)` then looks for
    those of every method, which is what a container holds.
    """
    kind = peft_type(name)
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_class
    return kind


class MixedModel(mixed.MixedModel):
    """peft's model of several adapter types at once, which also knows the types registered here.

    A registered `model_class` is called with this object as `self`, so what it needs must come from the arguments and
    `self.model`. It may define `detach_from(model)`, which takes its adapters off, for methods without a `base_layer`.
    """

    def _prepare_adapter_config(self, config: PeftConfig, model_config: dict) -> PeftConfig:
        return config if type(config) in _OURS else super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, config: PeftConfig, model: nn.Module) -> None:
        if type(config) in _OURS:
            _OURS[type(config)]._prepare_model(self, config, self.model)
        else:
            super()._prepare_model(config, model)

    @staticmethod
    def _check_target_module_exists(config: PeftConfig, key: str) -> Any:
        owner = _OURS.get(type(config), mixed.MixedModel)
        return owner._check_target_module_exists(config, key)

    def _create_and_replace(self, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        if type(config) in _OURS:
            _OURS[type(config)]._create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        ours = {_OURS[type(config)] for config in self.peft_config.values() if type(config) in _OURS}
        for model_class in ours:
            if merge and hasattr(model_class, "refuse_merge"):
                model_class.refuse_merge()
            if hasattr(model_class, "detach_from"):
                model_class.detach_from(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def peft_methods() -> dict[str, type[PeftConfig]]:
    """Every method that peft knows, ours included: lower-case name -> config class."""
    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def tuner_class(kind: PeftType | str) -> type[BaseTuner] | None:
    """The class that puts adapters of this peft type into a model; None for methods that have none."""
    return PEFT_TYPE_TO_TUNER_MAPPING.get(kind)


def parameter_prefixes() -> dict[PeftType, str]:
    """peft type -> what the names of its parameters start with, such as "lora_"."""
    return PEFT_TYPE_TO_PREFIX_MAPPING


def refused_by_peft(model: nn.Module, path: str) -> bool:
    """Whether peft will not adapt this linear: Mamba's kernels read some weights without calling the layer."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, path.rpartition(".")[2])
    except ValueError:
        return True
    return False


def renamed_by_peft(model: nn.Module, path: str) -> bool:
    """Whether peft's LoRA takes this linear for a fused expert.

    In mixture-of-experts models, peft maps the expert names of transformers 4 to the fused parameters of transformers
    5, by their last part only: a dense layer's or a shared expert's `down_proj` would silently go untrained.
    """
    config = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:
        return True
    return path not in config.target_modules
