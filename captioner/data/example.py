"""One photograph with its captions, and which of them are fit to learn from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["DataError", "Example", "ImageId", "coco_image_id", "drop_junk", "is_junk"]

ImageId = int | str
"""An image's id, as its data has it."""

# What annotators wrote when the photograph did not load, or when they had nothing to say.
_JUNK_PHRASES = re.compile(
    r"\b(broken image|image not (?:found|available|loading)|no image (?:found|available|here)|"
    r"(?:photo|picture|image) (?:is )?(?:unavailable|missing)|does not load|did not load|"
    r"cannot see (?:the )?(?:image|picture|photo)|unable to see)\b",
    re.IGNORECASE,
)


class DataError(ValueError):
    """An annotation file that cannot be used; the message names the file and the entry."""


@dataclass(frozen=True)
class Example:
    """One photograph with its captions, as its annotation file has it.

    ``image`` is the name in the annotation file, or the photograph's path once it has been found.
    ``tags`` is ``None`` where the data names no objects; tags then come from the captions.
    ``image_id`` is ``None`` where the data has no ids. ``junk`` holds the captions that the data
    itself marks as useless; they are not in ``captions``.
    """

    image: Path
    captions: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    image_id: ImageId | None = None
    # Without influence on training, and so not part of the hash of a run's data.
    junk: tuple[str, ...] = field(default=(), repr=False)


def coco_image_id(path: str) -> int | None:
    """Return the integer that ends a file's stem: 139 for ``COCO_val2014_000000000139.jpg``."""
    match = re.search(r"(?<![0-9])[0-9]{1,18}\Z", Path(path).stem)
    return None if match is None else int(match.group())


def is_junk(caption: str) -> bool:
    """Whether a caption says nothing: at most two words, or a phrase such as "broken image"."""
    words = [word for word in caption.split() if re.search(r"\w", word)]
    return len(words) <= 2 or _JUNK_PHRASES.search(caption) is not None


def drop_junk(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Return the examples without their junk captions, and how many captions were dropped.

    An example that has no caption left is dropped with them.
    """
    useful: list[Example] = []
    dropped = 0
    for example in examples:
        captions = tuple(c for c in example.captions if not is_junk(c))
        dropped += len(example.captions) - len(captions) + len(example.junk)
        if captions:
            useful.append(replace(example, captions=captions))
    return useful, dropped
