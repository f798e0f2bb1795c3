"""merge(): fold an adapter into its base, tensor by tensor, and prove that the result computes what was trained."""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters_kit.errors import ShippingError
from adapters_kit.shipping.adapter import Adapter, is_finite, read_adapter, read_json
from adapters_kit.shipping.card import model_card, without_front_matter
from adapters_kit.shipping.checkpoint import DTYPES, Checkpoint, open_checkpoint
from adapters_kit.shipping.deltas import merge_unit
from adapters_kit.shipping.identity import differences, wrong_base
from adapters_kit.shipping.layout import Tensor, write_index
from adapters_kit.shipping.plan import Job, plan
from adapters_kit.shipping.skeleton import stored_form
from adapters_kit.shipping.source import WEIGHT_SUFFIXES, as_checkpoint, base_of
from adapters_kit.shipping.staging import copy_range, file_sha256, staged, write_at
from adapters_kit.shipping.verify import Comparison, compare

MANIFEST = "manifest.json"
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
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
        return "\n".join([f"Merged into {self.path}: tensors {shown}; {size}.", check, *self.notes])


def merge(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    verify: str = "sample",
    overwrite: bool = False,
    force: bool = False,
) -> MergeReport:
    """Write a model folder that computes what base + adapter computes, without building either.

    Weights are read, merged in float32, rounded once and written one tensor at a time; what the adapter does not touch
    is copied by the kernel. Memory holds the adapter and the largest changed tensor in float32. `out` appears when
    everything is written and verified, or not at all.

    An adapter that `train` made on a quantized base is merged into the dequantized weights, because they are what it
    was trained on; `base="original"` takes the original ones and reports how far the result is from the trained model.

    Args:
        adapter: a peft adapter folder.
        out: the folder to write; it must not exist or be empty, unless `overwrite`.
        base: the base model's folder, .gguf file or hub id; None takes the one that the adapter names; "original"
            takes that one without the quantization of the training.
        dtype: "float32", "bfloat16" or "float16" for every float tensor; None keeps each tensor's own (for a quantized
            base, that of the training).
        verify: "sample" compares the outputs of merged and base + adapter on two small batches, "full" on eight;
            "off" compares nothing.
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
    target = as_dtype(dtype)
    read = read_adapter(Path(adapter))
    original = base == "original"
    source = base_of(read, None if original else base)
    with staged(Path(out), overwrite=overwrite) as stage:
        begin = time.perf_counter()
        work = stage / ".base"
        with as_checkpoint(source, work) as folder, open_checkpoint(folder) as checkpoint:
            notes = _check_base(read, source, checkpoint, force)
            job = plan(read, checkpoint, target, original)
            job.notes += notes
            write(job, stage)
            _write_config(job, stage, target)
            _copy_files(folder, read.folder, stage)
            report = MergeReport(
                path=Path(out),
                changed=len(job.computed),
                copied=sum(tensor.origin is not None for _, tensor in job.layout.tensors().values()),
                added=sorted(job.added.values()),
                dropped=sorted(job.dropped),
                nbytes=job.layout.nbytes,
                seconds=time.perf_counter() - begin,
                notes=job.notes,
            )
            if verify != "off":
                report.check = compare(job, stage, batches=2 if verify == "sample" else 8)
        shutil.rmtree(work, ignore_errors=True)
        check = None if report.check is None else asdict(report.check)
        _write_card(stage, job, report, source)
        about = {"adapter": str(read.folder), "base": str(source), "check": check}
        write_manifest(stage, about | {"base_tensors": read.record.get("tensors") or "not recorded at training"})
    return report


def _write_card(stage: Path, job: Job, report: MergeReport, source: Path) -> None:
    own = job.adapter.folder / "README.md"
    text = model_card(
        kind=type(job.attached.bare).__name__,
        base=str(job.adapter.base or source),
        adapter=str(job.adapter.folder),
        method=job.adapter.method,
        check="Not verified." if report.check is None else str(report.check),
        notes=report.notes,
        body=without_front_matter(own.read_text(encoding="utf-8")) if own.is_file() else "",
    )
    (stage / "README.md").write_text(text, encoding="utf-8")


def _check_base(adapter: Adapter, source: Path, checkpoint: Checkpoint, force: bool) -> list[str]:
    """Compare the base with the record of the training; what to tell the user."""
    if not adapter.record.get("tensors"):
        return [
            f"{adapter.folder} has no record of its base (adapters_kit.json): nobody checked that it is the right one."
        ]
    found = differences(adapter.record, source, checkpoint if source.is_dir() else None)
    if found and not force:
        raise wrong_base(adapter.folder, adapter.record, source, found)
    return [f"Forced onto another base than the recorded one: {line}." for line in found]


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A float dtype by its name or short name; None stays None."""
    if dtype is None or dtype in _FLOATS.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if _SHORT.get(name, name) not in _FLOATS:
        raise ShippingError(f"dtype={dtype!r}: choose one of {', '.join(_FLOATS)}.")
    return _FLOATS[_SHORT.get(name, name)]


def write(job: Job, folder: Path) -> None:
    """Write the weight files of a planned merge, and their index, into `folder`."""
    files = {}
    try:
        for name, header in job.layout.headers.items():
            files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            size = len(header) + sum(tensor.nbytes for tensor in job.layout.files[name])
            os.posix_fallocate(files[name], 0, size)  # a full disk is noticed now, not at the end
            write_at(files[name], header, 0)
            _copy_untouched(job, job.layout.files[name], files[name])
        _write_changed(job, files)
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    write_index(job.layout, job.checkpoint, folder)


def _copy_untouched(job: Job, tensors: list[Tensor], target: int) -> None:
    """Copy runs of neighbours in one call; cast what gets another dtype."""
    run: tuple[Path, int, int, int] | None = None  # source file, start, position in the target, count

    def flush() -> None:
        if run is not None:
            copy_range(job.checkpoint.descriptor(run[0]), run[1], target, run[2], run[3])

    for tensor in tensors:
        if tensor.origin is None:
            continue
        stored = job.checkpoint.tensors[tensor.origin]
        if stored.dtype != tensor.dtype:
            _put(target, tensor, job.checkpoint.read(tensor.origin))
        elif run and run[0] == stored.file and run[1] + run[3] == stored.start and run[2] + run[3] == tensor.at:
            run = (*run[:3], run[3] + stored.nbytes)
        else:
            flush()
            run = (stored.file, stored.start, tensor.at, stored.nbytes)
    flush()


def _put(target: int, tensor: Tensor, value: torch.Tensor) -> None:
    if tuple(value.shape) != tuple(tensor.shape):
        raise ShippingError(f"{tensor.name} came out as {tuple(value.shape)} where {tuple(tensor.shape)} was planned.")
    cast = value.to(DTYPES[tensor.dtype]).contiguous()
    if not is_finite(cast):
        if not is_finite(value):
            raise ShippingError(f"{tensor.name} is not finite: the base or the adapter is broken.")
        raise ShippingError(
            f"{tensor.name} has values that do not fit {DTYPES[tensor.dtype]}. Choose dtype='bfloat16' or 'float32'."
        )
    if cast.numel():
        write_at(target, cast.view(-1).view(torch.uint8).numpy().data, tensor.at)


def _write_changed(job: Job, files: dict[str, int]) -> None:
    places = job.layout.tensors()

    def put(key: str, value: torch.Tensor) -> None:
        file, tensor = places[job.renamed.get(key, key)]
        _put(files[file], tensor, value)

    pending: dict[str, torch.Tensor] = {}

    def write_ready(names: list[str]) -> None:
        for name in names:
            if name in job.added:
                put(job.added[name], pending[name])
            origin = job.origins.get(name)
            if name not in job.written or origin is None:
                continue
            needed = job.written & set(origin.parameters)
            if needed <= pending.keys():  # one stored tensor may hold several parameters (fused q, k and v)
                whole = {part: pending[part] if part in needed else job.read(part) for part in origin.parameters}
                for key, value in stored_form(job.attached.bare, origin, whole).items():
                    put(key, value)
                for part in needed:
                    del pending[part]

    pending.update(job.attached.replaced)
    write_ready(sorted(job.attached.replaced))
    for unit in job.attached.units:
        merged = merge_unit(unit, job.adapter, job.read)
        pending.update(merged)
        write_ready(list(merged))
        for name in merged.keys() - job.written:
            del pending[name]
    for name in sorted(job.written - set(job.attached.replaced)):
        if name in job.rounded and not any(name in unit.shapes for unit in job.attached.units):
            pending[name] = job.read(name)
            write_ready([name])
    for name in job.added.keys() - job.attached.replaced.keys():
        if not any(name in unit.shapes for unit in job.attached.units):
            put(job.added[name], job.read(name))  # was tied to a weight that changed; keeps the old values


def _write_config(job: Job, stage: Path, dtype: torch.dtype | None) -> None:
    """The base's config.json, changed only where the trained model differs."""
    raw = read_json(job.checkpoint.folder / "config.json")
    old, new = job.attached.loaded, job.attached.bare.config
    changes: dict[str, Any] = dict(job.adapter.record.get("config") or {})
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
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in raw else "dtype"
        changes[key] = str(dtype).removeprefix("torch.")
    raw |= changes
    (stage / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """`manifest.json`: size and sha256 of every file of the folder, and where they come from."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
    }
    manifest = {"made_by": f"adapters-kit {version('adapters-kit')}", **about, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
