"""Photographs in folders: which files of a person's paths are to be described."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate

from captioner.photos.formats import HEIF_ENDINGS, HEIF_HINT, OTHER_ENDINGS, URL_HINT, is_url
from captioner.photos.images import image_endings
from captioner.photos.workers import Found

__all__ = ["PassedOver", "find_listed", "find_photographs"]

# Folders that systems and programs keep for themselves: thumbnails, copies, and what was deleted.
_SYSTEM = frozenset({
    "@eadir", "@tmp", "#recycle", "#snapshot",  # Synology
    "@recycle", "@recently-snapshot",  # QNAP
    "~snapshot",  # NetApp
    "$recycle.bin", "recycler", "system volume information",  # Windows
    "lost+found", "network trash folder", "temporary items",  # Linux, macOS
    "__macosx",  # zip archives made by macOS
})  # fmt: skip

# What photo programs derive from photographs, again as pictures.
_DERIVATIVES = (".lrdata", ".lrcat-data")
_LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
_ORIGINALS = frozenset({"originals", "masters"})


@dataclass
class PassedOver:
    """Counts of the files and folders that a search skips, without names that begin with a dot.

    Attributes:
        system: the names of folders that systems and programs keep for themselves.
        unread: the endings of photographs that no reader here opens.
        excluded: how many files and folders the caller's globs name.
    """

    system: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    excluded: int = 0

    def notes(self) -> list[str]:
        """Return what to tell a person."""
        notes = []
        if self.unread:
            notes.append(f"photographs that no reader opens: {_counts(self.unread)}")
        if self.unread.keys() & HEIF_ENDINGS:
            notes.append(HEIF_HINT)
        if self.system:
            notes.append(f"folders of the system, passed over: {_counts(self.system)}")
        if self.excluded:
            notes.append(f"files and folders passed over by --exclude: {self.excluded}")
        return notes


def _counts(counts: Counter[str]) -> str:
    return f"{counts.total()} ({', '.join(f'{n} {name}' for name, n in counts.most_common())})"


def find_photographs(
    paths: Iterable[str], exclude: Iterable[str] = (), passed_over: PassedOver | None = None
) -> Iterator[Found]:
    """Yield the photographs of the paths: files as they are, folders searched recursively.

    Within a folder: sorted, by the endings that Pillow reads in any case, without names that
    begin with a dot and without the folders that systems keep for themselves (``@eaDir``,
    ``$RECYCLE.BIN``, ...). Links to folders are followed, but no folder is searched twice.

    Args:
        paths: files and folders.
        exclude: globs of what to pass over, as the shell's but that ``*`` also takes ``/``. One
            without ``/`` is compared with the names of files and of folders below the paths, one
            with ``/`` with the path as it is given, and with what of it lies below the folder that
            is searched.
        passed_over: counts what is passed over.
    """
    search = _Search(list(exclude), PassedOver() if passed_over is None else passed_over)
    for path in paths:
        if os.path.isdir(path):
            yield from search.folder(path)
        elif search.excludes(os.path.basename(path), path, path):
            continue
        elif os.path.exists(path):
            yield Found(path)
        else:
            hint = f"; {URL_HINT}" if is_url(path) else ""
            yield Found(path, f"no such file or folder{hint}")


def find_listed(paths: Iterable[str], passed_over: PassedOver | None = None) -> Iterator[str]:
    """Yield the photographs among the files of a folder, as :func:`find_photographs` finds them.

    The folder is one that only lists all that lies below it, as object stores do.

    Args:
        paths: the paths of files from that folder, with ``/`` between folders.
        passed_over: counts what is passed over.
    """
    search = _Search([], PassedOver() if passed_over is None else passed_over)
    folders: dict[str, bool] = {"": True}

    def wanted(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = wanted_folder(folder)
        return folders[folder] and search.wants(folder, name, is_folder=False)

    def wanted_folder(path: str) -> bool:
        above, _, name = path.rpartition("/")
        if above not in folders:
            folders[above] = wanted_folder(above)
        return folders[above] and search.wants(above, name, is_folder=True)

    # A search sorts the names in each folder: "/" comes before all that names are made of.
    yield from filter(wanted, sorted(paths, key=lambda path: path.replace("/", "\0")))


class _Search:
    """The search of folders for photographs, which counts the files that it skips."""

    def __init__(self, exclude: list[str], passed_over: PassedOver) -> None:
        self._endings = image_endings()
        self._passed_over = passed_over
        names = [glob.rstrip("/") for glob in exclude if "/" not in glob.rstrip("/")]
        below = [glob.rstrip("/") for glob in exclude if "/" in glob.rstrip("/")]
        self._names, self._below = (
            re.compile("|".join(map(translate, globs)) or r"(?!)") for globs in (names, below)
        )

    def excludes(self, name: str, below: str, path: str) -> bool:
        """Whether a glob names a file or folder, which is counted then."""
        # With "/" before it, "**/raw/*" also names what lies right in the folder.
        excluded = bool(self._names.match(name)) or any(
            map(self._below.match, (below, f"/{below}", path))
        )
        self._passed_over.excluded += excluded
        return excluded

    def folder(self, top: str) -> Iterator[Found]:
        """Yield the photographs in a folder and all that are below it."""
        seen: set[tuple[int, int]] = set()
        # No recursion: folders may be nested deeper than Python's stack.
        stack = [iter([(top, True)])]
        while stack:
            path, is_folder = next(stack[-1], ("", False))
            if not path:
                stack.pop()
            elif not is_folder:
                yield Found(path)
            else:
                try:
                    stack.append(self._entries(path, len(top), seen))
                except OSError as error:
                    yield Found(path, f"cannot be searched: {error.strerror}")

    def _entries(
        self, folder: str, top: int, seen: set[tuple[int, int]]
    ) -> Iterator[tuple[str, bool]]:
        """Return the folders and photographs in a folder, sorted, and which of them are folders."""
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            return iter(())
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        kept = ((e, _is_folder(e)) for e in entries if not e.name.startswith("."))
        return iter([
            (entry.path, is_folder)
            for entry, is_folder in kept
            if not self.excludes(entry.name, entry.path[top:].lstrip("/"), entry.path)
            and self.wants(folder, entry.name, is_folder)
        ])  # fmt: skip

    def wants(self, folder: str, name: str, is_folder: bool) -> bool:
        """Whether a name in a folder is that of a photograph, or of a folder to search."""
        if name.startswith("."):
            return False
        if is_folder:
            system = _system_name(folder, name)
            self._passed_over.system.update([system] if system else [])
            return not system
        ending = os.path.splitext(name)[1].lower()
        unread = ending in OTHER_ENDINGS and ending not in self._endings
        self._passed_over.unread.update([ending] if unread else [])
        return ending in self._endings


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one
        return False


def _system_name(folder: str, name: str) -> str:
    """Return what a folder is called among those that systems keep, or nothing for any other."""
    small = name.casefold()
    if small in _SYSTEM:
        return name
    if small.endswith(_DERIVATIVES):
        return f"*{os.path.splitext(small)[1]}"
    if os.path.normpath(folder).casefold().endswith(_LIBRARIES) and small not in _ORIGINALS:
        return f"{name} of a photo library"
    return ""
