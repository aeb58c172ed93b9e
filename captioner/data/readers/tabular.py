"""Tables of photographs and captions: JSONL and CSV."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from captioner.data.csv_cells import csv_tags, csv_text
from captioner.data.example import DataError, Example
from captioner.data.readers.entries import (
    numbered_lines,
    photograph_path,
)

__all__ = ["read_csv", "read_jsonl"]


def read_jsonl(captions: Path, images: Path) -> list[Example]:
    """Read one ``{"image": …, "captions": […], "tags": […]}`` a line; ``tags`` may be missing.

    Raises ``DataError`` that names the line that is not of that form.
    """
    examples: list[Example] = []
    for number, line in numbered_lines(captions):
        where = f"{captions}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, found {line!r}")
        tags = entry.get("tags")
        examples.append(
            Example(
                photograph_path(images, entry.get("image"), where),
                _strings(entry.get("captions"), f"{where}: 'captions'"),
                None if tags is None else _strings(tags, f"{where}: 'tags'"),
                len(examples) + 1,
            )
        )
    return examples


def _strings(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: expected a list of strings, found {values!r}")
    return tuple(values)


def read_csv(captions: Path, images: Path) -> list[Example]:
    """Read columns ``image`` and ``caption``, one caption a row, and ``tags`` where there is one.

    Rows of one image are put together. What ``captioner caption --output FILE.csv`` writes is of
    this form: tags stand between commas, an apostrophe before a formula is taken off, and an error
    record is a photograph without a caption. A ``tags`` column that is empty in every row is none.
    Raises ``DataError`` that names the row which is not of that form.
    """
    texts: dict[Path, list[str]] = defaultdict(list)
    tags: dict[Path, list[str]] = defaultdict(list)
    for where, row in _csv_rows(captions):
        path = photograph_path(images, csv_text(row["image"]), where)
        texts[path] += filter(None, [csv_text(row["caption"]).strip()])
        tags[path] += csv_tags(row.get("tags", ""))
    tagged = any(tags.values())
    return [
        Example(path, tuple(lines), tuple(dict.fromkeys(tags[path])) if tagged else None, number)
        for number, (path, lines) in enumerate(texts.items(), 1)
    ]


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            if not {"image", "caption"} <= {*head} or len({*head}) < len(head):
                raise DataError(f"{path}:1: expected the columns image and caption, found {head}")
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if cells and len(cells) != len(head):
                    found = f"{len(cells)} cells where the head has {len(head)}"
                    raise DataError(f"{where}: {found}; a text with a comma stands in quotes")
                if cells:
                    yield where, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
