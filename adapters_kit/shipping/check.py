"""check(): will a folder load in a server, and load right? Every reason if not, and the command that helps.

Each rule names the version whose source it was read from or on which it was observed. Rules err on the side of telling.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import CONFIG, Adapter, read_adapter, read_json
from adapters_kit.artifacts.checkpoint import SINGLE, open_checkpoint
from adapters_kit.artifacts.source import locate
from adapters_kit.errors import ShippingError, UnknownNameError, did_you_mean
from adapters_kit.shipping.export import KEY, RESIDUAL

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VERSIONS = {
    "peft": "peft 0.21",
    "transformers": "transformers 5.23",
    "vllm": "vLLM 0.33",
    "sglang": "SGLang at commit 0ceb81f, srt/lora",
    "llama.cpp": "llama.cpp as in llama-cpp-python 0.3.36",
    "ollama": "Ollama at commit 0242080, convert",
}
# Architectures whose adapters Ollama takes.
_OLLAMA = ("llama", "gemma2")


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


@dataclass
class CheckReport:
    """What `check` found; true in a condition if nothing stands in the way."""

    path: Path
    target: str
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rules = f"rules of {VERSIONS[self.target]}"
        if self.ok:
            return f"{self.path} loads in {self.target} ({rules})."
        count = len(self.problems)
        head = f"{self.path} in {self.target}: {count} problem{'s' * (count > 1)} ({rules})"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


def check(folder: str | os.PathLike, target: str = "vllm", *, max_lora_rank: int = 16) -> CheckReport:
    """Whether an adapter or a merged model loads in `target`, and computes there what it should.

    Args:
        folder: an adapter folder, or a model folder.
        target: "peft", "transformers", "vllm", "sglang", "llama.cpp" or "ollama".
        max_lora_rank: for vLLM, the value of its option of that name (its default is 16).

    Returns:
        A report with every reason against it. Nothing is loaded or changed.

    Raises:
        UnknownNameError: no such target.
        ShippingError: the folder holds neither an adapter nor a model.
    """
    if target not in VERSIONS:
        raise UnknownNameError(f"Unknown target {target!r}. {did_you_mean(target, VERSIONS)}")
    path = Path(folder)
    report = CheckReport(path, target)
    if not (path / CONFIG).is_file():
        if not (path / "config.json").is_file():
            raise ShippingError(f"{path} holds neither an adapter ({CONFIG}) nor a model (config.json).")
        report.problems += _model_problems(path, target)
        return report
    try:
        adapter = read_adapter(path)
    except ShippingError as error:
        report.problems.append(Problem(str(error), "take another checkpoint, or save the adapter again"))
        return report
    report.problems += _common(adapter)
    report.problems += _RULES[target](adapter, max_lora_rank)
    return report


def _model_problems(path: Path, target: str) -> Iterator[Problem]:
    try:
        with open_checkpoint(path) as checkpoint:
            files = checkpoint.files
    except ShippingError as error:
        yield Problem(str(error), "merge or save the model again")
        return
    if target == "sglang" and len(files) == 1 and files != [SINGLE]:
        yield Problem(f"the weights are named {files[0]}", f"rename them to {SINGLE}")
    config = read_json(path / "config.json")
    if not config.get("architectures"):
        yield Problem("config.json names no architecture", 'add "architectures": ["…ForCausalLM"] to config.json')
    text = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
    if not text and target not in {"peft", "transformers"}:
        yield Problem("there is no tokenizer", "copy the base's tokenizer files, verbatim, into the folder")
    if target == "llama.cpp":
        yield Problem("it takes GGUF files, not safetensors", f"adapters-kit export {path} model.gguf --format gguf")


def _common(adapter: Adapter) -> Iterator[Problem]:
    """What breaks an adapter everywhere."""
    if adapter.base is None:
        yield Problem("the adapter does not name its base", f'write "base_model_name_or_path" into {CONFIG}')
    else:
        try:
            locate_here(adapter.base)
        except ShippingError:
            yield Problem(
                f"its base {adapter.base!r} is a path that does not exist here",
                f"correct base_model_name_or_path in {CONFIG}, or name the base when loading",
            )
    sizes = {name: tensor.shape[0] for name, tensor in adapter.weights.items() if ".lora_A." in name}
    zero = [n for n, t in adapter.weights.items() if (".lora_B." in n or "lora_embedding_B" in n) and not t.any()]
    if zero and len(zero) == len(sizes):
        yield Problem("every lora_B is zero: the adapter changes nothing", "train it, or take a later checkpoint", True)


def locate_here(name: str) -> None:
    """Refuse a base that looks like a path and is not there; a hub id is not looked up."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        locate(name)


def _merge(adapter: Adapter) -> str:
    return f"adapters-kit merge {adapter.folder} merged/"


def _canonical(adapter: Adapter, rank: int | None = None) -> str:
    ranked = f" --rank {rank}" if rank else ""
    return f"adapters-kit export {adapter.folder} canonical/ --canonical{ranked}"


def _ranks(adapter: Adapter) -> set[int]:
    return {
        t.shape[0] for name, t in adapter.weights.items() if ".lora_A." in name or name.endswith("lora_embedding_A")
    }


def _scaled_oddly(adapter: Adapter, rslora_too: bool) -> list[str]:
    """Options that change the scale of an update and that a server does not read."""
    config = adapter.config
    return [
        name
        for name, used in (
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
            ("use_rslora", rslora_too and config.use_rslora),
        )
        if used
    ]


def _lora_only(adapter: Adapter, server: str) -> Iterator[Problem]:
    if adapter.method != "lora":
        yield Problem(f"it is a {adapter.method} adapter; {server} takes LoRA only", _merge(adapter))


def _not_plain(adapter: Adapter) -> Iterator[Problem]:
    """Variants of LoRA that are more than B A."""
    config = adapter.config
    for used, what in (
        (config.use_dora, "it uses DoRA"),
        (config.lora_bias, "it has biases on lora_B (lora_bias)"),
        (config.bias != "none", f"it trains biases (bias={config.bias!r})"),
        (getattr(config, "layer_replication", None), "it replicates layers (layer_replication)"),
        (getattr(config, "alora_invocation_tokens", None), "it is an activated LoRA (alora_invocation_tokens)"),
        (getattr(config, "trainable_token_indices", None), "it trains single tokens (trainable_token_indices)"),
        (getattr(config, "target_parameters", None), "it adapts fused experts (target_parameters)"),
    ):
        if used:
            yield Problem(what, _merge(adapter))
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(RESIDUAL):
        yield Problem(f"it sits on weights changed by its initialisation ({init})", _merge(adapter), silent=True)


def _peft(adapter: Adapter, _: int) -> Iterator[Problem]:
    raw = read_json(adapter.folder / CONFIG)
    known = set(type(adapter.config).__dataclass_fields__)
    strange = sorted(raw.keys() - known)
    if strange:
        yield Problem(
            f"{CONFIG} has options that this peft does not know and ignores: {', '.join(strange)}",
            "install the peft that wrote it (peft_version in the config)",
            silent=True,
        )


def _transformers(adapter: Adapter, _: int) -> Iterator[Problem]:
    if adapter.config.is_prompt_learning:
        yield Problem("load_adapter refuses prompt learning", "load it with peft.PeftModel.from_pretrained")


def _vllm(adapter: Adapter, limit: int) -> Iterator[Problem]:
    yield from _lora_only(adapter, "vLLM")
    if adapter.method != "lora":
        return
    yield from _not_plain(adapter)
    largest = max(_ranks(adapter), default=0)
    if largest > limit:
        allowed = next((rank for rank in VLLM_RANKS if rank >= largest), None)
        start = f"start vLLM with --max-lora-rank {allowed}, or " if allowed else ""
        yield Problem(f"rank {largest} is above max_lora_rank = {limit}", start + _canonical(adapter, limit))
    heads = set(adapter.config.modules_to_save or ()) - {"classifier", "score"}
    if heads:
        yield Problem(f"it saves whole modules ({', '.join(sorted(heads))})", _merge(adapter))
    odd = _scaled_oddly(adapter, rslora_too=False)
    if odd:
        yield Problem(f"{', '.join(odd)} ignored: wrong scales", _canonical(adapter), silent=True)


def _sglang(adapter: Adapter, _: int) -> Iterator[Problem]:
    yield from _lora_only(adapter, "SGLang")
    if adapter.method != "lora":
        return
    yield from _not_plain(adapter)
    if adapter.config.modules_to_save:
        yield Problem(f"it saves whole modules ({', '.join(sorted(adapter.config.modules_to_save))})", _merge(adapter))
    odd = _scaled_oddly(adapter, rslora_too=True)
    if odd:
        yield Problem(f"{', '.join(odd)} ignored: the scale is alpha / r", _canonical(adapter), silent=True)


def _llama_cpp(adapter: Adapter, _: int) -> Iterator[Problem]:
    yield from _lora_only(adapter, "llama.cpp")
    if adapter.method != "lora":
        return
    yield from _not_plain(adapter)
    other = sorted(name for name in adapter.weights if not KEY.match(name) and "lora_B.bias" not in name)
    if other:
        yield Problem(f"{len(other)} tensors are neither lora_A nor lora_B, such as {other[0]!r}", _merge(adapter))
    odd = _scaled_oddly(adapter, rslora_too=True)
    if odd:
        yield Problem(f"{', '.join(odd)} ignored: the scale is alpha / r", _canonical(adapter), silent=True)
    yield Problem("it takes GGUF files", f"adapters-kit export {adapter.folder} adapter.gguf --format gguf")


def _ollama(adapter: Adapter, limit: int) -> Iterator[Problem]:
    rules = [problem for problem in _llama_cpp(adapter, limit) if problem.what != "it takes GGUF files"]
    yield from rules
    alpha = getattr(adapter.config, "lora_alpha", 0)
    if not isinstance(alpha, int) or alpha < 0:
        yield Problem(f"lora_alpha = {alpha!r} is not a whole number", _canonical(adapter))
    base = Path(adapter.base or "")
    if (base / "config.json").is_file():
        kind = read_json(base / "config.json").get("model_type")
        if kind not in _OLLAMA:
            yield Problem(f"adapters on {kind!r} models are not taken ({', '.join(_OLLAMA)} are)", _merge(adapter))


_RULES: dict[str, Callable[[Any, int], Iterator[Problem]]] = {
    "peft": _peft,
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
}
