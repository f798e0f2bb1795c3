"""Prefix tuning inside attention, as a peft method: trained keys and values in every layer.

model = ak.wrap(model, "prefix", num_virtual_tokens=20)
...train...
ak.eject(model)          # only if prefix_projection was on: drops the MLP, outputs stay
"""

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from adapters_kit.anatomy import base_model
from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.beside import BesideModel
from adapters_kit.methods.prefix import holders as prefix_probe
from adapters_kit.methods.prefix.attention import CHILD
from adapters_kit.methods.prefix.config import SMALL_STD, PrefixConfig
from adapters_kit.methods.prefix.layer import PrefixLayer
from adapters_kit.peft_plugin import register
from adapters_kit.registry import Method

COMMON = 5000  # tokens that words to start from are drawn from


class PrefixModel(BesideModel):
    """Puts a `PrefixLayer` inside each attention that the config names."""

    prefix = "prefix_"
    tuner_layer_cls = layer_class = PrefixLayer

    def _prepare_model(self, peft_config: PrefixConfig, model: nn.Module) -> None:
        """Measure shapes, and activations to start from, before anything is changed."""
        self._start = {}
        if peft_config.shapes is not None:
            _check_shapes(peft_config, model)
            return
        ids = _start_ids(peft_config, model)
        seen = prefix_probe.run(model, _start_inputs(peft_config, model, ids))
        chosen = _choose(peft_config, seen)
        peft_config.shapes = {path: seen[path].shape for path in chosen}
        given = peft_config.init or peft_config.init_text or peft_config.init_ids
        if ids and (given or any(note.kind == "decoder" for note in seen.values())):
            self._start = {path: _start(peft_config, seen[path], len(ids)) for path in chosen}
        elif peft_config.init_std is None and not peft_config.prefix_projection:
            self._start = {path: _random_start(peft_config, seen[path]) for path in chosen}

    @staticmethod
    def _check_target_module_exists(peft_config: PrefixConfig, key: str) -> bool:
        return _path(key) in (peft_config.shapes or {})

    def _create_and_replace(
        self,
        peft_config: PrefixConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # Mixed models call this with themselves as `self`: only the arguments and `self.model` can be relied on.
        path = _path(current_key)
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = PrefixLayer(target, (peft_config.shapes or {})[path])
            layer.attach()
            layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, self._start.pop(path, None))

    @staticmethod
    def detach_from(model: nn.Module) -> None:
        """Take every prefix off `model`."""
        for layer in prefix_layers(model):
            layer.detach()


def _path(key: str) -> str:
    """The attention's path in the base model; in mixed models keys start with the path of the wrapper."""
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def prefix_layers(model: nn.Module) -> list[PrefixLayer]:
    """Every prefix layer inside `model`."""
    return [module for module in model.modules() if isinstance(module, PrefixLayer)]


def _start_ids(config: PrefixConfig, model: nn.Module) -> list[int]:
    """The tokens whose keys and values the prefix starts from, at most as many as it has; none for a random start."""
    ids = config.init_ids
    if config.init_text:
        from transformers import AutoTokenizer

        source = config.tokenizer_name_or_path or getattr(base_model(model), "name_or_path", "")
        if not source:
            raise AdapterError(
                "init_text needs a tokenizer, and the model does not say where it came from. Give "
                "tokenizer_name_or_path='...', or init_ids=[...]."
            )
        ids = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(config.init_text)["input_ids"]
    if ids is None and config.init != "random" and prefix_probe.reads_text(model):
        ids = _words(model, config.num_virtual_tokens)
    return list(ids or ())[: config.num_virtual_tokens]


def _words(model: nn.Module, count: int) -> list[int]:
    """Different ids of common tokens: vocabularies begin with those. After Lester et al. 2021, arXiv:2104.08691."""
    text = base_model(model).config.get_text_config()
    special = {value for key, value in text.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    drawn = [i for i in torch.randperm(min(text.vocab_size, COMMON)).tolist() if i not in special][:count]
    # Models that begin every text with the same token expect to see it; attention rests on it.
    first = getattr(text, "bos_token_id", None)
    return [first, *drawn[1:]] if isinstance(first, int) and 0 <= first < text.vocab_size else drawn


def _start_inputs(config: PrefixConfig, model: nn.Module, ids: list[int]) -> dict[str, torch.Tensor] | None:
    """The batch to read activations from, `ids` repeated to the length of the prefix; None without ids."""
    if not ids:
        return None
    positions = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa and its kin keep two of their positions for padding.
    length = min(config.num_virtual_tokens, max(positions - 2, 1) if positions else config.num_virtual_tokens)
    return prefix_probe.text_inputs(model, (ids * length)[:length])


def _start(config: PrefixConfig, seen: prefix_probe.Seen, different: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values (tokens, heads, width) to start from; None on a model of shapes alone."""
    if seen.key.device.type == "meta":
        return None
    rows = torch.arange(config.num_virtual_tokens)
    parts = [part.float().cpu().transpose(0, 1) for part in (seen.key, seen.value)]
    parts = [part[rows % len(part)] for part in parts]
    for part in parts:  # two equal tokens would get equal gradients for ever
        part[different:] += (config.init_std or SMALL_STD) * torch.randn_like(part[different:])
    return parts[0], parts[1]


def _random_start(config: PrefixConfig, seen: prefix_probe.Seen) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys near zero and values of half the size of the model's own; None for small ones: in a decoder, which random
    values disturb, and on a model of shapes alone.

    Tokens with equal values get equal gradients, in their keys too, and Adam moves them all alike.
    """
    if seen.kind == "decoder" or seen.key.device.type == "meta":
        return None
    heads, key_width, value_width, _ = seen.shape
    size = seen.value.float().square().mean().sqrt().item()
    key = torch.randn(config.num_virtual_tokens, heads, key_width) * SMALL_STD
    value = torch.randn(config.num_virtual_tokens, heads, value_width) * max(SMALL_STD, size / 2)
    return key, value


def _choose(config: PrefixConfig, seen: dict[str, prefix_probe.Seen]) -> list[str]:
    """The paths that the config selects, in the model's order; an option that selects nothing is an error."""
    kinds = {note.kind for note in seen.values()}
    for kind in config.attentions or ():
        if kind not in kinds:
            raise UnknownNameError(f"attentions: this model has no {kind!r} attention. It has: {sorted(kinds)}.")
    numbers = {int(number) for path in seen for number in re.findall(r"\.(\d+)\.", path)[:1]}
    for layer in _layers(config) or ():
        if layer not in numbers:
            there = f"{min(numbers)} to {max(numbers)}" if numbers else "none with a number"
            raise UnknownNameError(f"layers_to_transform: there is no layer {layer}. There are: {there}.")
    chosen = [path for path, note in seen.items() if _selected(config, path, note.kind)]
    if not chosen:
        named = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
        raise UnknownNameError(f"{named} leave no attention module to put a prefix in. There are: {', '.join(seen)}.")
    return chosen


def _layers(config: PrefixConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def _selected(config: PrefixConfig, path: str, kind: str) -> bool:
    if config.attentions and kind not in config.attentions:
        return False
    number = re.findall(r"\.(\d+)\.", path)[:1]
    layers = _layers(config)
    if layers is not None and (not number or int(number[0]) not in layers):
        return False
    if config.target_modules is None and config.exclude_modules is None:
        return True
    return bool(check_target_module_exists(_Names(config), path))


class _Names:
    """Only the names of a config, for peft's own matching."""

    modules_to_save = layers_to_transform = target_parameters = None

    def __init__(self, config: PrefixConfig) -> None:
        self.target_modules = config.target_modules if config.target_modules is not None else ".*"
        self.exclude_modules = config.exclude_modules


def _check_shapes(config: PrefixConfig, model: nn.Module) -> None:
    """A saved prefix must find its attention modules; peft itself would only warn, or load half of it."""
    prefix_probe.check_model(model)
    there = prefix_probe.attention_modules(model)
    missing = [path for path in config.shapes or () if path not in there]
    if missing:
        raise AdapterError(
            f"The prefix belongs to attention modules that this {type(base_model(model)).__name__} lacks: "
            f"{', '.join(missing[:3])}{' …' if missing[3:] else ''}. Load the base model that it was trained on."
        )


def eject(model: PeftModel, adapter_name: str | None = None) -> int:
    """Replace the MLP that writes a prefix (`prefix_projection=True`) by the keys and values that it writes.

    Outputs stay equal; the adapter becomes smaller and is saved as a plain prefix. Call it after training.

    Args:
        model: a model with prefixes.
        adapter_name: which adapter; all by default.

    Returns:
        How many attention modules lost an MLP; 0 if there was none.
    """
    layers = prefix_layers(model)
    if not layers:
        raise AdapterError("This model has no prefix; eject() drops the MLP of one with prefix_projection=True.")
    known = list(model.peft_config)
    if adapter_name is not None and adapter_name not in known:
        raise UnknownNameError(f"There is no adapter {adapter_name!r}. {did_you_mean(adapter_name, known)}")
    names = known if adapter_name is None else [adapter_name]
    count = sum(layer.eject(name) for layer in layers for name in names)
    for name in names:
        config = model.peft_config[name]
        for part in (config, *getattr(config, "parts", {}).values()):
            if isinstance(part, PrefixConfig):
                part.prefix_projection = False
    return count


def _prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    prefix_probe.check_model(model)
    return options


register("prefix", PrefixConfig, PrefixModel, PrefixLayer)

PREFIX = Method(
    name="prefix",
    config="adapters_kit.methods.prefix.model:PrefixConfig",
    trains="keys and values before every attention",
    when="where one base serves many tasks that generate: it ships as a KV cache too",
    paper="Li & Liang 2021, arXiv:2101.00190",
    mergeable=False,
    defaults={"num_virtual_tokens": 20},
    learning_rate=5e-3,
    # There it starts near zero, and has to grow to the size of keys and values.
    classifier_learning_rate=3e-2,
    # It learns more slowly than other methods, and what is frozen needs no regularisation (docs/defaults.md).
    base_dropout=0.0,
    prepare=_prepare,
)
