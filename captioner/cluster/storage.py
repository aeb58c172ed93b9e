"""Folders and files of any pyarrow file system: a disk, S3, Google Cloud Storage, Azure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from uuid import uuid4

from pyarrow import ArrowInvalid, ArrowKeyError
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from captioner.files import replacing
from captioner.folder.checks import RunError

__all__ = ["Place", "located", "reachable", "why"]

# They show an object once all of it is there, and never a part.
_OBJECT_STORES = frozenset({"abfs", "gcs", "s3"})


class Place(NamedTuple):
    """A file or folder of a file system."""

    filesystem: FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or one that is mounted like it."""
        return isinstance(self.filesystem, LocalFileSystem)

    def of(self, name: str) -> Place:
        """Return the place of a name in this folder."""
        return self._replace(path=f"{self.path.rstrip('/')}/{name}")

    def info(self) -> FileInfo:
        """Return what there is."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Return whether there is anything."""
        return bool(self.info().type != FileType.NotFound)

    def files(self, recursive: bool = False) -> list[str]:
        """Return the paths of the files in a folder, below it; none where there is no folder."""
        selector = FileSelector(self.path, allow_not_found=True, recursive=recursive)
        base = len(self.path.rstrip("/")) + 1
        found = self.filesystem.get_file_info(selector)
        return [info.path[base:] for info in found if info.type == FileType.File]

    def read(self) -> bytes:
        """Return the content of a file."""
        with self.filesystem.open_input_file(self.path) as file:
            return bytes(file.read())

    def write(self, content: bytes) -> None:
        """Write a file whole or not at all, also if this process is killed on the way."""
        if self.is_local:
            with replacing(self.path) as file:
                file.write(content)
            return
        whole = self.filesystem.type_name in _OBJECT_STORES
        target = self.path if whole else f"{self.path}.{uuid4().hex}.tmp"
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(content)
        if not whole:
            self.filesystem.move(target, self.path)


def located(path: str | os.PathLike[str], filesystem: FileSystem | None = None) -> Place:
    """Return where a path leads: into the file system, or by its scheme (``s3://bucket/photos``).

    After ``?`` a URI may have pyarrow's options, such as ``s3://bucket?region=eu-west-1``. Nothing
    else in it is decoded: names in an object store are taken as they are. Raises ``RunError`` where
    there is no such file system.
    """
    path = os.fspath(path)
    scheme, _, rest = path.partition("://")
    if filesystem is not None:
        return Place(filesystem, path if scheme == path else rest)
    if scheme == path:
        return Place(LocalFileSystem(), os.path.abspath(path))
    rest, _, query = rest.partition("?")
    root, _, below = rest.partition("/")
    if "@" in root and ":" in root.partition("@")[0]:
        raise RunError(
            f"a {scheme}:// URI with a password would show it in every record: have it in the "
            "environment or the store's own configuration, or give filesystem="
        )
    with reachable(path):
        found, base = FileSystem.from_uri(f"{scheme}://{root}/{f'?{query}' if query else ''}")
    return Place(found, f"{base.rstrip('/')}/{below}".rstrip("/"))


@contextmanager
def reachable(path: str) -> Iterator[None]:
    """Turn the errors of a file system before any work into a ``RunError`` that names a path."""
    try:
        yield
    except (OSError, ArrowInvalid, ArrowKeyError, NotImplementedError) as error:
        raise RunError(f"{path}: cannot be reached: {why(error)}") from error


def why(error: BaseException) -> str:
    """Return the reason of an error as one line, without a number of the system."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join(str(said or error).split()) or type(error).__name__
