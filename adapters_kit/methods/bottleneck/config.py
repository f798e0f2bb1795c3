"""`BottleneckConfig`: every published bottleneck adapter as one set of options.

With h the output of a branch (attention or FFN) after dropout, x the residual stream it is added to, LN the norm after
that sum (identity in pre-norm models) and A(z) = scaling · up(activation(down(z))):

    serial, the default                LN(A(h) + h + x)           Houlsby
    original_ln_before                 LN(A(LN(h + x)) + h + x)   Pfeiffer
    original_ln_before, no ln_after    A(LN(h + x)) + LN(h + x)   AdapterPlus
    is_parallel                        LN(h + A(x) + x)           He et al.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers.activations import ACT2FN

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.beside import BesideConfig
from adapters_kit.peft_plugin import peft_type

INITS = ("identity", "bert", "mam_adapter", "houlsby")
BOTTLENECK = peft_type("bottleneck")


@dataclass
class BottleneckConfig(BesideConfig):
    """Options of a bottleneck adapter; names and defaults are those of AdapterHub where it has the option.

    Where the adapter sits is found by running the model once on a tiny input, and kept in `sites`; a loaded
    adapter therefore needs no such run.

    Raises:
        AdapterError: options that contradict each other, or a combination that has no meaning.
        UnknownNameError: an unknown activation or initialization.
    """

    mh_adapter: bool = field(default=True, metadata={"help": "adapt self-attention"})
    output_adapter: bool = field(default=True, metadata={"help": "adapt the feed-forward network (a whole MoE, too)"})
    cross_adapter: bool = field(default=False, metadata={"help": "adapt cross-attention in encoder-decoders"})
    reduction_factor: float | dict[str, float] = field(
        default=16,
        metadata={
            "help": "hidden size / bottleneck size, or one per layer: keys are layer numbers, regular expressions over "
            "module paths (the first that matches counts) and 'default'"
        },
    )
    bottleneck_dim: int | None = field(default=None, metadata={"help": "bottleneck size; overrides reduction_factor"})
    non_linearity: str = field(default="swish", metadata={"help": "activation, as transformers names it"})
    original_ln_before: bool = field(default=False, metadata={"help": "the adapter reads LN(h + x) instead of h"})
    original_ln_after: bool = field(default=True, metadata={"help": "the model's norm comes after the adapter"})
    residual_before_ln: bool = field(
        default=True, metadata={"help": "the adapter's own residual is taken before the model's norm"}
    )
    ln_before: bool = field(default=False, metadata={"help": "a new LayerNorm before the down-projection"})
    ln_after: bool = field(default=False, metadata={"help": "a new LayerNorm after the up-projection"})
    adapter_residual_before_ln: bool = field(default=False, metadata={"help": "the new norm spans the residual, too"})
    is_parallel: bool = field(default=False, metadata={"help": "the adapter reads x, beside the branch"})
    scaling: float | str = field(default=1.0, metadata={"help": "a number, 'learned' or 'channel' (a learned vector)"})
    dropout: float = field(default=0.0, metadata={"help": "on the adapter's output"})
    stochastic_depth: float = field(default=0.0, metadata={"help": "chance to drop the adapter for a training row"})
    init_weights: str = field(
        default="identity",
        metadata={
            "help": "'identity' and 'mam_adapter': up-projection zero, so the model starts as pretrained; 'bert': "
            "normal 0.02 on both, AdapterHub's default; 'houlsby': truncated normal 0.01 on both"
        },
    )
    before_output_norm: bool = field(
        default=False,
        metadata={
            "help": "in models that normalize a branch before adding it (Gemma 2, OLMo 2): adapt before that norm, "
            "where AdapterHub does, instead of after it"
        },
    )
    phm_layer: bool = field(default=False, metadata={"help": "Compacter: down and up are sums of Kronecker products"})
    phm_dim: int = field(default=4, metadata={"help": "number of Kronecker products"})
    phm_rank: int = field(default=1, metadata={"help": "rank of the large factors"})
    phm_bias: bool = field(default=True, metadata={"help": "whether PHM layers have biases"})
    shared_phm_rule: bool = field(default=True, metadata={"help": "one set of small factors for all layers"})
    factorized_phm_rule: bool = field(default=False, metadata={"help": "small factors of rank one"})
    factorized_phm_W: bool = field(default=True, metadata={"help": "large factors of rank phm_rank, else full"})
    learn_phm: bool = field(default=True, metadata={"help": "train the small factors"})
    phm_c_init: str = field(default="normal", metadata={"help": "small factors: 'normal' or 'uniform'"})
    phm_init_range: float = field(default=1e-4, metadata={"help": "standard deviation of 'normal'"})
    gate: bool = field(default=False, metadata={"help": "a learned gate for each token on the adapter's output"})
    layers: list[int] | None = field(
        default=None, metadata={"help": "only these layers, counted from 0, encoder first"}
    )
    leave_out: list[int] = field(default_factory=list, metadata={"help": "not these layers"})
    target_modules: Any = field(
        default=None,
        metadata={"help": "only branches whose path matches: a regular expression, or names that end the path"},
    )
    exclude_modules: Any = field(default=None, metadata={"help": "not these, written the same way"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "trained and saved in full: a task head"})
    sites: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "filled in: full module path -> role, layer, width, and what the adapter reads"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if self.sites is not None:
            # A tuple, because peft shortens long lists and sets of targets to ambiguous endings.
            self.target_modules = tuple(self.sites)
        if self.non_linearity.lower() == "leakyrelu":  # AdapterHub's spelling
            self.non_linearity = "leaky_relu"
        self._check_values()
        self._check_equation()

    def _check_values(self) -> None:
        if self.non_linearity.lower() not in ACT2FN:
            raise UnknownNameError(
                f"non_linearity={self.non_linearity!r} is no activation. {did_you_mean(self.non_linearity, ACT2FN)}"
            )
        if self.init_weights not in INITS:
            raise UnknownNameError(
                f"init_weights={self.init_weights!r} is unknown. {did_you_mean(self.init_weights, INITS)}"
            )
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise AdapterError(f"scaling={self.scaling!r}: give a number, 'learned' or 'channel'.")
        if self.phm_c_init not in ("normal", "uniform"):
            raise AdapterError(f"phm_c_init={self.phm_c_init!r}: give 'normal' or 'uniform'.")
        if self.bottleneck_dim is not None and self.bottleneck_dim < 1:
            raise AdapterError(f"bottleneck_dim={self.bottleneck_dim}: a bottleneck has at least one unit.")
        factors = self.reduction_factor
        for key, factor in factors.items() if isinstance(factors, dict) else [("", factors)]:
            if not factor > 0:
                where = f"[{key!r}]" if key != "" else ""
                raise AdapterError(
                    f"reduction_factor{where}={factor}: it divides the hidden size, so give a number > 0."
                )
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise AdapterError(f"{name}={getattr(self, name)}: give a probability, at least 0 and below 1.")
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise AdapterError(
                "mh_adapter, output_adapter and cross_adapter are all off: no adapter is left. Switch one of them on."
            )

    def _check_equation(self) -> None:
        if self.is_parallel:
            if not self.original_ln_after:
                raise AdapterError("is_parallel needs original_ln_after=True: the branch is summed, then normalized.")
        elif self.original_ln_after != self.residual_before_ln and self.original_ln_before:
            raise AdapterError(
                f"original_ln_before=True, original_ln_after={self.original_ln_after} and "
                f"residual_before_ln={self.residual_before_ln!r} would "
                + ("add the residual stream twice." if self.original_ln_after else "lose the residual stream.")
                + " Give the last two the same value: True is Pfeiffer's adapter, False is AdapterPlus."
            )
        elif not self.original_ln_before and not self.original_ln_after:
            raise AdapterError(
                "original_ln_before and original_ln_after are both off, which loses the residual stream. "
                "Switch one of them on."
            )
        if self.adapter_residual_before_ln:
            if not self.ln_after:
                raise AdapterError("adapter_residual_before_ln concerns the norm of ln_after, which is off.")
            if self.is_parallel or self.original_ln_before:
                raise AdapterError(
                    "adapter_residual_before_ln works on a serial adapter after the bare branch: leave is_parallel and "
                    "original_ln_before off."
                )

    def width_at(self, path: str) -> int:
        """Size of the bottleneck at the site `path`.

        `bottleneck_dim`, else hidden size // reduction factor, at least 1; with `phm_layer` rounded up to a multiple of
        `phm_dim`.
        """
        site = (self.sites or {})[path]
        hidden = site["width"]
        chosen = self.bottleneck_dim
        size = chosen if chosen is not None else max(1, int(hidden // self._factor_at(path, site["layer"])))
        if not self.phm_layer:
            return size
        if hidden % self.phm_dim:
            raise AdapterError(
                f"phm_dim={self.phm_dim} does not divide the hidden size {hidden} at {path}. Choose one of "
                f"{[n for n in range(2, 17) if hidden % n == 0]}."
            )
        rounded = -(-size // self.phm_dim) * self.phm_dim
        if chosen is not None and rounded != chosen:
            raise AdapterError(f"bottleneck_dim={chosen} is no multiple of phm_dim={self.phm_dim}; {rounded} is.")
        return rounded

    def _factor_at(self, path: str, layer: int) -> float:
        factors = self.reduction_factor
        if not isinstance(factors, dict):
            return factors
        if str(layer) in map(str, factors):
            return next(factor for key, factor in factors.items() if str(key) == str(layer))
        for pattern, factor in factors.items():
            if pattern != "default" and not str(pattern).isdigit() and re.search(rf"(^|\.)(?:{pattern})(\.|$)", path):
                return factor
        if "default" not in factors:
            raise AdapterError(
                f"reduction_factor has no entry for layer {layer} ({path}): its keys are {sorted(map(str, factors))}. "
                "Add 'default'."
            )
        return factors["default"]
