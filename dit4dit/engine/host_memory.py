"""Buffers of a step on a CPU: allocated in the first chunk, then used again.

PyTorch asks the C library for each intermediate result. glibc gives large ones back to the kernel at once, so that every chunk
faults in the same tens of thousands of pages anew; told to keep what it has, it hands the same memory out again.
"""

from __future__ import annotations

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def hold() -> bool:
    """Let the process keep freed memory for its next allocation. False where the C library is not glibc.

    It holds for the whole process: memory that its other parts free stays with it too.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # large blocks from the heap instead of mappings of their own, and the heap's top is never given back
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
