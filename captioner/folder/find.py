"""Photographs in folders: which files of a person's paths are to be described."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator

from captioner.photos.images import image_endings
from captioner.photos.workers import Found

__all__ = ["find_photographs"]


def find_photographs(paths: Iterable[str]) -> Iterator[Found]:
    """Yield the photographs of the paths: files as they are, folders searched recursively.

    Within a folder: sorted, by the endings that Pillow reads in any case, without names that
    begin with a dot; links to folders are followed, but no folder is searched twice.
    """
    endings = image_endings()
    for path in paths:
        if os.path.isdir(path):
            yield from _search_folder(path, endings, set())
        elif os.path.exists(path):
            yield Found(path)
        else:
            yield Found(path, "no such file or folder")


def _search_folder(
    folder: str, endings: Container[str], seen: set[tuple[int, int]]
) -> Iterator[Found]:
    try:
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            return
        seen.add((stat.st_dev, stat.st_ino))
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield Found(folder, f"cannot be searched: {error.strerror}")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _search_folder(path, endings, seen)
        elif os.path.splitext(name)[1].lower() in endings:
            yield Found(path)
