"""Identity of photographs: paths of the same file, and files that have changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from captioner.folder.journal import Journal, Stamp
from captioner.photos.workers import Found

__all__ = ["Photograph", "changed", "distinct", "gone", "named", "stamp_of"]


class Photograph(NamedTuple):
    """A photograph that a run was asked for.

    Attributes:
        found: how it is spelled this time, or why it is none.
        path: its absolute path without links to folders: what it is known by.
        stamp: its size and time, if it is there.
    """

    found: Found
    path: str
    stamp: Stamp | None


def distinct(found: Iterable[Found]) -> tuple[list[Photograph], set[tuple[int, int]]]:
    """Return the photographs, each once, and the device and inode of each that is there.

    The first spelling of several counts. A link to a photograph is one of its own, as it has a
    name and a sidecar of its own.
    """
    folders: dict[str, str] = {}
    photographs: dict[str, Photograph] = {}
    inodes: set[tuple[int, int]] = set()
    for one in found:
        path = _path(one.path, folders)
        if path not in photographs:
            status = _status(one.path)
            photographs[path] = Photograph(one, path, _stamp(status))
            inodes |= set() if status is None else {(status.st_dev, status.st_ino)}
    return list(photographs.values()), inodes


def _path(spelled: str, folders: dict[str, str]) -> str:
    folder, name = os.path.split(spelled)
    if name in {"", ".", ".."}:  # a folder that could not be searched
        folder, name = spelled, ""
    if folder not in folders:
        try:
            folders[folder] = os.path.realpath(folder)
        except (OSError, ValueError):  # a working directory that is gone, a NUL
            folders[folder] = folder
    return os.path.join(folders[folder], name) if name else folders[folder]


def stamp_of(path: str) -> Stamp | None:
    """Return a file's size and time, if it is there."""
    return _stamp(_status(path))


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _stamp(status: os.stat_result | None) -> Stamp | None:
    return None if status is None else Stamp(status.st_size, status.st_mtime_ns)


def named(photographs: Iterable[Photograph], journal: Journal) -> dict[str, Photograph]:
    """Return the photographs by image: the name that a journal has for them, or is to have.

    That is how they were spelled first. Where the spelling is another photograph's already, which
    was meant from another folder, the name is the absolute path. One that was moved, together with
    the folder that the names begin in, keeps its name and its record.
    """
    known = journal.photographs
    images = {path: image for image, path in known.items()}
    result: dict[str, Photograph] = {}
    for photograph in photographs:
        image = images.get(photograph.path)
        if image is None or image in result:
            image = photograph.found.path
            if image in known and not _moved(journal.stamp(image), known[image], photograph):
                image = photograph.path
            while image in result or (image != photograph.found.path and image in known):
                image = f"/{image}"  # names the same file
        result[image] = photograph
    return result


def _moved(stamp: Stamp | None, path: str, photograph: Photograph) -> bool:
    """Whether a photograph is the one that had its name, in a place that is gone now."""
    return stamp is not None and stamp == photograph.stamp and not os.path.lexists(path)


def changed(photographs: Mapping[str, Photograph], journal: Journal) -> list[str]:
    """Return the images of photographs that are others now than when they were described."""
    done = journal.done & photographs.keys()
    stamps = ((image, photograph.stamp) for image, photograph in photographs.items())
    return [
        image
        for image, stamp in stamps
        if image in done and stamp is not None and stamp != journal.stamp(image)
    ]


def gone(
    photographs: Mapping[str, Photograph], journal: Journal, folders: Iterable[str]
) -> list[str]:
    """Return the images in a journal of which there is no photograph any more.

    Args:
        photographs: those that were asked for, by image.
        journal: what is known of them, and of others.
        folders: those that were searched. What lay elsewhere, or in one where no photograph was
            found, may be on a disk that is not there at the moment.
    """
    inner = {os.path.dirname(photograph.path) for photograph in photographs.values()}
    full = {parent for folder in inner for parent in _parents(folder)}
    searched = {os.path.realpath(folder) for folder in folders} & full
    return [
        image
        for image, path in journal.photographs.items()
        if (
            photographs[image].stamp is None and journal.stamp(image) is not None
            if image in photographs
            else not searched.isdisjoint(_parents(path)) and _is_gone(path)
        )
    ]


def _parents(path: str) -> Iterator[str]:
    """Yield a path and the folders above it."""
    above = ""
    while path != above:
        yield path
        path, above = os.path.dirname(path), path


def _is_gone(path: str) -> bool:
    """Whether there is nothing, or a folder that could not be searched before."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):  # a network drive that does not answer
        return False
