"""What differs between systems: locks, whole writes, swapped folders, offsets with and without pread, processes."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters_kit import system
from adapters_kit.errors import ShippingError, TrainingError, WriteError

HOLDER = """
import sys, time
from adapters_kit import system
with system.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock on `tmp_path`/out."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(system.__file__).parents[1])
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_names_its_holder_and_dies_with_it(holder, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # asking does not wipe the number out
        with pytest.raises(WriteError, match=rf"is being written by process {holder.pid}\. Wait"), system.lock(out):
            pass
    assert system.is_locked(out)
    holder.kill()
    holder.wait()
    assert not system.is_locked(out)
    with system.lock(out):
        assert system.is_locked(out)
        with pytest.raises(WriteError, match=f"process {os.getpid()}"), system.lock(out):
            pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="Could not write"), system.lock(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_hidden_folder_has_the_user_s_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = system.folder_beside(tmp_path / "out", "partial")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("name", ["out", "o[1]", "w?*", "a b"])
def test_a_folder_takes_the_place_of_another(tmp_path, swaps, name, monkeypatch):
    if not swaps:
        monkeypatch.setattr(system, "exchange", lambda *_: False)
    out = tmp_path / name
    for content in ("first", "second"):
        stage = system.folder_beside(out, "partial")
        (stage / "a").write_text(content)
        assert system.leftovers(out, "partial") == [stage]
        system.put_in_place(stage, out)
        assert (out / "a").read_text() == content
        assert os.listdir(tmp_path) == [name]


def test_a_crash_between_the_two_renames_is_put_right(tmp_path):
    out = tmp_path / "o*t"
    old = system.folder_beside(out, "old")
    (old / "folder").mkdir()
    (old / "folder" / "mine").write_text("x")
    other = system.folder_beside(tmp_path / "oat", "old")  # another name that the pattern would match
    system.recover(out)
    assert (out / "mine").read_text() == "x" and other.exists() and not old.exists()


@pytest.mark.parametrize("portable", [False, True])
def test_bytes_at_an_offset(tmp_path, portable, monkeypatch):
    if portable:
        for name in ("preadv", "pwrite", "posix_fallocate"):
            monkeypatch.delattr(os, name, raising=False)
    rng = random.Random(0)
    expected = bytearray(rng.randbytes(1000))
    descriptor = os.open(tmp_path / "file", system.WRITE_BINARY)
    system.reserve(descriptor, len(expected))
    assert os.fstat(descriptor).st_size == len(expected)
    system.write_at(descriptor, bytes(expected), 0)
    for _ in range(20):
        at, piece = rng.randrange(900), rng.randbytes(rng.randrange(1, 100))
        system.write_at(descriptor, memoryview(piece), at)
        expected[at : at + len(piece)] = piece
    system.start_writing(descriptor, 0, 1000)
    for _ in range(20):
        at, count = rng.randrange(1000), rng.randrange(1, 300)
        buffer = bytearray(count)
        got = system.read_at(descriptor, memoryview(buffer), at)
        assert bytes(buffer[:got]) == bytes(expected[at : at + count])
    os.close(descriptor)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only"), "read-only"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), "a link is in the way"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 0 vs 4"), "most likely the disk"),
        (RuntimeError("basic_ios::clear: iostream error"), "most likely the disk"),  # torch.save, too
        (ValueError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_failed_write_is_one_sentence(tmp_path, error, told):
    sentence = rf"Could not write .*out: .*{told}.*Nothing was changed\."
    with pytest.raises(WriteError, match=sentence) as caught, system.writing(tmp_path / "out"):
        raise error
    assert isinstance(caught.value, TrainingError) and isinstance(caught.value, ShippingError)


def test_other_errors_pass(tmp_path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/somewhere/data.csv")
    for error in (KeyError("x"), FileNotFoundError(errno.ENOENT, "no"), RuntimeError("shape"), elsewhere):
        with pytest.raises(type(error)), system.writing(tmp_path / "out"):
            raise error


def test_memory_is_told_without_the_resource_module(monkeypatch):
    assert system.peak_memory() >= system.resident_memory() * 0.9 > 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_memory() > 1e6


CHILD = """
import subprocess, sys, time
if len(sys.argv) > 1:
    from adapters_kit import system
    system.end_with_parent()
    print("ready", flush=True)
    time.sleep(60)
process = subprocess.Popen([sys.executable, __file__, "child"])
print(process.pid, flush=True)
process.wait()
"""


def test_an_orphan_ends(tmp_path):
    import psutil

    (tmp_path / "parent.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": str(Path(system.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    lines = [process.stdout.readline().strip() for _ in range(2)]
    child = psutil.Process(int(next(line for line in lines if line.isdigit())))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_ends_a_block_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), system.stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
