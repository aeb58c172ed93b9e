"""Where records go: files of several forms, a terminal, sidecars beside the photographs."""

from __future__ import annotations

import csv
import errno
import os
import re
from collections.abc import Callable, Iterable
from io import FileIO, StringIO
from pathlib import Path
from typing import IO, Protocol
from xml.sax.saxutils import escape

from captioner.data.csv_cells import BETWEEN_TAGS, csv_cell
from captioner.files import Record, append, as_json, printable, replacing

__all__ = [
    "FORMS",
    "SIDECARS",
    "CocoFile",
    "ErrorStream",
    "JsonLinesStream",
    "LinesFile",
    "Output",
    "Sidecars",
    "TerminalStream",
    "coco_image_id",
    "csv_line",
    "json_line",
    "output_file",
    "sidecar_path",
]

FORMS = (".jsonl", ".csv", ".json")
"""The endings of output files."""

SIDECARS = ("txt", "caption", "xmp")
"""The kinds of sidecars."""

_CSV_HEAD = "\ufeffimage,caption,log_prob,tags,error\r\n".encode()

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="captioner">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
{}  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


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
        """Write one more record; a file that is gone is an ``OSError`` as well."""
        append(self._file, self._line(record))
        os.stat(self._path)

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """Close the file, once it has its records in order."""
        self._file.close()
        if reordered:
            self.start(records)
            self._file.close()


class CocoFile:
    """COCO results, ``[{"image_id", "caption"}]``, written at the end.

    Error records have no place in that form; they are passed over.
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
                if "caption" in record:
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
        if "caption" in record:
            parts.append(printable(record["caption"]))
        if "tags" in record:
            parts.append(f"[{printable(_tag_list(record))}]")
        print("  ".join(parts), file=self._stream, flush=True)

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        """End."""


class ErrorStream(TerminalStream):
    """The errors alone, for a person."""

    def write(self, record: Record) -> None:
        """Write one line, if it is an error."""
        if "error" in record:
            super().write(record)


def output_file(path: str) -> Output:
    """Return the output of a file, in the form that the name's ending (in ``FORMS``) says."""
    ending = Path(path).suffix.lower()
    if ending == ".json":
        return CocoFile(path)
    return LinesFile(path, csv_line, _CSV_HEAD) if ending == ".csv" else LinesFile(path, json_line)


def json_line(record: Record) -> bytes:
    """Return a record as a line of JSON; what only the report shows is left out."""
    return as_json({key: value for key, value in record.items() if key != "attention"}) + b"\n"


def csv_line(record: Record) -> bytes:
    """Return a record as a line of CSV: image, caption, log_prob, tags, error.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    texts = [record["image"], record.get("caption", ""), _tag_list(record), record.get("error", "")]
    image, caption, tags, error = map(csv_cell, texts)
    row = StringIO()
    csv.writer(row).writerow([image, caption, record.get("log_prob", ""), tags, error])
    return row.getvalue().encode("utf-8", "backslashreplace")


def _tag_list(record: Record) -> str:
    return BETWEEN_TAGS.join(tag["name"] for tag in record.get("tags", ()))


def coco_image_id(path: str) -> int | None:
    """Return the integer that ends a file's stem: 139 for ``COCO_val2014_000000000139.jpg``."""
    match = re.search(r"[0-9]+$", Path(path).stem)
    return None if match is None else int(match.group())


def sidecar_path(image: str, kind: str) -> str:
    """Return where a photograph's sidecar lies.

    Trainers look for ``dog.txt`` and ``dog.caption``, photo managers for ``dog.jpg.xmp``.
    """
    return f"{image if kind == 'xmp' else os.path.splitext(image)[0]}.{kind}"


class Sidecars:
    """A file beside each photograph, of a kind in ``SIDECARS``.

    "txt" and "caption" hold the caption, or the tags with commas between where there is no
    caption; "xmp" holds both as Dublin Core. A file that exists is left alone, and counted in
    ``left_alone``, unless ``overwrite``.
    """

    def __init__(self, kind: str, overwrite: bool) -> None:
        """Choose the kind."""
        self._kind, self._overwrite = kind, overwrite
        self.left_alone = 0

    def exists(self, image: str) -> bool:
        """Whether a photograph has its sidecar, and not an empty one."""
        try:
            return os.stat(sidecar_path(image, self._kind)).st_size > 0
        except OSError:
            return False

    def write(self, record: Record) -> Record:
        """Write a record's sidecar; return the record, or an error record if that failed.

        A full disk is an ``OSError``.
        """
        if "error" in record:
            return record
        path = sidecar_path(record["image"], self._kind)
        try:
            self._write(path, self._content(record).encode("utf-8", "backslashreplace"))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            why = f"cannot write {os.path.basename(path)}: {error.strerror}"
            return {"image": record["image"], "error": why}
        return record

    def _write(self, path: str, content: bytes) -> None:
        if os.path.lexists(path) and not self._overwrite:
            with open(path, "rb") as file:
                if (there := file.read(len(content) + 1)) != content:
                    self.left_alone += there != b""
                if there:
                    return
        temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}.captioner.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _content(self, record: Record) -> str:
        if self._kind == "xmp":
            return _xmp(record)
        return f"{record['caption'] if 'caption' in record else _tag_list(record)}\n"


def _xmp(record: Record) -> str:
    parts = ""
    if "caption" in record:
        item = f'<rdf:li xml:lang="x-default">{_xml(record["caption"])}</rdf:li>'
        parts += f"   <dc:description><rdf:Alt>{item}</rdf:Alt></dc:description>\n"
    if names := [tag["name"] for tag in record.get("tags", ())]:
        items = "".join(f"<rdf:li>{_xml(name)}</rdf:li>" for name in names)
        parts += f"   <dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>\n"
    return _XMP.format(parts)


def _xml(text: str) -> str:
    # XML has no way to write most control characters.
    return escape("".join(c for c in text if c.isprintable()))
