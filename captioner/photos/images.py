"""Photographs as plain RGB pixels of the size that the encoder takes. No torch here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from captioner.config import Preprocessing
from captioner.held import Held
from captioner.photos import jpeg, png
from captioner.photos.colour import to_srgb
from captioner.photos.flatten import flatten
from captioner.photos.formats import HEIF_ENDINGS, HEIF_HINT, is_heif

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "Photograph",
    "TooLargeError",
    "UnreadableError",
    "check_format",
    "image_endings",
    "open_photograph",
    "open_rgb",
    "prepare",
    "read_pixels",
    "to_rgb",
]

MAX_PIXELS = 250_000_000
"""A picture with more pixels is refused: opening it could use up the memory."""


# What Pillow opens but cannot decode, at least not without another program; EPS starts Ghostscript.
# IPTC holds a picture of any format, which Pillow would open as any.
_NO_PHOTOGRAPHS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})

# How many times as large as needed a JPEG must at least stay when its decoder scales it: with
# less, the sharpest photographs come out more than 0.3 of 255 different in the mean.
_GAP = 6

# A JPEG that breaks off is a photograph if at least this share of its rows is there.
_NEARLY_ALL = 0.9

FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Photograph(NamedTuple):
    """Upright pixels of mode L, RGB or, with a profile, CMYK; ``to_srgb`` makes RGB of them.

    ``truncated`` says that the file breaks off, so that up to a tenth of the rows are made up.
    """

    image: Image.Image
    truncated: bool = False


class UnreadableError(ValueError):
    """A file that is not a readable photograph; the message says what is wrong with it."""


class TooLargeError(UnreadableError):
    """A picture of more than ``MAX_PIXELS`` pixels."""


class ImageError(ValueError):
    """An image in a list that cannot be read: ``index`` in the list, ``path`` if it has one."""

    def __init__(self, reason: str, index: int, path: str | None) -> None:
        """Name the image and the reason."""
        super().__init__(f"image {index}{'' if path is None else f' ({path})'}: {reason}")
        self.reason, self.index, self.path = reason, index, path


def image_endings() -> frozenset[str]:
    """Return the endings, in lower case with their dot, of the files that Pillow reads."""
    readable = {*_formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(ending for ending, name in Image.EXTENSION.items() if name in readable)


def check_format(image: Image.Image) -> None:
    """Raise ``UnreadableError`` for a file that Pillow opened as something else than a photograph.

    To load such an image may start another program.
    """
    if image.format in _NO_PHOTOGRAPHS:
        raise UnreadableError(f"not a photograph, but {image.format}")


@cache
def _formats() -> tuple[str, ...]:
    """Return the names of the formats that Pillow is allowed to open."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(sorted(Image.OPEN.keys() - _NO_PHOTOGRAPHS))


def open_rgb(path: FilePath, size: int | None = None) -> Image.Image:
    """Open a photograph as RGB; size and errors as in :func:`open_photograph`."""
    return to_srgb(open_photograph(path, size).image)


def open_photograph(path: FilePath, size: int | None = None) -> Photograph:
    """Open a photograph: upright by its EXIF orientation, transparency on white.

    An animation gives its first frame. Where ``size`` is given, a large JPEG may come smaller,
    but at least six times as high and wide as that: its decoder itself scales by 1/2, 1/4 or 1/8.
    More than 40 megapixels always come smaller. A JPEG that breaks off is read if at least nine
    tenths of its rows can be decoded, whatever Pillow's ``LOAD_TRUNCATED_IMAGES`` is. Raises
    ``UnreadableError`` for anything else that cannot be read to its end as a picture.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            # Reading from a pipe or a device might never end.
            raise UnreadableError("a folder or a device, not a photograph")
        return _read(os.fsdecode(path), size)
    except UnreadableError:
        raise
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except UnidentifiedImageError:
        raise UnreadableError(_why_unidentified(path)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"too large to open safely: {error}") from None
    except MemoryError:
        raise UnreadableError("decoding it takes more memory than there is for it") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise UnreadableError(f"damaged: {type(error).__name__}: {error}") from None


def _read(path: str, size: int | None) -> Photograph:
    try:
        with _loaded(path, size) as image:
            return Photograph(flatten(image))
    except OSError:
        photograph = _read_truncated_jpeg(path, size)
        if photograph is None:
            raise
    except UnreadableError:
        raise
    except ValueError:
        photograph = _read_without_notes(path, size)
        if photograph is None:
            raise
    return photograph


_STRICT = Held(
    lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
    lambda value: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", value),
    False,
)


@contextmanager
def _loaded(source: str | IO[bytes], size: int | None) -> Iterator[Image.Image]:
    """Give a file's decoded pixels, as they are stored; what is missing is an error."""
    with _STRICT, Image.open(source, formats=_formats()) as image:
        _check_size(image)
        if size is not None:
            _shrink(image, size)
        image.load()
        yield image


def _read_truncated_jpeg(path: str, size: int | None) -> Photograph | None:
    """Return what nearly all rows of are there; ``None`` if another JPEG decoder's error is it."""
    if _beginning(path, 3) != b"\xff\xd8\xff":
        return None
    content = Path(path).read_bytes()
    if not jpeg.has_every_scan(content):
        return None
    with suppress(OSError):
        first, second = (BytesIO(ended) for ended in jpeg.ends(content))
        with _loaded(first, size) as image, _loaded(second, size) as other:
            rows = jpeg.intact_rows(image, other)
            if rows >= _NEARLY_ALL * image.height:
                return Photograph(flatten(image), truncated=True)
            missing = f"{1 - rows / image.height:.0%} of the photograph is missing"
            raise UnreadableError(f"the file breaks off, and {missing}")
    return None


def _read_without_notes(path: str, size: int | None) -> Photograph | None:
    """Return a PNG by its pixels and profile alone; ``None`` if the file is none."""
    if _beginning(path, len(png.SIGNATURE)) != png.SIGNATURE:
        return None
    with open(path, "rb") as file, png.hide_notes(file) as content:
        profile = png.profile_of(file)
        with _loaded(content, size) as image:
            if profile is not None:
                image.info["icc_profile"] = profile
            return Photograph(flatten(image))


def _beginning(path: str, length: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(length)


def _shrink(image: Image.Image, size: int) -> None:
    width, height = image.size
    for scale in (8, 4, 2):
        # A side that is no multiple would be rounded up, and the picture stretched by that.
        fits = width % scale == 0 == height % scale
        if fits and min(width, height) >= scale * _GAP * size:
            image.draft(None, (width // scale, height // scale))
            return


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise TooLargeError(f"too large to open safely: {size}, more than {MAX_PIXELS:,}")


def _why_unidentified(path: FilePath) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if is_heif(head) and not HEIF_ENDINGS & image_endings():
        return f"not a picture that Pillow can read; {HEIF_HINT}"
    return "not a picture that Pillow can read" if head else "an empty file (0 bytes)"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as upright RGB in the colours of sRGB, transparency on white."""
    return to_srgb(flatten(image))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Scale upright pixels to ``(3, h, w)``, uint8, with h = w = ``preprocessing.size``.

    A profile of the image is applied last, when there are few pixels left.
    """
    size = preprocessing.size
    if preprocessing.fit == "crop":
        fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        fitted = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(to_srgb(fitted)).transpose(2, 0, 1))


def read_pixels(path: FilePath, preprocessing: Preprocessing) -> np.ndarray:
    """Open and scale a photograph: pixels ``(3, h, w)``, uint8; raises ``UnreadableError``."""
    return prepare(open_photograph(path, preprocessing.size).image, preprocessing)
