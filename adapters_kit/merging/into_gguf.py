"""An adapter into its GGUF file: a copy of the same size in which what the adapter changes is new, and no other byte.

What the method `blocks` trained goes in exactly: fp16 numbers. LoRA's update does not fit between the codes; the codes
are chosen for the layers' outputs then (`lora_rounding`), and the report says what survived. The rows of a layer may
lie in another order in the file than in the model (q and k of Llama): they go back where they were. What was written is
read again as a user would, and compared with base + adapter.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from adapters_kit.anatomy import probe_inputs
from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.identity import base_hashes, compare_hashes, wrong_base
from adapters_kit.artifacts.manifest import describe
from adapters_kit.artifacts.staging import check_file, file_sha256, staged_file
from adapters_kit.errors import ShippingError
from adapters_kit.kernels.block_update import updated
from adapters_kit.kernels.ggml import FORMATS
from adapters_kit.loading import load, skeleton
from adapters_kit.loading.gguf import Kept, kept_weights
from adapters_kit.merging.lora_rounding import calibration_tokens, round_in, takes_in
from adapters_kit.methods.blocks.layer import BlocksLayer
from adapters_kit.wrapping import wrap

SUFFIX = ".adapters_kit.json"  # beside the file, since not one byte inside it says what was trained
COPY = 1 << 24  # bytes
EXACT = 0.01  # nats: fp16 alone costs a thousandth of it


@dataclass(frozen=True)
class GgufReport:
    """What a merge into a GGUF file did; `print` it.

    Attributes:
        path: the written file.
        tensors: number of tensors that changed.
        nbytes: size of the file, which is the base's.
        seconds: wall-clock time, without the verification.
        kl: mean Kullback–Leibler divergence of the written file's predictions from those of base + adapter, in nats;
            None if nothing was compared.
        kl_base: the same of the base's predictions: what is lost if nothing of the adapter arrives.
        notes: what a user should know.
    """

    path: Path
    tensors: int
    nbytes: int
    seconds: float
    kl: float | None = None
    kl_base: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"Merged into {self.path}: {self.tensors} tensors are new and every other byte is the base's; "
            f"{self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s."
        )
        check = "Not verified (verify='off')."
        if self.kl is not None and self.kl_base is not None:
            arrived = 1 - self.kl / self.kl_base if self.kl_base else 1.0
            check = (
                f"The file, read again, against base + adapter: KL {self.kl:.1e} nats; the base alone is "
                f"{self.kl_base:.1e} away, so that {arrived:.1%} of the change arrived."
            )
        return "\n".join([text, check, *self.notes])


def merge_into_gguf(
    adapter: Adapter,
    base: Path,
    out: Path,
    *,
    calibration: Sequence[str] | str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    force: bool = False,
) -> GgufReport:
    """Write `out`, the file `base` with what the adapter trained.

    Args:
        adapter: of the method `blocks`, or LoRA.
        base: the .gguf file that it was trained on.
        out: the file to write.
        calibration: for LoRA, text like that which the model will see: a file or some texts. None: the tuned model
            writes it itself.
        verify: load `out` and compare its predictions with those of base + adapter.
        overwrite: replace `out`.
        force: another base than the recorded one; the report says so.

    Raises:
        ShippingError: another method, another base, a tensor that the file lacks or stores otherwise, values that fp16
            cannot hold, or a file that does not compute what was trained. `out` is then as it was.
    """
    _check(adapter, base, out, overwrite)
    notes = _check_base(adapter, base, force)
    begin = time.perf_counter()
    table = kept_weights(base, skeleton(base))
    with torch.no_grad(), staged_file(out, overwrite=overwrite, beside=[SUFFIX]) as made:
        if adapter.method == "blocks":
            new, judged = _exact(adapter, base, table), None
        else:
            new, judged, more = _rounded(adapter, base, calibration)
            notes += more
        _copy(base, made)
        with open(made, "rb+") as file:
            for path, raw in new.items():
                kept = _place(table, path, adapter, base)
                file.seek(kept.stored.offset)
                file.write(_in_file_order(kept, raw))
        seconds = time.perf_counter() - begin
        kl, kl_base = _compare(adapter, base, made, judged) if verify else (None, None)
        names = sorted(table[f"{path}.weight"].stored.name for path in new)
        told = _told(adapter, base, made) | {"tensors": names, "kl": kl, "kl_base": kl_base}
        write_json(Path(f"{made}{SUFFIX}"), told)
    return GgufReport(out, len(new), out.stat().st_size, seconds, kl, kl_base, tuple(notes))


def _check(adapter: Adapter, base: Path, out: Path, overwrite: bool) -> None:
    if adapter.method not in ("blocks", "lora"):
        raise ShippingError(
            f"{adapter.folder} is a {adapter.method} adapter; a .gguf file takes in what 'blocks' or LoRA trained. "
            f"Merge it into a folder, then export that: adapters-kit merge {adapter.folder} merged/ and adapters-kit "
            f"export merged/ {out.name} --format gguf."
        )
    if base.suffix != ".gguf" or not base.is_file():
        raise ShippingError(f"{base} is no .gguf file. Name the file that {adapter.folder} was trained on with base=.")
    if out.exists() and out.samefile(base):
        raise ShippingError(f"{out} is the base itself. Choose another file: the base would be lost.")
    check_file(out, overwrite)


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


def _place(table: Mapping[str, Kept], path: str, adapter: Adapter, base: Path) -> Kept:
    kept = table.get(f"{path}.weight")
    if kept is None:
        raise ShippingError(f"{base} holds no blocks for {path}, which {adapter.folder} trains.")
    return kept


def _exact(adapter: Adapter, base: Path, table: Mapping[str, Kept]) -> dict[str, Tensor]:
    """Path -> new blocks, rows in the model's order: the base's with fp16 numbers that a `blocks` adapter changed."""
    fields: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in adapter.weights.items():
        path, mark, tail = name.removeprefix("base_model.model.").partition(".blocks_")
        if not mark:
            raise ShippingError(
                f"{adapter.folder} also holds {name}, which no .gguf file takes in: the method 'blocks' ships alone."
            )
        field, _, part = tail.partition(".")
        fields.setdefault(path, {}).setdefault(field, {})[part] = tensor.double()
    factor = float(adapter.raw.get("scale_factor", 0.1))
    made = {}
    for path, found in fields.items():
        kept = _place(table, path, adapter, base)
        raw, kind = kept.read(os.fspath(base)), int(kept.stored.kind)
        changes = {name: _matrix(parts) for name, parts in found.items()}
        shape = (raw.shape[0], raw.shape[1] // FORMATS[kind].nbytes)
        for change in changes.values():
            if change.shape != shape:
                raise ShippingError(
                    f"{path}: {adapter.folder} changes {tuple(change.shape)} blocks, {base} has {shape}."
                )
        minima, scales = changes.get("minima"), changes.get("scales")
        made[path] = updated(
            raw,
            kind,
            None if minima is None else minima * BlocksLayer.unit_of(raw, kind),
            None if scales is None else scales * factor,
        )
        _check_finite(path, made[path], kind)
    return made


def _matrix(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["full"] if "full" in parts else parts["B"] @ parts["A"]


def _check_finite(path: str, raw: Tensor, kind: int) -> None:
    given = FORMATS[kind]
    blocks = raw.view(raw.shape[0], -1, given.nbytes)
    for offset in (given.scale, given.minimum):
        if offset is not None:
            values = blocks[..., offset : offset + 2].contiguous().view(torch.float16)
            if not values.isfinite().all():
                raise ShippingError(f"{path}: what was trained does not fit into fp16. The training diverged.")


def _rounded(
    adapter: Adapter, base: Path, calibration: Sequence[str] | str | Path | None
) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Path -> new blocks for a LoRA adapter; tokens that were not used to choose them; notes."""
    model = _tuned(adapter, base)
    fit, left = takes_in(model)
    why = (
        f"The update of {len(left)} of {len(fit) + len(left)} layers was left out, such as {', '.join(left[:1])}: "
        "their weights lie in no blocks, or in a format whose codes are not evenly spaced."
    )
    if not fit:
        raise ShippingError(f"None of the layers of {adapter.folder} lies in a format that takes in updates: {why}")
    tokens = calibration_tokens(model, base, calibration)
    judged = tokens[::4]
    chosen_by = tokens[torch.arange(len(tokens)) % 4 != 0]
    return round_in(model, chosen_by), judged, [why] if left else []


def _tuned(adapter: Adapter, base: Path) -> PeftModel:
    bare = load(base, quantize="keep", dtype="float32")
    return wrap(bare, adapter.folder, fuse=False, force=True).eval()  # whose base was compared before


def _in_file_order(kept: Kept, raw: Tensor) -> memoryview:
    array = raw.numpy()
    if kept.order is not None:
        in_file = np.empty_like(array)
        in_file[kept.order] = array
        array = in_file
    return np.ascontiguousarray(array).data.cast("B")


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        while piece := read.read(COPY):
            write.write(piece)


def _compare(adapter: Adapter, base: Path, made: Path, tokens: Tensor | None) -> tuple[float, float]:
    """KL of the file's predictions from those of base + adapter, and that of the base's; float32, in nats a token."""
    tuned = _tuned(adapter, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = probe_inputs(tuned) if tokens is None else {"input_ids": tokens}
    expected = tuned(**batch).logits.log_softmax(-1)
    with tuned.disable_adapter():
        plain = tuned(**batch).logits.log_softmax(-1)
    got = load(made, quantize="keep", dtype="float32")(**batch).logits.log_softmax(-1)
    kl, kl_base = (float((expected.exp() * (expected - other)).sum(-1).mean()) for other in (got, plain))
    if adapter.method == "blocks" and not kl < EXACT:
        raise ShippingError(
            f"The written file does not compute what was trained (KL {kl:.2e} nats), and was not kept: the numbers may "
            "have grown beyond what fp16 resolves."
        )
    if not kl <= max(kl_base, EXACT):
        raise ShippingError(
            f"Rounded into {base.name}'s blocks, the model is further from what was trained (KL {kl:.2e} nats) than "
            f"the base is ({kl_base:.2e}), and was not kept. Ship the adapter beside the file: adapters-kit export "
            f"{adapter.folder} adapter.gguf --format gguf."
        )
    return kl, kl_base


def _told(adapter: Adapter, base: Path, made: Path) -> dict[str, Any]:
    return {
        "made_by": f"adapters-kit {version('adapters-kit')}",
        "base": describe(base),
        "base_sha256": base_hashes(base)[base.name],
        "sha256": file_sha256(made),
        "method": adapter.method,
        "trained": adapter.raw.get("train"),
    }
