"""The C library's treatment of freed memory that the next batch needs again."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["freed_memory_is_kept", "keep_freed_memory"]

# Numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_kept = False


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees, for the next batch.

    By default glibc returns the memory of a large tensor to the system at once. The next tensor
    is then mapped anew, page by page, which is much of an encoder's time on a CPU. The peak of
    memory grows by a few per cent. Programs call this function; a library should not, because the
    setting is the whole process's: without it a ``Captioner`` encodes a batch in parts. With
    another C library nothing changes. Source: mallopt(3).
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        _kept = True


def freed_memory_is_kept() -> bool:
    """Return whether this process keeps the memory of large tensors for the next ones."""
    return _kept
