"""Random views of a photograph to train on. No torch here."""

from __future__ import annotations

from io import BytesIO
from random import Random

from PIL import Image, ImageEnhance, ImageOps

__all__ = ["augment"]


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
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=["JPEG"]).convert("RGB")
