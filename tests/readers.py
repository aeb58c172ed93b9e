"""What the processes that read photographs do in tests. No torch here, as there is none in them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from captioner.config import Preprocessing
from captioner.photos.images import read_pixels


def read_small(path: str) -> bytes:
    return read_pixels(path, Preprocessing(size=32)).tobytes()


def read_and_measure(path: str) -> bytes:
    """Return how many bytes of memory this process had at its fullest, after reading a picture."""
    read_pixels(path, Preprocessing(size=32))
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith("VmHWM")).split()[1]
    return b"%d" % (int(kilobytes) * 1024)


def read_much(path: str) -> bytes:
    """Take as many megabytes as a name says."""
    return b"%d" % len(bytes(int(path) * 1_000_000))


def read_or_crash(preprocessing: Preprocessing, path: str) -> bytes:
    """Read a picture, or end as a decoder that crashes, if the name says so."""
    if "crash" in Path(path).name:
        os.kill(os.getpid(), signal.SIGSEGV)
    return b"%d" % preprocessing.size
