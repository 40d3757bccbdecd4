"""Keeps the memory of one training step for the next, where the C library would give it back."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 2**31 - 1  # what mallopt's int holds


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 2 GiB for the process instead of unmapping them.

    By default it maps every block of 32 MiB and more anew, and the system fills it with zeros page
    by page. That is a quarter of a training step at 8x3x256x256 on two cores, 13.2 s against 9.8 s;
    kept, the process's peak is 6.8 GB instead of 4.8 GB (`python -m bench.freed_memory`, whose
    table is in ``docs/training.md``).

    Returns:
        Whether it was done: not on other systems, and not where the environment says how malloc is
        to behave (``GLIBC_TUNABLES``, ``MALLOC_..._``).
    """
    said = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if said or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    done = [library.mallopt(o, _LARGEST) for o in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(done)
