"""Tables too large for memory: written to an unnamed file, mapped, and given back page by page as they are read."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO

import pyarrow as pa

from adapters_kit.errors import WriteError
from adapters_kit.system import reason

_PIECE = 1 << 22  # bytes
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def on_disk(batches: Iterable[pa.Table]) -> list[pa.Table]:
    """The same tables, their bytes in a file without a name that the system deletes with the last reference.

    The file lies where `tempfile` puts such files (TMPDIR chooses).
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return []
    with writing_rows(), temporary() as file:
        places = []
        for batch in chain([first], batches):
            start = file.tell()
            with pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_table(batch)
            places.append((start, file.tell()))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    keep_mapped(mapped)
    buffer = pa.py_buffer(mapped)
    return [pa.ipc.open_stream(buffer.slice(start, end - start)).read_all() for start, end in places]


def kept(tables: Iterable[pa.Table]) -> list[pa.Table]:
    """The same rows, in pieces of some megabytes: a few in memory, more in a file, as `on_disk`."""
    pieces = _pieces(iter(tables))
    first = next(pieces, None)
    return [] if first is None else [first, *on_disk(pieces)]


def _pieces(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    some: list[pa.Table] = []
    for table in tables:
        some.append(table)
        if sum(one.nbytes for one in some) > _PIECE:
            yield pa.concat_tables(some).combine_chunks()
            some = []
    if some:
        yield pa.concat_tables(some).combine_chunks()


def temporary() -> IO[bytes]:
    """A file without a name, where `tempfile` puts such files; the system deletes it with the last reference."""
    with writing_rows():
        return tempfile.TemporaryFile(prefix="adapters_kit_rows_")


@contextmanager
def writing_rows() -> Iterator[None]:
    """A failure to write such a file becomes one sentence.

    Raises:
        WriteError: with the folder, and how to name another.
    """
    try:
        yield
    except OSError as error:
        why = reason(error) or str(error)
        raise WriteError(
            f"Rows that are more than memory should hold are kept in a file without a name in {_folder()}, and it "
            f"cannot be written: {why}. Or name another folder, of a disk with twice the size of the rows free: "
            "TMPDIR=FOLDER before the command."
        ) from error


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # none of those that there usually are
        return os.environ.get("TMPDIR", "the system's folder for temporary files")


def keep_mapped(mapped: mmap.mmap) -> None:
    """Has the pages of a mapped file given back too."""
    _maps.add(mapped)


def release_pages() -> None:
    """Tell the system that mapped rows read so far need not stay in memory; read again, they come from the file."""
    for mapped in list(_maps):
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which takes pages back by itself
            mapped.madvise(mmap.MADV_DONTNEED)
