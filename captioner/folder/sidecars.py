"""Files beside the photographs: captions for trainers, XMP for photo managers."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from captioner.files import Record, append, as_json
from captioner.folder.outputs import tag_list
from captioner.folder.xmp import XmpError, is_captioners, merge_xmp

__all__ = ["SIDECARS", "Sidecars", "closed_folders", "sidecar_path"]

SIDECARS = ("txt", "caption", "xmp")
"""The kinds of sidecars."""

_LARGEST = 16 << 20  # bytes; darktable and Lightroom write kilobytes
_INDEX = ".captioner-sidecars"
_LEFTOVER = re.compile(r"\.captioner-[0-9a-f]{16}\.tmp")
_HOUR = 3600.0  # seconds


def sidecar_path(image: str, kind: str, full_name: bool = False) -> str:
    """Return where a photograph's sidecar lies.

    Trainers look for ``dog.txt`` and ``dog.caption``, photo managers for ``dog.jpg.xmp``. With
    ``full_name`` the first two are ``dog.jpg.txt`` and ``dog.jpg.caption`` as well.
    """
    return f"{image if full_name or kind == 'xmp' else os.path.splitext(image)[0]}.{kind}"


def closed_folders(images: Iterable[str]) -> dict[str, str]:
    """Return the folders of the images in which no file can be made, each with the reason.

    What killed runs left in the others goes once it is an hour old.
    """
    closed = {}
    for folder in dict.fromkeys(os.path.dirname(image) for image in images):
        try:
            path, descriptor = _temporary(folder)
            began = os.fstat(descriptor).st_mtime
            os.close(descriptor)
            os.unlink(path)
            _remove_leftovers(folder, began - _HOUR)
        except OSError as error:
            closed[folder or "."] = error.strerror or str(error)
    return closed


class _There(NamedTuple):
    """The present content of a sidecar's path.

    Attributes:
        content: its bytes; none if there is nothing, or no plain file.
        writer: "captioner"; "another" whose file is not to be touched; or "nobody", where there
            is nothing, or XMP that captioner has not been merged into.
    """

    content: bytes
    writer: str


class Sidecars:
    """Files beside each photograph, one of each kind that was chosen from ``SIDECARS``.

    "txt" and "caption" hold the caption, or the tags with commas between where there is no
    caption. Such a file is replaced only if captioner wrote it: the hidden file
    ``.captioner-sidecars`` of each folder has its digest. "xmp" holds both as Dublin Core, merged
    into what other programs wrote.

    Attributes:
        left_alone: how many files that captioner did not write were left as they are.
        earlier: how many files of an earlier run were left as they are.
        kept: how many descriptions of others were kept; the caption is beside them in the XMP.
        failed: the photographs whose sidecar could not be written.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        overwrite: bool = False,
        *,
        full_names: bool = False,
        alone: bool = False,
    ) -> None:
        """Choose the kinds.

        Args:
            kinds: of ``SIDECARS``.
            overwrite: replace what an earlier run wrote.
            full_names: ``dog.jpg.txt`` in place of ``dog.txt``.
            alone: whether records go nowhere else, so that a full disk ends the run.
        """
        self._kinds, self._overwrite = kinds, overwrite
        self._full_names, self._alone = full_names, alone
        self._index = _Index()
        self.left_alone = self.earlier = self.kept = 0
        self.failed: set[str] = set()

    def _path(self, image: str, kind: str) -> str:
        return sidecar_path(image, kind, self._full_names)

    def has(self, image: str) -> bool:
        """Return whether a photograph needs no record, where records go nowhere else.

        It has all its sidecars already, and they are not to be replaced.
        """
        try:
            writers = [self._look(self._path(image, kind), kind).writer for kind in self._kinds]
        except (OSError, XmpError):  # which its record will say
            return False
        if not all(w == "another" or (w == "captioner" and not self._overwrite) for w in writers):
            return False
        self.left_alone += writers.count("another")
        self.earlier += writers.count("captioner")
        return True

    def write(self, record: Record, again: bool = False) -> Record:
        """Write a record's sidecars.

        Args:
            record: what is to be written; an error record has no sidecars.
            again: whether the record replaces an earlier one of the same run, so that its sidecars
                replace that one's.

        Returns:
            The record, with ``sidecar_error`` if any failed.

        Raises:
            OSError: the disk is full, and records go nowhere else.
        """
        if "error" in record:
            return record
        whys = [self._why_not(record, kind, again or self._overwrite) for kind in self._kinds]
        why = "; ".join(filter(None, whys)) or None
        (self.failed.discard if why is None else self.failed.add)(record["image"])
        if why == record.get("sidecar_error"):
            return record
        record = {key: value for key, value in record.items() if key != "sidecar_error"}
        return record if why is None else record | {"sidecar_error": why}

    def _why_not(self, record: Record, kind: str, replace: bool) -> str | None:
        """Write a record's sidecar of a kind; return why that is impossible, if it is."""
        path = self._path(record["image"], kind)
        try:
            self._write(path, kind, record, replace)
        except OSError as error:
            if self._alone and error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            return f"cannot write {os.path.basename(path)}: {error.strerror}"
        except XmpError as error:
            return f"cannot merge into {os.path.basename(path)}: {error}"
        return None

    def notes(self) -> list[str]:
        """Return what to tell a person at the end."""
        counts = {
            "sidecars hold something else and were left alone": self.left_alone,
            "sidecars are of an earlier run and were left alone; --overwrite replaces them": (
                self.earlier
            ),
            "descriptions by others were kept; captioner:caption is beside them": self.kept,
            "sidecars could not be written": len(self.failed),
        }
        return [f"{count} {text}" for text, count in counts.items() if count]

    def _look(self, path: str, kind: str) -> _There:
        """Return what lies where a sidecar is to be; raises ``OSError`` and ``XmpError``."""
        content = _content(path)
        if content is None:
            return _There(b"", "another")
        if kind == "xmp":
            return _There(content, "captioner" if content and is_captioners(content) else "nobody")
        if content:
            return _There(content, "captioner" if self._index.has(path, content) else "another")
        return _There(content, "nobody")

    def _write(self, path: str, kind: str, record: Record, replace: bool) -> None:
        there = self._look(path, kind)
        content = self._wanted(record, kind, there.content)
        if there.content == content:
            return
        if there.writer == "another":
            self.left_alone += 1
        elif there.writer == "captioner" and not replace:
            self.earlier += 1
        else:
            if kind != "xmp":
                # Before the file itself: a kill in between must not make it a stranger's.
                self._index.add(path, content)
            _replace(path, content, careful=there.content != b"")

    def _wanted(self, record: Record, kind: str, before: bytes) -> bytes:
        """Return what is to stand in a sidecar in place of what stands there."""
        caption, tags = record.get("caption"), record.get("tags")
        if kind != "xmp":
            text = tag_list(record) if caption is None else caption
            return f"{text}\n".encode("utf-8", "backslashreplace")
        names = None if tags is None else [tag["name"] for tag in tags]
        merged = merge_xmp(before, caption, names)
        self.kept += merged.kept
        return merged.content


class _Index:
    """The digests of the texts that captioner wrote in a folder, in a hidden file there.

    Nothing in a text for a trainer can say who wrote it.
    """

    def __init__(self) -> None:
        self._folder: str | None = None
        self._known: set[tuple[str, str]] = set()

    def has(self, path: str, content: bytes) -> bool:
        """Return whether captioner wrote these bytes under this name."""
        return self._entry(path, content) in self._known

    def add(self, path: str, content: bytes) -> None:
        """Remember that captioner writes these bytes under this name; raises ``OSError``."""
        entry = self._entry(path, content)
        if entry not in self._known:
            with FileIO(self._place(path), "a", opener=_no_link) as file:
                append(file, as_json({"name": entry[0], "sha256": entry[1]}) + b"\n")
            self._known.add(entry)

    def _place(self, path: str) -> str:
        return os.path.join(os.path.dirname(path), _INDEX)

    def _entry(self, path: str, content: bytes) -> tuple[str, str]:
        if os.path.dirname(path) != self._folder:
            self._folder, self._known = os.path.dirname(path), set()
            with suppress(OSError), open(self._place(path), "rb", opener=_no_link) as file:
                for line in file:
                    with suppress(ValueError, KeyError, TypeError, RecursionError):
                        entry = json.loads(line)
                        self._known.add((entry["name"], entry["sha256"]))
        return os.path.basename(path), sha256(content).hexdigest()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _content(path: str) -> bytes | None:
    """Return what stands in a file: nothing if it is not there, ``None`` if it is no plain file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return b""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        return None
    with open(path, "rb", opener=_no_link) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(errno.EFBIG, f"what is there has more than {_LARGEST:,} bytes", path)
    return content


def _replace(path: str, content: bytes, careful: bool) -> None:
    """Put a file in the place of another, whole or not at all; ``careful``, also if power fails."""
    temporary, descriptor = _temporary(os.path.dirname(path))
    try:
        with open(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                before = os.stat(path)
                with suppress(PermissionError):  # root may, and must not take the file away
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            file.write(content)
            if careful:
                file.flush()
                os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _remove_leftovers(folder: str, before: float) -> None:
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            old = _LEFTOVER.fullmatch(entry.name) and entry.stat(follow_symlinks=False)
            if old and old.st_mtime < before:
                os.unlink(entry.path)


def _temporary(folder: str) -> tuple[str, int]:
    """Make a file that nobody else has; return its path and a descriptor."""
    path = os.path.join(folder, f".captioner-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return path, os.open(path, flags, 0o666)
