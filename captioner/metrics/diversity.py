"""Figures of captions alone, without their photographs: how varied, how long, how new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from captioner.metrics.treebank import check_captions
from captioner.metrics.treebank import tokenize as ptb_tokenize

__all__ = ["Diversity", "diversity"]

# The list by which the field counts captions that break off: self-critical.pytorch's.
_BAD_ENDINGS = frozenset(
    ("with", "in", "on", "of", "a", "at", "to", "for", "an", "this", "his", "her", "that", "the")
)


@dataclass(frozen=True)
class Diversity:
    """How varied a set of captions is, whatever the photographs.

    ``distinct_1`` and ``distinct_2`` are different n-grams over all n-grams (after Li et al. 2016).
    ``words_used`` counts different words. ``mean_length`` is in words. ``bad_endings`` is the share
    of captions that break off: they end on a word such as "a", "with" or "the". ``novel`` is the
    share of captions that no training caption equals.
    """

    distinct_1: float
    distinct_2: float
    words_used: int
    mean_length: float
    bad_endings: float
    novel: float | None


def diversity(captions: Sequence[str], training: Sequence[str] | None = None) -> Diversity:
    """Describe a set of captions; ``novel`` is ``None`` without the training captions.

    Raises ``TypeError`` for a caption that is not a string and ``ValueError`` when there is none.
    """
    if not captions:
        raise ValueError("there is no caption to describe")
    written = _each_alone(captions, "caption")
    pairs = [pair for words in written for pair in pairwise(words)]
    words = [word for sentence in written for word in sentence]
    novel = None
    if training is not None:
        known = set(_each_alone(training, "training caption"))
        novel = _share(sentence not in known for sentence in written)
    return Diversity(
        distinct_1=len(set(words)) / max(len(words), 1),
        distinct_2=len(set(pairs)) / max(len(pairs), 1),
        words_used=len(set(words)),
        mean_length=len(words) / len(written),
        bad_endings=_share(sentence[-1:] and sentence[-1] in _BAD_ENDINGS for sentence in written),
        novel=novel,
    )


def _each_alone(captions: Sequence[str], kind: str) -> list[tuple[str, ...]]:
    """Return the words of each caption as they are where the caption stands alone."""
    check_captions(captions, kind)
    return [tuple(words) for caption in captions for words in ptb_tokenize([caption])]


def _share(holds: Iterable[object]) -> float:
    values = [bool(value) for value in holds]
    return sum(values) / len(values)
