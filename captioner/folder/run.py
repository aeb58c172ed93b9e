"""A run over many photographs: finding them and describing them."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from captioner.config import Preprocessing
from captioner.files import Record
from captioner.folder.journal import Journal
from captioner.folder.outputs import Output, Sidecars
from captioner.photos.images import UnreadableError, image_endings, read_pixels
from captioner.photos.workers import Found, read_ahead

if TYPE_CHECKING:
    from captioner.generation.captions import Caption
    from captioner.generation.options import SearchOptions
    from captioner.inference import Captioner

__all__ = ["Found", "Part", "catch_up", "describe_folder", "find_photographs", "keep", "plan"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def find_photographs(paths: Iterable[str]) -> Iterator[Found]:
    """Yield the photographs of the paths: files as they are, folders searched recursively.

    Within a folder: sorted, by the endings that Pillow reads in any case, without names that
    begin with a dot; links to folders are followed, but no folder is searched twice.
    """
    endings = image_endings()
    for path in paths:
        if os.path.isdir(path):
            yield from _search_folder(path, endings, set())
        elif os.path.exists(path):
            yield Found(path)
        else:
            yield Found(path, "no such file or folder")


def _search_folder(
    folder: str, endings: Container[str], seen: set[tuple[int, int]]
) -> Iterator[Found]:
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
    paths: Iterable[str | os.PathLike[str] | Found],
    *,
    options: SearchOptions | None = None,
    captions: bool = True,
    tags: bool = True,
    attention: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    decode_timeout: float = 30.0,
    done: Container[str] = frozenset(),
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Record]:
    """Yield one record a photograph, in order; what cannot be read gives an error record.

    ``paths`` are photographs and folders as in :func:`find_photographs`. ``workers`` processes
    read photographs while the model works, each at most ``decode_timeout`` seconds; never more
    than four batches are held. Those in ``done`` are passed over, but batches are cut as if they
    were not, so that a run that is continued computes the same numbers as one that was not cut
    off. With ``attention`` a record also says where the model looked for each word of its caption.
    ``progress`` is told after each batch how many records it gave.
    """
    preprocessing = captioner.checkpoint.config.preprocessing
    pending = _pending(_found(paths), batch_size, done)
    with closing(
        read_ahead(partial(_read, preprocessing), pending, workers, 3 * batch_size, decode_timeout)
    ) as read:
        while batch := list(islice(read, batch_size)):
            shape = (3, preprocessing.size, preprocessing.size)
            pixels = [
                np.frombuffer(image, np.uint8).reshape(shape)
                for _, image in batch
                if not isinstance(image, UnreadableError)
            ]
            described = iter(_describe(captioner, pixels, options, captions, tags, attention))
            records = [
                {"image": path}
                | ({"error": str(image)} if isinstance(image, UnreadableError) else next(described))
                for path, image in batch
            ]
            new = [record for record in records if record["image"] not in done]
            yield from new
            progress(len(new))


class Part(NamedTuple):
    """What one call of :func:`describe_folder` is to do: ``photographs`` but those in ``done``."""

    photographs: Iterable[Found]
    done: Container[str]


def plan(photographs: Sequence[Found], journal: Journal, retry_errors: bool = False) -> list[Part]:
    """Return what is left to do of a run, in the order and the batches it was begun with.

    Photographs that are new come at the end, and then, with ``retry_errors``, those that have
    an error record. Those of earlier runs that were not asked for this time are passed over.
    """
    asked = {found.path: found.error for found in photographs}
    failed = [Found(path, asked[path]) for path in asked if path in journal.errors]
    journal.add(asked)
    everything = journal.photographs
    skipped = {path for path in everything if path not in asked}
    parts = [Part((Found(p, asked.get(p)) for p in everything), journal.done | skipped)]
    if retry_errors:
        parts.append(Part(failed, frozenset()))
    return parts


def keep(
    records: Iterable[Record],
    output: Output,
    journal: Journal | None = None,
    sidecars: Sidecars | None = None,
) -> Iterator[Record]:
    """Write each record wherever it goes, then yield it; raises ``OSError`` when that fails."""
    for record in records:
        if sidecars is not None:
            record = sidecars.write(record)
        if journal is not None:
            journal.write(record)
        output.write(record)
        yield record


def catch_up(journal: Journal, sidecars: Sidecars) -> None:
    """Write the sidecars of what was done before there were to be any."""
    for record in journal.records():
        written = sidecars.write(record)
        if written is not record:
            journal.write(written)


def _found(paths: Iterable[str | os.PathLike[str] | Found]) -> Iterator[Found]:
    for path in paths:
        if isinstance(path, Found):
            yield path
        else:
            yield from find_photographs([os.fspath(path)])


def _pending(
    photographs: Iterator[Found], batch_size: int, done: Container[str]
) -> Iterator[Found]:
    """Yield the batches that are not wholly done; all are full but the last."""
    while batch := list(islice(photographs, batch_size)):
        if any(found.path not in done for found in batch):
            yield from batch


def _read(preprocessing: Preprocessing, path: str) -> bytes:
    return read_pixels(path, preprocessing).tobytes()


def _describe(
    captioner: Captioner,
    pixels: Sequence[Pixels],
    options: SearchOptions | None,
    captions: bool,
    tags: bool,
    attention: bool,
) -> list[Record]:
    if not pixels:
        return []
    grids = captioner.encode(pixels)
    records: list[Record] = [{} for _ in pixels]
    if captions:
        written = captioner.captions_of(grids, options, attention)
        for record, found in zip(records, written, strict=True):
            texts = [_entry(caption) for caption in found]
            record |= {"caption": texts[0]["text"], "log_prob": texts[0]["log_prob"]}
            record["captions"] = texts
            if found[0].attention is not None:
                record["attention"] = _attention(found[0])
    if tags:
        for record, names in zip(records, captioner.tags_of(grids), strict=True):
            record["tags"] = [{"name": t.name, "score": round(t.score, 4)} for t in names]
    return records


def _entry(caption: Caption) -> Record:
    unfinished = {} if caption.finished else {"finished": False}
    return {"text": caption.text, "log_prob": round(caption.log_prob, 4)} | unfinished


def _attention(caption: Caption) -> Record:
    """Return the words, and for each its weights over the grid: a byte a cell, 255 the highest."""
    weights = np.asarray(caption.attention)
    scaled = weights * (255.0 / weights.max(axis=1, keepdims=True, initial=1e-12))
    rows = [b64encode(row.tobytes()).decode() for row in scaled.astype(np.uint8)]
    return {"words": list(caption.words), "weights": rows}
