"""One photograph with its captions, and which of them are fit to learn from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["DataError", "Example", "drop_junk", "drop_missing", "is_junk"]

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

    ``tags`` is ``None`` where the data names no objects; tags then come from the captions.
    ``image_id`` is the data's own, or the place in it from 1.
    """

    image: Path
    captions: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    image_id: int | None = None


def is_junk(caption: str) -> bool:
    """Whether a caption says nothing: at most two words, or a phrase such as "broken image"."""
    words = [word for word in caption.split() if re.search(r"\w", word)]
    return len(words) <= 2 or _JUNK_PHRASES.search(caption) is not None


def drop_junk(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Return the examples without their junk captions, and how many captions were dropped.

    An example that has no caption left is dropped with them.
    """
    kept: list[Example] = []
    dropped = 0
    for example in examples:
        captions = tuple(c for c in example.captions if not is_junk(c))
        dropped += len(example.captions) - len(captions)
        if captions:
            kept.append(replace(example, captions=captions))
    return kept, dropped


def drop_missing(examples: Iterable[Example]) -> tuple[list[Example], list[Path]]:
    """Return the examples whose photograph is there, and the paths of those that are not."""
    kept: list[Example] = []
    missing: list[Path] = []
    for example in examples:
        if example.image.is_file():
            kept.append(example)
        else:
            missing.append(example.image)
    return kept, missing
