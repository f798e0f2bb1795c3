"""A GGUF file's header, walked through before anything believes it: counts, lengths and offsets end inside the file.

Layout: "GGUF", version, number of tensors, number of fields; the fields (name, type, value); the tensors (name, number
of dimensions, dimensions, type, offset); the tensors' bytes, from the next multiple of the alignment on.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from math import prod
from pathlib import Path

from adapters_kit.errors import ModelError

_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> its bytes
_STRING, _ARRAY, _DIMENSIONS, _DEEPEST = 8, 9, 8, 4
_MOST = 1 << 22  # entries of all arrays; the largest vocabularies have 2**18, and readers make an object of each
_ALIGNMENT = b"general.alignment"


class _Walk:
    """A place in the header that only moves on, and never past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.entries = data, 0, 0

    def skip(self, count: int) -> int:
        start = self.at
        if count > len(self.data) - start:
            raise ValueError(f"it ends at byte {len(self.data):,}, and its header goes on to {start + count:,}")
        self.at += count
        return start

    def number(self, kind: str) -> int:
        return int(struct.unpack_from(f"<{kind}", self.data, self.skip(struct.calcsize(kind)))[0])

    def text(self) -> bytes:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : self.at]

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _NUMBERS:
            self.skip(_NUMBERS[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            self.entries += count
            if self.entries > _MOST:
                raise ValueError(f"its arrays have {self.entries:,} entries, and {_MOST:,} are the most that is read")
            if inner in _NUMBERS:
                self.skip(_NUMBERS[inner] * count)
            else:
                self.fits(count)
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise ValueError(f"a field is of type {kind}, which does not exist")

    def fits(self, count: int) -> None:
        """Refuse a count of things of 8 bytes or more that the rest of the file has no room for."""
        if 8 * count > len(self.data) - self.at:
            raise ValueError(f"it claims {count:,} entries, more than its {len(self.data):,} bytes hold")


def check_header(path: Path) -> None:
    """Refuse a GGUF file that is cut off, or whose header leads outside the file.

    Raises:
        ModelError: what is wrong with it.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Walk(data))
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path} is no whole GGUF file: {error}. Fetch it again.") from None


def _check(walk: _Walk) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if walk.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    walk.skip(4)
    version = walk.number("I")
    if version & 0xFFFF == 0:
        return  # the other byte order: told by whoever reads it
    if version < 2:
        raise ValueError(f"it is of version {version}, and 2 is the oldest that is read")
    tensors, fields, alignment = walk.number("Q"), walk.number("Q"), 32
    walk.fits(tensors)
    walk.fits(fields)
    for _ in range(fields):
        name, kind = walk.text(), walk.number("I")
        before = walk.at
        walk.value(kind)
        if name == _ALIGNMENT and kind == 4:
            alignment = int(struct.unpack_from("<I", walk.data, before)[0])
    if alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    ends = []
    for _ in range(tensors):
        name, dimensions = walk.text(), walk.number("I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {dimensions:,} dimensions")
        shape = [walk.number("Q") for _ in range(dimensions)]
        kind, offset = walk.number("I"), walk.number("Q")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"the tensor {name[:60]!r} is of type {kind}, which this gguf package does not know")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        ends.append((offset + prod(shape) // block * size, name))
    start = -(-walk.at // alignment) * alignment
    end, name = max(ends, default=(-start, b""))
    if start + end > len(walk.data):
        raise ValueError(
            f"it has {len(walk.data):,} bytes, and the tensor {name[:60].decode(errors='replace')!r} ends at byte "
            f"{start + end:,}"
        )
