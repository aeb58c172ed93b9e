"""PNG files whose texts or profile are larger than Pillow takes."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from contextlib import suppress
from struct import pack_into, unpack_from
from typing import BinaryIO, cast

__all__ = ["SIGNATURE", "hide_notes", "profile_of"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""

_HEAD, _CHECKSUM = 8, 4  # length and kind before a chunk's content, CRC after it
_NOTES = {b"iCCP", b"iTXt", b"tEXt", b"zTXt"}
_MOST_PROFILE_BYTES = 16 << 20
_PRIVATE = b"noTe"  # lower, lower, upper, lower case: whoever does not know it may pass over it


def hide_notes(file: BinaryIO) -> BinaryIO:
    """Return a PNG whose chunks of text and profile readers pass over; the file stays as it is."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for kind, start, length in _chunks(content):
        if kind in _NOTES:
            content[start - 4 : start] = _PRIVATE
            checksum = zlib.crc32(content[start - 4 : start + length])
            pack_into(">I", content, start + length, checksum)
    return cast("BinaryIO", content)  # it reads, seeks and tells as a file does


def profile_of(file: BinaryIO) -> bytes | None:
    """Return the colour profile of a PNG, its first 16 megabytes at most, if it has one."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = next((c for c in _chunks(content) if c[0] == b"iCCP"), None)
        if found is None:
            return None
        _, start, length = found
        _, _, packed = content[start : start + length].partition(b"\0")
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(packed[1:], _MOST_PROFILE_BYTES)
    return None


def _chunks(content: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each whole chunk, where its content starts, and its length in bytes."""
    start = len(SIGNATURE) + _HEAD
    while start <= len(content):
        length, kind = unpack_from(">I4s", content, start - _HEAD)
        if start + length + _CHECKSUM > len(content):
            return
        yield kind, start, length
        start += length + _CHECKSUM + _HEAD
