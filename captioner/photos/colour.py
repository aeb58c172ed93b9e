"""The colours of an embedded profile (Display P3, Adobe RGB, CMYK, grey) as those of sRGB."""

from __future__ import annotations

from functools import cache, lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

__all__ = ["has_profile", "to_srgb"]

# What a profile calls the colours of a mode (ICC.1:2022, table 19).
_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}

# Profiles that differ from sRGB by less, of 255, only write it down otherwise: its curve has been
# published as a table, as a formula and as an approximation.
_SAME = 3


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB in the colours of sRGB, without a profile.

    The profile is ``info["icc_profile"]``. It has no influence if it is damaged, of other colours
    than the image's mode, or sRGB's own.
    """
    transform = _transform_of(image)
    converted = image.convert("RGB") if transform is None else transform.apply(image)
    converted.info.pop("icc_profile", None)
    return converted


def has_profile(image: Image.Image) -> bool:
    """Return whether an image has a profile that :func:`to_srgb` would convert from."""
    return _transform_of(image) is not None


def _transform_of(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    known = isinstance(profile, bytes) and image.mode in _SPACES
    return _transform(profile, image.mode) if known else None


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts from a profile; ``None`` where nothing is to be converted."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space != _SPACES[mode]:
            return None
        transform = ImageCms.ImageCmsTransform(source, _srgb(), mode, "RGB")
        return transform if mode == "CMYK" or _changes(transform, mode) else None
    except Exception:  # a damaged profile does not make a damaged picture
        return None


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform gives other colours than a plain conversion to RGB."""
    levels = np.linspace(0, 255, 256 if mode == "L" else 9).astype(np.uint8)
    axes = [levels] if mode == "L" else [levels] * 3
    colours = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    image = Image.fromarray(colours.squeeze()[None])
    ours = np.asarray(transform.apply(image)).astype(int)
    return int(np.abs(ours - np.asarray(image.convert("RGB"))).max()) > _SAME
