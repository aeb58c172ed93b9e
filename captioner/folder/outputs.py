"""Where records go: files of several forms, and a terminal."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import FileIO, StringIO
from pathlib import Path
from typing import IO, Protocol

from captioner.data.csv_cells import BETWEEN_TAGS, csv_cell
from captioner.data.example import coco_image_id
from captioner.files import Record, append, as_json, check_in_place, printable, replacing
from captioner.folder.database import DatabaseFile

__all__ = [
    "FORMS",
    "CocoFile",
    "ErrorStream",
    "JsonLinesStream",
    "LinesFile",
    "Output",
    "TerminalStream",
    "csv_line",
    "json_line",
    "output_file",
    "tag_list",
]

FORMS = (".jsonl", ".csv", ".json", ".sqlite")
"""The endings of output files."""

_CSV_COLUMNS = ("image", "caption", "log_prob", "confidence", "tags", "error")


class Output(Protocol):
    """A place for records; each method raises ``OSError`` when it cannot write."""

    def start(self, records: Iterable[Record]) -> None:
        """Begin with the records of earlier runs, in order."""
        ...

    def write(self, record: Record) -> None:
        """Write one more record."""
        ...

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """End; ``records`` are all there are, ``reordered`` if not each came after the last."""
        ...


class LinesFile:
    """A file of one line a record (``line``) after a ``head``, whole after every record."""

    def __init__(self, path: str, line: Callable[[Record], bytes], head: bytes = b"") -> None:
        """Take the place and the form; nothing is opened yet."""
        self._path, self._line, self._head = path, line, head

    def start(self, records: Iterable[Record]) -> None:
        """Write the file anew, and open it for more."""
        with replacing(self._path) as file:
            file.write(self._head)
            file.writelines(map(self._line, records))
        self._file = FileIO(self._path, "a")

    def write(self, record: Record) -> None:
        """Write one more record; a file that is gone or another is an ``OSError`` as well."""
        check_in_place(self._file)
        append(self._file, self._line(record))

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """Close the file, once it has its records in order."""
        self._file.close()
        if reordered:
            self.start(records)
            self._file.close()


class CocoFile:
    """COCO results, ``[{"image_id", "caption"}]``, written at the end.

    Error records and captions that were left out have no place in that form.
    """

    def __init__(self, path: str) -> None:
        """Take the place; nothing is opened yet."""
        self._path = path

    def start(self, records: Iterable[Record]) -> None:
        """Show at once whether the file can be written."""
        self.finish(records, False)

    def write(self, record: Record) -> None:
        """Wait for the end."""

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """Write all captions."""
        separator = b"["
        with replacing(self._path) as file:
            for record in records:
                if record.get("caption") is not None:
                    image_id = coco_image_id(record["image"])
                    entry = {"image_id": image_id, "caption": record["caption"]}
                    file.write(separator + as_json(entry))
                    separator = b",\n"
            file.write(b"[]\n" if separator == b"[" else b"]\n")


class JsonLinesStream:
    """JSON lines on a stream, each flushed."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Write to a binary stream."""
        self._stream = stream

    def start(self, records: Iterable[Record]) -> None:
        """Begin; earlier records went out in their time."""

    def write(self, record: Record) -> None:
        """Write one line."""
        self._stream.write(json_line(record))
        self._stream.flush()

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """End."""


class TerminalStream:
    """One line a photograph, for a person: ``dog.jpg  a dog runs  [dog, run]``."""

    def __init__(self, stream: IO[str]) -> None:
        """Write to a text stream."""
        self._stream = stream

    def start(self, records: Iterable[Record]) -> None:
        """Begin; earlier records went out in their time."""

    def write(self, record: Record) -> None:
        """Write one line."""
        parts = [printable(record["image"])]
        if "error" in record:
            parts.append(f"error: {printable(record['error'])}")
        if record.get("caption") is not None:
            parts.append(printable(record["caption"]))
        elif "caption" in record:
            parts.append(f"(no caption: {record['confidence']:.0%} sure)")
        if "tags" in record:
            parts.append(f"[{printable(tag_list(record))}]")
        if "sidecar_error" in record:
            parts.append(f"error: {printable(record['sidecar_error'])}")
        print("  ".join(parts), file=self._stream, flush=True)

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """End."""


class ErrorStream(TerminalStream):
    """The errors alone, for a person."""

    def write(self, record: Record) -> None:
        """Write one line, if there is an error."""
        errors = [record[key] for key in ("error", "sidecar_error") if key in record]
        if errors:
            super().write({"image": record["image"], "error": errors[0]})


def output_file(path: str, sidecars: bool = False) -> Output:
    """Return the output of a file, in the form that the name's ending (in ``FORMS``) says.

    With ``sidecars`` CSV has one more column, ``sidecar_error``.
    """
    ending = Path(path).suffix.lower()
    if ending == ".json":
        return CocoFile(path)
    if ending == ".sqlite":
        return DatabaseFile(path, json_line)
    if ending != ".csv":
        return LinesFile(path, json_line)
    columns = (*_CSV_COLUMNS, *(["sidecar_error"] if sidecars else []))
    head = f"\ufeff{','.join(columns)}\r\n".encode()
    return LinesFile(path, partial(csv_line, columns=columns), head)


def json_line(record: Record) -> bytes:
    """Return a record as a line of JSON; what only the report shows is left out."""
    return as_json({key: value for key, value in record.items() if key != "attention"}) + b"\n"


def csv_line(record: Record, columns: Sequence[str] = _CSV_COLUMNS) -> bytes:
    """Return a record as a line of CSV: image, caption, log_prob, confidence, tags, error.

    Every text is quoted, and an apostrophe stands before whatever a spreadsheet could take for a
    formula.
    """
    cells = {**record, "tags": tag_list(record)}
    row = StringIO()
    csv.writer(row, quoting=csv.QUOTE_NONNUMERIC).writerow(
        value if isinstance(value := cells.get(name), float) else csv_cell(value or "")
        for name in columns
    )
    return row.getvalue().encode("utf-8", "backslashreplace")


def tag_list(record: Record) -> str:
    """Return the names of a record's tags, with commas between."""
    return BETWEEN_TAGS.join(tag["name"] for tag in record.get("tags", ()))
