"""Files written whole or not at all, locks, lines of JSON, and text that is safe on a terminal."""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from secrets import token_hex
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "Notice",
    "Record",
    "append",
    "as_json",
    "check_in_place",
    "check_is_at",
    "check_replaceable",
    "decoded",
    "from_json",
    "listed_paths",
    "locked",
    "printable",
    "remove_leftovers",
    "replacing",
]

Record = dict[str, Any]
"""An object that becomes one line of JSON."""

_HOUR = 3600.0  # seconds

# What file systems answer that have no locks: NFS without its lock daemon, FUSE, Lustre.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_told: set[str] = set()


class Notice(UserWarning):
    """A line that a person should read; nothing is wrong with the program."""


def as_json(value: object) -> bytes:
    """Return a value as one line of JSON, without its end.

    Control characters, also those beyond ASCII, and the bytes of names that are not UTF-8 are
    escapes in it, so that the line is safe on a terminal and reads back the same.
    """
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return text.encode()


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


def check_in_place(file: FileIO) -> None:
    """Raise ``OSError`` if an open file is no longer what its name leads to.

    What is written to it would be gone with it.
    """
    check_is_at(str(file.name), os.fstat(file.fileno()))


def check_is_at(path: str, status: os.stat_result) -> None:
    """Raise ``OSError`` if the file of a status is no longer what a path leads to."""
    if not os.path.samestat(os.stat(path), status):
        raise OSError(errno.ESTALE, "another file has taken its place", path)


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a file to write that takes the place of another only once it is whole.

    What a killed process left of an earlier attempt goes once it is an hour old. Raises
    ``OSError``.
    """
    target = Path(os.path.realpath(path))
    temporary: Path | None = None
    try:
        temporary, descriptor = _temporary(target)
        # Opened so, the file has a name, under which others can write to it.
        with open(temporary, "wb", opener=lambda *_: descriptor) as file:
            began = os.fstat(descriptor).st_mtime
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
        remove_leftovers(path, before=began - _HOUR)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_leftovers(path: str, before: float = math.inf) -> None:
    """Remove what killed processes left that were replacing a file.

    Without a time ``before`` which it was written, that is only for one who knows that nobody is
    writing the file now.
    """
    target = Path(os.path.realpath(path))
    with suppress(OSError):
        for leftover in target.parent.glob(f"{_leftover(target)}*.tmp"):
            if leftover.lstat().st_mtime < before:
                leftover.unlink()


def check_replaceable(path: str) -> None:
    """Raise ``OSError`` if :func:`replacing` could not even begin."""
    temporary, descriptor = _temporary(Path(os.path.realpath(path)))
    os.close(descriptor)
    temporary.unlink()


def _temporary(target: Path) -> tuple[Path, int]:
    """Make a file that nobody else has, beside another; return its path and a descriptor."""
    path = target.with_name(f"{_leftover(target)}{token_hex(8)}.tmp")
    # Whoever planted a link under this name would choose what is written to.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return path, os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def _leftover(target: Path) -> str:
    """Return how the names of a file's temporaries begin: short, or they could be too long."""
    return f".captioner-{sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


@contextmanager
def locked(path: str, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold a lock that one process at a time can have; it ends with its process, however that ends.

    Yields whether it is held: where the file system or the platform has no such locks, a
    ``Notice`` says so once, and the work goes on without.

    Args:
        path: the file of the lock, which is made and, as filelock sees fit, stays.
        waiting: called if another process has the lock, before waiting for it; may raise.

    Raises:
        OSError: the file cannot be made.
    """
    lock = _acquired(path, waiting)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquired(path: str, waiting: Callable[[], None]) -> BaseFileLock | None:
    """Return the lock; ``None`` where there is no such thing."""
    from filelock import FileLock, SoftFileLock, Timeout

    # filelock would make do with a file that exists or not, which is no lock: a killed process
    # would leave it behind for ever.
    lock = FileLock(path, fallback_to_soft=False)
    why = "not on this platform" if isinstance(lock, SoftFileLock) else None
    held = False
    try:
        if why is None:
            lock.acquire(timeout=0)
            held = True
    except Timeout:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, path) from error
        why = os.strerror(error.errno)
    if why is not None:
        _say_unlocked(path, why)
        return None
    if not held:
        waiting()
        lock.acquire()
    return lock


def _say_unlocked(path: str, why: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in _told:
        _told.add(folder)
        text = f"{folder}: no locks here ({why}); going on without: start no second run there"
        warnings.warn(text, Notice, stacklevel=4)


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
