"""Tables too large for memory: written to an unnamed file, mapped, and given back page by page as they are read."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain

import pyarrow as pa

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
    with tempfile.TemporaryFile(prefix="adapters_kit_rows_") as file:
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


def keep_mapped(mapped: mmap.mmap) -> None:
    """Has the pages of a mapped file given back too."""
    _maps.add(mapped)


def release_pages() -> None:
    """Tell the system that mapped rows read so far need not stay in memory; read again, they come from the file."""
    for mapped in list(_maps):
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which takes pages back by itself
            mapped.madvise(mmap.MADV_DONTNEED)
