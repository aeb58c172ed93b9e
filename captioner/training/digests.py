"""What lies in files: a hash of each, and those that did not change are not read again."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import time_ns

from tqdm import tqdm

from captioner.files import as_json, from_json, locked, replacing

__all__ = ["Digests"]

# Two writes within one tick of a file system's clock leave the same time; FAT's tick is 2 s.
_TICK_NS = 2_000_000_000


class Digests:
    """The SHA-256 of files, kept in a file of its own between runs.

    A file with the size, the times and the inode that it had is not read again, unless it was
    written so shortly before it was hashed that a later write could have left the same time
    (git's "racily clean"). Several processes may keep their digests in one place.
    """

    def __init__(self, path: Path) -> None:
        """Take up what is kept at ``path``; a file that is missing or damaged counts as empty."""
        self._path = path
        self._kept = _read(path)
        self._new: dict[str, str] = {}

    def of(self, files: Sequence[str]) -> list[str]:
        """Return the SHA-256 of each file in hexadecimal, or why it cannot be read."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(self._of, files)
            # Shown to a person only where it takes longer than a second.
            return list(tqdm(digests, "hashing", len(files), False, disable=None, delay=1.0))

    def save(self) -> None:
        """Keep what is new, beside what others have kept meanwhile; raises ``OSError``."""
        if not self._new:
            return
        with locked(f"{self._path}.lock"), replacing(str(self._path)) as file:
            file.write(as_json(_read(self._path) | self._new))
        self._new = {}

    def _of(self, path: str) -> str:
        place = os.path.abspath(path)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                return "a folder or a device"  # reading from a pipe might never end
            stamp, _, digest = str(self._kept.get(place)).rpartition(" ")
            if stamp == _stamp(status):
                return digest
            began = time_ns()
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return error.strerror or str(error)
        if max(status.st_mtime_ns, status.st_ctime_ns) + _TICK_NS < began:
            self._kept[place] = self._new[place] = f"{_stamp(status)} {digest}"
        return digest


def _stamp(status: os.stat_result) -> str:
    # The change time and the inode tell of what was put there with the time of another.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _read(path: Path) -> dict[str, str]:
    try:
        kept = from_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    entries = kept.items() if isinstance(kept, dict) else ()
    return {path: stamp for path, stamp in entries if isinstance(stamp, str)}
