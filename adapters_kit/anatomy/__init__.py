"""Where the blocks, branches, linears, experts, embeddings and head of a transformers model are, found by structure."""

from adapters_kit.anatomy.probe import probe_inputs
from adapters_kit.anatomy.structure import (
    base_model,
    block_linears,
    blocks,
    embeddings,
    expert_parameters,
    head,
    output_embeddings,
    routers,
)

__all__ = [
    "base_model",
    "block_linears",
    "blocks",
    "embeddings",
    "expert_parameters",
    "head",
    "output_embeddings",
    "probe_inputs",
    "routers",
]
