"""Files written whole or not at all, locks, lines of JSON, and text that is safe on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

__all__ = [
    "Record",
    "append",
    "as_json",
    "check_replaceable",
    "locked",
    "printable",
    "replacing",
]

Record = dict[str, Any]
"""An object that becomes one line of JSON."""


def as_json(value: object) -> bytes:
    """Return a value as one line of JSON, without its end."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8 survives as an escaped surrogate
        return json.dumps(value).encode()


def append(file: FileIO, content: bytes) -> int:
    """Write at the end of a file, all or nothing; return where it begins."""
    start = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        with suppress(OSError):
            file.truncate(start)
        raise OSError(error.errno, error.strerror, str(file.name)) from None
    return start


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a file to write that takes the place of another only once it is whole."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock that one process at a time can have; it ends with its process, however that ends.

    ``waiting`` is called if another one has it. The empty file of the lock stays. Raises
    ``OSError``.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # To close it is not enough: a process that was forked meanwhile has it open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def check_replaceable(path: str) -> None:
    """Raise ``OSError`` if :func:`replacing` could not even begin."""
    temporary = _temporary(path)
    temporary.touch()
    temporary.unlink()


def _temporary(path: str) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.tmp")


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
