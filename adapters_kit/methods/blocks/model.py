"""`blocks` as a peft method: the minima, the scales or both that a GGUF file stores, trained in place.

Nothing is lost on the way to the file: a merge writes two fp16 numbers a block into a copy of it.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from adapters_kit import peft_plugin
from adapters_kit.anatomy import block_linears
from adapters_kit.errors import AdapterError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.methods.blocks.config import BlocksConfig
from adapters_kit.methods.blocks.layer import FIX, BlocksLayer, blocks_of
from adapters_kit.registry import Method


class BlocksModel(BaseTuner):
    """What peft builds around a model for a `BlocksConfig`."""

    prefix = "blocks_"
    tuner_layer_cls = BlocksLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's interface; targets are found by structure

    def _prepare_adapter_config(self, config: BlocksConfig, model_config: dict[str, Any]) -> BlocksConfig:
        return config

    def _create_and_replace(
        self,
        config: BlocksConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target
        if not isinstance(target, BlocksLayer):
            weight = blocks_of(target.get_base_layer() if hasattr(target, "get_base_layer") else target)
            if not config.inference_mode and not config.fields(weight.kind):  # old adapters may name such layers
                raise AdapterError(
                    f"{current_key} lies in {weight.format} blocks, of which train={config.train!r} trains nothing. "
                    "Leave it out of target_modules, or train='auto' what each layer's format stores."
                )
            layer = BlocksLayer(target)
            setattr(parent, target_name, layer)
        active = adapter_name in self.active_adapters
        layer.add(adapter_name, config, trained=active and not config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)


def _fill_in_targets(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Every linear of the blocks whose format stores a number that is to be trained."""
    if options.get("target_modules"):
        return options
    config = BlocksConfig(train=options.get("train", "auto"))
    layers = {path: model.get_submodule(path).weight for path in block_linears(model)}
    packed = {path: weight for path, weight in layers.items() if isinstance(weight, BlockTensor)}
    if not packed:
        raise AdapterError(
            "The method 'blocks' trains what a GGUF file's blocks store, and no linear of this model lies in blocks. "
            + FIX
        )
    wanted = [path for path, weight in packed.items() if config.fields(weight.kind)]
    if not wanted:
        kinds = sorted({weight.format for weight in packed.values()})
        stored = "minima" if config.train == "minima" else "fp16 scales"
        fix = "Train the scales: train='scales'." if config.train == "minima" else "Train LoRA on this file."
        raise AdapterError(f"train={config.train!r}: this file's formats ({', '.join(kinds)}) store no {stored}. {fix}")
    return {**options, "target_modules": wanted}


BLOCKS = Method(
    name="blocks",
    config="adapters_kit.methods.blocks.config:BlocksConfig",
    trains="the minima or scales that a GGUF file's blocks store",
    when="where the result must be one .gguf file of the same size",
    paper="Xu et al. 2023, arXiv:2309.14717; Kim et al. 2023, arXiv:2305.14152",
    mergeable=True,
    needs='a .gguf file, quantize="keep"',
    learning_rate=1e-3,
    prepare=_fill_in_targets,
)

peft_plugin.register("blocks", BlocksConfig, BlocksModel, BlocksLayer)
