"""A `blocks` adapter into its GGUF file: a copy in which the trained fp16 numbers are new, and no other byte.

The rows of a layer may lie in another order in the file than in the model (q and k of Llama): they go back where they
were. What was written is read again as a user would, and compared with base + adapter.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from adapters_kit.anatomy import probe_inputs
from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.files import replacing, write_json
from adapters_kit.artifacts.identity import base_hashes, compare_hashes, wrong_base
from adapters_kit.artifacts.manifest import describe
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.errors import ShippingError
from adapters_kit.kernels.block_update import updated
from adapters_kit.kernels.ggml import FORMATS
from adapters_kit.loading import load, skeleton
from adapters_kit.loading.gguf import Kept, kept_weights
from adapters_kit.methods.blocks.layer import BlocksLayer

SUFFIX = ".adapters_kit.json"  # beside the file, since not one byte inside it says what was trained
COPY = 1 << 24  # bytes


@dataclass(frozen=True)
class BlocksReport:
    """What a merge into a GGUF file did; `print` it.

    Attributes:
        path: the written file.
        tensors: number of tensors with new scales or minima.
        numbers: fp16 values that are new.
        nbytes: size of the file, which is the base's.
        seconds: wall-clock time, without the verification.
        kl: mean Kullback–Leibler divergence of the written file's predictions from those of base + adapter, in nats;
            None if nothing was compared.
        largest: largest difference of the logits, in units of their largest absolute value; None likewise.
        notes: what a user should know.
    """

    path: Path
    tensors: int
    numbers: int
    nbytes: int
    seconds: float
    kl: float | None = None
    largest: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"Merged into {self.path}: {self.numbers:,} fp16 numbers of {self.tensors} tensors are new and every other "
            f"byte is the base's; {self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s."
        )
        check = "not verified (verify='off')"
        if self.kl is not None:
            check = (
                f"The file, read again, against base + adapter: KL {self.kl:.1e} nats, largest difference of the "
                f"logits {self.largest:.1e} of their largest value (rounding to fp16)."
            )
        return "\n".join([text, check, *self.notes])


def merge_into_gguf(
    adapter: Adapter, base: Path, out: Path, *, verify: bool = True, overwrite: bool = False, force: bool = False
) -> BlocksReport:
    """Write `out`, the file `base` with what the adapter trained.

    Args:
        adapter: of the method `blocks`.
        base: the .gguf file that it was trained on.
        out: the file to write.
        verify: load `out` and compare its logits with those of base + adapter.
        overwrite: replace `out`.
        force: another base than the recorded one; the report says so.

    Raises:
        ShippingError: another method, another base, a tensor that the file lacks or stores otherwise, values that fp16
            cannot hold, or a file that does not compute what was trained. `out` is then as it was.
    """
    if adapter.method != "blocks":
        raise ShippingError(
            f"{adapter.folder} is a {adapter.method} adapter, and a .gguf file's blocks can only take in what the "
            f"method 'blocks' trains. Merge it into a folder, then export that: adapters-kit merge {adapter.folder} "
            f"merged/ and adapters-kit export merged/ {out.name} --format gguf. Or ship it beside the file: "
            f"adapters-kit export {adapter.folder} adapter.gguf --format gguf."
        )
    if base.suffix != ".gguf" or not base.is_file():
        raise ShippingError(f"{base} is no .gguf file. Name the file that {adapter.folder} was trained on with base=.")
    if out.exists() and out.samefile(base):
        raise ShippingError(f"{out} is the base itself. Choose another file: the base would be lost.")
    if out.exists() and not overwrite:
        raise ShippingError(f"{out} exists. Choose another file, or allow it with overwrite=True.")
    notes = _check_base(adapter, base, force)
    begin = time.perf_counter()
    changes = _changes(adapter)
    table = kept_weights(base, skeleton(base))
    numbers = 0
    with replacing(out) as beside:
        _copy(base, beside)
        with open(beside, "rb+") as file:
            for path, (minima, scales) in changes.items():
                kept = table.get(f"{path}.weight")
                if kept is None:
                    raise ShippingError(f"{base} holds no blocks for {path}, which {adapter.folder} trains.")
                file.seek(kept.stored.offset)
                file.write(_new_blocks(kept, base, path, minima, scales))
                numbers += sum(change.numel() for change in (minima, scales) if change is not None)
        seconds = time.perf_counter() - begin
        kl, largest = _compare(adapter, base, beside) if verify else (None, None)
    write_json(
        Path(f"{out}{SUFFIX}"),
        {
            "made_by": f"adapters-kit {version('adapters-kit')}",
            "base": describe(base),
            "base_sha256": base_hashes(base)[base.name],
            "sha256": file_sha256(out),
            "method": "blocks",
            "trained": json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))["train"],
            "tensors": sorted(table[f"{path}.weight"].stored.name for path in changes),
            "kl": kl,
        },
    )
    return BlocksReport(out, len(changes), numbers, out.stat().st_size, seconds, kl, largest, tuple(notes))


def _check_base(adapter: Adapter, base: Path, force: bool) -> list[str]:
    expected = adapter.record.get("tensors")
    if not expected:
        return [f"{adapter.folder.name} has no record of its base: nobody checked that it is the right file."]
    # A file is known by what it holds, wherever it lies and whatever it is called.
    here = base_hashes(base)
    found = [] if set(expected.values()) == set(here.values()) else compare_hashes(expected, here)
    if found and not force:
        raise wrong_base(adapter.folder, adapter.record, base, found)
    return [f"Forced onto another base than the recorded one: {line}." for line in found]


def _changes(adapter: Adapter) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Path in the model -> Δm and s as saved matrices, `(out, blocks)` in float64, without a layer's own unit."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in adapter.weights.items():
        head, mark, tail = name.removeprefix("base_model.model.").partition(".blocks_")
        if not mark:
            raise ShippingError(
                f"{adapter.folder} also holds {name}, which no .gguf file takes in: the method 'blocks' ships alone."
            )
        field, _, part = tail.partition(".")
        found.setdefault(head, {}).setdefault(field, {})[part] = tensor.double()
    factor = float(adapter.raw.get("scale_factor", 0.1))
    made: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    for path, fields in found.items():
        minima, scales = (_matrix(fields[name]) if name in fields else None for name in ("minima", "scales"))
        made[path] = minima, None if scales is None else scales * factor
    return made


def _matrix(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts["full"] if "full" in parts else parts["B"] @ parts["A"]


def _new_blocks(
    kept: Kept, base: Path, path: str, minima: torch.Tensor | None, scales: torch.Tensor | None
) -> memoryview:
    """The tensor's bytes in the file's order of rows."""
    kind = int(kept.stored.kind)
    raw = kept.read(os.fspath(base))
    blocks = raw.shape[1] // FORMATS[kind].nbytes
    for change in (minima, scales):
        if change is not None and change.shape != (raw.shape[0], blocks):
            raise ShippingError(
                f"{path}: the adapter changes {tuple(change.shape)} blocks, {base} holds {(raw.shape[0], blocks)}."
            )
    if minima is not None:
        minima = minima * BlocksLayer.unit_of(raw, kind)
    new = updated(raw, kind, minima, scales)
    for offset in (FORMATS[kind].scale, FORMATS[kind].minimum):
        if offset is not None:
            values = new.view(raw.shape[0], blocks, -1)[..., offset : offset + 2].contiguous().view(torch.float16)
            if not values.isfinite().all():
                raise ShippingError(f"{path}: what was trained does not fit into fp16. The training diverged.")
    array = new.numpy()
    if kept.order is not None:
        in_file = np.empty_like(array)
        in_file[kept.order] = array
        array = in_file
    return memoryview(np.ascontiguousarray(array)).cast("B")


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "rb+") as write:
        while piece := read.read(COPY):
            write.write(piece)


def _compare(adapter: Adapter, base: Path, made: Path) -> tuple[float, float]:
    """The file against base + adapter, float32, on random tokens."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained: nn.Module = load(base, quantize="keep", dtype="float32")
        inputs = [probe_inputs(trained) for _ in range(2)]
        wrapped = PeftModel.from_pretrained(trained, str(adapter.folder)).eval()
        expected = [wrapped(**batch).logits.float() for batch in inputs]
        shipped = load(made, quantize="keep", dtype="float32")
        got = [shipped(**batch).logits.float() for batch in inputs]
    largest = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True))
    kls = []
    for a, b in zip(expected, got, strict=True):
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kls.append(float((log_a.exp() * (log_a - log_b)).sum(-1).mean()))
    kl = sum(kls) / len(kls)
    if not kl < 0.01:
        raise ShippingError(
            f"The written file does not compute what was trained (KL {kl:.2e} nats). It was not kept; the numbers may "
            "have grown beyond what fp16 resolves."
        )
    return kl, largest
