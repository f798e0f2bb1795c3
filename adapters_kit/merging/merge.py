"""merge(): fold an adapter into its base, tensor by tensor, and prove that the result computes what was trained."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters_kit.artifacts.adapter import Adapter, open_adapter, read_json
from adapters_kit.artifacts.checkpoint import Checkpoint, open_checkpoint
from adapters_kit.artifacts.dtypes import as_dtype
from adapters_kit.artifacts.identity import base_hashes, compare_hashes, wrong_base
from adapters_kit.artifacts.manifest import MANIFEST, write_manifest
from adapters_kit.artifacts.source import WEIGHT_SUFFIXES, base_of
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError
from adapters_kit.merging.base import as_checkpoint
from adapters_kit.merging.card import model_card, without_front_matter
from adapters_kit.merging.output import lay_out
from adapters_kit.merging.plain_lora import find_direct
from adapters_kit.merging.writing import write

# Building the model's skeleton imports transformers and peft, which takes longer than a plain merge: see `direct`.
if TYPE_CHECKING:
    from adapters_kit.merging.into_gguf import GgufReport
    from adapters_kit.merging.job import Job
    from adapters_kit.merging.mixing import Mix
    from adapters_kit.merging.requantize import Survival
    from adapters_kit.merging.verify import Comparison

QUANTIZED = ("nf4", "fp4", "int8")
BATCHES = {"sample": 2, "full": 16}
# Files of a training folder that a model folder needs too: the tokenizer may have got new tokens or a chat template.
_PROCESSOR = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "preprocessor",
              "processor", "spiece", "sentencepiece")  # fmt: skip


@dataclass
class MergeReport:
    """What a merge did; `print` it.

    Attributes:
        path: the merged folder.
        changed: number of stored tensors that the adapter changed.
        copied: number of stored tensors that are the base's.
        added: tensors that the base did not have (a trained head, an untied embedding).
        dropped: base tensors that the trained model has no use for.
        nbytes: size of the weight files.
        seconds: wall-clock time, without the verification.
        check: merged against base + adapter; None if it was switched off.
        survival: what requantizing left of the update; None if it was not asked for.
        notes: what a user should know.
    """

    path: Path
    changed: int
    copied: int
    added: list[str]
    dropped: list[str]
    nbytes: int
    seconds: float
    check: Comparison | None = None
    survival: Survival | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "changed": self.changed,
            "copied": self.copied,
            "added": len(self.added),
            "dropped": len(self.dropped),
        }
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        size = f"{self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s"
        check = "not verified (verify='off')" if self.check is None else str(self.check)
        survival = [] if self.survival is None else [str(self.survival)]
        return "\n".join([f"Merged into {self.path}: tensors {shown}; {size}.", check, *survival, *self.notes])


def merge(
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    verify: str = "sample",
    calibration: Sequence[str] | str | os.PathLike | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> MergeReport | GgufReport:
    """Write a model folder that computes what base + adapter computes, without building either.

    Weights are read, merged in float32, rounded once and written a few rows at a time; what the adapter does not touch
    is copied. Memory holds the adapter and the largest changed tensor in float32 (for plain LoRA, a few rows of it).
    `out` appears when everything is written and verified, or not at all.

    An adapter that `train` made on a quantized base is merged into the dequantized weights, because they are what it
    was trained on; `base="original"` takes the original ones and reports how far the result is from the trained model.

    Args:
        adapter: a peft adapter folder; or several, of any methods that merge, which become one update of each weight.
        weights: with several adapters, a factor for each; None takes 1 for each.
        method: with several adapters: "sum" is `base + Σ weight · update`, exactly; "ties" (Yadav et al. 2023,
            arXiv:2306.01708) keeps each update's largest values and settles signs by vote; "dare" (Yu et al. 2023,
            arXiv:2311.03099) drops values at random and scales up the rest.
        density: share of the values that "ties" and "dare" keep, above 0 and up to 1.
        seed: of DARE's choice.
        out: the folder to write; it must not exist or be empty, unless `overwrite`. Or a .gguf file, for an adapter on
            one: the base's, of the same size, with exactly what the method `blocks` trained, or for LoRA with the codes
            that keep its outputs best.
        base: the base model's folder, .gguf file or hub id; None takes the one that the adapter names; "original"
            takes that one without the quantization of the training.
        dtype: "float32", "bfloat16" or "float16" for every float tensor; None keeps each tensor's own (for a quantized
            base, that of the training).
        quantize: "nf4", "fp4" or "int8": quantize the merged linears again and save them as bitsandbytes holds them,
            which transformers loads. The report tells what the rounding left of the update; in 4 bit that is little.
        verify: "sample" compares the outputs of merged and base + adapter on two small batches; "full" on sixteen, and
            reads every written tensor again: copied ones must be the base's, changed ones what peft computes once
            more; "off" compares nothing. Weights lie in memory for one block at a time.
        calibration: LoRA into a .gguf file: text like that which the model will see, a file or some texts; by default
            the tuned model writes it itself.
        overwrite: replace what `out` holds, in one step at the end.
        force: merge into a base whose tensors differ from those recorded at training; the report says which.

    Returns:
        A report; its text shows the largest difference beside what rounding to the output dtype alone costs.

    Raises:
        ShippingError: the adapter cannot be merged, does not fit or is broken; the result does not compute the same; or
            it cannot be written. `out` is then as it was.
    """
    if verify not in {"sample", "full", "off"}:
        raise ShippingError(f"verify={verify!r}: choose 'sample', 'full' or 'off'.")
    if quantize not in (None, *QUANTIZED):
        raise ShippingError(f"quantize={quantize!r}: choose {', '.join(map(repr, QUANTIZED))} or None.")
    target = None if dtype is None else as_dtype(dtype)
    if not isinstance(adapter, str | os.PathLike):
        options = {"base": base, "dtype": target, "verify": verify, "overwrite": overwrite, "force": force}
        from adapters_kit.merging.mixing import Mix

        mix = Mix(method, density, seed)
        return _merge_sum([open_adapter(Path(one)) for one in adapter], weights, mix, Path(out), quantize, **options)
    if weights is not None or method != "sum":
        given = "weights" if weights is not None else f"method={method!r}"
        raise ShippingError(f"{given} is for several adapters: merge([first, second], out, weights=[0.5, 0.5]).")
    read = open_adapter(Path(adapter))
    if Path(out).suffix == ".gguf":
        from adapters_kit.merging.into_gguf import merge_into_gguf

        return merge_into_gguf(
            read,
            base_of(read, base),
            Path(out),
            calibration=calibration,
            verify=verify != "off",
            overwrite=overwrite,
            force=force,
        )
    if read.method == "blocks":
        raise ShippingError(
            f"{read.folder} trains what a .gguf file stores, and merges into such a file: merge({str(read.folder)!r}, "
            "'merged.gguf')."
        )
    original = base == "original"
    source = base_of(read, None if original else base)
    with staged(Path(out), overwrite=overwrite) as stage:
        begin = time.perf_counter()
        work = stage / ".base"
        with (
            as_checkpoint(source, work) as folder,
            open_checkpoint(folder) as checkpoint,
            ThreadPoolExecutor(1) as beside,
        ):
            hashing = beside.submit(base_hashes, source)
            raw = read_json(folder / "config.json")
            direct = None if original else find_direct(read, checkpoint, raw)
            job, changes, added, dropped = None, dict(read.record.get("config") or {}), [], []
            if direct is not None:
                kind, notes = raw["architectures"][0], []
                computed = set(direct.factors)
                layout = lay_out(checkpoint, dtype=target, computed=computed)
                values = direct.changed(checkpoint)
            else:
                notes = _check_base(read, source, hashing.result(), force)  # before the model is built
                job = _plan(read, checkpoint, target, original)
                kind, computed, layout = type(job.attached.bare).__name__, job.computed, job.layout
                changes |= _config_changes(job, raw)
                added, dropped = sorted(job.added.values()), sorted(job.dropped)
                values = _changed(job)
            hashes = write(layout, checkpoint, values, stage)
            notes = notes or _check_base(read, source, hashing.result(), force)
            _write_config(raw, changes, stage, target)
            _copy_files(folder, read.folder, stage)
            copied = sum(tensor.origin is not None for _, tensor in layout.tensors().values())
            report = MergeReport(
                Path(out), len(computed), copied, added, dropped, layout.nbytes, time.perf_counter() - begin
            )
            if verify != "off" or quantize:
                job = job or _plan(read, checkpoint, target, original)
            if verify != "off":
                from adapters_kit.merging.verify import compare, recheck

                report.check = compare(job, stage, batches=BATCHES[verify])
                if verify == "full":
                    recheck(checkpoint, layout, _changed(job), stage)
            if quantize:
                from adapters_kit.merging.requantize import requantize

                report.survival = requantize(job, stage, quantize)
                report.nbytes = sum(path.stat().st_size for path in stage.glob("*.safetensors"))
                hashes = {}
            report.notes = (job.notes if job else []) + notes
        shutil.rmtree(work, ignore_errors=True)
        _write_card(stage, kind, read, report, source)
        about = {"adapter": str(read.folder), "base": str(source), "base_tensors": hashing.result()}
        about["check"] = None if report.check is None else asdict(report.check)
        write_manifest(stage, about, hashes)
    return report


def _merge_sum(
    adapters: list[Adapter],
    weights: Sequence[float] | None,
    mix: Mix,
    out: Path,
    quantize: str | None,
    *,
    base: str | os.PathLike | None,
    dtype: torch.dtype | None,
    verify: str,
    overwrite: bool,
    force: bool,
) -> MergeReport:
    """As `merge` for several adapters. No live model computes their sum (peft's would add cross terms), so every tensor
    is computed again and compared with what was written."""
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(factors) != len(adapters):
        raise ShippingError(f"{len(factors)} weights for {len(adapters)} adapters: give one for each.")
    if quantize or base == "original":
        raise ShippingError("Several adapters merge into the base as it is stored: leave out quantize= and 'original'.")
    from adapters_kit.merging.mixing import changed_sum, plan_sum
    from adapters_kit.merging.verify import recheck

    source = base_of(adapters[0], base)
    with staged(out, overwrite=overwrite) as stage:
        begin = time.perf_counter()
        work = stage / ".base"
        with as_checkpoint(source, work) as folder, open_checkpoint(folder) as checkpoint:
            hashes = base_hashes(source)
            notes = [line for one in adapters for line in _check_base(one, source, hashes, force)]
            jobs, layout = plan_sum(adapters, checkpoint, dtype)
            written = write(layout, checkpoint, changed_sum(jobs, factors, mix), stage)
            raw = read_json(folder / "config.json")
            _write_config(raw, dict(adapters[0].record.get("config") or {}), stage, dtype)
            _copy_files(folder, adapters[0].folder, stage)
            tensors = [tensor for _, tensor in layout.tensors().values()]
            copied = sum(tensor.origin is not None for tensor in tensors)
            seconds = time.perf_counter() - begin
            report = MergeReport(out, len(tensors) - copied, copied, [], [], layout.nbytes, seconds, notes=notes)
            if verify != "off":
                recheck(checkpoint, layout, changed_sum(jobs, factors, mix), stage)
                report.notes.insert(0, "Verified: every tensor was computed again and is what was written.")
        shutil.rmtree(work, ignore_errors=True)
        how = {"sum": "The sum", "ties": f"TIES at density {mix.density:g}", "dare": f"DARE at density {mix.density:g}"}
        parts = ", ".join(f"{factor:g} × {one.folder}" for one, factor in zip(adapters, factors, strict=True))
        report.notes.append(f"{how[mix.method]} of {parts}.")
        _write_card(stage, type(jobs[0].attached.bare).__name__, adapters[0], report, source)
        about = {"adapters": [str(one.folder) for one in adapters], "weights": factors, "base": str(source)}
        about["combined"] = asdict(mix) if mix.method != "sum" else {"method": "sum"}
        write_manifest(stage, about | {"base_tensors": hashes}, written)
    return report


def _plan(adapter: Adapter, checkpoint: Checkpoint, dtype: torch.dtype | None, original: bool) -> Job:
    from adapters_kit.merging.job import plan

    return plan(adapter, checkpoint, dtype, original)


def _changed(job: Job) -> Iterator[tuple[str, torch.Tensor]]:
    from adapters_kit.merging.job import changed

    return changed(job)


def _write_card(stage: Path, kind: str, adapter: Adapter, report: MergeReport, source: Path) -> None:
    own = adapter.folder / "README.md"
    text = model_card(
        kind=kind,
        base=str(adapter.base or source),
        adapter=str(adapter.folder),
        method=adapter.method,
        check="Not verified." if report.check is None else str(report.check),
        notes=[*([str(report.survival)] if report.survival else []), *report.notes],
        body=without_front_matter(own.read_text(encoding="utf-8")) if own.is_file() else "",
    )
    (stage / "README.md").write_text(text, encoding="utf-8")


def _check_base(adapter: Adapter, source: Path, hashes: Mapping[str, str], force: bool) -> list[str]:
    """Compare the base with the record of the training; what to tell the user."""
    expected = adapter.record.get("tensors")
    if not expected:
        return [
            f"{adapter.folder} has no record of its base (adapters_kit.json): nobody checked that it is the right one."
        ]
    found = compare_hashes(expected, hashes)
    if found and not force:
        raise wrong_base(adapter.folder, adapter.record, source, found)
    return [f"Forced onto another base than the recorded one: {line}." for line in found]


def _config_changes(job: Job, raw: dict[str, Any]) -> dict[str, Any]:
    """Where the trained model's config differs from the base's, `raw`; a nested text config is changed in place."""
    old, new = job.attached.loaded, job.attached.bare.config
    changes: dict[str, Any] = {}
    name = type(job.attached.bare).__name__
    if name not in (raw.get("architectures") or [name]):
        changes["architectures"] = [name]
    if old.num_labels != new.num_labels:
        changes |= {"id2label": {str(k): v for k, v in new.id2label.items()}, "label2id": new.label2id}
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else None
    words = getattr(new.get_text_config(), "vocab_size", None)
    if words != getattr(old.get_text_config(), "vocab_size", None):
        (raw if text is None else text)["vocab_size"] = words
    if job.untied:
        changes["tie_word_embeddings"] = False
        if text is not None and "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    return changes


def _write_config(raw: dict[str, Any], changes: dict[str, Any], stage: Path, dtype: torch.dtype | None) -> None:
    """The base's config.json, changed only where the trained model differs."""
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in raw else "dtype"
        changes = changes | {key: str(dtype).removeprefix("torch.")}
    text = json.dumps(raw | changes, indent=2, ensure_ascii=False)
    (stage / "config.json").write_text(text + "\n", encoding="utf-8")


def _copy_files(base: Path, adapter: Path, stage: Path) -> None:
    """Everything that is not weights, verbatim: the base's files, then the adapter's tokenizer over them."""
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        skip = (
            path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or path.name in {"README.md", MANIFEST}
        )
        if path.is_file() and not hidden and not skip and relative != Path("config.json"):
            (stage / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, stage / relative)
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name.startswith(_PROCESSOR) and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, stage / path.name)
