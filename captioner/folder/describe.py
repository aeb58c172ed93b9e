"""The engine of a folder run: photographs in, one record each out, in order."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.config import Preprocessing
from captioner.files import Record
from captioner.folder.find import PassedOver, find_photographs
from captioner.photos.images import UnreadableError, open_photograph, prepare
from captioner.photos.workers import Found, read_ahead

if TYPE_CHECKING:
    from captioner.generation.describer import Describer
    from captioner.generation.description import Caption
    from captioner.generation.options import SearchOptions, TagOptions

__all__ = [
    "describe_folder",
    "describe_read",
    "found_of",
    "read_photograph",
    "record_settings",
]

_WHOLE, _TRUNCATED = b"\0", b"\1"

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def describe_folder(
    captioner: Describer[Any],
    paths: Iterable[str | os.PathLike[str] | Found],
    *,
    options: SearchOptions | None = None,
    captions: bool = True,
    tags: bool = True,
    attention: bool = False,
    tag_options: TagOptions | None = None,
    min_confidence: float = 0.0,
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
    off. The record of a JPEG whose file breaks off in the last rows says ``"truncated": True``.
    With ``attention`` a record also says where the model looked for each word of its caption.
    ``tag_options`` says which tags are given. A caption that is less probably right than
    ``min_confidence`` is left out: its record has ``"caption": None``, its confidence and its tags.
    ``progress`` is told after each batch how many records it gave.
    """
    preprocessing = captioner.preprocessing
    pending = _pending(found_of(paths), batch_size, done)
    with closing(
        read_ahead(
            partial(read_photograph, preprocessing),
            pending,
            workers,
            3 * batch_size,
            decode_timeout,
        )
    ) as read:
        while batch := list(islice(read, batch_size)):
            described = describe_read(
                captioner,
                [image for _, image in batch],
                options,
                captions=captions,
                tags=tags,
                attention=attention,
                tag_options=tag_options,
                min_confidence=min_confidence,
            )
            records = [
                {"image": path} | record for (path, _), record in zip(batch, described, strict=True)
            ]
            new = [record for record in records if record["image"] not in done]
            yield from new
            progress(len(new))


def describe_read(
    captioner: Describer[Any],
    images: Sequence[bytes | UnreadableError],
    options: SearchOptions | None = None,
    *,
    captions: bool = True,
    tags: bool = True,
    attention: bool = False,
    tag_options: TagOptions | None = None,
    min_confidence: float = 0.0,
) -> list[Record]:
    """Return what a record says of each photograph, ``image`` aside, from one batch.

    Args:
        captioner: The model.
        images: What :func:`read_photograph` returned, or the error that it raised.
        options: How captions are searched for.
        captions: Whether captions are written.
        tags: Whether tags are.
        attention: Whether records say where the model looked.
        tag_options: Which tags are given.
        min_confidence: As for :func:`describe_folder`.

    Raises:
        ConfigError: The model cannot do what the options say.

    """
    size = captioner.preprocessing.size
    pixels = [
        np.frombuffer(image, np.uint8, offset=len(_WHOLE)).reshape(3, size, size)
        for image in images
        if not isinstance(image, UnreadableError)
    ]
    described = iter(
        _describe(
            captioner, pixels, options, captions, tags, attention, tag_options, min_confidence
        )
    )
    return [
        ({"error": str(image)} if isinstance(image, UnreadableError) else next(described))
        | _truncated(image)
        for image in images
    ]


def record_settings(
    captioner: Describer[Any],
    options: SearchOptions | None,
    tag_options: TagOptions | None,
    *,
    captions: bool,
    tags: bool,
    min_confidence: float,
) -> Record:
    """Return what records depend on besides the photographs, by name.

    A run is continued only with the same settings. The arguments are as for
    :func:`describe_folder`.
    """
    from captioner.generation.options import SearchOptions, TagOptions

    return {
        "model": f"the one of SHA-256 {captioner.digest()}",
        "precision": str(captioner.precision).removeprefix("torch."),
        "captions": captions,
        "tags": tags,
        **({"min_confidence": min_confidence} if captions else {}),
        **(asdict(options or SearchOptions()) if captions else {}),
        **(asdict(tag_options or TagOptions()) if tags else {}),
    }


def found_of(
    paths: Iterable[str | os.PathLike[str] | Found],
    exclude: Iterable[str] = (),
    passed_over: PassedOver | None = None,
) -> Iterator[Found]:
    """Yield the photographs of paths, of which some are found already.

    ``exclude`` and ``passed_over`` are as in :func:`find_photographs`.
    """
    exclude = list(exclude)
    for path in paths:
        if isinstance(path, Found):
            yield path
        else:
            yield from find_photographs([os.fspath(path)], exclude, passed_over)


def _pending(
    photographs: Iterator[Found], batch_size: int, done: Container[str]
) -> Iterator[Found]:
    """Yield the batches that are not wholly done; all are full but the last."""
    while batch := list(islice(photographs, batch_size)):
        if any(found.path not in done for found in batch):
            yield from batch


def read_photograph(preprocessing: Preprocessing, path: str) -> bytes:
    """Return a byte that says whether a photograph is whole, and its pixels.

    It is what a process that reads does. Raises ``UnreadableError``.
    """
    photograph = open_photograph(path, preprocessing.size)
    whole = _TRUNCATED if photograph.truncated else _WHOLE
    return whole + prepare(photograph.image, preprocessing).tobytes()


def _truncated(image: bytes | UnreadableError) -> Record:
    is_truncated = isinstance(image, bytes) and image.startswith(_TRUNCATED)
    return {"truncated": True} if is_truncated else {}


def _describe(
    captioner: Describer[Any],
    pixels: Sequence[Pixels],
    options: SearchOptions | None,
    captions: bool,
    tags: bool,
    attention: bool,
    tag_options: TagOptions | None,
    min_confidence: float,
) -> list[Record]:
    if not pixels:
        return []
    from captioner.generation.description import as_record

    grids = captioner.encode(pixels)
    scores = captioner.scores_of(grids) if tags else None
    nothing = [None] * len(pixels)
    written = captioner.captions_of(grids, options, attention, scores) if captions else nothing
    named = captioner.tags_of(grids, tag_options, scores) if tags else nothing
    return [
        as_record(found, names, min_confidence) | _looked(found)
        for found, names in zip(written, named, strict=True)
    ]


def _looked(found: Sequence[Caption] | None) -> Record:
    if not found or found[0].attention is None:
        return {}
    return {"attention": _attention(found[0])}


def _attention(caption: Caption) -> Record:
    """Return the words, and for each its weights over the grid: a byte a cell, 255 the highest."""
    weights = np.asarray(caption.attention)
    scaled = weights * (255.0 / weights.max(axis=1, keepdims=True, initial=1e-12))
    rows = [b64encode(row.tobytes()).decode() for row in scaled.astype(np.uint8)]
    return {"words": list(caption.words), "weights": rows}
