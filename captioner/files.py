"""Files written whole or not at all, locks, lines of JSON, and text that is safe on a terminal."""

from __future__ import annotations

import codecs
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
    "decoded",
    "from_json",
    "listed_paths",
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


def from_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises ``ValueError`` for every text without one, also where brackets are nested so deeply that
    Python's parser would end with a ``RecursionError``.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def decoded(content: bytes, errors: str = "strict") -> str:
    """Return the text of a file: UTF-8, or UTF-16 where it begins with that byte order mark.

    ``errors`` is as in ``bytes.decode``. Raises ``ValueError`` for bytes that are neither.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if b"\0" in content:
        raise ValueError("NUL bytes in it: UTF-16 without a byte order mark? Save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)


def listed_paths(content: bytes, separator: str) -> list[str]:
    """Return the paths of a list, each ended by the separator, a newline or NUL.

    A list of lines may come from Windows: a byte order mark, UTF-16, and a carriage return before
    every newline are no part of its paths. Raises ``ValueError`` as :func:`decoded`.
    """
    if separator == "\0":
        return [path for path in os.fsdecode(content).split(separator) if path]
    *lines, last = decoded(content, "surrogateescape").split("\n")
    # A name may end with a carriage return, but not every name of a list does.
    if lines and all(line.endswith("\r") for line in lines):
        lines, last = [line[:-1] for line in lines], last.removesuffix("\r")
    return [path for path in (*lines, last) if path]


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
