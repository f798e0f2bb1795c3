"""Where the blocks, branches, linears, experts, embeddings and head of a transformers model are, found by structure."""

from adapters_kit.anatomy.parts import Block, Branch, ExpertWeight, Linear, ModelMap, Tap
from adapters_kit.anatomy.probe import probe_inputs
from adapters_kit.anatomy.render import render, tree
from adapters_kit.anatomy.shapes import fake, fake_batch, shape_dtype, shapes_alone
from adapters_kit.anatomy.structure import (
    base_model,
    block_linears,
    blocks,
    embeddings,
    expert_parameters,
    head,
    output_embeddings,
    pooler,
    routers,
)
from adapters_kit.anatomy.writers import map_model

__all__ = [
    "Block",
    "Branch",
    "ExpertWeight",
    "Linear",
    "ModelMap",
    "Tap",
    "base_model",
    "block_linears",
    "blocks",
    "embeddings",
    "expert_parameters",
    "fake",
    "fake_batch",
    "head",
    "map_model",
    "output_embeddings",
    "pooler",
    "probe_inputs",
    "render",
    "routers",
    "shape_dtype",
    "shapes_alone",
    "tree",
]
