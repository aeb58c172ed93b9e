"""Caption scores by coco-caption's definitions: BLEU-1…4 and CIDEr-D."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from captioner.tokenizer import tokenize

__all__ = ["Scores", "bleu", "cider_d", "paired_bootstrap", "score"]

_SIGMA = 6.0
_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's smoothing constants

NGrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captions; ×100 gives the figures of the literature.

    ``bleu`` holds BLEU-1…4 over the whole set, ``cider_d`` the mean of ``cider_d_per_image``.
    """

    bleu: tuple[float, float, float, float]
    cider_d: float
    cider_d_per_image: tuple[float, ...]

    def as_dict(self) -> dict[str, float]:
        """Return the scores of the whole set by name."""
        named = {f"bleu_{n}": value for n, value in enumerate(self.bleu, 1)}
        return {**named, "cider_d": self.cider_d}


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score one candidate an image against that image's references.

    Raises ``ValueError`` when the two are not of one length or an image has no reference.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} sets of references")
    for index, texts in enumerate(references):
        if not texts:
            raise ValueError(f"image {index} has no reference")
    words = [tokenize(text) for text in candidates]
    reference_words = [[tokenize(text) for text in texts] for texts in references]
    per_image = cider_d(words, reference_words)
    return Scores(bleu(words, reference_words), sum(per_image) / len(per_image), tuple(per_image))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of first minus second and the 95 % interval of it.

    Both are scores of the same photographs, which are drawn anew with replacement. Raises
    ``ValueError`` when they are not of one length. Source: Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores cannot be paired with {len(second)}")
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(axis=1), (2.5, 97.5))
    return float(gaps.mean()), float(low), float(high)


def _ngrams(words: Sequence[str], longest: int = 4) -> NGrams:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, longest + 1)
        for start in range(len(words) - n + 1)
    )


def bleu(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, float, float, float]:
    """Return corpus BLEU-1…4 of tokenized captions, each 0…1.

    Source: Papineni et al. (2002), with coco-caption's closest reference length and smoothing.
    """
    matches, totals = [0] * 4, [0] * 4
    candidate_length = reference_length = 0
    for words, texts in zip(candidates, references, strict=True):
        candidate_length += len(words)
        lengths = (len(text) for text in texts)
        reference_length += min(lengths, key=lambda length: (abs(length - len(words)), length))
        most: NGrams = Counter()
        for text in texts:
            most |= _ngrams(text)
        for ngram, count in _ngrams(words).items():
            matches[len(ngram) - 1] += min(count, most[ngram])
        for n in range(4):
            totals[n] += max(0, len(words) - n)
    ratio = (candidate_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1.0 - 1.0 / ratio) if ratio < 1.0 else 1.0
    values, product = [], 1.0
    for n in range(4):
        product *= (matches[n] + _TINY) / (totals[n] + _SMALL)
        values.append(product ** (1.0 / (n + 1)) * brevity)
    return values[0], values[1], values[2], values[3]


def cider_d(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return CIDEr-D of each tokenized caption, 0…10.

    Document frequencies come from the references at hand. Source: Vedantam et al. (2015),
    section 6; what coco-caption calls CIDEr.
    """
    counted = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in counted for ngram in set().union(*texts))
    log_images = math.log(max(len(references), 1))
    values = []
    for words, texts in zip(candidates, counted, strict=True):
        candidate = _tf_idf(_ngrams(words), frequency, log_images)
        others = [_tf_idf(ngrams, frequency, log_images) for ngrams in texts]
        values.append(10.0 * sum(_similarity(candidate, o) for o in others) / len(others))
    return values


class _Vector(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]  # of the n-grams of each n
    bigrams: int  # by which coco-caption measures length


def _tf_idf(ngrams: NGrams, frequency: NGrams, log_images: float) -> _Vector:
    weights = {g: c * (log_images - math.log(max(1, frequency[g]))) for g, c in ngrams.items()}
    squares = [0.0] * 4
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight * weight
    bigrams = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
    return _Vector(weights, [math.sqrt(square) for square in squares], bigrams)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    dots = [0.0] * 4
    for ngram, weight in candidate.weights.items():
        other = reference.weights.get(ngram, 0.0)
        dots[len(ngram) - 1] += min(weight, other) * other
    cosines = [
        dot / (ours * theirs) if ours and theirs else 0.0
        for dot, ours, theirs in zip(dots, candidate.norms, reference.norms, strict=True)
    ]
    gap = candidate.bigrams - reference.bigrams
    return sum(cosines) / 4.0 * math.exp(-(gap**2) / (2.0 * _SIGMA**2))
