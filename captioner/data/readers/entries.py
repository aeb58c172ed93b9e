"""The entries of an annotation file, checked; ``where`` is how an error names one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captioner.data.example import DataError

__all__ = ["field", "load_json", "numbered_lines", "objects", "photograph_path"]


def load_json(path: Path) -> Any:
    """Return what a JSON file holds; raises ``DataError``."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text that are not blank, and their numbers; raises ``DataError``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def photograph_path(folder: Path, name: object, where: str) -> Path:
    """Return the path of a photograph; ``DataError`` for a name that leads out of its folder."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: expected the name of a photograph, found {name!r}")
    # A link inside the folder is its owner's doing, not the file's: it may lead anywhere.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r} leaves the image folder")
    return folder / name


def objects(data: Any, key: str, where: object) -> list[dict[str, Any]]:
    """Return the list of objects at a key; raises ``DataError``."""
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: expected an object with a list {key!r} of objects")
    return entries


def field(entry: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of an object, of this type; raises ``DataError``."""
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} is {value!r}")
    return value
