"""How much does a merge cost beside copying the file? Ours, peft in memory, and a plain copy; interleaved.

    python benchmarks/merging.py                      # SmolLM2 (from examples/assets.py), bf16, LoRA on all linears
    python benchmarks/merging.py --rounds 9 --out benchmarks/results/merging.json
    pip install --no-deps --target /tmp/mergekit mergekit click immutables   # not beside peft's newest by itself
    python benchmarks/merging.py --mergekit /tmp/mergekit

Every run is a fresh process. What is counted, and where:
- "seconds" are those of the call alone, to the last fsync; imports have a column of their own, since every process pays
  them once. The plain copy is `shutil.copyfile` of the weights followed by fsync, since a merge flushes to the disk as
  well. Ratios are taken within a round, then the median.
- "memory" is the peak of the resident set (VmHWM, reset before the call) above what the process held once its imports
  were done; that is the column "interpreter". Without a kernel that resets VmHWM the script stops.
- "ours" reads, merges, writes, hashes base and result (two passes of sha256 over the bytes, in threads) and writes the
  manifest. "ours, no hashes" is the same with sha256 switched off by the script: what the merging itself costs.
  "ours, verified" adds the comparison of outputs, which builds the model block by block.
- "copy, hashed" is that copy with the same two passes: one thread hashes the source while another copies and hashes the
  copy. Its processor time is what the proofs of a merge cost before anything is computed.
- "processor" is the time of all threads of the process, in the kernel too: what stays the same on a busy machine.
- mergekit is called as `mergekit-yaml` calls it; it has peft merge the whole model, saves that, and writes it again.
  axolotl is left out: it pins other versions of peft and transformers.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import time
started = time.perf_counter()
import json, os, sys
from pathlib import Path
base, adapter, out, way = sys.argv[1:]

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def written():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))

def sync(folder):
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

if way.startswith("copy"):
    import hashlib, shutil, threading
    def digest(path):
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
    def copied(path):
        shutil.copyfile(path, Path(out, path.name))
    def hashed(path):
        beside = threading.Thread(target=digest, args=(path,))
        beside.start()
        copied(path)
        digest(Path(out, path.name))
        beside.join()
    def run():
        Path(out).mkdir()
        for path in Path(base).glob("*.safetensors"):
            (hashed if way == "copy, hashed" else copied)(path)
        sync(out)
elif way.startswith("ours"):
    import adapters_kit.merging.merge as module
    if way == "ours, verified":
        import transformers.models.llama.modeling_llama
        import adapters_kit.merging.verify
    if way == "ours, no hashes":
        import adapters_kit.merging.writer as writing
        writing._Digest._update = lambda self, start, stop: writing.start_writing(self.descriptor, start, stop - start)
        module.base_hashes = lambda base: {}
    def run():
        module.merge(adapter, out, base=base, verify="sample" if way == "ours, verified" else "off")
elif way == "mergekit":
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from transformers import LlamaForCausalLM
    models = [{"model": f"{base}+{adapter}"}]
    recipe = MergeConfiguration(merge_method="passthrough", models=models, dtype="bfloat16")
    def run():
        run_merge(recipe, out, MergeOptions(lora_merge_cache=out + "-cache", copy_tokenizer=False, quiet=True))
        sync(out)
else:
    import peft, torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    def run():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        sync(out)

imports = time.perf_counter() - started
Path("/proc/self/clear_refs").write_text("5")
before, bytes_before = memory("VmRSS"), written()
spent, begin = time.process_time(), time.perf_counter()
run()
seconds = time.perf_counter() - begin
processor = time.process_time() - spent
print(json.dumps({"seconds": seconds, "imports": imports, "interpreter": before, "memory": memory("VmHWM") - before,
                  "processor": processor, "written": written() - bytes_before}))
"""
WAYS = ("copy", "copy, hashed", "ours, no hashes", "ours", "ours, verified", "peft")


def prepare(folder: Path) -> tuple[Path, Path]:
    """A bf16 base and an adapter with noise in place of training."""
    sys.path.insert(0, str(ROOT / "examples"))
    import assets
    import peft
    import torch

    import adapters_kit as ak

    model = ak.load(assets.smollm2(), dtype="bfloat16")
    model.save_pretrained(folder / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def measure(way: str, base: Path, adapter: Path, work: Path, mergekit: Path | None = None) -> dict[str, float]:
    out = work / "out"
    for left in (out, work / "out-cache"):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-c", WORKER, str(base), str(adapter), str(out), way]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(mergekit)} if way == "mergekit" else {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how many times each way runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "merging.json")
    parser.add_argument("--mergekit", type=Path, help="a folder that mergekit was installed to; measures it too")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (a temporary one by default)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        base, adapter = prepare(work)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        ways = (*WAYS, "mergekit") if options.mergekit else WAYS
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for index in range(options.rounds + 1):
            for way in ways[index % len(ways) :] + ways[: index % len(ways)]:
                result = measure(way, base, adapter, work, options.mergekit)
                if index:  # the first round fills the page cache
                    runs[way].append(result)
    rows = {}
    for way, results in runs.items():
        ratios = [one["seconds"] / copy["seconds"] for one, copy in zip(results, runs["copy"], strict=True)]
        rows[way] = {
            "seconds": statistics.median(result["seconds"] for result in results),
            "times_a_copy": statistics.median(ratios),
            "processor": statistics.median(result["processor"] for result in results),
            "imports": statistics.median(result["imports"] for result in results),
            "interpreter_mb": statistics.median(result["interpreter"] for result in results) / 1e6,
            "peak_memory_mb": statistics.median(result["memory"] for result in results) / 1e6,
            "written_mb": statistics.median(result["written"] for result in results) / 1e6,
        }
    packages = ("torch", "transformers", "peft", "safetensors")
    report = {
        "model": "SmolLM2-135M, bf16, LoRA r=16 on all linears",
        "weights_mb": size / 1e6,
        "rounds": options.rounds,
        "results": rows,
        "environment": {
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "load": os.getloadavg()[0],
            "cpus": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            **{package: version(package) for package in packages},
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def table(report: dict) -> str:
    """The results in Markdown."""
    columns = {
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "× a copy": lambda row: f"{row['times_a_copy']:.2f}",
        "processor, s": lambda row: f"{row['processor']:.2f}",
        "memory above the interpreter": lambda row: f"{row['peak_memory_mb']:.0f} MB",
        "interpreter": lambda row: f"{row['interpreter_mb']:.0f} MB",
        "its imports, s": lambda row: f"{row['imports']:.1f}",
    }
    if any("processor" not in row for row in report["results"].values()):  # results of before it was counted
        del columns["processor, s"]
    lines = [f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for way, row in report["results"].items():
        lines.append(f"| {way} | {' | '.join(show(row) for show in columns.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
