"""Photographs to plain RGB pixels of the size the encoder takes. No torch here."""

from __future__ import annotations

import io
import os
import stat
from contextlib import suppress
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from captioner.config import Preprocessing
from captioner.photos.formats import HEIF_ENDINGS, HEIF_HINT, is_heif

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "UnreadableError",
    "augment",
    "image_endings",
    "open_rgb",
    "prepare",
    "read_pixels",
    "to_rgb",
]

MAX_PIXELS = 250_000_000
"""A picture with more pixels is refused: opening it could use up the memory."""


# What Pillow opens but cannot decode, at least not without another program.
_NO_PHOTOGRAPHS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})

# How many times as large as needed a JPEG must at least stay when its decoder scales it: with
# less, the sharpest photographs come out more than 0.3 of 255 different in the mean.
_GAP = 6

FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class UnreadableError(ValueError):
    """A file that is not a readable photograph; the message says what is wrong with it."""


class ImageError(ValueError):
    """An image in a list that cannot be read: ``index`` in the list, ``path`` if it has one."""

    def __init__(self, reason: str, index: int, path: str | None) -> None:
        """Name the image and the reason."""
        super().__init__(f"image {index}{'' if path is None else f' ({path})'}: {reason}")
        self.reason, self.index, self.path = reason, index, path


def image_endings() -> frozenset[str]:
    """Return the endings, in lower case with their dot, of the files that Pillow reads."""
    _load_plugins()
    readable = Image.OPEN.keys() - _NO_PHOTOGRAPHS | {"MPO"}  # which the reader of JPEG opens
    return frozenset(ending for ending, name in Image.EXTENSION.items() if name in readable)


@cache
def _load_plugins() -> None:
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def open_rgb(path: FilePath, size: int | None = None) -> Image.Image:
    """Open a photograph as RGB: upright by its EXIF orientation, transparency on white.

    An animation gives its first frame. Where ``size`` is given, a large JPEG may come smaller,
    but at least six times as high and wide as that: its decoder itself scales by 1/2, 1/4 or 1/8.
    Raises ``UnreadableError`` for anything that cannot be read to its end as a picture.
    """
    _load_plugins()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            # Reading from a pipe or a device might never end.
            raise UnreadableError("a folder or a device, not a photograph")
        with Image.open(os.fsdecode(path)) as image:
            _check_size(image)
            if size is not None:
                _shrink(image, size)
            image.load()
            return to_rgb(image)
    except UnreadableError:
        raise
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except UnidentifiedImageError:
        raise UnreadableError(_why_unidentified(path)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"too large to open safely: {error}") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise UnreadableError(f"damaged: {type(error).__name__}: {error}") from None


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
        raise UnreadableError(f"too large to open safely: {size}, more than {MAX_PIXELS:,}")


def _why_unidentified(path: FilePath) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if is_heif(head) and not HEIF_ENDINGS & image_endings():
        return f"not a picture that Pillow can read; {HEIF_HINT}"
    return "not a picture that Pillow can read" if head else "an empty file (0 bytes)"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as upright RGB, transparency composited on white."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in {"LA", "RGBa", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged notes about a picture do not make it a damaged picture
        return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits; Pillow's own conversion would clip it."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float64)).clip(0.0)
    peak = grey.max(initial=0.0)
    whites = [65535.0] if image.mode.startswith("I;16") else [1.0, 255.0, 65535.0]
    white = next((white for white in whites if peak <= white), peak)
    return Image.fromarray((grey * (255.0 / white)).astype(np.uint8))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Scale an RGB image to pixels ``(3, h, w)``, uint8, with h = w = ``preprocessing.size``."""
    size = preprocessing.size
    if preprocessing.fit == "crop":
        fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        fitted = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def read_pixels(path: FilePath, preprocessing: Preprocessing) -> np.ndarray:
    """Open and scale a photograph: pixels ``(3, h, w)``, uint8; raises ``UnreadableError``."""
    return prepare(open_rgb(path, preprocessing.size), preprocessing)


def augment(image: Image.Image, random: Random) -> tuple[Image.Image, bool]:
    """Return a random view of an RGB image, and whether it is mirrored.

    The view is a box of 80 to 100 % of each side; half of them are mirrored. Brightness, contrast
    and saturation change by 20 % at most, the hue does not: captions name colours. A quarter has
    been through a JPEG of quality 30 to 90.
    """
    width, height = (random.uniform(0.8, 1.0) * side for side in image.size)
    left = random.uniform(0.0, image.width - width)
    top = random.uniform(0.0, image.height - height)
    view = image.transform(
        (max(round(width), 1), max(round(height), 1)),
        Image.Transform.EXTENT,
        (left, top, left + width, top + height),
        Image.Resampling.BILINEAR,
    )
    mirrored = random.random() < 0.5
    if mirrored:
        view = ImageOps.mirror(view)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(random.uniform(0.8, 1.2))
    if random.random() < 0.25:
        view = _through_jpeg(view, random.randint(30, 90))
    return view, mirrored


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
