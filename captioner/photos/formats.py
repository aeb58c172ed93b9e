"""Formats of photographs that Pillow reads only with another package, or not at all."""

from __future__ import annotations

import re

__all__ = ["HEIF_ENDINGS", "HEIF_HINT", "OTHER_ENDINGS", "URL_HINT", "is_heif", "is_url"]

URL_HINT = "nothing is downloaded: save what a URL leads to, and name the file"
"""The advice to a person who has the address of a photograph."""

HEIF_ENDINGS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
"""The endings of HEIF, which phones write and the package pillow-heif reads."""

HEIF_HINT = 'HEIC is read after: pip install "captioner[heif]"'
"""The advice to a person who has such photographs."""

OTHER_ENDINGS = HEIF_ENDINGS | {
    # cameras' raw data
    ".3fr", ".ari", ".arw", ".bay", ".braw", ".cr2", ".cr3", ".crw", ".dcr", ".dcs", ".dng",
    ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mdc", ".mef", ".mos", ".mrw", ".nef",
    ".nrw", ".orf", ".ori", ".pef", ".ptx", ".pxn", ".r3d", ".raf", ".raw", ".rw2", ".rwl",
    ".rwz", ".sr2", ".srf", ".srw", ".x3f",
    # and pictures
    ".avif", ".exr", ".hdp", ".hdr", ".j2k", ".jls", ".jp2", ".jpm", ".jxl", ".jxr", ".psb",
    ".wdp", ".xcf",
}  # fmt: skip
"""Endings of photographs that Pillow may be unable to read; it depends on how it was built."""

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)

# The brands of HEIF with HEVC (ISO 23008-12, annex B.4): what follows "ftyp" in the file.
_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


def is_heif(head: bytes) -> bool:
    """Return whether a file that begins with these bytes (12 are enough) is HEIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def is_url(path: str) -> bool:
    """Return whether what should be a path is the address of something elsewhere."""
    return _URL.match(path) is not None
