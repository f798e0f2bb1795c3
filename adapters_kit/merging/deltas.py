"""What an adapter adds to each weight, computed by peft itself, one layer at a time.

The adapter is attached to a model without weights (see `skeleton`). Then, for one layer after the other, the base
weight is put in, peft merges, and the result is taken out. So every method that peft can merge is covered, ranks,
patterns and variants mean what they mean in peft, and memory holds the adapter and one layer.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters_kit.anatomy import embeddings, output_embeddings
from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.artifacts.factors import check_ranks, strip
from adapters_kit.artifacts.patterns import check_patterns
from adapters_kit.errors import ShippingError
from adapters_kit.merging.roundtrip import Rounding
from adapters_kit.merging.weightless import empty_model, fill, hollow, is_hollow, make_hollow
from adapters_kit.methods.moved import names_now, targets_now
from adapters_kit.peft_plugin import parameter_prefixes

# Initialisations of LoRA that move a part of the base weight into the adapter. Only the deterministic ones can be
# repeated; for the others the base that was trained on is not known.
_RESIDUAL = {"pissa": "pissa_init", "olora": "olora_init"}
_UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")
_AS_IT_IS = "the adapter cannot be merged. Ship it as it is: export(..., format='peft')."


@dataclass(frozen=True)
class Unit:
    """A module of the base that the adapter changes.

    Attributes:
        path: its dotted name in the base model.
        module: what peft put there.
        base: the module that was there before.
    """

    path: str
    module: nn.Module
    base: nn.Module

    @property
    def copy(self) -> nn.Module | None:
        """The trained copy that replaces the module as a whole (`modules_to_save`); None for an update of the base."""
        copies = None if isinstance(self.module, BaseTunerLayer) else getattr(self.module, "modules_to_save", None)
        return None if copies is None else copies[self.module.active_adapters[0]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that `merge_unit` returns, by their name in the base model."""
        result = self.copy or self.base
        return {f"{self.path}.{name}": tuple(parameter.shape) for name, parameter in result.named_parameters()}

    @property
    def wanted(self) -> list[str]:
        """Base parameters that have to be put in, by their name in the unit."""
        if self.copy is not None:
            return []
        return [name for name, parameter in self.base.named_parameters() if is_hollow(parameter)]


@dataclass
class Attached:
    """An adapter on a model without weights.

    Attributes:
        model: the `PeftModel`; base parameters hollow (see `skeleton.hollow`), the adapter's real, in float32.
        base: the bare model inside, its modules replaced by peft's.
        bare: the same model untouched, for its names.
        owners: parameter or buffer name -> the module of `base` that owns it.
        units: the modules that change.
        replaced: whole parameters that the adapter brings along (biases, resized embeddings), by name in the base.
        tied: name -> all names of the same parameter, for parameters with several names.
        loaded: the config before it was fitted to the adapter (`bare.config` is the fitted one).
    """

    model: PeftModel
    base: PreTrainedModel
    bare: PreTrainedModel
    owners: dict[str, nn.Module]
    units: list[Unit]
    replaced: dict[str, torch.Tensor]
    tied: dict[str, tuple[str, ...]]
    loaded: PretrainedConfig


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """name -> all the names of its parameter, for parameters that have more than one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def fit_config(kind: type, config: PretrainedConfig, adapter: Adapter) -> PreTrainedModel:
    """The empty model, with the vocabulary and the number of labels of the parameters that the adapter brings along."""
    model = empty_model(kind, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    sized = {f"{path}.weight" for path in (*embeddings(model), output_embeddings(model)) if path}
    words = model.config.get_text_config()
    changed = False
    for key, tensor in adapter.weights.items():
        name = re.sub(r"\.(modules_to_save|base_layer|token_adapter)(?=\.)", "", strip(key))
        if tensor.ndim == 0 or name not in shapes or shapes[name] == tuple(tensor.shape):
            continue
        if name in sized and shapes[name][0] == getattr(words, "vocab_size", None):
            config.get_text_config().vocab_size = tensor.shape[0]
        elif not adapter.record:
            config.num_labels = tensor.shape[0]
        changed = True
    return empty_model(kind, config) if changed else model


def _check_mergeable(adapter: Adapter) -> None:
    config, where = adapter.config, adapter.folder
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ShippingError(
            f"{where} is a {adapter.method} adapter: it adds virtual tokens, not a weight update, so it cannot be "
            "merged. Ship it as an adapter: export(..., format='peft')."
        )
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_UNREPEATABLE):
        raise ShippingError(
            f"{where} was initialised with {init!r}, which changed the base weights in a way that cannot be repeated. "
            "Convert it to plain LoRA first: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=initial_adapter)."
        )


def usual_rounding(kind: str, bare: PreTrainedModel, checkpoint: Checkpoint) -> Rounding:
    """What `from_pretrained(quantization_config=...)` of that kind makes of a model as QLoRA does: every linear but the
    output embeddings in blocks of 64 with scales quantized once more, the rest in the checkpoint's dtype."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    leave = get_keys_to_not_convert(bare)
    linears = (nn.Linear, Conv1D)
    paths = [path for path, module in bare.named_modules() if type(module) in linears]
    floats = [stored.torch_dtype for stored in checkpoint.tensors.values() if stored.torch_dtype.is_floating_point]
    dtype = max(set(floats), key=floats.count)
    return Rounding(kind, frozenset(path for path in paths if should_convert_module(path, leave)), dtype)


def attach(adapter: Adapter, kind: type, config: PretrainedConfig) -> Attached:
    """The adapter on an empty model of class `kind`.

    Raises:
        ShippingError: the method cannot be merged, a tensor is missing, unmatched, or of the wrong shape.
    """
    # Longer than a screen: each step needs what the one before found, and any of them can refuse the adapter.
    _check_mergeable(adapter)
    check_ranks(adapter)
    bare = fit_config(kind, copy.deepcopy(config), adapter)
    check_patterns(adapter.raw, [path for path, _ in bare.named_modules()])
    base = copy.deepcopy(bare)
    originals = {module: path for path, module in base.named_modules()}
    tied = tied_names(base)
    computed = {id(parameter) for parameter in base.parameters() if not parameter.is_meta}
    make_hollow(base)
    peft_config = copy.deepcopy(targets_now(adapter.config, adapter.weights, bare))
    peft_config.inference_mode = True
    if getattr(peft_config, "init_lora_weights", None) is not None:
        peft_config.init_lora_weights = False  # the weights come from the file; `residual` repeats what matters
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    try:
        model = wrapper(base, peft_config).eval()
        weights = {name: _single(tensor) for name, tensor in adapter.weights.items()}
        own = get_peft_model_state_dict(model)
        weights = dict(names_now(weights, model, "default", own, bare))
        result = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)  # assigns instead of copying
    except Exception as error:  # peft raises KeyError, RuntimeError, ValueError, TypeError for what does not fit
        raise ShippingError(f"{adapter.folder} does not fit {kind.__name__}: {error}") from error
    result.unexpected_keys[:] = [key for key in result.unexpected_keys if not _shared_tokens(key, weights)]
    if result.unexpected_keys:
        raise ShippingError(
            f"{len(result.unexpected_keys)} tensors of {adapter.folder} match nothing in {type(base).__name__}, such "
            f"as {result.unexpected_keys[0]!r}. The adapter belongs to another base, or its config names other targets."
        )
    owners = {
        f"{path}.{leaf}" if path else leaf: module
        for module, path in originals.items()
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }
    replaced: dict[str, torch.Tensor] = {}
    for name, module in owners.items():
        parameter = module._parameters.get(name.rpartition(".")[2])
        if parameter is not None and not is_hollow(parameter) and id(parameter) not in computed:
            replaced = dict.fromkeys(tied.get(name, (name,)), parameter.data) | replaced
    own = {id(tensor) for name, module in owners.items() for tensor in [getattr(module, name.rpartition(".")[2])]}
    named = dict(model.named_parameters())
    prefixes = parameter_prefixes()  # an adapter of several methods has parameters of each
    of_method = [prefixes[peft_config.peft_type]] if peft_config.peft_type in prefixes else list(prefixes.values())
    saved = (*of_method, ".modules_to_save.", ".trainable_tokens_delta.")
    missing = [
        name
        for name in result.missing_keys
        if name in named and id(named[name]) not in own and any(part in name for part in saved)
    ]
    if missing:
        raise ShippingError(
            f"{len(missing)} adapter tensors are missing from {adapter.folder}, such as {missing[0]!r}. "
            "The file is incomplete, or its config names targets that were not trained."
        )
    units = list(_units(base, originals))
    if not units and not replaced:
        raise ShippingError(f"{adapter.folder} changes nothing in {type(base).__name__}.")
    return Attached(model, base, bare, owners, units, replaced, tied, config)


def _shared_tokens(key: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor holds the rows of a tied head, which peft saves although the embedding's stand for both."""
    leaf = ".trainable_tokens_delta"
    same = (other for other in weights if other != key and other.endswith(leaf))
    return key.endswith(leaf) and any(torch.equal(weights[key], weights[other]) for other in same)


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _units(base: nn.Module, originals: dict[nn.Module, str]) -> Iterator[Unit]:
    inside: list[str] = []
    for path, module in base.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(path + ".")
            if not (hasattr(module, "merge") or hasattr(module, "unload_and_optionally_merge_module")):
                raise ShippingError(f"{type(module).__name__} at {path} has no merge; {_AS_IT_IS}")
            replaced = next((m for m in module.modules() if originals.get(m) == path), None)
            if replaced is None:
                raise ShippingError(f"{type(module).__name__} at {path} is not an update of a weight; {_AS_IT_IS}")
            yield Unit(path, module, replaced)


def fill_unit(unit: Unit, adapter: Adapter, read: Callable[[str], torch.Tensor]) -> None:
    """Put the base weights into `unit`, as the adapter's training saw them.

    Args:
        read: parameter name in the base -> tensor, in the dtype of the training.
    """
    names = unit.wanted
    fill(unit.base, {name: read(f"{unit.path}.{name}") for name in names})
    start = _RESIDUAL.get(str(getattr(adapter.config, "init_lora_weights", None)))
    if start is not None and hasattr(unit.module, start):
        layer, name = unit.module, unit.module.active_adapters[0]
        trained = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        getattr(layer, start)(name, *([adapter.config.init_lora_weights] if start == "pissa_init" else []))
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = trained
    fill(unit.base, {name: _single(unit.base.get_parameter(name).data) for name in names})


def empty_unit(unit: Unit, names: Sequence[str]) -> None:
    """Drop base weights again: `names` are relative to the unit."""
    fill(unit.base, {name: hollow(unit.base.get_parameter(name).shape) for name in names})


def merge_unit(unit: Unit, adapter: Adapter, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The merged parameters of one unit in float32, by their name in the base model. The unit itself stays unmerged.

    Raises:
        ShippingError: peft cannot merge this layer.
    """
    # A copy is merged, so that nothing has to be undone. Hollow parameters are shared: a copy would take memory.
    keep = {id(parameter): parameter for parameter in unit.base.parameters() if is_hollow(parameter)}
    layer, base = copy.deepcopy((unit.module, unit.base), keep)
    unit = Unit(unit.path, layer, base)
    shapes = unit.shapes
    fill_unit(unit, adapter, read)
    try:
        if hasattr(layer, "unload_and_optionally_merge_module"):
            result = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge(safe_merge=False)
            result = layer.get_base_layer()
    except Exception as error:
        raise ShippingError(f"{unit.path} cannot be merged: {error}") from error
    merged = {f"{unit.path}.{name}": parameter.data for name, parameter in result.named_parameters()}
    if merged.keys() != shapes.keys():
        raise ShippingError(f"{unit.path} has other parameters after merging, which the base's layout cannot hold.")
    return merged
