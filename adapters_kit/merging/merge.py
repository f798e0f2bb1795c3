"""merge(): fold an adapter into its base, tensor by tensor, and prove that the result computes what was trained."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters_kit.artifacts import mlx
from adapters_kit.artifacts.base_config import read_base_config
from adapters_kit.artifacts.checkpoint import Checkpoint, open_checkpoint
from adapters_kit.artifacts.files import write_text
from adapters_kit.artifacts.identity import base_hashes, check_bases
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.proof import GENERATES, PROOF
from adapters_kit.artifacts.side_files import own_file, write_side_files
from adapters_kit.artifacts.source import base_of
from adapters_kit.artifacts.staging import staged
from adapters_kit.artifacts.unread import other_adapters
from adapters_kit.errors import ShippingError
from adapters_kit.merging.base_folder import as_checkpoint
from adapters_kit.merging.job import Job, Order, on_model, plan
from adapters_kit.merging.merge_card import model_card
from adapters_kit.merging.order import Paths, check_one_for_gguf, order_of
from adapters_kit.merging.writer import write

if TYPE_CHECKING:
    from adapters_kit.merging.into_gguf import GgufReport
    from adapters_kit.merging.requantize import Survival
    from adapters_kit.merging.verify import Comparison

BATCHES = {"sample": 2, "full": 16}


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
        told = any(note.startswith("Verified") for note in self.notes)
        check = "" if told else "not verified (verify='off')" if self.check is None else str(self.check)
        survival = [] if self.survival is None else [str(self.survival)]
        head = f"Merged into {self.path}: tensors {shown}; {size}."
        return "\n".join([head, *([check] if check else []), *survival, *self.notes])


def merge(
    adapter: Paths | Sequence[Paths],
    out: Paths,
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    base: Paths | None = None,
    quantized: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    verify: str = "sample",
    calibration: Sequence[str] | str | Path | None = None,
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
        quantized: "nf4", "fp4" or "int8": what the base was quantized to when the adapter was trained, for an adapter
            that has no record of it; its linears are then taken as bitsandbytes holds them by default.
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
            it cannot be written. `out` is then as it was. An adapter without a record, of which nothing tells whether
            its base was quantized, is refused as well: say it with `base=` or `quantized=`.
    """
    order = order_of(adapter, weights, method, density, seed, base, quantized, dtype, quantize, verify)
    first = order.adapters[0]
    source = base_of(first, None if base == "original" else base)
    if Path(out).suffix == ".gguf":
        meaningless = {"dtype": dtype, "quantize": quantize, "quantized": quantized}
        check_one_for_gguf(order, Path(out), [name for name, value in meaningless.items() if value is not None])
        from adapters_kit.merging.into_gguf import merge_into_gguf

        checked = verify != "off"
        return merge_into_gguf(
            first, source, Path(out), calibration=calibration, verify=checked, overwrite=overwrite, force=force
        )
    if calibration is not None:
        raise ShippingError(f"calibration is for a LoRA that goes into a .gguf file, and {out} is none: leave it out.")
    if first.method == "blocks":
        raise ShippingError(
            f"{first.folder} trains what a .gguf file stores, and merges into such a file: "
            f"merge({str(first.folder)!r}, 'merged.gguf')."
        )
    with (
        staged(Path(out), overwrite=overwrite, keep=[*(one.folder for one in order.adapters), source]) as stage,
        as_checkpoint(source, stage / ".base") as folder,
        open_checkpoint(folder) as checkpoint,
        ThreadPoolExecutor(1) as beside,
    ):
        begin = time.perf_counter()
        hashing = beside.submit(base_hashes, source)
        raw = read_base_config(folder)
        for one in order.adapters:
            mlx.check_base(one.folder, raw)
        _check_known(order, source, base, checkpoint, raw)
        job = plan(order, checkpoint, raw)
        if job.updates:  # the plain road hashes while it writes
            check_bases(order.adapters, source, hashing.result(), force)
        hashes = write(job.layout, checkpoint, job.changed(), stage)
        others = [note for one in order.adapters for note in other_adapters(one.folder)]
        notes = [*job.notes, *others, *check_bases(order.adapters, source, hashing.result(), force)]
        notes += write_side_files(folder, first.folder, job.config, stage)
        report = _counted(Path(out), job, time.perf_counter() - begin)
        if verify != "off":
            report.check, found = _verify(order, job, checkpoint, raw, stage, verify)
            notes += found
            if order.mix is None and report.check is not None:
                notes += _prove(order, job, checkpoint, raw, stage)
        if quantize is not None:
            _requantize(_on_model(order, job, checkpoint, raw), stage, quantize, report)
            hashes = {}
        checkpoint.check_unchanged()
        report.notes = notes
        shutil.rmtree(stage / ".base", ignore_errors=True)
        _write_card(stage, order, job, report, source)
        write_manifest(stage, _about(order, source, hashing.result(), report), hashes)
    return report


def _check_known(
    order: Order, source: Path, base: Paths | None, checkpoint: Checkpoint, raw: Mapping[str, Any]
) -> None:
    """Refuse to guess whether a base without a record was quantized when its adapter was trained."""
    adapter = order.adapters[0]
    if order.mix is not None or order.rounding is not None or base is not None or "quantize" in adapter.record:
        return
    if adapter.record.get("tensors"):  # recorded before records told it
        return
    from dataclasses import replace

    from adapters_kit.merging.verify import CannotRun, drift

    drifts = []
    try:
        for kind in ("nf4", "int8"):
            update = on_model(replace(order, rounding=kind), checkpoint, raw).updates[0]
            drifts.append(f"{drift(update)} for {kind}")
    except CannotRun:
        drifts = []  # nothing to show
    except ShippingError:  # it cannot be merged either way, and says so when it is tried
        if adapter.method != "lora":
            raise
    joined = " and ".join(drifts)
    shown = f" Outputs of base + adapter on the one and on the other differ by up to {joined}." if drifts else ""
    raise ShippingError(
        f"{adapter.folder} has no record of its base (adapters_kit.json), so nothing tells whether it was trained on "
        f"{source.name} as it is stored or on a quantized copy, and the two merge into different models.{shown} Say "
        "it: base='original' where it was not quantized, quantized='nf4' (or 'fp4', 'int8') where it was; or write "
        "the record once with ak.record(folder, model)."
    )


def _counted(out: Path, job: Job, seconds: float) -> MergeReport:
    tensors = [tensor for _, tensor in job.layout.tensors().values()]
    copied = sum(tensor.origin is not None for tensor in tensors)
    changed = len(tensors) - copied - len(job.added)
    return MergeReport(out, changed, copied, list(job.added), list(job.dropped), job.layout.nbytes, seconds)


def _on_model(order: Order, job: Job, checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Job:
    """The job with its adapter on a model, which plain LoRA does without until something has to run."""
    return job if job.updates else on_model(order, checkpoint, raw)


def _requantize(job: Job, stage: Path, kind: str, report: MergeReport) -> None:
    from adapters_kit.merging.requantize import requantize

    report.survival = requantize(job.updates[0], stage, kind)
    report.nbytes = sum(path.stat().st_size for path in stage.glob("*.safetensors"))


def _verify(
    order: Order, job: Job, checkpoint: Checkpoint, raw: Mapping[str, Any], stage: Path, level: str
) -> tuple[Comparison | None, list[str]]:
    """The finished folder against base + adapter, and what to tell about it.

    No live model computes the sum of several adapters (peft's would add cross terms): there every tensor is computed
    again and compared with what was written.
    """
    from adapters_kit.merging.merged_folder import open_whole, tokenizer_notes
    from adapters_kit.merging.verify import CannotRun, compare, recheck

    open_whole(stage, job.architecture)
    told = tokenizer_notes(stage)
    if order.mix is not None:
        recheck(checkpoint, job.layout, job.changed(), stage)
        return None, ["Verified: every tensor was computed again and is what was written.", *told]
    job = _on_model(order, job, checkpoint, raw)
    check = None
    try:
        check, notes = compare(job.updates[0], stage, batches=BATCHES[level])
    except CannotRun as error:
        notes = [
            f"Verified: every tensor was computed again and is what was written. Outputs were not compared: {error}"
        ]
    if level == "full" or check is None:
        recheck(checkpoint, job.layout, job.changed(), stage)
    return check, [*notes, *told]


def _prove(order: Order, job: Job, checkpoint: Checkpoint, raw: Mapping[str, Any], stage: Path) -> list[str]:
    """Write proof.json, by which `prove` tells the merged model from its base on any server."""
    from adapters_kit.merging.merged_proof import adapters_proof, new_proof

    proof = adapters_proof(order.adapters[0], stage)
    if proof is None and not job.architecture.endswith(GENERATES):
        return []
    proof = proof or new_proof(_on_model(order, job, checkpoint, raw).updates[0], stage)
    if proof is None:
        return []
    proof.write(stage)
    return [f"{PROOF} holds what base and tuned model say to {len(proof.prompts)} prompts: adapters-kit prove URL."]


def _write_card(stage: Path, order: Order, job: Job, report: MergeReport, source: Path) -> None:
    first = order.adapters[0]
    own = own_file(first.folder, "README.md")
    verified = next((note for note in report.notes if note.startswith("Verified")), "Not verified.")
    text = model_card(
        kind=job.architecture,
        base=str(first.base or source),
        adapters=[one.folder for one in order.adapters],
        method=first.method,
        check=verified if report.check is None else str(report.check),
        notes=[*([str(report.survival)] if report.survival else []), *(n for n in report.notes if n != verified)],
        own=own.read_text(encoding="utf-8", errors="replace") if own else "",
    )
    write_text(stage / "README.md", text)


def _about(order: Order, source: Path, hashes: Mapping[str, str], report: MergeReport) -> dict[str, Any]:
    """What the manifest says of where the folder comes from."""
    about: dict[str, Any] = {"base": describe(source), "base_tensors": dict(hashes)}
    if order.mix is None:
        return {
            "adapter": describe(order.adapters[0].folder),
            **about,
            "check": None if report.check is None else asdict(report.check),
        }
    names = [describe(one.folder) for one in order.adapters]
    combined = asdict(order.mix) if order.mix.method != "sum" else {"method": "sum"}
    return {"adapters": names, "weights": list(order.factors), **about, "combined": combined}
