"""Which attention modules of a model can hold a prefix, and how wide it must be: one forward tells."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from adapters_kit.anatomy import base_model, fake, fake_batch, probe_inputs, shape_dtype, shapes_alone
from adapters_kit.anatomy.structure import walk
from adapters_kit.errors import AdapterError, ModelError
from adapters_kit.methods.prefix.attention import _is_causal, original_config, route, view_config

NAME = "adapters_kit_probe"


class Seen(NamedTuple):
    """What one attention module computed with.

    Attributes:
        kind: "encoder", "decoder" or "cross".
        key: (key/value heads, tokens, key width), without the batch.
        value: (key/value heads, tokens, value width).
        hidden_size: width of the module's input.
    """

    kind: str
    key: torch.Tensor
    value: torch.Tensor
    hidden_size: int

    @property
    def shape(self) -> list[int]:
        """Key/value heads, key width, value width, input width."""
        return [self.key.shape[0], self.key.shape[2], self.value.shape[2], self.hidden_size]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, for every attention that looks its function up in transformers' `AttentionInterface`."""
    return {
        path: module
        for path, module in walk(model)
        # Whole models speak of the interface too, when they are asked to change it.
        if not isinstance(module, PreTrainedModel)
        and hasattr(getattr(module, "config", None), "_attn_implementation")
        and route(type(module)) is not None
    }


def check_model(model: nn.Module) -> None:
    """Refuse a model without a single attention that a prefix can join.

    Raises:
        ModelError: names the model and its attention, and what works there instead.
    """
    if attention_modules(model):
        return
    base = base_model(model)
    name = type(base).__name__
    own = sorted({type(module).__name__ for _, module in walk(base) if "attention" in type(module).__name__.lower()})
    how = "has no attention"
    if own:
        how = f"computes attention by itself ({', '.join(own[:3])}), not through transformers' AttentionInterface"
    generates = callable(getattr(base, "can_generate", None)) and base.can_generate()
    prompts = " and the soft prompts 'prompt' and 'p-tuning'" if generates else ""
    raise ModelError(
        f"{name} {how}, so there is no place to join a prefix. "
        f"What works on it: 'lora', 'ia3', bottleneck adapters such as 'houlsby'{prompts}."
    )


def run(model: nn.Module, inputs: dict[str, Any] | None = None) -> dict[str, Seen]:
    """Run the model once, without gradients, and note what each attention on the interface computed with.

    Args:
        model: the base model; adapters in it take part. Its mode and random state are left as they were.
        inputs: a batch of one row; the smallest that fits the model by default.

    Returns:
        Path of an attention module to its note; on the meta device, notes of shapes.
    """
    check_model(model)
    base = base_model(model)
    if shapes_alone(base):
        with fake(base, shape_dtype(base)):
            seen = run(base, fake_batch(inputs))
        return {path: note._replace(key=_shape(note.key), value=_shape(note.value)) for path, note in seen.items()}
    modules = attention_modules(base)
    notes: dict[str, Seen] = {}
    with _listening(base, modules, notes), torch.no_grad(), torch.random.fork_rng(devices=[]):
        base(**(probe_inputs(base) if inputs is None else inputs))
    return notes


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Listener:
    """Stands in for a prefix layer in a config view; never idle."""

    idle = False

    def __init__(self, path: str, kind: Any, notes: dict[str, Seen]) -> None:
        self.path, self.kind, self.notes = path, kind, notes
        self.cross, self.hidden_size = False, 0


def _note(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> Any:
    listener = module.config._view_layer
    kind = listener.kind(listener.cross, _is_causal(module, kwargs))
    listener.notes.setdefault(
        listener.path, Seen(kind, key[0].detach().clone(), value[0].detach().clone(), listener.hidden_size)
    )
    config = original_config(module.config)
    found = route(type(module))
    assert found is not None  # the module came here by its route
    function = found.table.get_interface(config._attn_implementation, found.eager)
    return function(module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, _note)


@contextmanager
def _listening(base: nn.Module, modules: dict[str, nn.Module], notes: dict[str, Seen]) -> Iterator[None]:
    encoder = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else None
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()

    def kind_of(module: nn.Module) -> Any:
        if encoder is None:
            return lambda cross, causal: "cross" if cross else "decoder" if causal else "encoder"
        own = "encoder" if id(module) in inside else "decoder"
        return lambda cross, causal: "cross" if cross else own

    modes = [(module, module.training) for module in base.modules()]
    configs = {path: module.config for path, module in modules.items()}
    hooks = []
    try:
        for module, _ in modes:
            # On CPU, bitsandbytes repacks 4-bit weights in eval mode, after which they cannot be trained through.
            module.training = hasattr(module, "support_avx512bf16_for_cpu")
        for path, module in modules.items():
            listener = _Listener(path, kind_of(module), notes)
            module.config = view_config(original_config(module.config), listener, NAME)
            hooks.append(module.register_forward_pre_hook(_listen_to_input, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for path, module in modules.items():
            module.config = configs[path]
        for module, mode in modes:
            module.training = mode


def _listen_to_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    listener = module.config._view_layer
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    hidden = next((value for name, value in given.items() if name != "self" and torch.is_tensor(value)), None)
    listener.hidden_size = hidden.shape[-1] if hidden is not None else 0
    others = [given.get(name) for name in ("key_value_states", "encoder_hidden_states")]
    listener.cross = any(other is not None and other is not hidden for other in others)


def reads_text(model: nn.Module) -> bool:
    """Whether the model's input is token ids, and not images or sound."""
    return getattr(base_model(model), "main_input_name", None) == "input_ids"


def text_inputs(model: nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """A batch of one row that begins with `ids`, for both sides of an encoder-decoder.

    Raises:
        AdapterError: the model does not read text, or an id is not in its vocabulary.
    """
    base = base_model(model)
    if not reads_text(base):
        reads = getattr(base, "main_input_name", None)
        raise AdapterError(
            f"{type(base).__name__} reads {reads!r}, not text, so a prefix cannot start from init_text or init_ids. "
            "Leave them out: it then starts from small random values."
        )
    vocabulary = base.config.get_text_config().vocab_size
    wrong = [i for i in ids if not 0 <= i < vocabulary]
    if wrong or not ids:
        raise AdapterError(f"init_ids: {wrong or 'empty'}; ids must be from 0 to {vocabulary - 1} for this model.")
    batch = probe_inputs(base)
    end = batch["input_ids"][..., -1:]
    row = torch.tensor(ids, device=end.device).view(*end.shape[:-1], -1)
    if base.config.is_encoder_decoder:  # whose classifiers read the end of the text
        row = torch.cat([row, end], dim=-1)
    batch = {**batch, "input_ids": row, "attention_mask": torch.ones_like(row)}
    return {**batch, "decoder_input_ids": row} if "decoder_input_ids" in batch else batch
