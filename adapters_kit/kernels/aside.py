"""Loading one more adapter without another look at those that a model has already.

`PeftModel.load_adapter` walks the whole model a dozen times, the layers of all its other adapters among it: the two
hundredth adapter takes two hundred times as long as the first. What it does to one adapter does not depend on those
that are not in use, so they are set aside meanwhile: each container of a LoRA layer (`lora_A`, `lora_dropout`, …)
makes room for one that holds the active adapters only, and takes what peft put there when it is back in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def others_aside(model: Any, loaded: Any) -> Iterator[None]:
    """Inside, the LoRA layers of `model` hold the active adapters and `loaded` only; afterwards all of them, in order.

    Args:
        model: a `PeftModel`. Methods other than LoRA share tensors between their adapters, and stay as they are.
        loaded: the name of the adapter that is loaded meanwhile.
    """
    from peft.tuners.lora import LoraModel

    tuner = getattr(model, "base_model", None)
    places = _containers(tuner) if isinstance(tuner, LoraModel) and len(model.peft_config) > 1 else ()
    swapped = []
    try:
        for layer, name, whole in places:
            # The newest stays in sight too: peft asks an empty container whether this is its first adapter.
            few = type(whole)()
            for kept in dict.fromkeys((*list(whole)[-1:], loaded, *layer.active_adapters)):
                if kept in whole:
                    few[kept] = whole[kept]
            layer._modules[name] = few
            swapped.append((layer, name, whole, few))
        yield
    finally:
        for layer, name, whole, few in reversed(swapped):  # a layer that stands in two places was swapped twice
            layer._modules[name] = whole
            for kept in few:
                whole[kept] = few[kept]
            if not few.training:  # which it was when it was made: peft has put the whole model into eval mode
                whole.training = False
                for part in whole.children():
                    if part.training:
                        part.eval()


def _containers(module: Any) -> Iterator[tuple[Any, str, Any]]:
    """`(layer, name, container)` of all LoRA layers below `module`, without a step into any container."""
    from peft.tuners.lora import LoraLayer

    names = {*module.adapter_layer_names, *module.other_param_names} if isinstance(module, LoraLayer) else set()
    for name, child in list(module.named_children()):
        if name in names and type(child) in (nn.ModuleDict, nn.ParameterDict):
            yield module, name, child
        else:
            yield from _containers(child)
