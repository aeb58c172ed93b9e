"""What a run over many photographs has done, kept so that nothing but the disk can lose it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from itertools import pairwise
from time import monotonic
from typing import Any

from captioner.files import Record, append, as_json

__all__ = [
    "Journal",
    "JournalError",
]


_FORMAT = "captioner journal 1"
_MAGIC = b'{"format": "captioner journal'
_LISTED = 1000
_SYNC_SECONDS = 1.0


class JournalError(ValueError):
    """A run that cannot be continued; the message says why, and what to do."""


class Journal:
    """A file of JSON lines: the run's settings, its photographs in order, and their records.

    A line is there whole or not at all. The file is locked while it is open; opening it again
    continues where it ends. What a power failure may cost is the last second. ``errors`` are the
    photographs that have an error record; ``reordered`` says whether records were, or may come to
    be, written in another order than that of the photographs. All writing raises ``OSError``.
    """

    def __init__(self, path: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Open a journal, or begin it.

        Raises ``JournalError`` for a file that is none, that another run is writing, or that was
        begun with other settings; with ``overwrite``, only for one that is being written.
        """
        self.path = path
        self.errors: set[str] = set()
        self.reordered = False
        self._offsets: dict[str, int | None] = {}  # in the order of the photographs
        self._file = FileIO(path, "a+")
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._read(settings)
        except BaseException:
            self._file.close()
            raise
        self._synced = monotonic()

    def __enter__(self) -> Journal:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Bring everything to the disk, and let the next run in."""
        with self._file:
            os.fsync(self._file.fileno())

    @property
    def photographs(self) -> list[str]:
        """Every photograph that the run was asked for, in order."""
        return list(self._offsets)

    @property
    def done(self) -> set[str]:
        """Those of them that have a record."""
        return {image for image, offset in self._offsets.items() if offset is not None}

    def add(self, images: Iterable[str]) -> None:
        """Put the photographs that are new at the end of the run's."""
        new = [image for image in images if image not in self._offsets]
        for start in range(0, len(new), _LISTED):
            append(self._file, as_json({"photographs": new[start : start + _LISTED]}) + b"\n")
        self._offsets |= dict.fromkeys(new)
        done = [offset is not None for offset in self._offsets.values()]
        # A later run may do what an earlier one was not asked for.
        self.reordered |= any(after and not before for before, after in pairwise(done))

    def write(self, record: Record) -> None:
        """Keep a record; an earlier one of the same photograph counts no more."""
        self._note(record, append(self._file, as_json(record) + b"\n"))
        if monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def records(self) -> Iterator[Record]:
        """Yield the records in the order of their photographs."""
        with open(self.path, "rb") as file:
            for offset in self._offsets.values():
                if offset is not None:
                    if offset != file.tell():
                        file.seek(offset)
                    yield json.loads(file.readline())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.path}: another run is writing it") from None

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Take up what is there, and cut off what did not reach the disk whole."""
        with open(self.path, "rb") as file:
            first = file.readline()
            if not (first.startswith(_MAGIC) or _MAGIC.startswith(first)):
                raise JournalError(f"{self.path}: not a journal of captioner's; move it away")
            header = _parsed(first)
            end = 0 if header is None else len(first)
            if header is not None:
                self._check(header, settings)
                while (entry := _parsed(file.readline())) is not None:
                    self._take(entry, end)
                    end = file.tell()
        self._file.truncate(end)
        if header is None:
            append(self._file, as_json({"format": _FORMAT, "settings": settings}) + b"\n")

    def _check(self, header: Record, settings: Mapping[str, Any]) -> None:
        before = {"format": header["format"], **header["settings"]}
        settings = json.loads(as_json({"format": _FORMAT, **settings}))
        differences = [
            f"{name} was {before.get(name)}, is {settings.get(name)}"
            for name in dict.fromkeys([*before, *settings])
            if before.get(name) != settings.get(name)
        ]
        if differences:
            raise JournalError(
                f"{self.path}: this run was begun differently: {'; '.join(differences)}; "
                "continue it as it was, or begin anew with --overwrite"
            )

    def _take(self, entry: Record, offset: int) -> None:
        if "photographs" in entry:
            self._offsets |= dict.fromkeys(entry["photographs"])
        else:
            self._note(entry, offset)

    def _note(self, record: Record, offset: int) -> None:
        image = record["image"]
        self.reordered |= self._offsets.get(image) is not None
        self._offsets[image] = offset
        if "error" in record:
            self.errors.add(image)
        else:
            self.errors.discard(image)


def _parsed(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
