"""Memory that is freed and needed again a moment later."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next batch, until it ends.

    Otherwise glibc gives the memory of a large tensor back to the system at once, and the next one
    is mapped anew, page by page, which is much of what an encoder takes on a processor. The most
    that is used at a time becomes a few per cent more. It is for programs to call, not for
    libraries; where the C library is another one nothing changes. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
