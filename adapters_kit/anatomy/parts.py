"""What `map_model` returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "cross-attention", "ffn", "mixer"]


@dataclass(frozen=True)
class Tap:
    """Where a tensor can be read while the model runs: an argument or a result of one module.

    Attributes:
        path: the module.
        side: "input": what it is called with; "output": what it returns.
        key: for an input the position or the keyword of the argument; for an output the index in the returned tuple,
            None if the tensor itself is returned.
    """

    path: str
    side: Literal["input", "output"]
    key: int | str | None = None


@dataclass(frozen=True)
class Linear:
    """One matrix product of a block.

    Attributes:
        path: full path in the base model.
        role: "q", "k", "v", "qkv", "kv", "o" in attention; "gate", "up", "gate_up", "down" in a feed-forward; "" where
            neither the flow of data nor the name settles it.
        in_features, out_features: widths, whatever the storage (4 bit, Conv1D).
        kind: class of the module, e.g. "Linear", "Linear4bit", "Conv1D".
        bypassed: never called, its weight is used by another module (Mamba's `dt_proj`): what wraps it never runs.
    """

    path: str
    role: str
    in_features: int
    out_features: int
    kind: str
    bypassed: bool = False


@dataclass(frozen=True)
class ExpertWeight:
    """A fused weight of all experts of one layer; `path` is what `LoraConfig(target_parameters=...)` takes.

    Attributes:
        path: full path of the parameter in the base model.
        shape: (experts, ., .): the order of in and out features differs between models.
    """

    path: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Branch:
    """One thing that is added to the residual stream: x + h, or norm(x + h).

    Attributes:
        kind: "attention", "cross-attention", "ffn" (with experts too: the whole of it), or "mixer": what else writes
            into the stream (state-space, recurrence, convolution).
        module: path of the module whose output is h. None if h is a raw tensor operation, as in XLNet's attention:
            then h = `sum` − `residual`.
        index: position of h in the tuple (or list: OpenAI GPT) that `module` returns; None if it returns h itself.
        width: number of features of h.
        dim: the dimension of h that holds them: −1, but 1 where channels come first (SqueezeBERT, CNNs).
        residual: where to read x; always read before `module` returns. None if no module ever sees x.
        sum: where to read x + h: the input of the module that reads it first, if that module is in the same block.
        norm: path of the norm that turns x + h into the next value of the stream (post-norm models); else None.
        branch_norm: path of the norm that ends the branch itself (sandwich norm: Gemma 2, OLMo 2); then it is `module`.
        inner: where there is a `branch_norm`, path of the module that it normalises; its output may be a tuple.
        inner_index: as `index`, for `inner`.
        aligned: whether h leaves `module` in the shape of x. False where windows are cut (Swin) or batch and length
            are flattened; a function of single positions may still be applied to h, but not combined with x there.
        linears: paths of the linears that compute h, in the order in which they ran.
        experts: paths of the fused expert parameters inside.
    """

    kind: Kind
    module: str | None
    index: int | None
    width: int
    dim: int
    residual: Tap | None
    sum: Tap | None
    norm: str | None
    branch_norm: str | None
    inner: str | None
    inner_index: int | None
    aligned: bool
    linears: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def returns_tuple(self) -> bool:
        """Whether `module` returns a tuple of which h is one part."""
        return self.index is not None


@dataclass(frozen=True)
class Block:
    """One repeated layer.

    Attributes:
        path: full path in the base model.
        stack: path of the list that it is an element of.
        index: position in that list.
        kind: class of the module.
        branches: what it adds to the stream, in the order of the additions.
        linears: every linear inside, also those outside any branch; routers of experts are left out.
        experts: fused 3-D expert parameters.
        hidden_size: width of the residual stream; None if the block never ran.
        key_value_heads: of its self-attention; None without one or if unknown.
        calls: how often one forward runs it: 12 for ALBERT's shared layer, 0 if the probe did not reach it.
    """

    path: str
    stack: str
    index: int
    kind: str
    branches: tuple[Branch, ...]
    linears: tuple[Linear, ...]
    experts: tuple[ExpertWeight, ...]
    hidden_size: int | None
    key_value_heads: int | None
    calls: int


@dataclass(frozen=True)
class ModelMap:
    """The parts of a model, by full path in the base model (prefixes and wrappers of peft left out).

    Attributes:
        model_class: e.g. "LlamaForCausalLM".
        blocks: in order; an encoder's before the decoder's.
        embeddings: input embeddings: tokens or patches, then positions and the like.
        head: modules that only the task needs.
        output_embeddings: the linear to the vocabulary, if there is one.
        hidden_size: width of the residual stream of the last stack; None without blocks.
        key_value_heads: of the last block with self-attention.
        reason: why no block has an attention or feed-forward branch; None if one has.
    """

    model_class: str
    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    output_embeddings: str | None
    hidden_size: int | None
    key_value_heads: int | None
    reason: str | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of all blocks, in order."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def experts(self) -> tuple[ExpertWeight, ...]:
        """The fused experts' weights of all blocks, in order."""
        return tuple(weight for block in self.blocks for weight in block.experts)

    def branches(self, *kinds: Kind) -> Iterator[tuple[Block, Branch]]:
        """Every `(block, branch)`, of the given kinds if any are given."""
        for block in self.blocks:
            for branch in block.branches:
                if not kinds or branch.kind in kinds:
                    yield block, branch
