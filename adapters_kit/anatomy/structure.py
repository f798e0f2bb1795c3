"""What can be read off a model without running it: blocks, linears, fused experts, head, embeddings.

Everything is found by structure (where attention sits, which lists repeat it), never by a table of architectures. All
paths are those of the base model: on a model that peft has wrapped, `base_layer` and the prefix `base_model.model` are
left out, which is also how peft itself reads `target_modules`.
"""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel` or peft tuner; the model itself if it is neither."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def unwrap(module: nn.Module) -> nn.Module:
    """The base module below any adapter layers that peft put around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def own_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """`named_children()` without the adapters that hang beside a module instead of around it.

    Such an adapter is a peft layer without a `base_layer`, or anything with a true attribute `is_adapter_part`.
    """

    def is_adapter(child: nn.Module) -> bool:
        beside = isinstance(child, BaseTunerLayer) and "base_layer" not in child._modules
        return beside or getattr(child, "is_adapter_part", False) is True

    return [(name, child) for name, child in module.named_children() if not is_adapter(child)]


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields `(path, module)` for the base model's modules, parents first, each module once; adapters are left out."""
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in own_parts(module):
            yield from visit(f"{path}.{name}" if path else name, child)

    return visit("", base_model(model))


def is_linear(module: nn.Module) -> bool:
    """Whether this is a matrix product with a stored weight: nn.Linear (bitsandbytes' are subclasses) or Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)`, right for packed 4-bit weights and for Conv1D's transposed storage."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def is_attention(module: nn.Module) -> bool:
    """Whether the module calls itself attention, the one naming convention that every transformers model keeps."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _holds_attention(module: nn.Module) -> bool:
    return any(is_attention(unwrap(child)) for child in module.modules())


def _holds_weights(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _lists(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in modules if isinstance(module, nn.ModuleList | nn.Sequential)]


def _descend(path: str, module: nn.Module, inner_lists: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """The blocks at or below one element of a list of blocks."""
    found: dict[str, nn.Module] = {}
    for inner_path, inner in inner_lists:
        below = inner is module or inner_path.startswith(path + ".")
        if below and not any(inner_path.startswith(done + ".") for done in found):
            for index, element in inner.named_children():
                found |= _descend(f"{inner_path}.{index}", unwrap(element), inner_lists)
    return found or {path: module}


def _attention_blocks(modules: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Elements of the outermost lists that repeat attention.

    A list inside such an element takes its place when each of ITS elements is a whole layer, that is, holds attention
    beside something else: Swin's stages, ALBERT's groups. T5's list of sub-layers and a list of experts do not qualify.
    """
    lists = [(path, module) for path, module in _lists(modules) if _holds_attention(module)]

    def is_whole_layer(element: nn.Module) -> bool:
        return _holds_attention(element) and not is_attention(unwrap(element))

    inner = [(path, module) for path, module in lists if all(is_whole_layer(child) for child in module.children())]
    found: dict[str, nn.Module] = {}
    done: list[str] = []
    for path, module in lists:
        if not any(path.startswith(outer + ".") for outer in done):
            done.append(path)
            for index, element in module.named_children():
                element = unwrap(element)
                if _holds_weights(element):
                    found |= _descend(f"{path}.{index}", element, inner)
    return found


def _plain_blocks(modules: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Blocks of a model without attention: the elements of the outermost ModuleLists.

    Where an inner list of one class holds most of an element's parameters (ConvNeXt's stages), that list's elements.
    """

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def is_stack(module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleList) and len({type(unwrap(child)) for child in module}) == 1

    inner = [
        (path, module)
        for (path, module), parent in zip(modules, _parents(modules), strict=True)
        if is_stack(module) and parent is not None and 2 * size(module) > size(parent)
    ]
    found: dict[str, nn.Module] = {}
    done: list[str] = []
    for path, module in modules:
        if isinstance(module, nn.ModuleList) and not any(path.startswith(outer + ".") for outer in done):
            done.append(path)
            for index, element in module.named_children():
                element = unwrap(element)
                if _holds_weights(element):
                    found |= _descend(f"{path}.{index}", element, inner)
    return found


def _parents(modules: list[tuple[str, nn.Module]]) -> list[nn.Module | None]:
    by_path = dict(modules)
    return [by_path.get(path.rpartition(".")[0]) if path else None for path, _ in modules]


def _split_blocks(found: dict[str, nn.Module], modules: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Adds the lists beside a list of bare attentions: XLM keeps `attentions` and `ffns` in two parallel lists."""
    by_path = dict(modules)
    result: dict[str, nn.Module] = {}
    for path, module in found.items():
        result[path] = module
        list_path, _, index = path.rpartition(".")
        if not is_attention(module):
            continue
        parent = by_path[list_path.rpartition(".")[0]]
        for name, sibling in parent.named_children():
            beside = isinstance(sibling, nn.ModuleList) and len(sibling) == len(by_path[list_path])
            twin = dict(sibling.named_children()).get(index) if beside else None
            if twin is not None and _holds_weights(sibling):
                element_path = ".".join(filter(None, [list_path.rpartition(".")[0], name, index]))
                result[element_path] = unwrap(twin)
    return result


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks (layers) of the model, in order of registration: encoder before decoder.

    Layers that are run many times with the same weights (ALBERT) appear once. XLM, which has no module for a layer,
    gives its pieces: `attentions.0`, `ffns.0`, `attentions.1`, …

    Returns:
        path -> module. Empty if the model repeats nothing.
    """
    modules = list(walk(model))
    found = _attention_blocks(modules)
    return _split_blocks(found, modules) if found else _plain_blocks(modules)


def _expert_counts(model: nn.Module) -> set[int]:
    """Every count of experts that the configuration (or one of its parts) names."""
    counts: set[int] = set()

    def read(entries: dict) -> None:
        for key, value in entries.items():
            if isinstance(value, dict):
                read(value)
            elif str(key).endswith("experts") and isinstance(value, int) and not isinstance(value, bool) and value > 1:
                counts.add(value)

    config = getattr(base_model(model), "config", None)
    if config is not None:
        read(config.to_dict())
    return counts


def _mixtures(modules: list[tuple[str, nn.Module]], counts: set[int]) -> list[str]:
    """Paths of the modules that route between experts: each has fused experts, or a child called `experts`."""
    found = []
    for path, module in modules:
        children = [(name, unwrap(child)) for name, child in module.named_children()]
        if any(
            name == "experts" or any(_is_fused_expert(one, counts) for one in child.parameters(recurse=False))
            for name, child in children
        ):
            found.append(path)
    return found


def _is_fused_expert(parameter: torch.Tensor, counts: set[int]) -> bool:
    return (
        parameter.ndim == 3
        and parameter.shape[0] in counts
        and parameter.is_floating_point()
        and 1 not in parameter.shape
    )


def routers(model: nn.Module) -> list[str]:
    """Paths of the linears that choose between experts: one output per expert (or one: a gate on a shared expert)."""
    counts = _expert_counts(model)
    if not counts:
        return []
    modules = list(walk(model))
    mixtures = _mixtures(modules, counts)

    def is_router(path: str, module: nn.Module) -> bool:
        # The gate may sit one level down, in a router module.
        for mixture in mixtures:
            inside = path.removeprefix(mixture + ".")
            if inside != path and inside.count(".") <= 1 and not inside.startswith("experts."):
                return linear_shape(module)[1] in {1, *counts}
        return False

    return [path for path, module in modules if is_linear(module) and is_router(path, module)]


def block_linears(model: nn.Module) -> list[str]:
    """Full paths of every linear in the blocks (nn.Linear, Conv1D, bitsandbytes), routers of experts left out.

    Neither the head nor embeddings nor anything else outside the blocks is among them.
    """
    inside = tuple(path + "." for path in blocks(model))
    skipped = set(routers(model))
    return [
        path for path, module in walk(model) if is_linear(module) and path.startswith(inside) and path not in skipped
    ]


def expert_parameters(model: nn.Module) -> list[str]:
    """Full paths of fused mixture-of-experts weights: 3-D parameters `(experts, ., .)`, which no nn.Linear holds.

    They are what `peft.LoraConfig(target_parameters=...)` takes. Weights that a quantization has packed into integers
    are left out, since peft cannot add to them.
    """
    counts = _expert_counts(model)
    if not counts:
        return []
    inside = tuple(path + "." for path in blocks(model))
    return [
        f"{path}.{name}"
        for path, module in walk(model)
        if path.startswith(inside) and not isinstance(module, CONVOLUTIONS)
        for name, parameter in module.named_parameters(recurse=False)
        if _is_fused_expert(parameter, counts)
    ]


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    wanted = None if wanted is None else unwrap(wanted)
    return next((path for path, module in walk(model) if module is wanted), None)


def output_embeddings(model: nn.Module) -> str | None:
    """Path of the linear from hidden states to the vocabulary, or None."""
    get = getattr(base_model(model), "get_output_embeddings", None)
    return _path_of(model, get()) if get is not None else None


def head(model: nn.Module) -> list[str]:
    """Paths of the outermost modules with weights that only the task needs: what is not in the pretrained backbone.

    `["lm_head"]` for a causal LM, `["pre_classifier", "classifier"]` for DistilBERT's classification, `[]` for a bare
    model.
    """
    base = base_model(model)
    prefix = getattr(base, "base_model_prefix", "")
    backbone = getattr(base, prefix, None) if prefix else None
    # A bare model may keep its blocks, but not its embeddings, under its own prefix (DINOv3): that is no backbone.
    outer = [path for path in embeddings(model) if not path.startswith(prefix + ".")]
    if isinstance(backbone, PreTrainedModel) and not outer:
        inside = tuple(blocks(model))
        # An encoder or decoder beside the backbone is no head: it holds blocks.
        return [
            name
            for name, child in base.named_children()
            if name != prefix
            and any(True for _ in child.parameters())
            and not any(path.startswith(name + ".") for path in inside)
        ]
    language_head = output_embeddings(model)
    if language_head is not None:
        return [language_head]
    # Some task models (CLIPForImageClassification) name a backbone that they do not have: the head is what ends them.
    labels = getattr(getattr(base, "config", None), "num_labels", None)
    if "For" in type(base).__name__ and labels:
        for name, child in reversed(list(base.named_children())):
            linears = [module for module in child.modules() if is_linear(module)]
            if linears and linear_shape(linears[-1])[1] == labels:
                return [name]
    return []


def pooler(model: nn.Module) -> list[str]:
    """Paths of the linears that make one vector of the backbone's hidden states for a task head.

    `["bert.pooler.dense"]`, for example. Most checkpoints never trained theirs, or for next-sentence prediction only.
    """
    inside = f"{getattr(base_model(model), 'base_model_prefix', '')}.pooler."
    return [path for path, module in walk(model) if is_linear(module) and f"{path}.".startswith(inside)]


def embeddings(model: nn.Module) -> list[str]:
    """Paths of the input embeddings: tokens (or patches) first, then positions, segments and the like."""
    found: list[str] = []
    for _, module in walk(model):
        get = getattr(module, "get_input_embeddings", None)
        if get is None:
            continue
        try:
            path = _path_of(model, get())
        except (NotImplementedError, AttributeError):  # audio models have no table to look up
            continue
        if path and path not in found:
            found.append(path)
    inside = tuple(path + "." for path in blocks(model))
    for path, module in walk(model):
        outside = not path.startswith(inside) and not any(path.startswith(done + ".") for done in found)
        if isinstance(module, nn.Embedding) and outside and path not in found:
            found.append(path)
    return found
