"""The first hour on a GPU as one script: is it right, how fast, how much memory, and where does the time go?

    python benchmarks/gpu.py                    # all parts, some 12 minutes on an H100; started again, it goes on
    python benchmarks/gpu.py --only right,speed
    python benchmarks/gpu.py --table            # README's table from results/gpu.json
    python benchmarks/gpu.py --dry              # every part with tiny shapes, on a pretended card or the CPU: minutes

What is measured is kept in results/gpu.json after every case; what is there is not made again (but with --again).
Shapes are those of real models' config.json (benchmarks/cards.py), weights are random: no hub is asked.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:  # before torch is imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.support.pretended import backend

    PRETENDED = backend.why_not() is None
    if PRETENDED:
        backend.load()
else:
    PRETENDED = False

import common
import torch

ROOT = common.ROOT
PARTS = ("right", "speed", "memory", "profile")
# Contestant -> how the model is made; see `made`.
WAYS: dict[str, dict[str, Any]] = {
    "ours": {"method": "lora", "chunked": True},
    "ours, recompute": {"method": "lora", "chunked": True, "recompute": "cheap"},
    "peft": {"method": "lora", "fuse": False},
    "ours, qlora": {"method": "lora", "chunked": True, "quantize": "nf4"},
    "peft, qlora": {"method": "lora", "fuse": False, "quantize": "nf4"},
    "full": {"method": None},
    "unsloth, qlora": {"unsloth": True},
}
# Case -> model of cards.py, rows, tokens, contestants.
CASES: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    "1B, 4 x 1024": ("Llama-3.2-1B", 4, 1024, ("ours", "ours, recompute", "peft", "full")),
    "1B, 1 x 4096": ("Llama-3.2-1B", 1, 4096, ("ours", "peft")),
    "8B, 2 x 1024": ("Llama-3.1-8B", 2, 1024, ("ours, qlora", "peft, qlora", "ours", "peft", "unsloth, qlora")),
}
DRY = {"Llama-3.2-1B": (64, 128, 2, 4), "Llama-3.1-8B": (64, 128, 2, 4)}  # hidden, inner, layers, heads


class Kept:
    """results/gpu.json: read at the start, written after every case."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not again else {}

    def once(self, key: str, work: Callable[[], Any]) -> None:
        """The result of `work`, unless it is known; a failure is a result that is tried again."""
        if "error" not in self.found.get(key, {"error": ""}):
            return
        began = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            result = {"error": f"{type(error).__name__}: {str(error).strip()[:300]} [{place}]"}
        self.found[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        part.replace(self.path)
        print(f"{time.perf_counter() - began:7.1f} s  {key}: {json.dumps(result)[:200]}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def made(name: str, way: dict[str, Any], dry: bool, device: str) -> Any:
    """A model ready to step, with random weights in the shape of `name`."""
    import cards
    import transformers

    import adapters_kit as ak
    from adapters_kit.kernels.cross_entropy import chunked_loss
    from adapters_kit.quantization import bnb_config, keep_layout, quantizable, quantize_in_place

    fields = dict(cards.MODELS[name])
    kind = fields.pop("model_type")
    if dry:
        hidden, inner, layers, heads = DRY[name]
        fields |= cards._shape(hidden, inner, layers, heads, True, head_dim=16, vocab_size=512, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    if way.get("unsloth"):
        return _unsloth(config)
    place = "cpu" if dry else device
    with torch.device(place):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    if way.get("quantize"):
        quantize_in_place(model, quantizable(model), bnb_config(way["quantize"]))
        keep_layout(model)
    if way["method"] is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.to(device).train()
    options = {key: way[key] for key in ("fuse", "recompute") if key in way}
    model = ak.wrap(model, way["method"], r=16, **options)
    if way.get("chunked"):
        chunked_loss(model)
    return model.to(device).train()


def _unsloth(config: Any) -> Any:
    import tempfile

    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        import transformers

        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=True, max_seq_length=4096)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=targets).train()


def stepper(model: Any, rows: int, length: int, device: str) -> Callable[[], None]:
    """A training step on random tokens, optimizer included."""
    from adapters_kit.training.optimizers import build_optimizer

    vocabulary = model.config.vocab_size
    ids = torch.randint(5, min(vocabulary, 20000), (rows, length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    optimizer = build_optimizer(model, "adamw", 1e-4)

    def step() -> None:
        with torch.autocast(device.partition(":")[0], dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(name: str, way: dict[str, Any], rows: int, length: int, dry: bool, device: str) -> dict[str, float]:
    """Tokens a second and peak bytes of one contestant; the median of its steps."""
    model = made(name, way, dry, device)
    step = stepper(model, rows, length, device)
    for _ in range(1 if dry else 3):
        step()
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
    times = []
    for _ in range(2 if dry else 8):
        common.sync(device)
        began = time.perf_counter()
        step()
        common.sync(device)
        times.append(time.perf_counter() - began)
    middle = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"tokens_per_second": rows * length / middle, "peak_gib": peak / 2**30, "seconds": middle}


def right(kind: str, dry: bool, device: str) -> dict[str, float]:
    """Largest difference of a gradient from peft's in float32, over the largest gradient: ours on the device."""
    import adapters_kit as ak
    from adapters_kit.kernels.cross_entropy import chunked_loss
    from tests.support import tiny

    options: dict[str, Any] = {
        "lora": {},
        "lora, bf16": {},
        "dora": {"use_dora": True},
        "lora, recompute": {"recompute": "cheap"},
    }[kind]
    sixteen = kind.endswith("bf16")

    def gradients(fuse: bool, place: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        given = {key: value for key, value in options.items() if fuse or key != "recompute"}
        model = ak.wrap(tiny.build("llama"), "lora", r=8, fuse=fuse, **given)
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            torch.manual_seed(number)
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        if fuse:
            chunked_loss(model)
        batch = {key: value.to(place) for key, value in tiny.inputs(model, batch=4, length=24, labels=True).items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype if not parameter.requires_grad else parameter.dtype)
        model = model.to(place).train()
        with torch.autocast(place.partition(":")[0], dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {key: p.grad.float().cpu() for key, p in model.named_parameters() if p.grad is not None}

    dtype = torch.bfloat16 if sixteen else torch.float32
    peft, ours = gradients(False, "cpu", torch.float32), gradients(True, device, dtype)
    size = max(grad.abs().max().item() for grad in peft.values())
    worst = max((ours[key] - grad).abs().max().item() for key, grad in peft.items()) / size
    bound = 0.1 if sixteen else 1e-3 if device != "cpu" else 1e-4
    assert worst < bound, f"{kind}: {worst:.1e} over {bound:.0e}"
    return {"worst": worst}


def planned(name: str, quantize: str | None, rows: int, length: int, dry: bool) -> dict[str, float]:
    """What `plan` says of a step without recomputing, in GiB."""
    import tempfile

    import cards

    if dry:
        return {"planned_gib": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        asked = cards.Planned(Path(folder), name, quantize)
        batch = asked.batches.batch(rows, length)
        memory = asked.asked.of(batch, asked.asked.kept(batch, asked.stands_for), checkpointing=False)
        asked.stack.close()
    return {"planned_gib": memory.total / 2**30}


def profile(name: str, way: dict[str, Any], rows: int, length: int, dry: bool, device: str) -> dict[str, Any]:
    """Three steps: kernels a step, the share of the time in which the device is idle, and the fifteen longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    model = made(name, way, dry, device)
    step = stepper(model, rows, length, device)
    step()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() and not dry else [])
    common.sync(device)
    began = time.perf_counter()
    with recorded(activities=kinds) as found:
        for _ in range(3):
            step()
        common.sync(device)
    wall = time.perf_counter() - began
    events = found.key_averages()
    busy = sum(getattr(event, "self_device_time_total", 0) for event in events) / 1e6
    top = sorted(events, key=lambda event: -(getattr(event, "self_device_time_total", 0) or event.self_cpu_time_total))
    return {
        "kernels_a_step": sum(event.count for event in events) / 3,
        "idle": 1 - busy / wall if busy else None,
        "top": [[event.key[:60], event.count // 3] for event in top[:15]],
    }


def table(found: dict[str, Any]) -> str:
    """README's: tokens a second and peak of every contestant, and peft's over ours."""
    lines = ["| | contestant | tokens/s | peak GiB | planned GiB |", "|---|---|---|---|---|"]
    for case, (_, _, _, ways) in CASES.items():
        for way in ways:
            one, plan = found.get(f"speed: {case}: {way}", {}), found.get(f"memory: {case}: {way}", {})
            if "tokens_per_second" in one:
                known = f"{plan['planned_gib']:.1f}" if "planned_gib" in plan else ""
                lines.append(f"| {case} | {way} | {one['tokens_per_second']:,.0f} | {one['peak_gib']:.1f} | {known} |")
            elif "error" in one:
                lines.append(f"| {case} | {way} | {one['error'][:60]} | | |")
    worst = {
        key.removeprefix("right: "): one.get("worst", one) for key, one in found.items() if key.startswith("right")
    }
    return "\n".join([*lines, "", f"gradients against peft's in float32: {worst}"])


def suite() -> dict[str, Any]:
    """The tests that want a GPU."""
    files = [
        "tests/kernels/test_fuse_cuda.py",
        "tests/kernels/test_cross_entropy.py",
        "tests/methods/test_prefix_train.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-300:])
    return {"tests": done.stdout.strip().splitlines()[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "gpu.json")
    arguments = parser.parse_args()
    kept = Kept(arguments.out, arguments.again)
    if arguments.table:
        print(table(kept.found))
        return 0
    dry, parts = arguments.dry, arguments.only.split(",")
    if not dry and not torch.cuda.is_available():
        print("There is no GPU here; --dry tries every part without one.", file=sys.stderr)
        return 2
    device = "cuda" if PRETENDED or not dry else "cpu"
    here = nullcontext()
    if PRETENDED:
        from tests.support.pretended import card

        here = card.present()
    with here:
        kept.once("environment", common.environment)
        if "right" in parts:
            for kind in ("lora", "lora, bf16", "dora", "lora, recompute"):
                kept.once(f"right: {kind}", lambda kind=kind: right(kind, dry, device))
            if not dry:
                kept.once("right: tests", suite)
        for case, (name, rows, length, ways) in CASES.items():
            rows, length = (2, 16) if dry else (rows, length)
            for way in ways:
                given = WAYS[way]
                if given.get("unsloth") and (dry or not _has("unsloth")):
                    continue
                if "speed" in parts:
                    key = f"speed: {case}: {way}"
                    kept.once(key, lambda: speed(name, given, rows, length, dry, device))  # noqa: B023
                if "memory" in parts and "method" in given and given["method"] and given.get("fuse", True):
                    key = f"memory: {case}: {way}"
                    kept.once(key, lambda: planned(name, given.get("quantize"), rows, length, dry))  # noqa: B023
                if "profile" in parts and way in ("ours", "peft", "ours, qlora", "peft, qlora"):
                    key = f"profile: {case}: {way}"
                    kept.once(key, lambda: profile(name, given, rows, length, dry, device))  # noqa: B023
    print(table(kept.found))
    return int(any("error" in one for one in kept.found.values()))


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    raise SystemExit(main())
