"""The peft tuner of a combination: it hands every call to the tuners of its parts, which work on the same model."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import nn

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.beside import BASE, BesideConfig, BesideModel, check_rows, mixed_batch
from adapters_kit.methods.together.config import CombinedConfig
from adapters_kit.peft_plugin import parameter_prefixes, register_container, tuner_class


class CombinedModel(BaseTuner):
    """One adapter made of several methods.

    Parts are put into the model by their own tuners, kept in `tuners` (peft type -> tuner), one for each kind,
    whichever adapters it serves. They are not submodules: parameters are found in the model's layers, under the names
    that each method gives them alone. So a saved combination holds its parts' tensors side by side.
    """

    prefix = "combined_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's interface

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put every part of the adapter into `model`. See `BaseTuner.inject_adapter`."""
        config: CombinedConfig = self.peft_config[adapter_name]
        if not config.parts:
            raise AdapterError(
                "A combination without parts trains nothing. Name some: wrap(model, ['lora', 'prefix'])."
            )
        self._check_nesting()
        flags = {} if len(self.peft_config) == 1 else {id(p): (p, p.requires_grad) for p in model.parameters()}
        for part in config.parts.values():
            part.inference_mode = config.inference_mode
            self._inject_part(part, model, adapter_name, low_cpu_mem_usage)
            if config.gate and part.peft_type == "LORA":
                _gate_lora(model, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        for parameter, flag in flags.values():
            parameter.requires_grad = flag

    @classmethod
    def around(cls, tuner: BaseTuner, configs: dict[str, CombinedConfig]) -> "CombinedModel":
        """A combination whose adapters `tuner` has put into the model already, each as its only part."""
        self = cls.__new__(cls)  # peft's own __init__ injects an adapter, and these are there
        nn.Module.__init__(self)
        self.model = tuner.model
        self.targeted_module_names, self.targeted_parameter_names = [*tuner.targeted_module_names], []
        tuner.peft_config = {name: next(iter(config.parts.values())) for name, config in configs.items()}
        self.peft_config = self.model.peft_config = configs
        self.active_adapter = tuner.active_adapter
        self.tuners[str(next(iter(tuner.peft_config.values())).peft_type.value)] = tuner
        self.training = tuner.training
        return self

    @property
    def tuners(self) -> dict[str, BaseTuner]:
        """peft type -> the tuner of that part."""
        # In __dict__, not in _modules: as submodules they would show the whole model several times.
        return self.__dict__.setdefault("_part_tuners", {})

    def _inject_part(self, part: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        kind = part.peft_type.value
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and type(base := layer.get_base_layer()).__name__ == "Linear8bitLt":
                # peft's 8-bit LoRA reads them off the layer right below, which may be another part's.
                layer.state, layer.index = base.state, base.index
        # A fresh tuner would take the model's configs for its own.
        configs = model.__dict__.pop("peft_config", None)
        try:
            if kind not in self.tuners:
                kind_of_tuner: Any = tuner_class(kind)
                self.tuners[kind] = kind_of_tuner(
                    model, {adapter_name: part}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                )
                return
            tuner = self.tuners[kind]
            tuner.peft_config[adapter_name] = part
            tuner.active_adapter = self.active_adapter
            tuner.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            if kind in self.tuners:
                self.tuners[kind].peft_config.pop(adapter_name, None)
            raise
        finally:
            model.__dict__.pop("peft_config", None)
            if configs is not None:
                model.peft_config = configs
            self.targeted_module_names = sorted(
                {name for tuner in self.tuners.values() for name in tuner.targeted_module_names}
            )

    def _check_nesting(self) -> None:
        """Two methods around the same weight apply in a fixed order, which a further adapter could not keep."""
        kinds = {
            name: {part.peft_type.value for part in config.parts.values() if not isinstance(part, BesideConfig)}
            for name, config in self.peft_config.items()
        }
        around = {name: found for name, found in kinds.items() if found}
        if len(around) > 1 and len(set.union(*around.values())) > 1:
            listed = "; ".join(f"{name!r}: {', '.join(sorted(found))}" for name, found in around.items())
            raise AdapterError(
                f"These adapters put different methods around the same weights ({listed}), and their order would "
                "depend on which came first. Keep such adapters in models of their own."
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, in every part."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for tuner in self.tuners.values():
            tuner.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter's parts out of the model.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise UnknownNameError(
                f"There is no adapter {adapter_name!r}. {did_you_mean(adapter_name, self.peft_config)}"
            )
        remaining = [name for name in self.active_adapters if name != adapter_name]
        remaining = remaining or [name for name in self.peft_config if name != adapter_name][:1]
        with warnings.catch_warnings():
            # Each layer would announce which adapter it turns to; that is decided here, for all of them.
            warnings.simplefilter("ignore", UserWarning)
            for module in self.model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(adapter_name)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(adapter_name, new_active_adapters=remaining or None)
        del self.peft_config[adapter_name]
        for tuner in self.tuners.values():
            tuner.peft_config.pop(adapter_name, None)
        self.set_adapter(remaining)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for kind, prefix in parameter_prefixes().items():
            if f".{prefix}" in key:
                tuner: Any = tuner_class(kind)
                return tuner._remove_adapter_name_from_key(key, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with ExitStack() as stack:
            check_rows(names or (), self.peft_config)
            # Ours last: its hooks on task heads then overrule those of peft, which knows one tuner's adapters only.
            for kind, tuner in self.tuners.items():
                if names is None or isinstance(tuner, BesideModel):
                    continue
                if not hasattr(type(tuner), "_enable_peft_forward_hooks"):
                    raise AdapterError(f"adapter_names: peft's {kind} cannot mix adapters within a batch.")
                tuner.training = self.training
                known = [name if name in tuner.peft_config else BASE for name in names]
                stack.enter_context(tuner._enable_peft_forward_hooks(*args, **kwargs | {"adapter_names": known}))
            stack.enter_context(mixed_batch(self.model, self.peft_config, kwargs))
            yield

    def _check_merge_allowed(self) -> None:
        kept = {label for config in self.peft_config.values() for label in unmergeable(config)}
        if kept:
            raise AdapterError(
                f"{', '.join(sorted(kept))} cannot be merged into weights. fold(model) merges the other parts and "
                "keeps an adapter of the rest; unload() takes everything off."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the parts that can be merged; the others stay active beside the weights."""
        for layer in reversed(wrappers(self.model)):  # inner ones first: IA³ scales what LoRA then adds to
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        for layer in wrappers(self.model):
            layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
            self.merge_adapter(adapter_names, safe_merge)
        for tuner in self.tuners.values():
            if hasattr(type(tuner), "detach_from"):
                tuner.detach_from(self.model)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AdapterError("A combination has no layers of its own; its parts' tuners make them.")


def wrappers(model: nn.Module) -> list[BaseTunerLayer]:
    """The adapter layers that stand around a weight, outer ones first."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer")]


def unmergeable(config: CombinedConfig) -> list[str]:
    """Labels of the parts that no weight can take in; with a gate, all of them."""
    return [label for label, part in config.parts.items() if config.gate or isinstance(part, BesideConfig)]


class GatedLora(LoraVariant):
    """LoRA whose update each token weighs: `W x + sigmoid(g · x) · scaling · B A x`."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`result`, (batch, tokens, out), with the gated update of `x`, (batch, tokens, in), added."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module._cast_input_dtype(x, down.weight.dtype)
        update = up(down(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
        return result + torch.sigmoid(module.lora_gate[active_adapter](x)) * update

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Refused."""
        raise AdapterError("A gated LoRA depends on its input, so no weight can take it in.")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Refused."""
        raise AdapterError("A gated LoRA depends on its input, so no weight can take it in.")


def _gate_lora(model: nn.Module, adapter_name: str) -> None:
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        if not hasattr(layer, "lora_gate"):
            layer.lora_gate = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
        down = layer.lora_A[adapter_name]
        gate = nn.Linear(down.in_features, 1, device=down.weight.device, dtype=down.weight.dtype)
        for parameter in gate.parameters():
            if parameter.device.type != "meta":
                nn.init.zeros_(parameter)
        layer.lora_gate[adapter_name] = gate
        layer.lora_variant[adapter_name] = GatedLora()


register_container("combined", CombinedConfig, CombinedModel)
