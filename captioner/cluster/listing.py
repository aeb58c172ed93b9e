"""The photographs of a run on a cluster: a list that is made once, sorted as a folder run's is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from pyarrow.fs import FileSystem, FileType
from ray.data import Dataset

from captioner.cluster.storage import Place, located, reachable
from captioner.folder.checks import RunError
from captioner.folder.describe import found_of
from captioner.folder.find import PassedOver, find_listed

__all__ = ["COLUMN", "Given", "Listed", "home", "listed"]

COLUMN = "path"
"""The column of a dataset that has the paths; Ray's readers call it so."""


class Listed(NamedTuple):
    """A photograph of a run.

    Attributes:
        image: how records call it: the path that was given, and what lies below it.
        path: where it is read, in its file system.
        error: why it cannot be, where that is known already.
    """

    image: str
    path: str
    error: str | None = None


Given: TypeAlias = Dataset | Sequence[str | os.PathLike[str]]
"""What a caller has photographs in: paths, or a dataset of Ray's with a column of them."""


def home(given: Given, filesystem: FileSystem | None) -> FileSystem:
    """Return the file system of photographs, which is one.

    Raises ``RunError`` where there is none, or there are several, or a dataset has no paths.
    """
    if isinstance(given, Dataset):
        _check_column(given)
        rows = given.select_columns([COLUMN]).take(1)
        root = _parted(rows[0][COLUMN])[0] if rows else ""
        return located(root or "/", filesystem).filesystem
    return _same([(path, located(path, filesystem)) for path in map(os.fspath, given)])


def listed(given: Given, filesystem: FileSystem | None, passed_over: PassedOver) -> list[Listed]:
    """Return the photographs of paths or of a dataset, each once.

    Paths come in the order in which they were given, what lies below each sorted. A dataset has
    no order that lasts, so its paths are sorted. ``passed_over`` counts what is no photograph.

    Raises ``RunError`` where none of the paths exists, or one cannot be searched, or they are of
    several file systems.
    """
    if isinstance(given, Dataset):
        paths = sorted(_column(given), key=lambda path: path.replace("/", "\0"))
        found = _single(paths, filesystem)
    else:
        found = _searched([os.fspath(path) for path in given], filesystem, passed_over)
    once: dict[str, Listed] = {}
    for one in found:
        once.setdefault(one.path, one)
    return list(once.values())


def _check_column(dataset: Dataset) -> None:
    columns = dataset.columns() or []
    if COLUMN not in columns:
        raise RunError(f"the dataset has no column {COLUMN!r}, but {', '.join(columns) or 'none'}")


def _column(dataset: Dataset) -> Iterator[str]:
    for batch in dataset.select_columns([COLUMN]).iter_batches(batch_format="pyarrow"):
        yield from batch[COLUMN].to_pylist()


def _single(paths: Iterable[str], filesystem: FileSystem | None) -> list[Listed]:
    """Return files as they are named: whether each is there is seen when it is read."""
    roots: dict[str, Place] = {}
    found = []
    for path in paths:
        root, below = _parted(path)
        if root not in roots:
            roots[root] = located(root or "/", filesystem)
        place = roots[root].of(below) if root else located(path, filesystem)
        found.append(Listed(path, place.path))
    _same([*roots.items()])
    return found


def _parted(path: str) -> tuple[str, str]:
    """Return the bucket of a URI, and the name in it: to find out about a bucket takes time."""
    scheme, _, rest = path.partition("://")
    if scheme == path:
        return "", path
    bucket, _, below = rest.partition("/")
    return f"{scheme}://{bucket}/", below


def _searched(
    paths: Sequence[str], filesystem: FileSystem | None, passed_over: PassedOver
) -> list[Listed]:
    places = [(path, located(path, filesystem)) for path in paths]
    with_types = [(path, place, _type(path, place)) for path, place in places]
    if paths and all(kind == FileType.NotFound for _, _, kind in with_types):
        raise RunError(f"no such file or folder: {', '.join(map(repr, paths[:5]))}")
    found: list[Listed] = []
    for path, place, kind in with_types:
        found += _below(path, place, kind, passed_over)
    return found


def _type(path: str, place: Place) -> Any:
    with reachable(path):
        return place.info().type


def _below(path: str, place: Place, kind: Any, passed_over: PassedOver) -> Iterator[Listed]:
    """Yield the photographs of one path."""
    if place.is_local and "://" not in path:
        for found in found_of([path], passed_over=passed_over):
            yield Listed(found.path, os.path.abspath(found.path), found.error)
    elif kind == FileType.NotFound:
        yield Listed(path, place.path, "no such file or folder")
    elif kind == FileType.File:
        yield Listed(path, place.path)
    else:
        with reachable(path):
            files = place.files(recursive=True)
        shown = path.partition("?")[0].rstrip("/")
        for below in find_listed(files, passed_over):
            yield Listed(f"{shown}/{below}", place.of(below).path)


def _same(places: Iterable[tuple[str, Place]]) -> FileSystem:
    """Return the file system of all places; raises ``RunError`` if there are several."""
    (first, place), *others = [*places] or [("", located("/"))]
    for path, other in others:
        if not other.filesystem.equals(place.filesystem):
            raise RunError(f"{first} and {path} are of different file systems: run each by itself")
    return place.filesystem
