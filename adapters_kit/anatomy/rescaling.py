"""Models that rewrite their weights when they first answer, which whatever stands beside a weight does not follow."""

from typing import Any

from torch import nn

from adapters_kit.anatomy.structure import base_model


def keep_weights(model: nn.Module) -> None:
    """Makes a model leave its weights as they are in evaluation. It computes the same function.

    RWKV halves the outputs of deep layers against overflow of fp16: the weights in place, the stream at every sixth
    layer. An adapter beside such a weight would not be halved with it.
    """
    base = base_model(model)
    config: Any = base.config
    if (getattr(config, "rescale_every", None) or 0) <= 0:
        return
    for module in base.modules():
        if getattr(module, "layers_are_rescaled", False):
            undo: Any = module
            mode, undo.training = undo.training, True
            undo._rescale_layers()
            undo.training = mode
    config.rescale_every = 0
