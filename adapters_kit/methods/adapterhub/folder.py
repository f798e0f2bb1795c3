"""Reads adapters saved by AdapterHub's `adapters` (bottleneck adapters, LoRA, prefixes) as peft adapters.

Its folders hold `adapter_config.json` (`{"config": {...}, "model_class": ..., "name": ..., "version": ...}`) and
`adapter.safetensors` or `pytorch_adapter.bin`. Keys follow the module paths of transformers 4.57; what has moved since
is renamed with transformers' own table for old checkpoints.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from adapters_kit import anatomy
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.unread import check_all_read
from adapters_kit.errors import ModelError, ShippingError
from adapters_kit.methods.adapterhub.heads import HEADS, head_file, head_state
from adapters_kit.methods.adapterhub.placement import check_class, check_placement
from adapters_kit.methods.adapterhub.prefix import convert_prefix
from adapters_kit.methods.bottleneck.config import BottleneckConfig
from adapters_kit.methods.bottleneck.layer import CHILD
from adapters_kit.methods.bottleneck.sites import find_sites
from adapters_kit.methods.configs import task_heads
from adapters_kit.methods.moved import paths_now
from adapters_kit.names import ADAPTER_CONFIG

CONFIG, WEIGHTS = ADAPTER_CONFIG, ("adapter.safetensors", "pytorch_adapter.bin")

# Options that mean the same in `BottleneckConfig`, under the same name.
_SHARED = (
    *("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "non_linearity", "leave_out", "dropout"),
    *("original_ln_before", "original_ln_after", "residual_before_ln", "ln_before", "ln_after"),
    *("adapter_residual_before_ln", "is_parallel", "scaling", "stochastic_depth", "init_weights"),
    *("phm_layer", "phm_dim", "phm_rank", "phm_bias", "shared_phm_rule", "factorized_phm_rule", "factorized_phm_W"),
    *("learn_phm", "phm_c_init", "phm_init_range"),
)
# Options about initialization only: nothing is left of them in a trained adapter.
_SPENT = ("init_weights_seed", "hypercomplex_nonlinearity", "inv_adapter_reduction_factor", "architecture")
_LORA = ("r", "alpha", "dropout", "leave_out", "attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora")
_LORA_SPENT = ("architecture", "init_weights", "init_weights_seed", "dtype", "composition_mode")


def is_adapterhub(folder: str | Path) -> bool:
    """Whether `folder` is an adapter saved by AdapterHub's `adapters` rather than by peft."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return False
    try:
        saved = read_json(path)
    except ShippingError:  # said by whoever reads it
        return False
    return "peft_type" not in saved and isinstance(saved.get("config"), dict)


def convert(source: str | Path, base_model: nn.Module) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The adapter in the folder `source`, for `base_model`.

    Args:
        source: a folder saved by AdapterHub's `save_adapter`.
        base_model: the transformers model that it was trained on, not wrapped. It is run once on a tiny input.

    Returns:
        The peft config, and the state dict as peft saves it, which
        `set_peft_model_state_dict(get_peft_model(base_model, config), state)` takes.

    Raises:
        ShippingError: files that are missing or cannot be read; an option without an equal, which is named.
        ModelError: weights that have no place in `base_model`.
    """
    source = Path(source)
    if not is_adapterhub(source):
        raise ShippingError(f"{source} holds no adapter saved by AdapterHub's adapters: no {CONFIG} with a 'config'.")
    saved = read_json(source / CONFIG)
    options, name = saved["config"], saved["name"]
    for key in ("model_type", "hidden_size"):
        here = getattr(base_model.config, key, None)
        if key in saved and saved[key] != here:
            raise ModelError(
                f"{source} was trained on a model with {key} {saved[key]!r}, but this {type(base_model).__name__} has "
                f"{here!r}. Load the base model that it was trained on ({saved.get('model_name') or 'not named'})."
            )
    check_class(source, base_model)
    weights = _read_weights(source)
    architecture = options.get("architecture")
    kinds = {None: _convert_bottleneck, "lora": _convert_lora, "prefix_tuning": convert_prefix}
    if architecture not in kinds:
        raise ShippingError(
            f"{source / CONFIG}: architecture={architecture!r} cannot be converted. Bottleneck adapters, LoRA and "
            "prefixes can."
        )
    config, state = kinds[architecture](source, options, name, weights, base_model)
    if file := head_file(source):
        heads = task_heads(base_model)
        head = head_state(file, _open(file), base_model, heads)
        if head:
            config.modules_to_save = heads
            # What the file lacks of the heads (a pooler) is the model's own.
            own = base_model.state_dict()
            state |= {f"base_model.model.{k}": v for k, v in own.items() if k.startswith(tuple(f"{h}." for h in heads))}
            state |= head
    return config, state


def convert_folder(source: str | Path, base_model: nn.Module, out: str | Path) -> Path:
    """Write the adapter in `source` as a peft adapter folder, which plain peft (or, for bottleneck adapters, peft with
    adapters_kit imported) loads.

    Args:
        source, base_model: as for `convert`.
        out: a folder that does not exist yet, or is empty. Nothing is written if the adapter cannot be converted.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShippingError(f"{out} exists and is not an empty folder. Choose another place for the converted adapter.")
    config, state = convert(source, base_model)
    config.base_model_name_or_path = base_model.name_or_path or None
    config.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(out))
    return out


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    for name in WEIGHTS:
        if (source / name).is_file():
            weights = _open(source / name)
            check_all_read(source, {name, *HEADS}, weights)
            return weights
    raise ShippingError(f"{source} holds no weights: looked for {' and '.join(WEIGHTS)}.")


def _open(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return tensors
    except pickle.UnpicklingError as error:
        raise ShippingError(
            f"{path} holds more than tensors, and could run code when opened. It was not opened; ask for the "
            "adapter as safetensors."
        ) from error
    except Exception as error:  # what a damaged file raises differs from format to format
        raise ShippingError(f"{path} cannot be read: {error}") from error


def _refuse(source: Path, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Stop at the first option that is on and has no equal."""
    for name, value in options.items():
        if name not in known and value not in (None, False, 0, [], {}):
            raise ShippingError(
                f"{source / CONFIG}: {name}={value!r} has no equal here, so the adapter would compute something else. "
                "It was not converted."
            )


# Bottleneck adapters

_PHM_NAMES = {
    "W_left": "weight_left",
    "W_right": "weight_right",
    "W": "weight",
    "b": "bias",
    "phm_rule": "rule.full",
    "phm_rule_left": "rule.left",
    "phm_rule_right": "rule.right",
}


def _convert_bottleneck(
    source: Path, options: dict[str, Any], name: str, weights: dict[str, torch.Tensor], model: nn.Module
) -> tuple[BottleneckConfig, dict[str, torch.Tensor]]:
    _refuse(source, options, (*_SHARED, *_SPENT))
    if options.get("residual_before_ln") == "post_add":
        raise ShippingError(f"{source / CONFIG}: residual_before_ln='post_add' has no equal here.")
    kept = {option: options[option] for option in _SHARED if option in options}
    config = BottleneckConfig(**kept, before_output_norm=True)
    config.sites = find_sites(model, config)
    config.target_modules = tuple(config.sites)
    if any(key.partition(f".adapters.{name}.")[0].endswith("attention.attention_adapters") for key in weights):
        _swap_in_attention(source, model, config)
    check_placement(source, model, config.sites)
    by_place = {(site["layer"], site["role"]): path for path, site in config.sites.items()}
    blocks, now = {block.path: number for number, block in enumerate(anatomy.map_model(model).blocks)}, paths_now(model)

    state: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if match := re.fullmatch(rf"(?:.*\.)?shared_parameters\.{re.escape(name)}\.(\w+)", key):
            shared[_PHM_NAMES[match[1]]] = value
            continue
        location, found, rest = key.partition(f".adapters.{name}.")
        place = _place_of(location, blocks, now) if found else None
        if place not in by_place:
            raise ModelError(f"{source}: {key} has no place in this {type(model).__name__}.")
        parameter = _parameter_name(rest, config)
        if parameter is not None:
            state[f"{_prefix(by_place[place])}.{parameter}"] = value
    if config.phm_layer and config.shared_phm_rule:
        if not shared:
            raise ShippingError(
                f"{source}: the shared phm_rule is not in the file (adapters 1.3 leaves it out for T5 and for models "
                "without a head), and without it the adapter's weights mean nothing."
            )
        for path in config.sites:
            for projection in ("down", "up"):
                state |= {f"{_prefix(path)}.{projection}.{rule}": value.clone() for rule, value in shared.items()}
    _check_complete(source, model, {path for path in config.sites if not any(_prefix(path) in key for key in state)})
    return config, state


def _swap_in_attention(source: Path, model: nn.Module, config: BottleneckConfig) -> None:
    """Inside ALBERT's attention the library hands its adapter the stream for the branch and the branch for the stream.

    With h and x swapped, LN(A(h) + h + x) is LN(A(x) + x + h): an adapter that reads the stream.
    """
    swapped = BottleneckConfig(is_parallel=True, cross_adapter=config.cross_adapter, leave_out=config.leave_out)
    parallel = find_sites(model, swapped)
    for path, site in (config.sites or {}).items():
        if site["role"] != "attention":
            continue
        if getattr(model.config, "model_type", None) != "albert" or site["reads"] != "branch" or path not in parallel:
            raise ModelError(
                f"{source}: what AdapterHub's library adapts inside the attention of {type(model).__name__} with these "
                "options is not known. It was not converted."
            )
        site |= {"reads": "residual", "residual": parallel[path]["residual"]}


def _prefix(path: str) -> str:
    return f"base_model.model.{path}.{CHILD}.bottleneck_net"


def _parameter_name(rest: str, config: BottleneckConfig) -> str | None:
    """`adapter_down.0.weight` -> `down.weight`; None for a second copy of a norm."""
    module, _, parameter = rest.rpartition(".")
    if config.phm_layer:
        parameter = _PHM_NAMES.get(parameter, parameter)
    if rest == "scaling":
        return "scaling"
    if module == "adapter_down.0" and config.ln_before:
        return None  # the same norm is stored as adapter_norm_before
    names = {"adapter_up": "up", "adapter_norm_before": "norm_before", "adapter_norm_after": "norm_after"}
    return f"{names.get(module, 'down')}.{parameter}"


def _place_of(location: str, blocks: Mapping[str, int], now: Callable[[str], str | None]) -> tuple[int, str] | None:
    """Which block and which of its branches: `bert.encoder.layer.0.attention.output` -> (0, "attention").

    Args:
        location: a module's path as transformers 4 had it.
        blocks: path -> number over the whole model.
        now: where a module of that path is in the model.
    """
    parts = location.split(".")
    for count in range(len(parts), 0, -1):
        path = now(".".join(parts[:count])) or ""
        if path in blocks:
            rest = ".".join(parts[count:])
            break
    else:
        return None
    if t5 := re.fullmatch(r"layer\.(\d)", rest):
        roles = ("attention", "cross-attention", "ffn") if "decoder" in path else ("attention", "ffn")
        role = roles[int(t5[1])]
    elif "cross" in rest:
        role = "cross-attention"
    else:
        role = "attention" if "attention" in rest else "ffn"
    return blocks[path], role


def _check_complete(source: Path, model: nn.Module, without: set[str]) -> None:
    if without:
        raise ModelError(
            f"{source} has no weights for {sorted(without)[0]} of this {type(model).__name__}. "
            "Load the base model that the adapter was trained on."
        )


# LoRA


def _convert_lora(
    source: Path, options: dict[str, Any], name: str, weights: dict[str, torch.Tensor], model: nn.Module
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    _refuse(source, options, (*_LORA, *_LORA_SPENT))
    if options.get("composition_mode", "add") != "add":
        raise ShippingError(
            f"{source / CONFIG}: composition_mode={options['composition_mode']!r} is (IA)³, which cannot be converted."
        )
    rank, alpha = options["r"], options["alpha"]
    modules, now = dict(model.named_modules()), paths_now(model)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        location, found, part = key.partition(f".loras.{name}.")
        path = now(location) if found else None
        if path is None or part not in ("lora_A", "lora_B"):
            raise ModelError(f"{source}: {key} has no place in this {type(model).__name__}.")
        pairs.setdefault(path, {})[part] = value
    ranks: dict[str, int] = {}
    state: dict[str, torch.Tensor] = {}
    for path, pair in pairs.items():
        a, b = pair["lora_A"], pair["lora_B"]
        if len(a) != rank:  # GPT-2 keeps query, key and value in one matrix, each part with a LoRA of its own
            out_features = anatomy.structure.linear_shape(modules[path])[1]
            b = _merged_up(b, rank, [part in options["attn_matrices"] for part in "qkv"], out_features)
            ranks[path] = len(a)
        state[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        state[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=options.get("dropout", 0.0),
        target_modules=sorted(pairs),
        # The scale is alpha / r in both; where r counts several parts, alpha grows with it.
        rank_pattern={f"^{re.escape(path)}": count for path, count in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": alpha * count // rank for path, count in ranks.items()},
        fan_in_fan_out=any(type(modules[path]).__name__ == "Conv1D" for path in pairs),
    )
    return config, state


def _merged_up(b: torch.Tensor, rank: int, enabled: list[bool], out_features: int) -> torch.Tensor:
    """One up-projection for several parts of a fused matrix: block i sees only the rows of its own down-projection."""
    size = out_features // len(enabled)
    blocks = iter(b.split(size))
    merged = b.new_zeros(out_features, rank * sum(enabled))
    column = 0
    for part, on in enumerate(enabled):
        if on:
            merged[part * size : (part + 1) * size, column : column + rank] = next(blocks)
            column += rank
    return merged
