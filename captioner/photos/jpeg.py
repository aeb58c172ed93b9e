"""How much of a JPEG that breaks off can still be decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import numpy as np
from PIL import Image

__all__ = ["ends", "has_every_scan", "intact_rows"]

# Markers of ITU-T T.81, table B.1.
_START, _SCAN = b"\xff\xd8", 0xDA
_RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]
_END = b"\xff\xd9"
_IN_ENTROPY_CODED_DATA = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def ends(content: bytes) -> tuple[bytes, bytes]:
    """Return two ends for a JPEG that breaks off: the marker alone, and noise before it.

    A decoder makes up what is missing from either. What comes out the same with both does not
    depend on the end, so that it has been decoded from the file.
    """
    noise = Random(0).randbytes(4096).replace(b"\xff", b"")
    # Where a restart marker is due, a decoder passes over all else, and tells them by their number.
    last = max(range(8), key=lambda number: content.rfind(_RESTARTS[number]))
    due = [_RESTARTS[(last + number) % 8] for number in range(1, 9)]
    again = b"".join(restart + noise[:256] for restart in due)
    # A marker of its own may be what breaks off.
    stem = content[:-1] if content.endswith(b"\xff") else content
    return stem + _END, stem + noise + again + _END


def intact_rows(first: Image.Image, second: Image.Image) -> int:
    """Return how many rows from the top are the same in two pictures of one size."""
    ours, theirs = np.asarray(first), np.asarray(second)
    same = (ours == theirs).reshape(len(ours), -1).all(axis=1)
    return len(same) if same.all() else int(same.argmin())


def has_every_scan(content: bytes) -> bool:
    """Return whether the last scan of each coefficient has at least begun.

    A progressive JPEG sends a coefficient's upper bits first, and its lower ones in later scans.
    """
    missing_bits: dict[int, list[int | None]] = {}
    for kind, segment in _segments(content):
        if kind in _FRAMES and len(segment) > 5:
            missing_bits = {number: [None] * 64 for number in segment[6::3]}
        elif kind == _SCAN and len(segment) > 4:
            components = segment[1 : 1 + 2 * segment[0] : 2]
            first, last, bits = segment[-3:]
            for component in components:
                rows = missing_bits.get(component, [])
                rows[first : last + 1] = [bits & 15] * len(rows[first : last + 1])
    return bool(missing_bits) and all(bits == 0 for rows in missing_bits.values() for bits in rows)


# Start of frame, baseline to progressive, Huffman and arithmetic; not 0xC4, 0xC8 and 0xCC.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the content of each whole segment between start and end."""
    position = len(_START)
    while match := _IN_ENTROPY_CODED_DATA.search(content, position):
        start = match.end()
        length = int.from_bytes(content[start : start + 2])
        if match.group()[-1:] == _END[1:] or length < 2 or start + length > len(content):
            return
        yield match.group()[-1], content[start + 2 : start + length]
        position = start + length
