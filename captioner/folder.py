"""A run over many photographs: finding them, describing them, writing the records."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from captioner.images import UnreadableError

if TYPE_CHECKING:
    from captioner.config import SearchOptions
    from captioner.inference import Captioner

__all__ = [
    "CocoWriter",
    "Found",
    "JsonLinesWriter",
    "Record",
    "TerminalWriter",
    "coco_image_id",
    "describe_folder",
    "find_photographs",
    "printable",
]

# What Pillow opens but cannot decode, at least not without another program.
_NO_PHOTOGRAPHS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})

Record = dict[str, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Found(NamedTuple):
    """A photograph to describe, or a path that is not there (``error``)."""

    path: str
    error: str | None = None


def find_photographs(paths: Iterable[str]) -> Iterator[Found]:
    """Yield the photographs of the paths: files as they are, folders searched recursively.

    Within a folder: sorted, by the endings that Pillow reads in any case, without names that
    begin with a dot; links to folders are followed, but no folder is searched twice.
    """
    Image.init()
    readable = Image.OPEN.keys() - _NO_PHOTOGRAPHS
    endings = {ending for ending, name in Image.EXTENSION.items() if name in readable}
    for path in paths:
        if os.path.isdir(path):
            yield from _search_folder(path, endings, set())
        elif os.path.exists(path):
            yield Found(path)
        else:
            yield Found(path, "no such file or folder")


def _search_folder(folder: str, endings: set[str], seen: set[tuple[int, int]]) -> Iterator[Found]:
    try:
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            return
        seen.add((stat.st_dev, stat.st_ino))
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield Found(folder, f"cannot be searched: {error.strerror}")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _search_folder(path, endings, seen)
        elif os.path.splitext(name)[1].lower() in endings:
            yield Found(path)


def describe_folder(
    captioner: Captioner,
    photographs: Iterable[Found],
    *,
    options: SearchOptions | None = None,
    captions: bool = True,
    tags: bool = True,
    batch_size: int = 32,
    workers: int = 2,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Record]:
    """Yield one record a photograph, in order; what cannot be read gives an error record.

    ``workers`` threads decode photographs while the model works; never more than four batches
    are held. ``progress`` is told how many photographs were done after each batch.
    """
    with (
        ThreadPoolExecutor(workers) as pool,
        closing(_ahead(pool, partial(_decode, captioner), photographs, 3 * batch_size)) as decoded,
    ):
        while batch := list(islice(decoded, batch_size)):
            pixels = [image for _, image in batch if not isinstance(image, str)]
            described = iter(_describe(captioner, pixels, options, captions, tags))
            for path, image in batch:
                rest = {"error": image} if isinstance(image, str) else next(described)
                yield {"image": path, **rest}
            progress(len(batch))


def _decode(captioner: Captioner, found: Found) -> tuple[str, Pixels | str]:
    if found.error is not None:
        return found.path, found.error
    try:
        return found.path, captioner.pixels(found.path)
    except UnreadableError as error:
        return found.path, str(error)


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[Found], tuple[str, Pixels | str]],
    items: Iterable[Found],
    depth: int,
) -> Generator[tuple[str, Pixels | str], None, None]:
    waiting: deque[Future[tuple[str, Pixels | str]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _describe(
    captioner: Captioner,
    pixels: Sequence[Pixels],
    options: SearchOptions | None,
    captions: bool,
    tags: bool,
) -> list[Record]:
    if not pixels:
        return []
    grid = captioner.encode(pixels)
    records: list[Record] = [{} for _ in pixels]
    if captions:
        for record, found in zip(records, captioner.captions_of(grid, options), strict=True):
            texts = [{"text": c.text, "log_prob": round(c.log_prob, 4)} for c in found]
            record |= {"caption": texts[0]["text"], "log_prob": texts[0]["log_prob"]}
            record["captions"] = texts
    if tags:
        for record, names in zip(records, captioner.tags_of(grid), strict=True):
            record["tags"] = [{"name": t.name, "score": round(t.score, 4)} for t in names]
    return records


class Writer(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Write one record."""
        ...


class JsonLinesWriter:
    """One JSON object a line, each flushed whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Write to a binary stream."""
        self._stream = stream

    def write(self, record: Record) -> None:
        """Write one record."""
        self._stream.write(_json(record) + b"\n")
        self._stream.flush()


class CocoWriter:
    """COCO results, ``[{"image_id", "caption"}]``, a valid file after every record.

    Error records have no place in that form; they are passed over.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        """Write to a binary file."""
        self._stream = stream
        self._stream.write(b"[]\n")
        self._first = True

    def write(self, record: Record) -> None:
        """Write one record over the closing bracket, and close again."""
        if "error" in record:
            return
        entry = {"image_id": coco_image_id(record["image"]), "caption": record["caption"]}
        self._stream.seek(-2, os.SEEK_END)
        separator = b"" if self._first else b",\n"
        self._stream.write(separator + _json(entry) + b"]\n")
        self._stream.flush()
        self._first = False


class TerminalWriter:
    """One line a photograph, for a person: ``dog.jpg  a dog runs  [dog, run]``."""

    def __init__(self, stream: IO[str]) -> None:
        """Write to a text stream."""
        self._stream = stream

    def write(self, record: Record) -> None:
        """Write one line."""
        parts = [printable(record["image"])]
        if "error" in record:
            parts.append(f"error: {printable(record['error'])}")
        if "caption" in record:
            parts.append(printable(record["caption"]))
        if "tags" in record:
            names = ", ".join(printable(tag["name"]) for tag in record["tags"])
            parts.append(f"[{names}]")
        print("  ".join(parts), file=self._stream, flush=True)


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8 survives as an escaped surrogate
        return json.dumps(value).encode()


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def coco_image_id(path: str) -> int | None:
    """Return the integer that ends a file's stem: 139 for ``COCO_val2014_000000000139.jpg``."""
    match = re.search(r"[0-9]+$", Path(path).stem)
    return None if match is None else int(match.group())
