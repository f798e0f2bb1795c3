"""Bottleneck adapters as a peft method, and the published presets.

`BottleneckConfig` (config.py) says what is computed, `find_sites` (sites.py) where,
`BottleneckLayer` (layer.py) does it. Here: what peft calls to add, switch, save and remove them.
"""

from typing import Any

from torch import nn

from adapters_kit import peft_plugin
from adapters_kit.methods.beside import BesideModel
from adapters_kit.methods.bottleneck.config import BottleneckConfig
from adapters_kit.methods.bottleneck.layer import (
    Bottleneck,
    BottleneckLayer,
    attach,
    detach,
    new_rule,
    tap_residual,
)
from adapters_kit.methods.bottleneck.phm import PHMRule
from adapters_kit.methods.bottleneck.sites import find_sites
from adapters_kit.registry import Method


class BottleneckModel(BesideModel):
    """What peft builds around a model for a `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = layer_class = BottleneckLayer
    detach_from = staticmethod(detach)

    def _prepare_model(self, config: BottleneckConfig, model: nn.Module) -> None:
        if config.sites is None:
            config.sites = find_sites(model, config)
            config.target_modules, config.exclude_modules = tuple(config.sites), None

    @staticmethod
    def _check_target_module_exists(config: BottleneckConfig, key: str) -> bool:
        return _site_path(config, key) is not None

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        # Mixed models call this with themselves as `self`: everything needed comes from arguments and `self.model`.
        model = self.model
        path = _site_path(config, current_key)
        assert path is not None and config.sites is not None  # as `_check_target_module_exists` found
        site = config.sites[path]
        layer = attach(target, site["index"], parent, model)
        rule = None
        if config.phm_layer and config.shared_phm_rule:
            rule = _rule_of(model, adapter_name) or new_rule(config)
        net = Bottleneck(site["width"], config.width_at(path), config, site["reads"], site["in_norm"], rule)
        layer.add(adapter_name, net.to(layer.place.dtype).train(model.training))
        if source := site["residual"]:
            tap_residual(layer, model.get_submodule(source["path"]), source["side"], source["key"])
        net.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".bottleneck_net.{adapter_name}.", ".bottleneck_net.", 1)


def _site_path(config: BottleneckConfig, key: str) -> str | None:
    """The site that `key` stands for; in mixed models keys start with the path of the wrapper."""
    path = key.removeprefix("base_model.model.")
    return path if path in (config.sites or {}) else None


def _rule_of(model: nn.Module, adapter_name: str) -> PHMRule | None:
    """The rule that the layers of this adapter made so far share."""
    for module in model.modules():
        if isinstance(module, BottleneckLayer) and adapter_name in module.bottleneck_net:
            return module.bottleneck_net[adapter_name].down.rule
    return None


def _fill_in_sites(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    sites = options.get("sites") or find_sites(model, BottleneckConfig(**options))
    return {**options, "sites": sites, "target_modules": tuple(sites), "exclude_modules": None}


def _preset(name: str, trains: str, when: str, paper: str, learning_rate: float = 1e-3, **defaults: Any) -> Method:
    return Method(
        name=name,
        config="adapters_kit.methods.bottleneck.config:BottleneckConfig",
        trains=trains,
        when=when,
        paper=paper,
        mergeable=False,
        defaults=defaults,
        learning_rate=learning_rate,
        prepare=_fill_in_sites,
    )


_PFEIFFER: dict[str, Any] = {
    "mh_adapter": False,
    "original_ln_before": True,
    "non_linearity": "relu",
    "reduction_factor": 16,
}
_COMPACTER: dict[str, Any] = {"phm_layer": True, "non_linearity": "gelu", "reduction_factor": 32}

HOULSBY = _preset(
    "houlsby",
    "an MLP after attention and after FFN",
    "where nothing needs merging: about LoRA's score with half of its parameters",
    "Houlsby et al. 2019, arXiv:1902.00751",
    3e-3,
)
PFEIFFER = _preset(
    "pfeiffer",
    "an MLP after FFN",
    "as houlsby with half of the places, for many small adapters of one base",
    "Pfeiffer et al. 2020, arXiv:2005.00247",
    3e-3,
    **_PFEIFFER,
)
# The paper scales it by 4: then one rate moves the second matrix four times as far as the first (docs/defaults.md).
PARALLEL = _preset(
    "parallel",
    "an MLP beside FFN",
    "where much is to be learned beside FFN, and nothing needs merging",
    "He et al. 2021, arXiv:2110.04366",
    mh_adapter=False,
    is_parallel=True,
    non_linearity="relu",
    reduction_factor=2,
)
ADAPTERPLUS = _preset(
    "adapterplus",
    "an MLP after FFN, scaled per channel",
    "on vision transformers, which it was made for",
    "Steitz and Roth 2024, arXiv:2406.06820",
    mh_adapter=False,
    original_ln_before=True,
    original_ln_after=False,
    residual_before_ln=False,
    non_linearity="gelu",
    reduction_factor=96,
    scaling="channel",
)
COMPACTER = _preset(
    "compacter",
    "Kronecker-factored MLPs after attention and FFN",
    "where a bottleneck must be smaller still: its matrices are products of small ones",
    "Mahabadi et al. 2021, arXiv:2106.04647",
    **_COMPACTER,
)
COMPACTER_PLUS_PLUS = _preset(
    "compacter++",
    "Kronecker-factored MLPs after FFN",
    "as compacter, with half of the places",
    "Mahabadi et al. 2021, arXiv:2106.04647",
    **_PFEIFFER | _COMPACTER,
)

peft_plugin.register("bottleneck", BottleneckConfig, BottleneckModel, BottleneckLayer)
