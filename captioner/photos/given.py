"""Images that a caller of the library gives: paths and pictures, in lists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from captioner.config import Preprocessing
from captioner.photos.flatten import flatten
from captioner.photos.formats import URL_HINT, is_url
from captioner.photos.images import (
    ImageError,
    UnreadableError,
    check_format,
    open_photograph,
    prepare,
)

__all__ = ["Pixels", "batches", "pixels_of"]

T = TypeVar("T")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""A photograph as the encoder takes it, ``(3, h, w)``."""

_ONE = (str, bytes, os.PathLike, Image.Image, np.ndarray)
_BATCH = 32


def pixels_of(image: object, preprocessing: Preprocessing) -> Pixels:
    """Return the prepared pixels ``(3, h, w)`` of a path, a picture, an array, bytes or a file.

    Raises ``UnreadableError`` for what cannot be read, and ``TypeError`` or ``ValueError`` for
    what is no image.
    """
    return prepare(_open(image, preprocessing.size), preprocessing)


def _open(image: object, size: int) -> Image.Image:
    if isinstance(image, Image.Image):
        check_format(image)
        try:
            return flatten(image)
        except Exception as error:  # Pillow reads lazily, so any damage shows only here
            raise UnreadableError(str(error)) from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            shape = f"{image.shape} {image.dtype}"
            raise ValueError(f"expected an array (h, w, 3) of uint8 in RGB, not {shape}")
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, str | os.PathLike):
        if is_url(os.fspath(image)):
            raise UnreadableError(f"no such file; {URL_HINT}, or give its bytes")
        return open_photograph(image, size).image
    content = image.read() if hasattr(image, "read") else image
    if isinstance(content, bytes):
        return _open_content(content, size)
    raise TypeError(
        "expected a path, a PIL image, a tensor, an array, bytes or a file open in binary, not "
        f"{type(image).__name__}"
    )


def _open_content(content: bytes, size: int) -> Image.Image:
    # Broken and odd files are read by their place in several ways; a file gives the same pixels.
    with TemporaryDirectory(prefix="captioner-") as folder:
        path = Path(folder, "photograph")
        path.write_bytes(content)
        return open_photograph(path, size).image


def batches(
    images: Iterable[T], read: Callable[[T], Pixels], *others: type[object]
) -> Iterator[list[Pixels]]:
    """Yield the pixels of images in lists of at most 32.

    ``read`` gives those of one; ``others`` are types of images that this module does not know. One
    array of four dimensions is a list of images. Raises ``TypeError`` for one image in place of a
    list, and ``ImageError`` for one that cannot be read.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if isinstance(images, (*_ONE, *others)) or hasattr(images, "read"):
        shown = repr(images) if isinstance(images, str) else type(images).__name__
        raise TypeError(f"expected a list of images, not one; write [{shown}]")
    numbered = enumerate(images)
    while batch := [_numbered(i, image, read) for i, image in islice(numbered, _BATCH)]:
        yield batch


def _numbered(index: int, image: T, read: Callable[[T], Pixels]) -> Pixels:
    try:
        return read(image)
    except UnreadableError as error:
        path = os.fsdecode(image) if isinstance(image, str | os.PathLike) else None
        raise ImageError(str(error), index, path) from error
