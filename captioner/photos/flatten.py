"""Pixels of any mode as upright pixels of 8 bits without transparency."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from captioner.photos.colour import has_profile

__all__ = ["flatten"]

# A larger picture is reduced, so that converting it does not take several times its memory.
_MOST_PIXELS = 40_000_000

# Modes are converted in tiles of about so many pixels: on the way they take up to 32 bytes each.
_TILE_PIXELS = 4_000_000

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[int, int, int, int]


def flatten(image: Image.Image) -> Image.Image:
    """Return any Pillow image upright, transparency on white, in mode L or RGB.

    An image with a CMYK profile keeps its mode CMYK, and a profile stays in ``info``. More than 40
    megapixels are averaged to less: 2 x 2 to one, or 3 x 3 and so on.
    """
    image.load()
    factor = math.ceil(math.sqrt(image.width * image.height / _MOST_PIXELS))
    factor = max(factor, 1)
    if factor == 1 and _is_flat(image):
        return _upright(image, image)
    return _upright(_flatten_in_tiles(image, factor), image)


def _is_flat(image: Image.Image) -> bool:
    if "transparency" in image.info:
        return False
    return image.mode in {"L", "RGB"} or (image.mode == "CMYK" and has_profile(image))


def _flatten_in_tiles(image: Image.Image, factor: int) -> Image.Image:
    white = _white(image)
    size = (math.ceil(image.width / factor), math.ceil(image.height / factor))
    flat: Image.Image | None = None
    for box in _tiles(image.size, factor):
        tile = _flatten_tile(image.crop(box), white)
        if factor > 1:
            tile = tile.reduce(factor)
        if flat is None:
            flat = Image.new(tile.mode, size)
        flat.paste(tile, (box[0] // factor, box[1] // factor))
    assert flat is not None  # no picture is empty
    profile = image.info.get("icc_profile")
    if profile is not None:
        flat.info["icc_profile"] = profile
    return flat


def _tiles(size: tuple[int, int], factor: int) -> Iterator[Box]:
    """Yield boxes that cover a picture; their corners are multiples of ``factor``."""
    width, height = size
    tall = min(height, math.isqrt(_TILE_PIXELS)) // factor * factor or factor
    wide = min(width, _TILE_PIXELS // tall) // factor * factor or factor
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            yield left, top, min(left + wide, width), min(top + tall, height)


def _flatten_tile(image: Image.Image, white: float | None) -> Image.Image:
    if white is not None:
        return _to_eight_bits(image, white)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in {"LA", "RGBa", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if _is_flat(image) else image.convert("RGB")


def _white(image: Image.Image) -> float | None:
    """Return the value of white in grey of more than 8 bits; ``None`` in other modes."""
    if not image.mode.startswith("I") and image.mode != "F":
        return None
    if image.mode.startswith("I;16"):
        return 65535.0
    peak = max(float(_grey(image.crop(box)).max(initial=0.0)) for box in _tiles(image.size, 1))
    return next((white for white in (1.0, 255.0, 65535.0) if peak <= white), peak)


def _to_eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Scale grey of more than 8 bits; Pillow's own conversion would clip it."""
    return Image.fromarray((_grey(image) * (255.0 / white)).astype(np.uint8))


def _grey(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    grey: np.ndarray[Any, np.dtype[np.float64]] = np.nan_to_num(
        np.asarray(image).astype(np.float64)
    ).clip(0.0)
    return grey


def _upright(flat: Image.Image, image: Image.Image) -> Image.Image:
    """Turn pixels by the orientation that the image they come from has noted."""
    try:
        turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged notes about a picture do not make it a damaged picture
        return flat
    return flat if turn is None else flat.transpose(turn)
