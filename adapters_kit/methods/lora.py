"""The LoRA family and its relatives in peft, with the defaults that the literature settled on.

Targets are all linears of the blocks ("LoRA Without Regret", Schulman et al. 2025: attention-only LoRA falls behind
full fine-tuning, all layers do not), alpha = 2r, learning rates about ten times those of full fine-tuning.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_kit import devices
from adapters_kit.anatomy import map_model
from adapters_kit.errors import AdapterError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.methods.targets import all_linears, lora_linears, lora_linears_and_experts, matches
from adapters_kit.registry import Method

_LORA_CONFIG = "peft:LoraConfig"
_LORA_PAPER = "Hu et al. 2021, arXiv:2106.09685"

Prepare = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]


def transposed(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """`fan_in_fan_out` for models whose targets are all GPT-2's `Conv1D` (weight stored in × out)."""
    names = options.get("target_modules")
    if isinstance(names, str) or not names or "fan_in_fan_out" in options:
        return options
    layers = dict(model.named_modules())
    targets = [layers[path] for name in names for path in matches(name, layers)]
    return {**options, "fan_in_fan_out": True} if all(isinstance(layer, Conv1D) for layer in targets) else options


def scaled_by_rank(ratio: float, targets: Prepare) -> Prepare:
    """A `prepare` which fills in targets, and `lora_alpha = ratio · r` where the user gave none."""

    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        options = transposed(model, targets(model, options))
        rank = options["r"]
        if not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"r={rank!r} is not a rank. Give a whole number of at least 1, such as r=16.")
        options.setdefault("lora_alpha", round(ratio * rank))
        return options

    return prepare


def _split_from_weights(name: str) -> Prepare:
    """A `prepare` for methods that take their start out of the weights, which must not be rounded a second time."""

    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        packed = any(isinstance(weight, BlockTensor) for weight in model.parameters())
        if packed or getattr(model, "is_quantized", False):
            raise AdapterError(
                f"{name} moves a part of each weight into the adapter, and the rest of this quantized model would be "
                "rounded anew, which is another model. Load it without quantize=, or use method 'lora'."
            )
        return scaled_by_rank(1, lora_linears)(model, options)

    return prepare


def _olora(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    options = _split_from_weights("olora")(model, options)
    if options.get("fan_in_fan_out"):
        raise AdapterError(
            f"peft's OLoRA does not know the transposed Conv1D layers of {type(model).__name__}. Use 'pissa' or 'lora'."
        )
    return options


def _loftq(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    if getattr(model, "is_quantized", False):
        raise AdapterError(
            "loftq starts from 16-bit weights and quantizes them itself, but this model is quantized already. "
            "Load it without quantize=, or use method 'lora'."
        )
    if not devices.quantizes_at_start():
        raise AdapterError(
            "loftq quantizes the weights to find its starting point, which peft does on CUDA only, and there is no GPU "
            "here. Use 'pissa' or 'lora' instead."
        )
    options.setdefault("loftq_config", {"loftq_bits": 4, "loftq_iter": 1})
    return scaled_by_rank(1, lora_linears)(model, options)


def _adalora(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    if not options.get("total_step"):
        raise AdapterError(
            "adalora plans its ranks over the whole run and needs total_step=<number of optimizer steps>. "
            "adapters_kit.train fills it in by itself."
        )
    if options.get("deltaT", 1) < 1:
        raise AdapterError(f"deltaT={options['deltaT']!r}: ranks are pruned every so many steps, 1 or more.")
    if not 1 <= options["target_r"] <= options["init_r"]:
        raise AdapterError(
            f"target_r={options['target_r']!r} has to be between 1 and init_r={options['init_r']!r}: ranks are pruned "
            "from the one to the other."
        )
    options = transposed(model, all_linears(model, options))
    options.setdefault("lora_alpha", 2 * options["target_r"])
    return options


def _ia3(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Rescale keys, values and the input of what leaves the FFN, as the paper does.

    Where projections are fused (GPT-2's q/k/v), all linears are rescaled: there are no keys and values of their own.
    """
    if options.get("target_modules") is not None:
        return transposed(model, {"feedforward_modules": [], **options})
    usable = all_linears(model, options)["target_modules"]
    roles = {linear.path: linear.role for linear in map_model(model).linears if linear.path in usable}
    down = [path for path, role in roles.items() if role == "down"]
    keys_values = [path for path, role in roles.items() if role in ("k", "v")]
    targets = [*keys_values, *down] if keys_values and down else usable
    return transposed(model, {"feedforward_modules": down, **options, "target_modules": targets})


LORA = Method(
    name="lora",
    config=_LORA_CONFIG,
    trains="a low-rank update beside every linear",
    when="where you do not know: any architecture, merges, every server takes it",
    paper=_LORA_PAPER,
    mergeable=True,
    defaults={"r": 16},
    prepare=scaled_by_rank(2, lora_linears_and_experts),
    learning_rate=6e-4,
)

# The scale is alpha/√r here; alpha = 16 as in the paper, so that it does not grow with the rank twice.
RSLORA = Method(
    name="rslora",
    config=_LORA_CONFIG,
    trains="LoRA scaled by alpha/√r, for high ranks",
    when="at ranks of 64 and more, which plain LoRA scales down with the rank unless alpha grows too",
    paper="Kalajdzievski 2023, arXiv:2312.03732",
    mergeable=True,
    defaults={"r": 16, "use_rslora": True, "lora_alpha": 16},
    prepare=scaled_by_rank(1, lora_linears_and_experts),
)

DORA = Method(
    name="dora",
    config=_LORA_CONFIG,
    trains="LoRA for the direction, a vector for the magnitude",
    when="where LoRA falls short at a low rank; it takes more memory",
    paper="Liu et al. 2024, arXiv:2402.09353",
    mergeable=True,
    defaults={"r": 16, "use_dora": True},
    prepare=scaled_by_rank(2, lora_linears),
    learning_rate=6e-4,
)

# PiSSA, OLoRA and LoftQ split W itself, which needs scale 1: alpha = r.
PISSA = Method(
    name="pissa",
    config=_LORA_CONFIG,
    trains="LoRA started from the principal singular vectors",
    when="for a short training of 16-bit weights: it starts in the directions that weigh most",
    paper="Meng et al. 2024, arXiv:2404.02948",
    mergeable=True,
    defaults={"r": 16, "init_lora_weights": "pissa"},
    prepare=_split_from_weights("pissa"),
    learning_rate=5e-5,
)

OLORA = Method(
    name="olora",
    config=_LORA_CONFIG,
    trains="LoRA started from a QR decomposition",
    when="as pissa, with a start that is found faster",
    paper="Büyükakyüz 2024, arXiv:2406.01775",
    mergeable=True,
    defaults={"r": 16, "init_lora_weights": "olora"},
    prepare=_olora,
    learning_rate=5e-5,
)

LOFTQ = Method(
    name="loftq",
    config=_LORA_CONFIG,
    trains="LoRA started from the quantization error",
    when="where the base will stay at 4 bit: the adapter starts with what quantizing lost",
    paper="Li et al. 2023, arXiv:2310.08659",
    mergeable=True,
    needs="a CUDA GPU",
    defaults={"r": 16, "init_lora_weights": "loftq"},
    prepare=_loftq,
)

ADALORA = Method(
    name="adalora",
    config="peft:AdaLoraConfig",
    trains="LoRA as an SVD whose ranks are pruned while training",
    when="where it is not known which layers need rank, and there are some hundred steps to find out",
    paper="Zhang et al. 2023, arXiv:2303.10512",
    mergeable=True,
    defaults={"init_r": 24, "target_r": 16},
    prepare=_adalora,
    learning_rate=1e-3,
)

IA3 = Method(
    name="ia3",
    config="peft:IA3Config",
    trains="one scale per channel of keys, values and FFN",
    when="where an adapter must be tiny and still merge",
    paper="Liu et al. 2022, arXiv:2205.05638",
    mergeable=True,
    prepare=_ia3,
    learning_rate=3e-2,
)

VERA = Method(
    name="vera",
    config="peft:VeraConfig",
    trains="two vectors around shared random matrices",
    when="for many adapters of one base: save_projection=False leaves the shared matrices out of each file",
    paper="Kopiczko et al. 2023, arXiv:2310.11454",
    mergeable=True,
    prepare=lambda model, options: transposed(model, all_linears(model, options)),
    learning_rate=4e-3,
)

OFT = Method(
    name="oft",
    config="peft:OFTConfig",
    trains="block-diagonal rotations of the weights",
    when="where the base's abilities shall stay: rotations keep the angles between a layer's outputs",
    paper="Qiu et al. 2023, arXiv:2306.07280",
    mergeable=True,
    prepare=all_linears,
)
