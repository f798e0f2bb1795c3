"""4- and 8-bit linears through bitsandbytes, kept correct: what is quantized, and what bitsandbytes gets wrong.

What the kinds are is in `quantization_table`. Faults of bitsandbytes (seen in 0.50.2) that are dealt with here. On CPU,
a forward pass without gradients repacks 4-bit weights into a layout that backward, merging and `dequantize_4bit`
misread: `keep_layout`. There too, rows whose length is a multiple of 16 but not of 64 are unpacked with the wrong
scales: `check_sizes` tries each size before it is used. 8-bit layers fail on inputs of four dimensions (DeepSeek's
attention): `keep_layout` again.
"""

import importlib.metadata
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from adapters_kit.anatomy import block_linears
from adapters_kit.anatomy.bypass import bypassed
from adapters_kit.artifacts.heap import Trimmer
from adapters_kit.errors import MissingPackageError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.quantization_table import BLOCK, KINDS

_log = logging.getLogger(__name__)

KEEP = "keep"  # a .gguf file's own blocks (kernels/ggml.py)
OLDEST = "0.49.0"


def check_kind(quantize: str) -> None:
    """Raises:
    UnknownNameError: not one of `KINDS`.
    MissingPackageError: as `check_bitsandbytes`.
    """
    if quantize not in KINDS:
        raise UnknownNameError(f"Unknown quantize={quantize!r}. {did_you_mean(str(quantize), KINDS)}")
    check_bitsandbytes(f"quantize={quantize!r}")


def check_bitsandbytes(what: str) -> None:
    """Refuse `what`, which needs bitsandbytes.

    Raises:
        MissingPackageError: bitsandbytes is absent, too old, or its native library does not load.
    """
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackageError(f'{what} needs bitsandbytes: pip install "bitsandbytes>={OLDEST}"') from None
    if Version(version) < Version(OLDEST):
        raise MissingPackageError(
            f'bitsandbytes {version} is too old for {what}: pip install -U "bitsandbytes>={OLDEST}"'
        )
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except Exception as error:  # a broken installation fails in many ways
        raise MissingPackageError(
            f"bitsandbytes {version} cannot be imported ({error}): pip install --force-reinstall bitsandbytes"
        ) from error
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise MissingPackageError(
            f"bitsandbytes {version} has no native library for this machine (torch {torch.__version__}), which {what} "
            "needs: `python -m bitsandbytes` shows what it looked for."
        )


def check_device(quantize: str, device: str) -> None:
    """Refuse a device that bitsandbytes has no kernels for.

    Raises:
        ModelError: with the devices that it has kernels for.
    """
    import bitsandbytes

    known = sorted(bitsandbytes.supported_torch_devices)
    if device not in known:
        raise ModelError(
            f"bitsandbytes has no kernels for {device!r}, which quantize={quantize!r} needs; it has them for "
            f"{', '.join(known)}. Load without quantize=, or with device_map='cpu'."
        )


def bnb_config(
    quantize: str,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    skip: Sequence[str] = (),
) -> BitsAndBytesConfig:
    """transformers' config for one of `KINDS`.

    Args:
        compute_dtype: dtype of the matrix products with 4-bit weights.
        double_quant: quantize the scales of 4-bit blocks too (0.37 bit less per weight).
        quant_storage: dtype that packed 4-bit weights pretend to have. FSDP wants that of the other weights.
        skip: modules to leave alone, as `modules_to_leave` gives them.
    """
    options = KINDS[quantize].options(compute_dtype, double_quant, quant_storage)
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=list(skip))


def quantizable(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Paths of the linears to quantize: those of the blocks, without routers and without `skip`.

    Linears whose weight the model reads instead of calling them (Mamba's `dt_proj`) stay too: it would read bytes.

    Args:
        model: may be on the meta device.
        skip: full paths, or ends of paths ("o_proj", "mlp.down_proj"), or parents ("model.layers.0").

    Raises:
        UnknownNameError: an entry of `skip` matches none of them.
        ModelError: the blocks hold no linear that bitsandbytes could replace.
    """
    # transformers replaces exactly these classes, and leaves alone what a model keeps in fp32 (T5's `wo`).
    fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    linears = block_linears(model)
    kinds = {path: type(model.get_submodule(path)) for path in linears}
    found = [path for path in linears if kinds[path] in (nn.Linear, Conv1D) and not fp32 & set(path.split("."))]
    if not found:
        own = sorted({kind.__name__ for kind in kinds.values()} - {"Linear", "Conv1D"})
        why = (
            f"only layers of its own class {' and '.join(own)}, which transformers does not quantize" if own else "none"
        )
        raise ModelError(
            f"{type(model).__name__} has no linear layers in its blocks that could be quantized ({why}). Load it "
            "without quantize=."
        )
    never_called = bypassed(model, found)
    found = [path for path in found if path not in never_called]
    for entry in skip:
        if not any(_names(entry, path) for path in found):
            parts = {part for path in found for part in (path, path.rpartition(".")[2])}
            raise UnknownNameError(f"skip={entry!r} matches no linear of the blocks. {did_you_mean(entry, parts)}")
    return [path for path in found if not any(_names(entry, path) for entry in skip)]


def modules_to_leave(model: nn.Module, wanted: Collection[str]) -> list[str]:
    """What transformers must be told to skip so that exactly `wanted` is quantized (it would take every linear).

    Plain paths, as other readers of the config expect them; an anchored pattern where a plain path would, by
    transformers' rules, take a wanted layer along ("score" is also the end of "layers.0.score").
    """
    wanted = set(wanted)
    leave = []
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and path not in wanted:
            clashes = any(not should_convert_module(other, [path]) for other in wanted)
            leave.append(f"^{re.escape(path)}$" if clashes else path)
    return leave


def check_sizes(model: nn.Module, paths: Sequence[str], quantize: str, device: str = "cpu") -> None:
    """Refuse layers that bitsandbytes would compute wrongly, or only through a compiler, on this device.

    Raises:
        ModelError: naming them, with the two ways out.
    """
    if KINDS[quantize].block == 1:
        return
    bad: dict[int, list[str]] = {}
    for path in paths:
        module = model.get_submodule(path)
        width = module.nx if isinstance(module, Conv1D) else module.in_features
        if not unpacks_right(width, quantize, device):
            bad.setdefault(width, []).append(path)
    if bad:
        names = sorted({path.rpartition(".")[2] for paths in bad.values() for path in paths})
        widths = ", ".join(map(str, sorted(bad)))
        raise ModelError(
            f'quantize="{quantize}": bitsandbytes on {device} unpacks rows of {widths} weights wrongly (a multiple of '
            f'{BLOCK} is safe); they are in {", ".join(names[:8])}. Use quantize="int8", or leave them out: '
            f"skip={names[:8]}."
        )


@cache
def unpacks_right(width: int, quantize: str, device: str = "cpu") -> bool:
    """Whether 4-bit rows of `width` weights come back as their codes and scales say. Tried, not assumed."""
    if width % BLOCK == 0:
        return True
    if width % 2:
        return False  # computed by code that bitsandbytes compiles on the spot
    from bitsandbytes import functional

    weight = torch.randn(33, width, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=quantize)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(BLOCK)[: weight.numel()]
    expected = (state.code[nibbles.long()] * scales).view_as(weight)
    return torch.allclose(functional.dequantize_4bit(packed, state), expected, atol=1e-5)


def keep_layout(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights on CPU, and undo it where it already happened.

    Repacked weights are still read by `backward`, by `dequantize_4bit` and so by merging as if they were not: training
    after an evaluation then follows wrong gradients, without an error. Cheap, and safe to call again.

    8-bit layers are repaired too. peft's `dequantize_module_weight` (DoRA and others) replaces the weight of a layer on
    CPU by one without scales, and the next forward would forget those it had. And inputs of more than three dimensions,
    which bitsandbytes cannot take, are handed over as rows.

    Returns:
        How many layers had to be unpacked. Their scales went through bf16, a relative error of up to 0.4 %; zero for a
        model that `load` returned.
    """
    unpacked = 0
    for module in four_bit_layers(model):
        module.support_avx512bf16_for_cpu = False
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, state
            )
            module.quant_state = module.weight.quant_state
            unpacked += 1
    for module in _layers(model, "Linear8bitLt"):
        module.init_8bit_state = partial(_move_to_state, module)
        if "forward" not in module.__dict__:  # accelerate's hooks may be there already
            module.forward = partial(_by_rows, module)
            module.forward.same_numbers = True  # fused layers need not give way to it
    if unpacked:
        _log.warning(
            "%d 4-bit layers had been repacked for inference by bitsandbytes, a form that cannot be trained; they are "
            "unpacked, with scales rounded to bfloat16 (up to 0.4 %% off). Wrap before evaluating, or load with "
            "adapters_kit.load, to keep them exact.",
            unpacked,
        )
    return unpacked


def _move_to_state(module: Any) -> None:
    """`Linear8bitLt.init_8bit_state`, but scales that are not there do not overwrite those that are."""
    module.state.CB = module.weight.CB
    if module.weight.SCB is not None:
        module.state.SCB = module.weight.SCB
    module.weight.CB = module.weight.SCB = None


def _by_rows(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`Linear8bitLt.forward` for an input of any number of dimensions."""
    if x.ndim <= 3:
        return type(module).forward(module, x)
    return type(module).forward(module, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def four_bit_layers(model: nn.Module) -> Iterator[Any]:
    """The model's `bitsandbytes.nn.Linear4bit` modules."""
    return _layers(model, "Linear4bit")


def _layers(model: nn.Module, class_name: str) -> Iterator[Any]:
    # By name: a model without such layers must not need the package. peft's adapter layers have the same names.
    return (
        module
        for module in model.modules()
        if any(cls.__name__ == class_name and cls.__module__.startswith("bitsandbytes") for cls in type(module).__mro__)
    )


def quantize_in_place(model: nn.Module, paths: Sequence[str], config: BitsAndBytesConfig) -> None:
    """Replace the linears at `paths` of a loaded model one after another: the peak is one layer above the start.

    For weights that transformers cannot quantize while reading them (GGUF files). The model then counts as quantized
    and saves like any other.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = config.to_dict()
    kind = next(kind for kind in KINDS.values() if kind.is_saved_as(settings))
    trimmer = Trimmer()
    for path in paths:
        old: Any = model.get_submodule(path)
        weight = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
        new = kind.layer(weight, old.bias is not None, config)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        new.source_cls = type(old)
        new.train(old.training)
        old.weight = None  # the old copy goes before the next one is made
        model.set_submodule(path, new)
        trimmer(weight.nbytes)
        del weight
    trimmer.now()
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantized: Any = model
    quantized.hf_quantizer = quantizer
    quantized.is_quantized = True
    quantized.quantization_method = config.quant_method
    quantizer.postprocess_model(model)


def _names(entry: str, path: str) -> bool:
    return f".{path}.".endswith(f".{entry}.") or path.startswith(f"{entry}.")
