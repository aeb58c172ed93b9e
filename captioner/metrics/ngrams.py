"""Scores of n-grams by coco-caption's definitions: BLEU, ROUGE-L and CIDEr-D."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.metrics.treebank import check_captions
from captioner.metrics.treebank import tokenize as ptb_tokenize

__all__ = ["References", "Scores", "score", "tokenized"]

_SIGMA = 6.0  # CIDEr-D's, in words
_BETA = 1.2  # ROUGE-L's weight of recall
_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's smoothing constants

_BITS = 32  # for the number of a word or n-gram, in a code or key

Words = Sequence[str]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Four = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captions, and of each of them in order.

    ``bleu`` holds BLEU-1…4 of the whole set, which is not the mean of ``bleu_per_image``;
    ``rouge_l`` and ``cider_d`` are means.
    """

    bleu: Four
    rouge_l: float
    cider_d: float
    bleu_per_image: tuple[Four, ...]
    rouge_l_per_image: tuple[float, ...]
    cider_d_per_image: tuple[float, ...]

    def as_dict(self) -> dict[str, float]:
        """Return the scores of the whole set by name."""
        named = {f"bleu_{n}": value for n, value in enumerate(self.bleu, 1)}
        return {**named, "rouge_l": self.rouge_l, "cider_d": self.cider_d}


class _Grams(NamedTuple):
    """The n-grams of one n in a set of references, sorted for look-up."""

    codes: Ints  # of each different n-gram; its place here is its number
    rarity: Floats  # logarithm of the images over those that have it; last, of one in none
    keys: Ints  # image and n-gram of each entry
    captions: Ints  # the caption of each entry
    counts: Ints  # how often that caption has the n-gram
    norms: Floats  # of each caption's TF-IDF vector


class _Overlap(NamedTuple):
    """The n-grams of one n in a set of candidates, and which references of their images share them.

    There is an entry a candidate and n-gram, and a pair an entry and reference.
    """

    candidates: Ints
    counts: Ints
    squares: Floats  # of the n-gram's rarity
    entries: Ints  # the entry of each pair
    captions: Ints  # its reference
    others: Ints  # how often that reference has the n-gram
    norms: Floats  # that reference's

    def found(self, size: int) -> Ints:
        """Return how many n-grams of each candidate references have, clipped: ``(size,)``."""
        most = np.zeros_like(self.counts)
        np.maximum.at(most, self.entries, self.others)
        return np.bincount(self.candidates, np.minimum(self.counts, most), size).astype(np.int64)

    def cosines(self, size: int) -> Floats:
        """Return what each pair adds to the clipped cosine of its candidate and reference."""
        squares = np.bincount(self.candidates, self.counts**2 * self.squares, size)
        norms = np.sqrt(squares)[self.candidates[self.entries]] * self.norms
        clipped = np.minimum(self.counts[self.entries], self.others)
        dots = clipped * self.others * self.squares[self.entries]
        return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0.0)


class References:
    """The references of a set of images, counted once for any number of candidates.

    ``references`` holds each image's captions as words; an image is named by its place. The
    document frequencies of CIDEr-D are those of ``corpus``, which is of the same form, by default
    of the references themselves. Candidates are lists of words, one an image in order or, with
    ``images``, of the images named there; many at once are quicker than one by one. Raises
    ``ValueError`` when there is no image, one without a reference, or a place without an image,
    and ``TypeError`` for a caption that is a string and no list of words.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Words]],
        corpus: Sequence[Sequence[Words]] | None = None,
    ) -> None:
        """Count the references."""
        for given in (references, *([] if corpus is None else [corpus])):
            _check_images(given)
        self._ids: dict[str, int] = {}
        self._words = [[words or [""] for words in captions] for captions in references]
        # Where each image's captions begin and end, of all.
        self._bounds = np.cumsum([0, *(len(captions) for captions in references)])
        images = [*references, *(corpus or ())]
        words, lengths = self._flatten([words for captions in images for words in captions])
        self._lengths = lengths
        owner = np.repeat(np.arange(len(images)), [len(captions) for captions in images])
        documents = owner >= (0 if corpus is None else len(references))
        self._grams = [
            self._index(codes, caption, rank, owner, documents)
            for codes, caption, rank in _ngrams(words, lengths)
        ]

    def _flatten(self, captions: Sequence[Words]) -> tuple[Ints, Ints]:
        """Return the number of each word of all captions, and the captions' lengths."""
        # coco-caption splits at any white space here, "1 1/2" too, but not for ROUGE-L.
        plain = [" ".join(words).split() for words in map(_as_words, captions)]
        ids = [self._ids.setdefault(word, len(self._ids)) for words in plain for word in words]
        lengths = [len(words) for words in plain]
        return np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64)

    def _index(
        self, codes: Ints, caption: Ints, rank: Ints, owner: Ints, documents: Bools
    ) -> _Grams:
        caption, rank, count = _tally(caption, rank)
        counted = documents[caption]
        _, seen, _ = _tally(owner[caption[counted]], rank[counted])
        frequency = np.append(np.bincount(seen, minlength=len(codes)), 0)
        rarity = math.log(len(np.unique(owner[documents]))) - np.log(np.maximum(frequency, 1))
        squares = np.bincount(caption, (count * rarity[rank]) ** 2, len(owner))
        keys = owner[caption] << _BITS | rank
        order = keys.argsort(kind="stable")
        return _Grams(codes, rarity, keys[order], caption[order], count[order], np.sqrt(squares))

    def _overlaps(self, words: Ints, lengths: Ints, images: Ints) -> list[_Overlap]:
        overlaps = []
        known = [grams.codes for grams in self._grams]
        for grams, (_, candidate, rank) in zip(
            self._grams, _ngrams(words, lengths, known), strict=True
        ):
            candidate, rank, count = _tally(candidate, rank)
            keys = images[candidate] << _BITS | rank
            first = np.searchsorted(grams.keys, keys)
            widths = np.searchsorted(grams.keys, keys, side="right") - first
            entry = np.repeat(np.arange(len(keys)), widths)
            pair = np.arange(len(entry)) + (first + widths - np.cumsum(widths))[entry]
            caption = grams.captions[pair]
            squares = grams.rarity[np.minimum(rank, len(grams.codes))] ** 2
            overlaps.append(
                _Overlap(
                    candidate,
                    count,
                    squares,
                    entry,
                    caption,
                    grams.counts[pair],
                    grams.norms[caption],
                )
            )
        return overlaps

    def _places(self, candidates: Sequence[Words], images: Sequence[int] | None) -> Ints:
        known = range(len(self._words))
        named = known if images is None else images
        if len(named) != len(candidates):
            raise ValueError(f"{len(candidates)} candidates for {len(named)} images")
        for image in named:
            if image not in known:
                raise ValueError(f"there is no image {image!r}; they are 0 to {known[-1]}")
        return np.array(named, dtype=np.int64)

    def bleu(self, candidates: Sequence[Words], images: Sequence[int] | None = None) -> Floats:
        """Return BLEU-1…4 of each candidate, 0…1: ``(candidates, 4)``."""
        places = self._places(candidates, images)
        words, lengths = self._flatten(candidates)
        return _bleu(*self._matches(self._overlaps(words, lengths, places), lengths, places))

    def rouge_l(self, candidates: Sequence[Words], images: Sequence[int] | None = None) -> Floats:
        """Return ROUGE-L of each candidate, 0…1: ``(candidates,)``.

        Source: Lin (2004), section 3.1, with beta 1.2; as in coco-caption the best precision and
        the best recall may be those of two references.
        """
        places = self._places(candidates, images)
        pairs = zip(candidates, places.tolist(), strict=True)
        values = [_rouge_l(_as_words(words) or [""], self._words[image]) for words, image in pairs]
        return np.array(values, dtype=np.float64)

    def cider_d(self, candidates: Sequence[Words], images: Sequence[int] | None = None) -> Floats:
        """Return CIDEr-D of each candidate, 0…10: ``(candidates,)``; coco-caption calls it CIDEr.

        Source: Vedantam et al. (2015), section 6 (clipped counts, sigma 6, times 10).
        """
        places = self._places(candidates, images)
        words, lengths = self._flatten(candidates)
        return self._cider_d(self._overlaps(words, lengths, places), lengths, places)

    def score(self, candidates: Sequence[Words]) -> Scores:
        """Score one candidate an image. Raises ``ValueError`` when they are not as many."""
        places = self._places(candidates, None)
        words, lengths = self._flatten(candidates)
        overlaps = self._overlaps(words, lengths, places)
        matches = self._matches(overlaps, lengths, places)
        rouge = self.rouge_l(candidates)
        cider = self._cider_d(overlaps, lengths, places)
        return Scores(
            bleu=_four(_bleu(*(counts.sum(axis=0) for counts in matches))),
            rouge_l=float(rouge.mean()),
            cider_d=float(cider.mean()),
            bleu_per_image=tuple(map(_four, _bleu(*matches))),
            rouge_l_per_image=tuple(rouge.tolist()),
            cider_d_per_image=tuple(cider.tolist()),
        )

    def _matches(
        self, overlaps: Sequence[_Overlap], lengths: Ints, places: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """Return n-grams found and written, ``(candidates, 4)``, and the closest length."""
        found = np.stack([overlap.found(len(lengths)) for overlap in overlaps], axis=1)
        written = np.maximum(lengths[:, None] - np.arange(4), 0)
        bounds = zip(self._bounds[places].tolist(), self._bounds[places + 1].tolist(), strict=True)
        known = self._lengths.tolist()
        closest = [
            min(known[first:last], key=lambda other: (abs(other - length), other))
            for length, (first, last) in zip(lengths.tolist(), bounds, strict=True)
        ]
        return found, written, np.array(closest)

    def _cider_d(self, overlaps: Sequence[_Overlap], lengths: Ints, places: Ints) -> Floats:
        total = np.zeros(len(lengths))
        bigrams, others = np.maximum(lengths - 1, 0), np.maximum(self._lengths - 1, 0)
        for overlap in overlaps:
            candidate = overlap.candidates[overlap.entries]
            gap = bigrams[candidate] - others[overlap.captions]
            near = np.exp(-(gap**2) / (2.0 * _SIGMA**2))
            total += np.bincount(candidate, overlap.cosines(len(lengths)) * near, len(lengths))
        sizes = self._bounds[places + 1] - self._bounds[places]
        mean: Floats = 10.0 * total / 4.0 / sizes
        return mean


def _check_images(images: Sequence[Sequence[Words]]) -> None:
    if not images:
        raise ValueError("there is no image to score")
    for place, captions in enumerate(images):
        if isinstance(captions, str):
            raise TypeError(f"the references of image {place} are one string, {captions!r}")
        if not captions:
            raise ValueError(f"image {place} has no reference")


def _as_words(words: Words) -> Words:
    if isinstance(words, str) or words is None:
        raise TypeError(f"{words!r} is no list of words")
    return words


def _ngrams(
    words: Ints, lengths: Ints, known: Sequence[Ints] | None = None
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield for n = 1…4 the codes of the n-grams, and the caption and number of each in the text.

    An n-gram's number is the place of its code, and its code is made of the number of its first
    n - 1 words and its last word. Where the codes are ``known``, others are numbered on from them.
    """
    caption = np.repeat(np.arange(len(lengths)), lengths)
    start, rank = np.arange(len(words)), np.zeros(len(words), dtype=np.int64)
    for n in range(4):
        start = start[start + n < len(words)]
        start = start[caption[start + n] == caption[start]]
        code = rank[start] << _BITS | words[start + n]
        if known is None:
            codes, rank[start] = np.unique(code, return_inverse=True)
        else:
            codes = known[n]
            rank[start] = _ranks(codes, code)
        yield codes, caption[start], rank[start]


def _ranks(codes: Ints, wanted: Ints) -> Ints:
    rank = np.searchsorted(codes, wanted)
    unknown = np.append(codes, -1)[rank] != wanted
    _, new = np.unique(wanted[unknown], return_inverse=True)
    rank[unknown] = len(codes) + new
    return rank


def _tally(caption: Ints, rank: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the different pairs of caption and n-gram, and how often each occurs."""
    keys, counts = np.unique(caption << _BITS | rank, return_counts=True)
    return keys >> _BITS, keys & ((1 << _BITS) - 1), counts


def _bleu(found: Ints, written: Ints, closest: Ints) -> Floats:
    """Return BLEU-1…4 of n-gram counts ``(…, 4)`` and the closest reference's length ``(…)``.

    Source: Papineni et al. (2002), section 2.3, smoothed as in coco-caption.
    """
    precision = np.cumprod((found + _TINY) / (written + _SMALL), axis=-1)
    ratio = (written[..., :1] + _TINY) / (np.asarray(closest)[..., None] + _SMALL)
    brevity: Floats = np.exp(np.minimum(1.0 - 1.0 / ratio, 0.0))
    return precision ** (1.0 / np.arange(1, 5)) * brevity


def _four(values: Floats) -> Four:
    one, two, three, four = values.tolist()
    return one, two, three, four


def _rouge_l(words: Words, references: Sequence[Words]) -> float:
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    common = [_common_subsequence(places, len(words), other) for other in references]
    precision = max(common) / len(words)
    recall = max(n / len(other) for n, other in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1.0 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(places: Mapping[str, int], length: int, other: Words) -> int:
    """Return the length of the longest common subsequence.

    ``places`` has a bit for each of the ``length`` places of a word. Source: Hyyrö, "Bit-parallel
    LCS-length computation revisited" (2004), figure 2.
    """
    row = (1 << length) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched) | (row - matched)
    return length - (row & ((1 << length) - 1)).bit_count()


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score one caption an image against that image's references, as coco-caption does.

    nltk's ``corpus_bleu`` on the same tokens gives the same BLEU-n where every candidate has n
    words or more, and some n-gram of each size is found in its references: it counts one n-gram
    of a shorter candidate, and takes 0 where this, as coco-caption, takes next to 0.

    Raises ``TypeError`` for what is no caption, and ``ValueError`` when the two are not of one
    length or an image has no reference; the message names the place.
    """
    written, wanted = tokenized(candidates, references)
    return References(wanted).score(written)


def tokenized(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return the words of the candidates, and of each image's references."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} sets of references")
    _check_images(references)
    check_captions(candidates, "candidate")
    flat = [text for texts in references for text in texts]
    check_captions(flat, "reference")
    words = iter(ptb_tokenize(flat))
    return ptb_tokenize(candidates), [[next(words) for _ in texts] for texts in references]
