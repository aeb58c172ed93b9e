"""The text of an annotation file, and the check of its entries: all mistakes are told at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from captioner.data.example import DataError, Example, ImageId
from captioner.data.names import wrong_name
from captioner.files import decoded, from_json
from captioner.settings import shown

__all__ = [
    "NULL_CAPTIONS",
    "Annotations",
    "Problems",
    "Text",
    "as_id",
    "as_number",
    "load_text",
    "objects",
    "parsed",
]

NULL_CAPTIONS = "captions that are null, passed over"
"""The name under which :meth:`Problems.count` counts captions that are null."""

_TOLD = 5


class Annotations(NamedTuple):
    """The photographs of an annotation file, each by its name there, and what was passed over."""

    examples: list[Example]
    notes: list[str]


class Text(NamedTuple):
    """A text file as it was read."""

    path: Path
    content: str
    notes: list[str]
    """Notes on an unusual encoding of the file."""

    @property
    def first_line(self) -> str:
        """Return the first line that is not blank, without leading space, cut at 10,000 letters."""
        # All of a COCO file may be one line.
        line = re.search(r"\S[^\n]{0,9999}", self.content)
        return line[0].removesuffix("\r") if line else ""

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that are not blank, and their numbers from 1."""
        for number, line in enumerate(self.content.split("\n"), 1):
            if line.strip():
                yield number, line.removesuffix("\r")


def load_text(path: Path) -> Text:
    """Read a text: UTF-8, UTF-16 with its mark or, where it cannot be UTF-8, Windows-1252.

    Raises ``DataError`` for a file that cannot be read, or that is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        return _windows_text(path, content, error)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return Text(path, text, [f"{path}: read as UTF-16"] if utf16 else [])


def _windows_text(path: Path, content: bytes, error: UnicodeDecodeError) -> Text:
    if error.encoding != "utf-8":
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    before = error.object[: error.start]
    where = f"{path}:{before.count(10) + 1}"
    start = before.rfind(b"\n") + 1
    seen = shown(error.object[start : error.start + 20])
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        raise DataError(
            f"{where}: cannot be read as text: neither UTF-8 nor Windows-1252: {seen}"
        ) from error
    return Text(path, text, [f"{where}: not UTF-8, so the file was read as Windows-1252: {seen}"])


def parsed(text: Text) -> Any:
    """Return the value of a JSON text; raises ``DataError``."""
    try:
        return from_json(text.content)
    except ValueError as error:
        raise DataError(f"{text.path}: cannot be read as JSON: {error}") from error


def objects(data: Any, key: str, where: object) -> list[dict[str, Any]]:
    """Return the list of objects at a key; raises ``DataError``."""
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{where}: expected an object with a list {key!r}, found {shown(data)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where}: {key}[{index}]: expected an object, found {shown(entry)}")
    return entries


class Problems:
    """The entries of a file that cannot be used: the first few in words, of the rest how many.

    ``where`` is the number of a line, or how an entry is called, such as "images[3]".
    """

    def __init__(self, path: Path) -> None:
        """Begin without a problem of the file."""
        self._path = path
        self._told: list[str] = []
        self._count = 0
        self._oddities: dict[str, list[str | int]] = {}

    def add(self, where: str | int, what: str) -> None:
        """Note what is wrong with an entry."""
        self._count += 1
        if self._count == 1:
            self._told.append(
                f"{self._path}:{'' if isinstance(where, int) else ' '}{where}: {what}"
            )
        elif self._count <= _TOLD:
            self._told.append(f"{_called(where)}: {what}")

    def check(self) -> None:
        """Raise ``DataError`` if there is a problem."""
        if self._told:
            more = [f"and {self._count - _TOLD:,} more"] if self._count > _TOLD else []
            raise DataError("; ".join(self._told + more))

    def count(self, where: str | int, what: str) -> None:
        """Count an entry that is odd and can be used, or changes nothing, under what it is."""
        self._oddities.setdefault(what, []).append(where)

    def notes(self) -> list[str]:
        """Return how many odd entries of each kind there are, and where the first is."""
        return [
            f"{self._path}: {len(entries):,} {what}; the first: {_called(entries[0])}"
            for what, entries in self._oddities.items()
        ]

    def wrong(self, where: str | int, key: str, entry: Mapping[str, Any], expected: str) -> None:
        """Note that a field is missing, or has a value that was not expected."""
        seen = f"is {shown(entry[key])}" if key in entry else "is missing"
        self.add(where, f"{key!r} {seen}; expected {expected}")

    def text(self, where: str | int, entry: Mapping[str, Any], key: str) -> str | None:
        """Return the text at a key, or ``None`` after noting what is wrong."""
        value = entry.get(key)
        if isinstance(value, str):
            return value
        self.wrong(where, key, entry, "a text")
        return None

    def image_id(self, where: str | int, entry: Mapping[str, Any], key: str) -> ImageId | None:
        """Return the id at a key, or ``None`` after noting what is wrong; see :func:`as_id`."""
        value = as_id(entry.get(key))
        if value is None:
            self.wrong(where, key, entry, "a whole number or a text")
        return value

    def name(self, where: str | int, name: object) -> Path | None:
        """Return the name of a photograph, or ``None`` after noting what is wrong."""
        wrong = wrong_name(name)
        if wrong:
            self.add(where, wrong)
        return None if wrong else Path(str(name))


def _called(where: str | int) -> str:
    return f"line {where}" if isinstance(where, int) else where


def as_id(value: object) -> ImageId | None:
    """Return an id: a text that is a whole number is that number. ``None`` for what is no id."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value or None
    if isinstance(value, float) and value.is_integer():  # as spreadsheets and pandas write them
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_number(value: object) -> float | None:
    """Return a finite number, or a text of one, as a float; ``None`` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None
