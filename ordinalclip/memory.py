"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """Tell the C library to use the memory of this process again instead of giving it back.

    By default glibc returns what a layer of a network freed and asks for as much in the next one, which the kernel
    fills with zeros page by page: two thirds of the time of large batches (`benchmarks/train_loop.py --serving`). The
    process stays as large as it once was. Blocks over a gigabyte are given back all the same.

    Returns:
        whether there is such a library: only on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
