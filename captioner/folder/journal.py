"""The append-only log of a folder run, from which the run is continued.

It holds the run's settings, its photographs in order, and one record each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from time import monotonic
from types import NoneType
from typing import IO, Any, NamedTuple
from zlib import crc32

from captioner.files import Record, append, as_json, check_in_place, from_json, locked

__all__ = ["Journal", "JournalError", "Stamp", "differences", "lock_path"]

_FORMAT = "captioner journal 2"
_MAGIC = b'{"format": "captioner journal '
_TAIL = len(b', "crc32": "00000000"}\n')
_LISTED = 1000
_SYNC_SECONDS = 1.0

_NUMBER = (int, float)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "image": str, "error": str, "sidecar_error": str, "caption": (str, NoneType), "text": str,
    "name": str, "log_prob": _NUMBER, "score": _NUMBER, "confidence": _NUMBER, "finished": bool,
    "truncated": bool,
    "captions": list, "tags": list, "words": list, "weights": list, "attention": dict,
}  # fmt: skip


class JournalError(ValueError):
    """A run that cannot be continued; the message says why, and what to do."""


class Stamp(NamedTuple):
    """The size and time of a file, by which a later run sees whether the file has changed.

    Attributes:
        size: in bytes.
        mtime: when it was last modified, in nanoseconds.
    """

    size: int
    mtime: int


@dataclass(slots=True)
class _Entry:
    """A photograph: its absolute path; where its record begins, if it has one; its stamp then."""

    path: str
    offset: int | None = None
    stamp: Stamp | None = None


def lock_path(path: str) -> str:
    """Return the file of a journal's lock: hidden, for it stays."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.lock")


def differences(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return how the settings of a run differ from those that it was begun with, if they do."""
    now = from_json(as_json(dict(settings)))
    different = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if not different:
        return ""
    return (
        f"this run was begun differently: {'; '.join(different)}; "
        "continue it as it was, or begin anew with --overwrite"
    )


class Journal:
    """A file of JSON lines: the run's settings, its photographs in order, and their records.

    A photograph has a name of its own, its ``image``, under which it stands in records. Each line
    has a checksum. A last line that was cut off is removed when the journal is opened again; any
    other damage is refused. A power failure may cost the last second. The journal is locked while
    it is open. All writing raises ``OSError``.

    Attributes:
        path: the file.
        alone: whether a lock keeps other runs out.
        torn: how many bytes of a last line were cut off when the journal was opened.
        errors: the images that have an error record.
        reordered: whether records were, or may come to be, in another order than that of the
            photographs.
    """

    def __init__(self, path: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Open a journal, or begin it.

        Args:
            path: the file.
            settings: what the records depend on.
            overwrite: begin it anew.

        Raises:
            JournalError: the file is no journal, or damaged, or was begun with other settings, or
                another run is writing it.
            OSError: the file cannot be opened.
        """
        self.path = path
        self.torn = 0
        self.errors: set[str] = set()
        self.reordered = False
        self._entries: dict[str, _Entry] = {}  # in the order of the photographs
        with ExitStack() as stack:
            try:
                self.alone = stack.enter_context(locked(lock_path(path), self._refuse))
            except OSError as error:  # what cannot be made is no concern of a person's
                raise OSError(error.errno, error.strerror, path) from error
            self._file = stack.enter_context(FileIO(path, "a+"))
            end = self._take_up(settings, overwrite)
            self._file.truncate(end)
            if end == 0:
                append(self._file, _line({"format": _FORMAT, "settings": settings}))
            self._closing = stack.pop_all()
        self._synced = monotonic()

    def __enter__(self) -> Journal:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Bring everything to the disk, and let the next run in."""
        with self._closing:
            os.fsync(self._file.fileno())

    @property
    def photographs(self) -> dict[str, str]:
        """The absolute path of each photograph that the run was asked for, by image, in order."""
        return {image: entry.path for image, entry in self._entries.items()}

    @property
    def done(self) -> set[str]:
        """The images that have a record."""
        return {image for image, entry in self._entries.items() if entry.offset is not None}

    def has(self, image: str) -> bool:
        """Return whether a photograph has a record."""
        return image in self._entries and self._entries[image].offset is not None

    def stamp(self, image: str) -> Stamp | None:
        """Return what a photograph was when it was described; ``None`` if it was not there."""
        return self._entries[image].stamp

    def add(self, photographs: Mapping[str, str]) -> None:
        """Put the photographs that are new at the end of the run's; others may have a new path."""
        new = [
            [image, path]
            for image, path in photographs.items()
            if image not in self._entries or self._entries[image].path != path
        ]
        for start in range(0, len(new), _LISTED):
            self._append({"photographs": new[start : start + _LISTED]})
        self._list(new)
        done = [entry.offset is not None for entry in self._entries.values()]
        # A later run may do what an earlier one was not asked for.
        self.reordered |= any(after and not before for before, after in pairwise(done))

    def drop(self, images: Iterable[str]) -> None:
        """Take photographs and their records out of the run."""
        dropped = list(images)
        for start in range(0, len(dropped), _LISTED):
            self._append({"dropped": dropped[start : start + _LISTED]})
        self._drop(dropped)

    def write(self, record: Record, stamp: Stamp | None = None) -> None:
        """Keep the record of a listed photograph; an earlier one of it counts no more."""
        path = self._entries[record["image"]].path
        entry = {**record, "path": path, "stamp": stamp}
        self._note(entry, self._append(entry))
        if monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def records(self) -> Iterator[Record]:
        """Yield the records in the order of their photographs."""
        with open(self.path, "rb") as file:
            for entry in self._entries.values():
                if entry.offset is not None:
                    if entry.offset != file.tell():
                        file.seek(entry.offset)
                    record = _parsed(file.readline())
                    yield {k: v for k, v in record.items() if k not in {"path", "stamp"}}

    def _append(self, entry: Record) -> int:
        """Write a line; return where it begins."""
        check_in_place(self._file)
        return append(self._file, _line(entry))

    def _refuse(self) -> None:
        raise JournalError(f"{self.path}: another run is writing it")

    def _take_up(self, settings: Mapping[str, Any], overwrite: bool) -> int:
        """Read what is there; return where its last whole line ends."""
        with open(self.path, "rb") as file:
            first = file.readline()
            if not (first.startswith(_MAGIC) or _MAGIC.startswith(first)):
                raise JournalError(f"{self.path}: not a journal of captioner's; move it away")
            if overwrite:
                return 0
            end = self._read(first, file, settings) if first.endswith(b"\n") else 0
            self.torn = os.fstat(file.fileno()).st_size - end
        return end

    def _read(self, first: bytes, file: IO[bytes], settings: Mapping[str, Any]) -> int:
        if not first.startswith(_MAGIC + b'2"'):
            raise JournalError(
                f"{self.path}: begun by another version of captioner, whose journals this one does "
                "not continue; begin anew with --overwrite"
            )
        try:
            before = _settings(_parsed(first))
        except ValueError as error:
            raise JournalError(
                f"{self.path}: line 1 is damaged ({error}); begin anew with --overwrite"
            ) from None
        self._check(before, settings)
        end, number = len(first), 2
        while (line := file.readline()).endswith(b"\n"):
            try:
                self._take(_parsed(line), end)
            except ValueError as error:
                raise JournalError(
                    f"{self.path}: line {number} is damaged ({error}); without that line the run "
                    "continues and does again what it held, or begin anew with --overwrite"
                ) from None
            end, number = end + len(line), number + 1
        return end

    def _check(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        if different := differences(before, settings):
            raise JournalError(f"{self.path}: {different}")

    def _take(self, entry: Record, offset: int) -> None:
        if "photographs" in entry:
            pairs = entry["photographs"]
            if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
                raise ValueError("its photographs are no list of names and paths")
            self._list(pairs)
        elif "dropped" in entry:
            if not _are_strings(entry["dropped"]):
                raise ValueError("what it drops is no list of names")
            self._drop(entry["dropped"])
        else:
            _check_record(entry)
            self._note(entry, offset)

    def _list(self, pairs: Iterable[list[str]]) -> None:
        for image, path in pairs:
            self._entries.setdefault(image, _Entry(path)).path = path

    def _drop(self, images: Iterable[str]) -> None:
        for image in images:
            self._entries.pop(image, None)
            self.errors.discard(image)

    def _note(self, entry: Record, offset: int) -> None:
        image = entry["image"]
        # Its list may have been in a line that was damaged and taken out.
        noted = self._entries.setdefault(image, _Entry(entry["path"]))
        self.reordered |= noted.offset is not None
        noted.offset = offset
        noted.stamp = None if entry["stamp"] is None else Stamp(*entry["stamp"])
        if "error" in entry:
            self.errors.add(image)
        else:
            self.errors.discard(image)


def _line(entry: Record) -> bytes:
    """Return a line: an object whose last member is the checksum of what comes before it."""
    content = as_json(entry)[:-1]
    return content + _tail(content)


def _tail(content: bytes) -> bytes:
    return b', "crc32": "%08x"}\n' % crc32(content)


def _parsed(line: bytes) -> Record:
    """Return the object of a whole line without its checksum; raises ``ValueError``."""
    content, tail = line[:-_TAIL], line[-_TAIL:]
    if tail != _tail(content):
        raise ValueError("its checksum is wrong")
    entry = from_json(content + b"}")
    if not isinstance(entry, dict):
        raise ValueError("it is no object")
    return entry


def _settings(header: Record) -> Record:
    if not isinstance(header.get("settings"), dict):
        raise ValueError("it has no settings")
    settings: Record = header["settings"]
    return settings


def _check_record(entry: Record) -> None:
    """Raise ``ValueError`` for what a run cannot have written, whoever gave it its checksum."""
    stamp = entry.get("stamp")
    if not isinstance(entry.get("image"), str) or not isinstance(entry.get("path"), str):
        raise ValueError("it names no photograph")
    if stamp is not None and not _is_list_of(stamp, int, 2):
        raise ValueError("its stamp is no size and time")
    _check_fields(entry)
    for name, needed in (("captions", ("text", "log_prob")), ("tags", ("name", "score"))):
        for inner in entry.get(name, ()):
            if not isinstance(inner, dict) or not inner.keys() >= set(needed):
                raise ValueError(f"its {name} lack {' or '.join(needed)}")
            _check_fields(inner)
    if "attention" in entry:
        weights = entry["attention"]
        if not (_are_strings(weights.get("words")) and _are_strings(weights.get("weights"))):
            raise ValueError("its attention is no words with weights")


def _check_fields(entry: Record) -> None:
    for name in entry.keys() & _FIELDS.keys():
        if not isinstance(entry[name], _FIELDS[name]):
            raise ValueError(f"its {name} is a {type(entry[name]).__name__}")


def _is_list_of(value: object, kind: type, length: int | None = None) -> bool:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        return False
    return length is None or len(value) == length


def _are_strings(value: object) -> bool:
    return _is_list_of(value, str)


def _is_pair(value: object) -> bool:
    return _is_list_of(value, str, 2)
