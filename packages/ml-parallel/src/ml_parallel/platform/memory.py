"""Keep the memory of freed tensors in the process, as torch does by itself on a GPU.

The C library hands every large block back to the system when it is freed and asks for it again at
the next layer; each time the system fills its pages with zeros. In a training step on a CPU that is
half a million page faults, a fifth of the time in bfloat16.
"""

from __future__ import annotations

import ctypes
import sys

# Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

_LARGEST_KEPT = 1 << 30
"""Blocks above 1 GiB still go back to the system: few are freed in a step, and each is a lot."""


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed blocks up to 1 GiB instead of returning them.

    Returns:
        Whether it obeys: glibc only, that is most of Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = ctypes.c_int(-1)
    # Before glibc 2.35 the threshold could be 32 MiB at most; then no block goes back.
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_M_MMAP_MAX, 0)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, never))
