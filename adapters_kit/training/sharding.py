"""FSDP2 on processes without accelerators, which accelerate passes over in silence; and what cannot be sharded at all.

torch shards a model over CPUs as it does over GPUs. accelerate looks at FSDP's settings for GPUs alone: with a config
file that says FSDP it would train plain copies, each with the whole model in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from adapters_kit.anatomy import base_model, blocks
from adapters_kit.errors import TrainingError

_CLASSES = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # accelerate's and peft's environment variable


def wants_fsdp() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(accelerator: Accelerator) -> None:
    """Makes `accelerator` do what the launcher's config says, if that is FSDP2.

    Raises:
        TrainingError: it would train plain copies all the same.
    """
    state: Any = accelerator.state
    if not wants_fsdp() or state.num_processes == 1:
        return
    if state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()  # from the launcher's environment
        if plugin.fsdp_version == 2:
            state.fsdp_plugin = plugin
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        raise TrainingError(
            f"The launcher's config says FSDP, and accelerate would train {state.distributed_type} here: every process "
            "with the whole model. Set fsdp_version: 2 in it, as examples/distributed/fsdp2.yaml does, or use ddp.yaml."
        )


def prepare_shards(model: nn.Module) -> None:
    """Tells accelerate and peft which modules to spread one by one: the model's blocks.

    Left to transformers' own list they would spread an encoder's embeddings twice, as a module and inside of one.

    Raises:
        TrainingError: blocks share parameters, which FSDP cannot spread (Compacter's one rule for all layers).
    """
    base = base_model(model)
    found = [base.get_submodule(path) for path in blocks(base)]
    if found and not os.environ.get(_CLASSES):
        os.environ[_CLASSES] = ",".join(sorted({type(block).__name__ for block in found}))
    homes: Counter[int] = Counter()
    for block in found:
        homes.update({id(parameter) for parameter in block.parameters() if parameter.requires_grad})
    if any(count > 1 for count in homes.values()):
        raise TrainingError(
            "FSDP gives each block's parameters a place of their own, and here blocks share some of what is trained. "
            "Set method.shared_phm_rule: false (compacter), or launch with examples/distributed/ddp.yaml."
        )
