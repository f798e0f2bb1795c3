"""The options of prefix tuning inside attention."""

from dataclasses import dataclass, field
from typing import Literal

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.beside import BesideConfig
from adapters_kit.peft_plugin import peft_type

ATTENTIONS = ("encoder", "decoder", "cross")
INITS = ("words", "random")
SMALL_STD = 0.02


@dataclass
class PrefixConfig(BesideConfig):
    """Prefix tuning: trained keys and values that every token attends to, in every layer.

    Li & Liang 2021, arXiv:2101.00190. Unlike peft's `PrefixTuningConfig` the prefix is joined inside attention: it
    takes no positions and no cache, so gradient checkpointing, static caches, sliding windows and encoder-decoders
    work.

    Attributes:
        num_virtual_tokens: keys and values trained for each attention.
        prefix_projection: write the prefix with a small MLP while training (the paper's reparametrisation), one for
            each attention so that layers can be sharded. `eject()` replaces it by what it writes.
        projection_hidden_size: width of that MLP and of its input.
        init: "words": start from the keys and values that the model itself computes for some common words of its
            vocabulary, drawn with torch's random state; "random": normal. By default words where the model reads text
            with causal attention, random elsewhere. Small random keys draw a decoder's attention away
            from the first token, on which it rests; words disturb it less (`benchmarks/comparison.py language` has
            both).
        init_text: start from this text instead (repeated if it is shorter than the prefix).
        init_ids: the same, as token ids.
        init_std: standard deviation of a random start, and of what keeps repeated tokens apart. By default 0.02, but
            for random values outside decoders half the size (root mean square) of those that the model computes itself:
            tokens with equal values would all be trained alike.
        tokenizer_name_or_path: reads `init_text`; the base model's own by default.
        attentions: of "encoder", "decoder", "cross" (a decoder looking at its encoder); all that exist by default.
        layers_to_transform: layer numbers, counted in each stack from 0; all by default.
        target_modules: names or path endings of attention modules, or one regular expression; all by default.
        exclude_modules: as `target_modules`, to leave some out.
        modules_to_save: modules outside attention to train and save in full, such as a task head.
        gate: learn for each token how much it listens to the prefix (UniPELT, Mao et al. 2022, arXiv:2110.07577).
        shapes: attention path -> [key/value heads, key width, value width, input width]. Measured once, when the
            adapter is created, and stored so that loading runs nothing.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    projection_hidden_size: int = 512
    init: Literal["words", "random"] | None = None
    init_std: float | None = None
    init_text: str | None = None
    init_ids: list[int] | None = None
    tokenizer_name_or_path: str | None = None
    attentions: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    gate: bool = False
    shapes: dict[str, list[int]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("prefix")
        for name in ("num_virtual_tokens", "projection_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AdapterError(f"{name}={value!r}: must be a whole number of at least 1, e.g. {name}=20.")
        if self.init_std is not None and not self.init_std > 0:
            raise AdapterError(f"init_std={self.init_std!r}: must be above 0, e.g. init_std=0.02.")
        for name in ("layers_to_transform", "attentions"):
            value = getattr(self, name)
            if isinstance(value, int | str):
                setattr(self, name, [value])
        for name in self.attentions or ():
            if name not in ATTENTIONS:
                raise UnknownNameError(f"attentions={self.attentions!r}: {name!r}. {did_you_mean(name, ATTENTIONS)}")
        if self.init is not None and self.init not in INITS:
            raise UnknownNameError(f"init={self.init!r}. {did_you_mean(str(self.init), INITS)}")
        if self.init == "random" and (self.init_text or self.init_ids):
            raise AdapterError("init='random' and init_text/init_ids both say how to start; give one of them.")
        if self.init_text and self.init_ids:
            raise AdapterError("init_text and init_ids both say how to start; give one of them.")
