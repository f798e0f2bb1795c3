"""`map_model`: the parts of a model, with what each block adds to the residual stream."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adapters_kit.anatomy.bypass import bypassed
from adapters_kit.anatomy.parts import Block, Branch, ExpertWeight, Kind, ModelMap, Tap
from adapters_kit.anatomy.probe import probe_inputs
from adapters_kit.anatomy.roles import key_value_heads, linears_of
from adapters_kit.anatomy.shapes import fake, fake_batch, shape_dtype, shapes_alone
from adapters_kit.anatomy.structure import (
    CONVOLUTIONS,
    base_model,
    block_linears,
    blocks,
    embeddings,
    expert_parameters,
    head,
    is_attention,
    is_linear,
    linear_shape,
    output_embeddings,
    walk,
)
from adapters_kit.anatomy.trace import Chain, Link, State, Trace, Write, trace
from adapters_kit.errors import ModelError

_CROSS = re.compile("cross|encoder_attn|encdec")
_FEED_FORWARD = re.compile("mlp|ffn|ffw|feed_?forward|moe|experts")


def map_model(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> ModelMap:
    """The blocks of a transformers model and what each adds to the residual stream, found by running it once.

    Nothing is looked up by architecture. One forward on a few tokens (in eval mode, without gradients, adapters
    switched off) shows which modules' outputs are added to the stream. The model is left as it was.

    Args:
        model: a transformers model, with or without a task head, quantized or wrapped by peft or not.
        inputs: a batch for the forward, where `probe_inputs(model)` cannot make one or misses a part of the model.

    Raises:
        ModelError: the model has no such inputs, or fails on them.
    """
    base = base_model(model)
    if shapes_alone(base):
        with fake(base, shape_dtype(base)):
            return map_model(base, fake_batch(inputs))
    modules = dict(walk(base))
    found = blocks(base)
    traces = [_run(base, found, probe_inputs(base) if inputs is None else inputs)]
    for path in [] if inputs is not None else _unreached(base, modules, found, traces[0]):
        # The image tower of a language model that was asked with text alone: asked by itself.
        try:
            own = probe_inputs(modules[path])
        except ModelError:
            continue
        traces.append(_run(modules[path], found, own, path))
    experts, linears = expert_parameters(base), block_linears(base)
    never_called = bypassed(base, linears, inputs)
    mapped = []
    writes = [_by_block(one) for one in traces]
    for path in found:
        run = next((number for number, one in enumerate(traces) if one.calls[path]), 0)
        mapped.append(_block(path, modules, traces[run], writes[run].get(path, []), linears, experts, never_called))
    return ModelMap(
        model_class=type(base).__name__,
        blocks=tuple(mapped),
        embeddings=tuple(embeddings(base)),
        head=tuple(head(base)),
        output_embeddings=output_embeddings(base),
        hidden_size=next((block.hidden_size for block in reversed(mapped) if block.hidden_size), None),
        key_value_heads=next((block.key_value_heads for block in reversed(mapped) if block.key_value_heads), None),
        reason=_reason(base, mapped),
    )


def _run(model: nn.Module, found: Mapping[str, nn.Module], inputs: Mapping[str, Any], prefix: str = "") -> Trace:
    # A cache is of no use here, and some hybrids of attention and state-space layers cannot make an empty one.
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        return trace(model, found, {**uncached, **inputs}, prefix)
    except Exception as error:
        shapes = {key: tuple(getattr(value, "shape", ())) for key, value in inputs.items()}
        raise ModelError(
            f"{type(model).__name__} failed on the probe inputs {shapes}: {type(error).__name__}: {error}. "
            "Give a batch that it runs on: map_model(model, inputs={...})."
        ) from error


def _unreached(base: nn.Module, modules: Mapping[str, nn.Module], found: Mapping[str, Any], seen: Trace) -> list[str]:
    """Paths of the outermost models inside this one which hold blocks, none of which ran."""
    result: list[str] = []
    for path, module in modules.items():
        held = [block for block in found if block.startswith(path + ".")]
        whole = isinstance(module, PreTrainedModel) and module is not base
        nested = any(path.startswith(outer + ".") for outer in result)
        if whole and held and not nested and not any(seen.calls[block] for block in held):
            result.append(path)
    return result


def _block(
    path: str,
    modules: Mapping[str, nn.Module],
    seen: Trace,
    writes: list[Write],
    all_linears: list[str],
    all_experts: list[str],
    never_called: set[str],
) -> Block:
    linears = [one for one in all_linears if one.startswith(path + ".")]
    experts = [one for one in all_experts if one.startswith(path + ".")]
    branches: dict[tuple, Branch] = {}
    # Parallel branches are added in any order: they are listed in the order in which they were computed.
    for write in sorted(writes, key=lambda write: _time(write, seen)):  # a shared layer repeats itself
        branch = _branch(path, write, modules, seen, linears, experts)
        branches.setdefault((branch.module, branch.index, branch.sum), branch)
    listed = linears_of(linears, modules, list(branches.values()), seen, never_called)
    stack, _, index = path.rpartition(".")
    return Block(
        path=path,
        stack=stack,
        index=int(index) if index.isdigit() else 0,
        kind=type(modules[path]).__name__,
        branches=tuple(branches.values()),
        linears=listed,
        experts=tuple(ExpertWeight(one, _shape(one, modules)) for one in experts),
        hidden_size=next((branch.width for branch in branches.values()), None),
        key_value_heads=key_value_heads(listed, list(branches.values()), _config(path, modules)),
        calls=seen.calls[path],
    )


def _by_block(seen: Trace) -> dict[str, list[Write]]:
    """The additions that last, by the block that they come from."""
    found: dict[str, list[Write]] = {}
    for write in seen.writes:
        if _lives(write.result):
            found.setdefault(_owner(write, seen), []).append(write)
    return found


def _shape(parameter: str, modules: Mapping[str, nn.Module]) -> tuple[int, int, int]:
    path, _, name = parameter.rpartition(".")
    return tuple(getattr(modules[path], name).shape)


def _config(path: str, modules: Mapping[str, nn.Module]) -> Any:
    """The configuration of the innermost model that the block belongs to."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(modules.get(path), "config", None)
        if config is not None:
            return config.get_text_config() if hasattr(config, "get_text_config") and not path else config
    return None


def _owner(write: Write, seen: Trace) -> str:
    """The block that the written branch comes from; for a raw tensor operation the block in which it is added."""
    link = _link(write.chain, seen)
    links = [link] if link else write.chain.links if write.chain else ()
    for one in links:
        owner = next((block for block in seen.blocks if (one.path + ".").startswith(block + ".")), None)
        if owner is not None:
            return owner
    return write.block


def _time(write: Write, seen: Trace) -> int:
    link = _link(write.chain, seen)
    return seen.order[link.path] if link else write.time


def _link(chain: Chain | None, seen: Trace) -> Link | None:
    """The outermost module of the chain that runs once per run of its block, and so stands for this branch alone.

    A dropout that attention and feed-forward share does not.
    """
    for link in reversed(chain.links if chain else ()):
        owner = next((block for block in seen.blocks if (link.path + ".").startswith(block + ".")), None)
        if owner is not None and seen.calls[link.path] == seen.calls[owner]:
            return link
    return None


def _lives(state: State) -> bool:
    """Whether this sum is a value of the stream: it leaves the block, or something later is added to it.

    Positions added to the queries (DETR) are not.
    """
    waiting, seen = [state], set()
    while waiting:
        one = waiting.pop()
        if one.borders:
            return True
        if id(one) not in seen:
            seen.add(id(one))
            waiting += [after for _, after in one.norms] + [write.result for write in one.residual_of]
    return False


def _branch(
    block: str, write: Write, modules: Mapping[str, nn.Module], seen: Trace, linears: list[str], experts: list[str]
) -> Branch:
    link = _link(write.chain, seen)
    normed = write.chain.normed if write.chain and link else None
    inner = _link(normed, seen) if normed else None
    through = write.through | ({link.path} if link else set())
    used = sorted((path for path in linears if path in through), key=lambda path: seen.order[path])
    dim = _feature_dim(block, write.shape, modules)
    first_norm = write.result.norms[0][0] if write.result.norms else None
    kept = write.result.borders or any(_lives(later.result) for later in write.result.residual_of)
    return Branch(
        kind=_kind(block, write, link, used, modules, seen),
        module=link.path if link else None,
        index=link.index if link else None,
        width=write.shape[dim],
        dim=dim,
        residual=_residual(write, block, seen),
        sum=_tap(write.result, write.shape, block, seen),
        norm=None if kept else first_norm,
        branch_norm=link.path if link and normed else None,
        inner=inner.path if inner else None,
        inner_index=inner.index if inner else None,
        aligned=link is None or link.shape == write.shape,
        linears=tuple(used),
        experts=tuple(path for path in experts if any(path.startswith(one + ".") for one in through)),
    )


def _feature_dim(block: str, shape: Any, modules: Mapping[str, nn.Module]) -> int:
    """−1; but 1, channels first, if the block's parameters have the size of that dimension and not of the last."""
    widths = {size for parameter in modules[block].parameters() if parameter.ndim for size in parameter.shape}
    widths |= {size for path in modules if path.startswith(block + ".") for size in _linear_widths(modules[path])}
    return 1 if len(shape) > 2 and shape[-1] not in widths and shape[1] in widths else -1


def _linear_widths(module: nn.Module) -> tuple[int, ...]:
    return linear_shape(module) if is_linear(module) else ()


def _kind(
    block: str, write: Write, link: Link | None, linears: list[str], modules: Mapping[str, nn.Module], seen: Trace
) -> Kind:
    own = {path for path in write.through | write.running if path.startswith(block + ".") or path == block}
    attentions = [path for path in own if is_attention(modules[path])]
    # MobileBERT adds once per layer, after attention and feed-forwards: the last of these is what writes.
    beside = [path for path in linears if not any(path.startswith(one + ".") for one in attentions)]
    if attentions and len(beside) < 2:
        names = [f"{path[len(block) :]} {type(modules[path]).__name__}".lower() for path in attentions]
        crossed = any(_CROSS.search(name) for name in names) or any(path in seen.fed for path in attentions)
        return "cross-attention" if crossed else "attention"
    name = f"{link.path[len(block) :]} {type(modules[link.path]).__name__}".lower() if link else ""
    if _FEED_FORWARD.search(name) or attentions:
        return "ffn"
    # What looks at one position at a time: weights, and no convolution over several.
    flow = [modules[path] for path in (write.through & own) | ({link.path} if link else write.running)]
    parts = [part for module in flow for part in module.modules()]
    mixes = any(isinstance(part, CONVOLUTIONS) and any(size > 1 for size in part.kernel_size) for part in parts)
    return "ffn" if not mixes and any(weight.ndim > 1 for part in parts for weight in part.parameters()) else "mixer"


def _residual(write: Write, block: str, seen: Trace) -> Tap | None:
    """Where x can be read before h is there."""
    state: State | None = write.residual
    while state is not None:
        tap = _tap(state, write.shape, block, seen, write.time)
        if tap is not None:
            return tap
        # Parallel branches added one after the other (Cohere): no module sees the sum between them.
        state = state.made_by.residual if state.made_by else None
    return None


def _tap(state: State, shape: Any, block: str, seen: Trace, before: float = float("inf")) -> Tap | None:
    """Where this value is read: at a norm of the block if there is one, since a norm takes and gives one tensor."""
    taps = [tap for time, tap, there in state.taps if time < before and there == shape]
    inside = [tap for tap in taps if (tap.path + ".").startswith(block + ".")]
    at_norms = [tap for tap in taps if tap.path in seen.norms]
    return next(iter([tap for tap in inside if tap in at_norms] + inside + at_norms), None)


def _reason(base: nn.Module, mapped: list[Block]) -> str | None:
    kinds = {branch.kind for block in mapped for branch in block.branches}
    if kinds - {"mixer"}:
        return None
    name = type(base).__name__
    if not mapped:
        return f"{name} has no repeated blocks."
    if not any(block.calls for block in mapped):
        return f"None of the blocks of {name} was called on the probe inputs (or only through `.forward`)."
    if kinds:
        one = next(branch for block in mapped for branch in block.branches)
        mixer = (
            f" What its blocks add to the residual stream comes from modules like {one.module}." if one.module else ""
        )
        return f"{name} has no attention and no feed-forward branches.{mixer}"
    kind = mapped[-1].kind
    return f"{name} has no attention and no feed-forward branches that its blocks ({kind}) add to a residual stream."
