"""Freed memory given back to the system: heaps keep it, and what is kept counts as used."""

import ctypes
from typing import Any

TRIM_EVERY = 8 << 20  # bytes read or made between two calls of malloc_trim


class Trimmer:
    """Gives freed memory back to the system from time to time, where the C library is glibc.

    Quantizing and merging make several fp32 temporaries of each weight; freed, they stay in the heap between the small
    results and add up to more than the model.

    Args:
        every: bytes between two calls of malloc_trim.
    """

    def __init__(self, every: int = TRIM_EVERY) -> None:
        self.read, self.every = 0, every
        self.trim: Any = None
        try:
            self.trim = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):  # macOS, Windows, musl
            return

    def __call__(self, nbytes: int) -> None:
        """Count bytes that were read or made, and trim if they have become many."""
        self.read += nbytes
        if self.read >= self.every:
            self.now()

    def now(self) -> None:
        """Trim, whatever the count."""
        self.read = 0
        if self.trim is not None:
            self.trim(0)
