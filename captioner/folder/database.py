"""Records in an SQLite database with a full-text index, and the search of it."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from captioner.files import Record, check_is_at, replacing

__all__ = ["DatabaseError", "DatabaseFile", "find_images"]

# "capt" in ASCII: the file begins with SQLite's own name, and this says whose tables are in it.
_APPLICATION = 0x63617074
_VERSION = 1

# A name that is not UTF-8 is a BLOB of its bytes in `image`.
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
CREATE TABLE photographs (
    id INTEGER PRIMARY KEY,
    image TEXT NOT NULL UNIQUE,
    caption TEXT,
    log_prob REAL,
    confidence REAL,
    error TEXT,
    record TEXT NOT NULL
);
CREATE TABLE captions (
    photograph INTEGER NOT NULL REFERENCES photographs (id),
    place INTEGER NOT NULL,
    text TEXT NOT NULL,
    log_prob REAL NOT NULL,
    PRIMARY KEY (photograph, place)
) WITHOUT ROWID;
CREATE TABLE tags (
    photograph INTEGER NOT NULL REFERENCES photographs (id),
    place INTEGER NOT NULL,
    name TEXT NOT NULL COLLATE NOCASE,
    score REAL NOT NULL,
    PRIMARY KEY (photograph, place)
) WITHOUT ROWID;
CREATE INDEX tags_by_name ON tags (name, score, photograph);
CREATE VIRTUAL TABLE texts USING fts5 (
    captions, tags, tokenize = 'porter unicode61 remove_diacritics 2'
);
"""

_TABLES = ("photographs", "captions", "tags", "texts")
_DAMAGE = (sqlite3.Error, OverflowError, ValueError)


class DatabaseError(ValueError):
    """A file in which nothing can be searched; the message says why."""


class DatabaseFile:
    """An output that is an SQLite database, whole after every record.

    The journal of the run is the truth: the database is written anew from it when a run begins, so
    that a kill in the middle of a transaction, or a power failure, costs nothing. Where another
    program holds the database, what it keeps out is written at the end.
    """

    def __init__(self, path: str, line: Callable[[Record], bytes]) -> None:
        """Take the place, and the form of a whole record in it; nothing is opened yet."""
        self._path, self._line = path, line

    def start(self, records: Iterable[Record]) -> None:
        """Write the database anew, and open it for more."""
        with replacing(self._path) as file, _writing(self._path):
            with closing(_connected(file.name, "off")) as connection, connection:
                connection.executescript(_SCHEMA)
                for record in records:
                    self._insert(connection, record)
            # SQLite would undo in the new database what a killed run had begun in the old one.
            for ending in ("-journal", "-wal", "-shm"):
                Path(f"{os.path.realpath(self._path)}{ending}").unlink(missing_ok=True)
        with _writing(self._path):
            self._connection = _connected(self._path, "delete")
        self._there, self._behind = os.stat(self._path), False

    def write(self, record: Record) -> None:
        """Write one more record, or another in the place of an earlier one of its photograph."""
        check_is_at(self._path, self._there)
        if self._behind:
            return
        try:
            with _writing(self._path), self._connection as connection:
                self._insert(connection, record, _removed(connection, record))
        except BlockingIOError:
            self._behind = True

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """Close the database, once it has its records in order."""
        self._connection.close()
        if reordered or self._behind:
            self.start(records)
            self._connection.close()

    def _insert(
        self, connection: sqlite3.Connection, record: Record, number: int | None = None
    ) -> None:
        """Insert a record; ``number`` is its place where it is not at the end."""
        captions, tags = record.get("captions", ()), record.get("tags", ())
        row = {
            "id": number,
            "image": _name(record["image"]),
            "caption": _text(record.get("caption")),
            "log_prob": record.get("log_prob"),
            "confidence": record.get("confidence"),
            "error": _text(record.get("error")),
            "record": self._line(record).decode().rstrip("\n"),
        }
        insert = f"INSERT INTO photographs VALUES ({', '.join(f':{name}' for name in row)})"
        number = connection.execute(insert, row).lastrowid
        connection.executemany(
            "INSERT INTO captions VALUES (?, ?, ?, ?)",
            [(number, i, _text(c["text"]), c["log_prob"]) for i, c in enumerate(captions)],
        )
        connection.executemany(
            "INSERT INTO tags VALUES (?, ?, ?, ?)",
            [(number, i, _text(tag["name"]), tag["score"]) for i, tag in enumerate(tags)],
        )
        texts = (f"{caption['text']}\n" for caption in captions), (f"{t['name']}\n" for t in tags)
        insert = "INSERT INTO texts (rowid, captions, tags) VALUES (?, ?, ?)"
        connection.execute(insert, (number, *(_text("".join(lines)) for lines in texts)))


def _connected(path: str, journal: str) -> sqlite3.Connection:
    """Open a database to write; nothing is synced, because it can be written anew."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("PRAGMA synchronous = off")
    return connection


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Turn an error of SQLite's into an ``OSError``; one of a database that another holds too."""
    codes = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_BUSY: errno.EAGAIN}
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        raise OSError(codes.get(code, errno.EIO), str(error), path) from error


def _removed(connection: sqlite3.Connection, record: Record) -> int | None:
    """Remove the photograph's earlier record; return where it was, if there was one."""
    select = "SELECT id FROM photographs WHERE image = ?"
    row = connection.execute(select, (_name(record["image"]),)).fetchone()
    if row is None:
        return None
    for table, key in zip(_TABLES, ("id", "photograph", "photograph", "rowid"), strict=True):
        connection.execute(f"DELETE FROM {table} WHERE {key} = ?", row)
    return int(row[0])


def _name(image: str) -> str | bytes:
    """Return a path as SQLite takes it: its bytes where they are not UTF-8."""
    try:
        image.encode()
    except UnicodeEncodeError:
        return os.fsencode(image)
    return image


def _text(text: str | None) -> str | None:
    """Return a text in which nothing is left that is not UTF-8."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def find_images(
    path: str | os.PathLike[str],
    text: str = "",
    tags: Sequence[str] = (),
    min_score: float = 0.0,
) -> Iterator[str]:
    """Yield the images of a database that have all words and all tags, best first.

    Words are looked for in captions and tags, by their stems, as SQLite's FTS5 ranks them (bm25).
    Without words, those come first whose tags have the highest scores.

    Args:
        path: The database of a folder run (``--output FILE.sqlite``).
        text: The words. There is no syntax; words that a sign joins must follow each other.
        tags: The names of tags, in upper or lower case.
        min_score: The lowest score, 0…1, of each of these tags.

    Raises:
        DatabaseError: The file is no such database, or it is damaged.
    """
    query, values = _query(text, tags, min_score)
    with _reading(path) as connection:
        # All at once: a reader that waits would keep a run from writing.
        found = connection.execute(query, values).fetchall()
    for (image,) in found:
        yield os.fsdecode(image) if isinstance(image, bytes) else str(image)


def _query(text: str, tags: Sequence[str], min_score: float) -> tuple[str, list[str | float]]:
    """Return a statement and its values. Nothing of what a person typed is in the statement."""
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    names = list(dict.fromkeys(tags))
    joins, values = [], list[str | float]()
    if words:
        joins.append("JOIN texts ON texts.rowid = photographs.id AND texts MATCH ?")
        values.append(_match(words))
    for table, name in enumerate(names):
        joins.append(
            "JOIN (SELECT photograph, max(score) AS score FROM tags WHERE name = ? AND score >= ? "
            f"GROUP BY photograph) AS tag{table} ON tag{table}.photograph = photographs.id"
        )
        values += [_text(name) or "", min_score]
    if not joins or (text.strip() and not words):
        joins.append("WHERE false")
    scores = " + ".join(f"tag{table}.score" for table in range(len(names)))
    best = "bm25(texts), " if words else f"{scores} DESC, " if names else ""
    return (
        f"SELECT image FROM photographs {' '.join(joins)} ORDER BY {best}photographs.id",
        values,
    )


def _match(words: Sequence[str]) -> str:
    """Return a query of FTS5's for all words: in quotes nothing is an operator."""
    quoted = ('"' + word.replace('"', '""').replace("\0", " ") + '"' for word in words)
    return " ".join(map(str, map(_text, quoted)))


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[sqlite3.Connection]:
    """Open a database that captioner wrote to read it; everything that is wrong is one error."""
    name = os.fspath(path)
    if not os.path.isfile(name):  # SQLite would wait for a pipe
        raise DatabaseError(f"{name}: {'not a file' if os.path.exists(name) else 'no such file'}")
    try:
        # To write, as SQLite must undo what a killed run had begun; the search itself cannot.
        place = f"{Path(os.path.abspath(name)).as_uri()}?mode=rw"
        with closing(sqlite3.connect(place, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema = off")
            connection.execute("PRAGMA query_only = on")
            _check(name, connection)
            yield connection
    except DatabaseError:
        raise
    except _DAMAGE as error:
        raise DatabaseError(f"{name}: cannot be searched: {error}") from error


def _check(name: str, connection: sqlite3.Connection) -> None:
    application, version = (
        connection.execute(f"PRAGMA {pragma}").fetchone()[0]
        for pragma in ("application_id", "user_version")
    )
    if application != _APPLICATION:
        raise DatabaseError(f"{name}: not a database that captioner wrote (--output FILE.sqlite)")
    if version != _VERSION:
        raise DatabaseError(
            f"{name}: its tables are of version {version}, and this captioner reads {_VERSION}; "
            "write it anew with --overwrite"
        )
