"""All or nothing, and nothing wrong: kills, full disks, read-only folders, damaged and foreign files."""

import ctypes
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.artifacts.manifest import write_manifest
from adapters_kit.artifacts.staging import file_sha256, staged
from adapters_kit.merging import merge as merging
from adapters_kit.merging import writer
from adapters_kit.merging.plain_lora import Direct
from tests.support.shipping import load

LORA = peft.LoraConfig(target_modules=["q_proj", "v_proj"])


def rewrite(folder: Path, change) -> None:
    """Change the tensors of an adapter with `change(dict)`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(dict(tensors)), folder / "adapter_model.safetensors")


def state(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


# --- the output ---


def test_the_manifest_tells_every_file(pair):
    base, adapter, tmp = pair
    ak.merge(adapter, tmp / "merged", base=base, verify="off")
    manifest = json.loads((tmp / "merged" / "manifest.json").read_text())
    files = manifest["files"]
    tensors = {name: value.numpy().tobytes() for name, value in load_file(base / "model.safetensors").items()}
    assert manifest["base_tensors"] == {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()}
    actual = state(tmp / "merged")
    actual.pop("manifest.json")
    assert {name: entry["sha256"] for name, entry in files.items()} == actual
    assert all(entry["bytes"] == (tmp / "merged" / name).stat().st_size for name, entry in files.items())


def test_an_old_folder_is_kept_or_replaced_whole(pair):
    base, adapter, tmp = pair
    stale = tmp / "merged" / "model-00007-of-00009.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"stale")
    with pytest.raises(ak.AdapterError, match="overwrite=True"):
        ak.merge(adapter, tmp / "merged", base=base)
    with pytest.raises(ak.AdapterError, match="did not write there, such as model-00007"):
        ak.merge(adapter, tmp / "merged", base=base, overwrite=True)
    assert os.listdir(tmp / "merged") == ["model-00007-of-00009.safetensors"]
    write_manifest(tmp / "merged", {})  # an older merge, with more shards
    ak.merge(adapter, tmp / "merged", base=base, overwrite=True, verify="off")
    assert not (tmp / "merged" / "model-00007-of-00009.safetensors").exists()
    assert load(tmp / "merged") is not None
    assert sorted(path.name for path in tmp.iterdir()) == ["adapter", "base", "merged"]


def test_files_are_readable_by_all_that_the_umask_allows(pair):
    base, adapter, tmp = pair
    before = os.umask(0o022)
    try:
        ak.merge(adapter, tmp / "merged", base=base, verify="off")
    finally:
        os.umask(before)
    assert (tmp / "merged").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp / "merged").iterdir())


SLOW_WRITER = """
import sys, time
from pathlib import Path
from adapters_kit.artifacts.manifest import write_manifest
from adapters_kit.artifacts.staging import staged
with staged(Path(sys.argv[1]), overwrite=True) as stage:
    for index in range(50):
        (stage / f"part{index}").write_bytes(b"new" * 1000)
        print(index, flush=True)
        time.sleep(0.02)
    write_manifest(stage, {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 10, 49])
def test_kill_9_leaves_the_old_folder(after, tmp_path):
    """Really killed while it writes; at the last part it may be just before or just after the rename."""
    out = tmp_path / "out"
    with staged(out) as stage:
        (stage / "old").write_text("old")
        write_manifest(stage, {})
    with subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(out)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == after:
                break
        process.send_signal(signal.SIGKILL)
    names = sorted(os.listdir(out))
    assert names == ["manifest.json", "old"] or (after == 49 and len(names) == 51)
    with staged(out, overwrite=True) as stage:  # the next run clears what the dead one left
        (stage / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["new"]


def test_two_do_not_write_at_once(tmp_path):
    with staged(tmp_path / "out") as first:
        (first / "a").write_text("a")
        with (
            pytest.raises(ak.AdapterError, match=f"is being written by process {os.getpid()}"),
            staged(tmp_path / "out"),
        ):
            raise AssertionError
        assert first.exists()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    """Somebody puts a file there while the work is done: looked at again before the rename."""
    with pytest.raises(ak.AdapterError, match="already holds"), staged(tmp_path / "out") as stage:
        (stage / "new").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize("onto", ["base", "adapter", "."])
def test_never_onto_what_is_read_from(onto, pair):
    base, adapter, tmp = pair
    write_manifest(tmp / onto, {})  # even where all of it looks like our own work
    before = sorted(path for path in tmp.rglob("*"))
    with pytest.raises(ak.AdapterError, match="holds what is read from"):
        ak.merge(adapter, tmp / onto, base=base, overwrite=True)
    assert sorted(path for path in tmp.rglob("*")) == before


def test_a_base_that_changes_while_it_is_read(pair, monkeypatch):
    """Its times are put back: the change of state still tells."""
    base, adapter, tmp = pair
    weights = base / "model.safetensors"

    def write(layout, *arguments):
        stat = weights.stat()
        with open(weights, "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return writer.write(layout, *arguments)

    monkeypatch.setattr(merging, "write", write)
    with pytest.raises(ak.AdapterError, match="was changed while it was read"):
        ak.merge(adapter, tmp / "merged", base=base, verify="off")
    assert not (tmp / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [".merged.partial-*", ".merged.partial-*/model.safetensors"])
def test_killed_while_merging(moment, pair):
    """At the start, and with the weights written or half written."""
    base, adapter, tmp = pair
    code = "import sys, adapters_kit as ak; print('on', flush=True); ak.merge(*sys.argv[1:3], base=sys.argv[3])"
    arguments = [sys.executable, "-c", code, str(adapter), str(tmp / "merged"), str(base)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        while process.poll() is None and not list(tmp.glob(moment)):
            time.sleep(0.01)
        process.kill()
    assert not (tmp / "merged").exists()
    ak.merge(adapter, tmp / "merged", base=base, verify="off")
    assert sorted(path.name for path in tmp.iterdir()) == ["adapter", "base", "merged"]


def test_a_tensor_that_nobody_computes_is_noticed(pair, monkeypatch):
    """Its place in the file would hold zeros."""
    base, adapter, tmp = pair
    changed = Direct.changed
    monkeypatch.setattr(Direct, "changed", lambda self, base: list(changed(self, base))[1:])
    with pytest.raises(ak.AdapterError, match="does not give"):
        ak.merge(adapter, tmp / "merged", base=base, verify="off")
    assert sorted(path.name for path in tmp.iterdir()) == ["adapter", "base"]


def test_a_full_disk_changes_nothing(pair):
    """A real limit of the kernel on the size of files; the process notices it as it would notice a full disk."""
    base, adapter, tmp = pair
    ak.merge(adapter, tmp / "merged", base=base, verify="off")
    before = state(tmp / "merged")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ak.AdapterError, match=r"Could not write .*merged.*size limit.*Nothing was changed"):
            ak.merge(adapter, tmp / "merged", base=base, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state(tmp / "merged") == before
    assert sorted(path.name for path in tmp.iterdir()) == ["adapter", "base", "merged"]


def mounted(folder: Path, *options: str) -> bool:
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_and_a_read_only_file_system(pair):
    base, adapter, tmp = pair
    small = tmp / "small"
    small.mkdir()
    if not mounted(small, "-t", "tmpfs", "-o", "size=200k", "tmpfs"):
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(ak.AdapterError, match=r"the disk is full.*Nothing was changed"):
            ak.merge(adapter, small / "merged", base=base)
        assert os.listdir(small) == []
        assert mounted(small, "-o", "remount,ro")
        with pytest.raises(ak.AdapterError, match="read-only"):
            ak.merge(adapter, small / "merged", base=base)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_kernels_own_word_that_the_disk_is_full(pair, monkeypatch):
    """/dev/full answers every write as a full disk does; here when the space for the weights is asked for."""
    base, adapter, tmp = pair

    def full(*_):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ak.AdapterError, match=r"the disk is full.*Nothing was changed"):
        ak.merge(adapter, tmp / "merged", base=base)
    assert sorted(path.name for path in tmp.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_to(pair):
    """Without root's right to ignore permissions, which a child process gives up before it starts."""
    base, adapter, tmp = pair
    closed = tmp / "closed"
    closed.mkdir()
    (closed / "mine").write_text("mine")
    closed.chmod(0o555)

    def mortal():
        if os.geteuid() == 0:
            drop_capability, override, read_search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_*
            for capability in (override, read_search):
                assert ctypes.CDLL(None, use_errno=True).prctl(drop_capability, capability, 0, 0, 0) == 0

    code = "import sys; from adapters_kit.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["merge", str(adapter), str(closed / "merged"), "--base", str(base), "--verify", "off"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], preexec_fn=mortal, capture_output=True, text=True)
    assert result.returncode == 2 and "you may not write there" in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(closed) == ["mine"]
