"""What each loader and server takes, by its own source. `VERSIONS` says which; `check` asks these rules.

Rules err on the side of telling. What a server does with an adapter was read, not run, except for peft, transformers
and llama.cpp, which the tests run.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import CONFIG, Adapter
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.factors import KEY, RESIDUAL, ship_instead
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.source import locate_here
from adapters_kit.errors import ShippingError
from adapters_kit.names import looks_like_path
from adapters_kit.peft_plugin import tuner_class

VERSIONS = {
    "peft": "peft 0.21.2",
    "transformers": "transformers 5.23.0 with peft 0.21.2, load_adapter",
    "vllm": "vLLM 0.33.0, vllm/lora/peft_helper.py, lora_model.py and utils.py",
    "sglang": "SGLang 0.5.23, srt/lora/lora_config.py, lora_manager.py, lora.py and mem_pool.py",
    "llama.cpp": "llama.cpp in llama-cpp-python 0.3.36, convert_lora_to_gguf.py; src/llama-adapter.h at commit 215841f",
    "ollama": "Ollama, convert/convert.go at commit 01cf744 and convert_llama_adapter.go at commit 0242080",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Embeddings below a LoRA: vLLM passes over tensors that end so.
_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
# What Ollama's converter takes: architectures, and the names that it translates.
_OLLAMA = ("llama", "gemma2")
_OLLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"}


def other_version(target: str) -> str | None:
    """The server that is installed here, where the rules are of another version of it; None where it is that one, or
    none is installed."""
    for package, known in re.findall(r"([A-Za-z][\w-]*) (\d+\.\d+\.\d+)", VERSIONS[target]):
        try:
            found = version(package.lower())
        except PackageNotFoundError:
            continue
        if found.partition("+")[0] != known:
            return f"{package} {found}"
    return None


@dataclass(frozen=True)
class Problem:
    """One reason why a folder would not load, or would load wrongly.

    Attributes:
        what: the reason.
        fix: what to do; a command where there is one.
        silent: it would load, and compute something else.
    """

    what: str
    fix: str
    silent: bool = False

    def __str__(self) -> str:
        return f"{'loads WRONGLY' if self.silent else 'does not load'}: {self.what}\n    fix: {self.fix}"


def _canonical(adapter: Adapter, rank: int | None = None) -> str:
    ranked = f" --rank {rank}" if rank else ""
    return f"adapters-kit export {adapter.folder} canonical/ --canonical{ranked}"


def _gguf(adapter: Adapter) -> str:
    return f"adapters-kit export {adapter.folder} adapter.gguf --format gguf"


def _leaves(adapter: Adapter, block: str) -> set[str]:
    """The last names of the modules with factors, of those whose path starts with `block`."""
    paths = [match["path"] for match in map(KEY.match, adapter.weights) if match]
    return {path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == block}


def _blocks(adapter: Adapter) -> set[str]:
    """The parents of the modules with factors: `model.layers.0.self_attn` and so on."""
    return {match["path"].rpartition(".")[0] for match in map(KEY.match, adapter.weights) if match}


def _lora_only(adapter: Adapter, server: str) -> Iterator[Problem]:
    if adapter.method != "lora":
        yield Problem(f"it is a {adapter.method} adapter; {server} takes LoRA only", ship_instead(adapter))


def _not_plain(adapter: Adapter, ignored: tuple[str, ...] = (), taken: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Variants of LoRA that are more than B A: refused, except those that the server ignores or takes."""
    config = adapter.config
    for option, used, what in (
        ("use_dora", config.use_dora, "it uses DoRA"),
        ("lora_bias", config.lora_bias, "it has biases on lora_B (lora_bias)"),
        ("bias", config.bias != "none", f"it trains biases (bias={config.bias!r})"),
        ("layer_replication", config.layer_replication, "it replicates layers (layer_replication)"),
        ("alora", config.alora_invocation_tokens, "it is an activated LoRA (alora_invocation_tokens)"),
        ("tokens", config.trainable_token_indices, "it trains single tokens (trainable_token_indices)"),
        ("experts", config.target_parameters, "it adapts fused experts (target_parameters)"),
        ("use_qalora", config.use_qalora, "its input is pooled (use_qalora)"),
        ("use_bdlora", config.use_bdlora, "it is block-diagonal (use_bdlora)"),
    ):
        if used and option not in taken:
            yield Problem(what, ship_instead(adapter), silent=option in ignored)


def _moved_base(adapter: Adapter, refused: bool = False) -> Iterator[Problem]:
    init = adapter.config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(RESIDUAL):
        yield Problem(f"it sits on weights changed by its initialisation ({init})", ship_instead(adapter), not refused)


def _wrong_scale(adapter: Adapter, options: tuple[str, ...]) -> Iterator[Problem]:
    """Options that change the scale of an update and that a server does not read."""
    used = [name for name in options if getattr(adapter.config, name)]
    if used:
        yield Problem(f"{', '.join(used)} ignored: the scale is alpha / r", _canonical(adapter), silent=True)


def _peft(adapter: Adapter, _: int) -> Iterator[Problem]:
    raw = adapter.raw
    known = set(type(adapter.config).__dataclass_fields__)
    strange = sorted(raw.keys() - known)
    if strange:
        yield Problem(
            f"{CONFIG} has options that this peft does not know and ignores: {', '.join(strange)}",
            "install the peft that wrote it (peft_version in the config)",
            silent=True,
        )


def _transformers(adapter: Adapter, limit: int) -> Iterator[Problem]:
    yield from _peft(adapter, limit)
    config, instead = adapter.config, "load it with peft.PeftModel.from_pretrained"
    if config.is_prompt_learning or config.is_adaption_prompt:
        yield Problem("load_adapter refuses prompt learning", instead)
    elif getattr(tuner_class(config.peft_type), "uses_shared_state", False):
        yield Problem(f"load_adapter refuses {adapter.method}, whose layers share weights", instead)
    if getattr(config, "use_dora", False):
        yield Problem("load_adapter leaves out DoRA's magnitudes and starts them anew", instead, silent=True)


def _vllm(adapter: Adapter, limit: int) -> Iterator[Problem]:
    yield from _lora_only(adapter, "vLLM")
    if adapter.method != "lora":
        return
    yield from _not_plain(adapter, taken=("experts",))
    yield from _moved_base(adapter, refused=not str(adapter.config.init_lora_weights).lower().startswith("lora_ga"))
    config = adapter.config
    largest = max([config.r, *config.rank_pattern.values()])
    if largest > limit:
        allowed = next((rank for rank in VLLM_RANKS if rank >= largest), None)
        start = f"start vLLM with --max-lora-rank {allowed}, or " if allowed else ""
        yield Problem(f"rank {largest} is above max_lora_rank = {limit}", start + _canonical(adapter, limit))
    heads = set(config.modules_to_save or ())
    if heads - {"classifier", "score"} or len(heads) > 1:
        yield Problem(f"it saves whole modules ({', '.join(sorted(heads))})", ship_instead(adapter))
    if not heads and not _variant(adapter):
        yield from _strangers(adapter, "vLLM stops at them", taken=_EMBEDDINGS)
        yield from _resized(adapter)
    yield from _matches_nothing(adapter, "vLLM")


def _variant(adapter: Adapter) -> bool:
    """Whether `_not_plain` tells of the adapter, whose other tensors then need no telling."""
    return any(_not_plain(adapter, taken=("experts",)))


def _strangers(adapter: Adapter, then: str, silent: bool = False, taken: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Tensors beside the factors, such as the embeddings that peft saves once a vocabulary was resized."""
    other = sorted(name for name in adapter.weights if not KEY.match(name) and not name.endswith(taken))
    if other:
        what = f"{len(other)} tensors are neither lora_A nor lora_B, such as {other[0]!r}: {then}"
        yield Problem(what, ship_instead(adapter), silent)


def _resized(adapter: Adapter) -> Iterator[Problem]:
    """Embeddings that peft saves below a LoRA of theirs. vLLM goes on with the base's, which are the same unless the
    vocabulary was resized."""
    saved = {name: len(tensor) for name, tensor in adapter.weights.items() if name.endswith(_EMBEDDINGS)}
    words = _vocabulary(adapter)
    other = [f"{name} with {rows} rows" for name, rows in sorted(saved.items()) if rows != words]
    if other:
        than = "whose size is not known here" if words is None else f"which has {words}"
        yield Problem(
            f"it brings {', '.join(other)}, and vLLM takes the base's, {than}: right only if they are the same",
            ship_instead(adapter),
            silent=not any("lora_embedding_A" in name for name in adapter.weights),  # stops at a factor of another size
        )


def _matches_nothing(adapter: Adapter, server: str) -> Iterator[Problem]:
    """Factors for modules that the base does not have: servers leave them out without a word."""
    base = _base(adapter)
    if base is None or not base.is_dir():
        return
    try:
        with open_checkpoint(base) as checkpoint:
            stored = {name.rpartition(".")[0] for name in checkpoint.tensors}
    except ShippingError:  # weights in another form: nothing is known of their names
        return
    paths = sorted({match["path"] for match in map(KEY.match, adapter.weights) if match})
    # What is fused or tied in the file has other names there: only other beginnings are told, of a text model alone,
    # since servers know the names that models with parts have had.
    endings = {".".join(name.split(".")[start:]) for name in stored for start in range(name.count(".") + 1)}
    plain = not any(key.endswith("_config") and key != "quantization_config" for key in _base_config(adapter))
    lost = [
        path for path in paths if path not in stored and (path in endings or (plain and _from_block(path) in endings))
    ]
    if lost:
        yield Problem(
            f"{len(lost)} modules begin otherwise than the base's names do, such as {lost[0]!r}: {server} matches them "
            "with nothing and answers from the base",
            ship_instead(adapter),
            silent=True,
        )


def _from_block(path: str) -> str:
    """`transformer.model.layers.0.mlp.up_proj` -> `layers.0.mlp.up_proj`."""
    found = re.search(r"[^.]+\.\d+\..*", path)
    return found[0] if found else path


def _sglang(adapter: Adapter, _: int) -> Iterator[Problem]:
    yield from _lora_only(adapter, "SGLang")
    if adapter.method != "lora":
        return
    yield from _not_plain(adapter, ignored=("alora", "tokens", "use_qalora", "use_bdlora"))
    yield from _moved_base(adapter)
    yield from _wrong_scale(adapter, ("alpha_pattern", "use_rslora"))
    config = adapter.config
    if config.rank_pattern:
        yield Problem("rank_pattern: its buffers have one rank for all modules, r", _canonical(adapter))
    if config.modules_to_save:
        heads = ", ".join(sorted(config.modules_to_save))
        yield Problem(f"it saves whole modules ({heads}), which are left out", ship_instead(adapter), silent=True)
    elif not _variant(adapter):
        yield from _strangers(adapter, "SGLang leaves them out", silent=True)
    if isinstance(config.target_modules, str) and config.target_modules not in ("all", "all-linear"):
        yield Problem(f"target_modules is a regular expression ({config.target_modules!r})", _canonical(adapter))
    added = adapter.folder / "added_tokens.json"
    if added.is_file():
        words = _vocabulary(adapter)
        beyond = [token for token, index in read_json(added).items() if words is None or index >= words]
        if beyond:
            yield Problem(f"added_tokens.json adds {len(beyond)} tokens, such as {beyond[0]!r}", ship_instead(adapter))
    for block in sorted(_blocks(adapter)):
        found = _leaves(adapter, block)
        for needed, of in (({"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj"}), ({"gate_proj"}, {"up_proj"})):
            if found & of and not needed <= found:
                here, lacks = ", ".join(sorted(found & of)), ", ".join(sorted(needed - found))
                what = f"{block} has {here} without {lacks}, which SGLang stacks with it"
                yield Problem(what, ship_instead(adapter))
                return


def _base(adapter: Adapter) -> Path | None:
    """The base's folder, if it is on this machine."""
    name = adapter.base
    return locate_here(name) if name else None


def _base_config(adapter: Adapter) -> dict[str, Any]:
    """The base's config.json, empty if the base is not on this machine."""
    base = _base(adapter)
    return read_json(base / "config.json") if base and (base / "config.json").is_file() else {}


def _vocabulary(adapter: Adapter) -> int | None:
    """The base's vocabulary size, None if the base is not on this machine."""
    config = _base_config(adapter)
    text = config.get("text_config")
    return config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)


def _takes_factors(adapter: Adapter, server: str) -> Iterator[Problem]:
    """llama.cpp and Ollama: pairs of factors, each scaled by alpha over its own rank."""
    yield from _lora_only(adapter, server)
    if adapter.method != "lora":
        return
    taken = ("alora",) if server == "llama.cpp" else ()
    yield from _not_plain(adapter, ignored=("use_qalora", "use_bdlora", "alora"), taken=taken)
    yield from _moved_base(adapter)
    other = sorted(name for name in adapter.weights if not KEY.match(name) and "lora_B.bias" not in name)
    if other:
        yield Problem(
            f"{len(other)} tensors are neither lora_A nor lora_B, such as {other[0]!r}", ship_instead(adapter)
        )
    yield from _wrong_scale(adapter, ("alpha_pattern", "use_rslora"))


def _llama_cpp(adapter: Adapter, _: int) -> Iterator[Problem]:
    yield from _takes_factors(adapter, "llama.cpp")
    if adapter.method == "lora":
        yield Problem("it takes GGUF files", _gguf(adapter))


def _ollama(adapter: Adapter, _: int) -> Iterator[Problem]:
    yield from _takes_factors(adapter, "Ollama")
    if adapter.method != "lora":
        return
    alpha = adapter.config.lora_alpha
    if not isinstance(alpha, int) or alpha < 0:
        yield Problem(f"lora_alpha = {alpha!r} is not a whole number", _canonical(adapter))
    foreign = {leaf for block in _blocks(adapter) for leaf in _leaves(adapter, block)} - _OLLAMA_LINEARS
    if foreign:
        yield Problem(f"its converter has no name for {', '.join(sorted(foreign))}", _gguf(adapter))
    kind = _base_config(adapter).get("model_type")
    if kind is not None and kind not in _OLLAMA:
        yield Problem(f"adapters on {kind!r} models are not taken ({', '.join(_OLLAMA)} are)", _gguf(adapter))
    turned = {"q_proj", "k_proj"} & {leaf for block in _blocks(adapter) for leaf in _leaves(adapter, block)}
    if turned and kind in ("llama", None):
        yield Problem(
            f"its converter reorders the heads in lora_A of {' and '.join(sorted(turned))}; they are lora_B's rows",
            f"{_gguf(adapter)}, and ADAPTER ./adapter.gguf in the Modelfile",
            silent=True,
        )


def missing_base(adapter: Adapter) -> Iterator[Problem]:
    """A base that is not named, or named by a path that is not there; a hub id is not looked up."""
    name = adapter.base
    if name is None:
        yield Problem("the adapter does not name its base", f'write "base_model_name_or_path" into {CONFIG}')
    elif not Path(name).exists() and looks_like_path(name):
        yield Problem(
            f"its base {name!r} is a path that does not exist here",
            f"correct base_model_name_or_path in {CONFIG}, or name the base when loading",
        )


RULES: dict[str, Callable[[Adapter, int], Iterator[Problem]]] = {
    "peft": _peft,
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
}


def model_problems(path: Path, target: str, config: dict[str, Any]) -> Iterator[Problem]:
    """What stands in the way of a model folder whose weights are whole."""
    if not config.get("architectures"):
        yield Problem("config.json names no architecture", 'add "architectures": ["…ForCausalLM"] to config.json')
    text = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
    if not text and target not in {"peft", "transformers"}:
        yield Problem("there is no tokenizer", "copy the base's tokenizer files, verbatim, into the folder")
    if target != "llama.cpp":
        return
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes":
        fix = "merge again without --quantize, and export that with --format gguf --dtype q8_0"
        yield Problem("its converter does not read weights quantized by bitsandbytes", fix)
    yield Problem("it takes GGUF files, not safetensors", f"adapters-kit export {path} model.gguf --format gguf")
