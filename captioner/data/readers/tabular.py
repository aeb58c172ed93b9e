"""Tables of photographs and captions: JSONL, and CSV with any separator."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from captioner.data.csv_cells import csv_tags, csv_text
from captioner.data.example import DataError, Example
from captioner.data.readers.entries import Annotations, Problems, Text
from captioner.files import from_json
from captioner.settings import shown

__all__ = ["Table", "csv_rows", "json_lines", "read_csv", "read_jsonl", "table_of", "table_of_text"]

_IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename")
_CAPTION_COLUMNS = ("caption", "comment", "text")
_SEPARATORS = ",;\t|"


class Table(NamedTuple):
    """The form of a CSV file, by its head."""

    separator: str
    columns: tuple[str, ...]
    image: str
    caption: str


def table_of(head: str) -> Table | None:
    """Return the form of a CSV file whose first line is ``head``; ``None`` for no such head.

    The image column is "image" (captioner, Kaggle's Flickr8k), "image_name" (Kaggle's Flickr30k),
    "file_name" or "filename"; the caption column is "caption", "comment" or "text".
    """
    for separator in _SEPARATORS:
        cells = next(csv.reader([head], delimiter=separator), [])
        columns = tuple(cell.strip().lower() for cell in cells)
        image = [column for column in columns if column in _IMAGE_COLUMNS]
        caption = [column for column in columns if column in _CAPTION_COLUMNS]
        if len(image) == len(caption) == 1 and len({*columns}) == len(columns):
            return Table(separator, columns, image[0], caption[0])
    return None


def json_lines(text: Text, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line; any other line is a problem."""
    for number, line in text.lines():
        try:
            entry = from_json(line)
        except ValueError as error:
            problems.add(number, f"not JSON: {error}")
            continue
        if isinstance(entry, dict):
            yield number, entry
        else:
            problems.add(number, f"expected an object, found {shown(entry)}")


def read_jsonl(text: Text) -> Annotations:
    """Read one ``{"image": …, "captions": […], "tags": […]}`` a line; ``tags`` may be missing.

    Raises ``DataError`` that names the lines that are not of that form.
    """
    problems = Problems(text.path)
    examples: list[Example] = []
    for number, entry in json_lines(text, problems):
        name = problems.name(number, entry.get("image"))
        captions = _texts(problems, number, entry, "captions")
        tags = None if entry.get("tags") is None else _texts(problems, number, entry, "tags")
        examples.append(Example(name or Path(), captions, tags))
    problems.check()
    return Annotations(examples, problems.notes())


def _texts(problems: Problems, where: int, entry: dict[str, Any], key: str) -> tuple[str, ...]:
    values = entry.get(key)
    if not isinstance(values, list) or not all(isinstance(v, str | None) for v in values):
        problems.wrong(where, key, entry, "a list of texts")
        return ()
    for value in values:
        if value is None:
            problems.count(where, f"{key} that are null, passed over")
    return tuple(value for value in values if value is not None)


def read_csv(text: Text) -> Annotations:
    """Read an image and a caption a row, and ``tags`` where there is such a column.

    Rows of one image are put together. What ``captioner caption --output FILE.csv`` writes is of
    this form: tags stand between commas, an apostrophe before a formula is taken off, and an error
    record is a photograph without a caption. A ``tags`` column that is empty in every row is none.
    Raises ``DataError`` that names the rows which are not of that form.
    """
    table, problems = table_of_text(text), Problems(text.path)
    texts: dict[Path, list[str]] = defaultdict(list)
    tags: dict[Path, list[str]] = defaultdict(list)
    for number, row in csv_rows(text, table, problems):
        name = problems.name(number, row[table.image])
        if name is not None:
            texts[name] += filter(None, [row[table.caption].strip()])
            tags[name] += csv_tags(row.get("tags", ""))
    problems.check()
    tagged = any(tags.values())
    examples = [
        Example(name, tuple(lines), tuple(dict.fromkeys(tags[name])) if tagged else None)
        for name, lines in texts.items()
    ]
    return Annotations(examples, problems.notes())


def csv_rows(text: Text, table: Table, problems: Problems) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line on which each row begins and its cells by column; other rows are problems.

    The cells of the image and the caption are texts, without the apostrophe before a formula.
    """
    # Flickr30k's captions have quotes, but none that mean something to CSV.
    reader = csv.reader(
        io.StringIO(text.content, newline=""),
        delimiter=table.separator,
        strict=True,
        quoting=csv.QUOTE_NONE if table.separator == "|" else csv.QUOTE_MINIMAL,
    )
    line, in_head = 1, True
    try:
        for cells in reader:
            number, line = line, reader.line_num + 1
            if not cells or in_head:
                in_head = in_head and not cells
            elif row := _row(table, _mended(cells, table, number, problems)):
                yield number, row
            else:
                problems.add(number, _misfit(cells, table))
    except csv.Error as error:
        problems.add(line, f"not CSV: {error}")


def _row(table: Table, cells: list[str]) -> dict[str, str] | None:
    if len(cells) != len(table.columns):
        return None
    row = dict(zip(table.columns, cells, strict=True))
    if table.separator == "|":
        row = {column: cell.strip() for column, cell in row.items()}
    return row | {column: csv_text(row[column]) for column in (table.image, table.caption)}


def _mended(cells: list[str], table: Table, number: int, problems: Problems) -> list[str]:
    """Return the cells of a row; one of Kaggle's Flickr30k lacks the bar after its number."""
    if table.columns[1:] == ("comment_number", "comment") and len(cells) == 2:
        match = re.fullmatch(r"\s*([0-9])\s+(\S.*)", cells[1])
        if match is not None:
            problems.count(number, "rows without a bar between comment_number and comment")
            return [cells[0], *match.groups()]
    return cells


def _misfit(cells: list[str], table: Table) -> str:
    rule = (
        "no text may have a | in it"
        if table.separator == "|"
        else (f"a text with {table.separator!r} in it stands in quotes")
    )
    return f"{len(cells)} cells where the head has {len(table.columns)}: {shown(cells)}; {rule}"


def table_of_text(text: Text) -> Table:
    """Return the form of a CSV file by its first line; ``DataError`` for one that is no head."""
    table = table_of(text.first_line)
    if table is None:
        cells = next(csv.reader([text.first_line]), [])
        raise DataError(
            f"{text.path}:1: expected the columns image and caption "
            f"(or {', '.join(_IMAGE_COLUMNS[1:])}; {', '.join(_CAPTION_COLUMNS[1:])}), "
            f"found {shown(cells)}"
        )
    return table
