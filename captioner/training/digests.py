"""SHA-256 digests of files, kept on disk so that an unchanged file is not read again."""

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
    """The SHA-256 digests of files, kept in one file between runs.

    A file with the same size, times and inode as before is not read again. The digest of a file
    that was written within 2 s before its hashing is not kept, because a later write could leave
    the same times (git's "racily clean"). Several processes may share one file of digests.
    """

    def __init__(self, path: Path) -> None:
        """Read the digests at ``path``; a missing or damaged file counts as empty."""
        self._path = path
        self._kept = _read(path)
        self._new: dict[str, str] = {}

    def of(self, files: Sequence[str]) -> list[str]:
        """Return the SHA-256 of each file in hexadecimal, or why the file is unreadable."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(self._of, files)
            # The progress bar appears only on a terminal and only after one second.
            return list(tqdm(digests, "hashing", len(files), False, disable=None, delay=1.0))

    def save(self) -> None:
        """Add the new digests to those that other processes kept meanwhile; raises ``OSError``."""
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
    # A file put in place with the old modification time has another change time or inode.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _read(path: Path) -> dict[str, str]:
    try:
        kept = from_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    entries = kept.items() if isinstance(kept, dict) else ()
    return {path: stamp for path, stamp in entries if isinstance(stamp, str)}
