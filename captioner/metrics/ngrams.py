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

_BITS = 32  # of the id of a word, or the index of an n-gram, in a code or key

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

    codes: Ints  # one of each different n-gram, ascending; its index names the n-gram
    rarity: Floats  # log of all images over those with the n-gram; the last is of unknown n-grams
    keys: Ints  # image and n-gram of each entry
    captions: Ints  # the caption of each entry
    counts: Ints  # how often that caption has the n-gram
    norms: Floats  # of each caption's TF-IDF vector


class _Overlap(NamedTuple):
    """The n-grams of one n in a set of candidates, and which references of their images share them.

    An entry is a candidate and one of its n-grams. A pair is an entry and a reference that has the
    n-gram.
    """

    candidates: Ints  # the candidate of each entry
    counts: Ints  # how often the candidate has the n-gram of each entry
    squares: Floats  # the squared rarity of the n-gram of each entry
    entries: Ints  # the entry of each pair
    captions: Ints  # the reference of each pair
    others: Ints  # how often the reference of each pair has the n-gram
    norms: Floats  # the norm of the TF-IDF vector of the reference of each pair

    def matches(self, size: int) -> Ints:
        """Return the clipped number of each candidate's n-grams in its references: ``(size,)``."""
        most = np.zeros_like(self.counts)
        np.maximum.at(most, self.entries, self.others)
        return np.bincount(self.candidates, np.minimum(self.counts, most), size).astype(np.int64)

    def cosines(self, size: int) -> Floats:
        """Return the term of each pair in the clipped cosine of its candidate and reference."""
        squares = np.bincount(self.candidates, self.counts**2 * self.squares, size)
        norms = np.sqrt(squares)[self.candidates[self.entries]] * self.norms
        clipped = np.minimum(self.counts[self.entries], self.others)
        dots = clipped * self.others * self.squares[self.entries]
        return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0.0)


class References:
    """The references of a set of images, counted once for any number of candidates.

    ``references`` holds the captions of each image, and each caption is a list of words. CIDEr-D
    takes its document frequencies from ``corpus``, which has the same form. The default corpus is
    the references themselves.

    The scoring methods take one candidate per image in order. With ``images`` the candidates are of
    the images at these indices. One call with many candidates is faster than many calls.

    Raises:
        ValueError: There is no image, an image has no reference, or an index has no image.
        TypeError: A caption is a string and not a list of words.
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
        # The captions of image i are those from _bounds[i] to before _bounds[i + 1].
        self._bounds = np.cumsum([0, *(len(captions) for captions in references)])
        images = [*references, *(corpus or ())]
        words, lengths = self._flatten([words for captions in images for words in captions])
        self._lengths = lengths
        owner = np.repeat(np.arange(len(images)), [len(captions) for captions in images])
        documents = owner >= (0 if corpus is None else len(references))
        self._grams = [
            self._index(codes, caption, gram, owner, documents)
            for codes, caption, gram in _ngrams(words, lengths)
        ]

    def _flatten(self, captions: Sequence[Words]) -> tuple[Ints, Ints]:
        """Return the id of each word of all captions, and the captions' lengths."""
        # coco-caption splits at any white space here, "1 1/2" too, but not for ROUGE-L.
        plain = [" ".join(words).split() for words in map(_as_words, captions)]
        ids = [self._ids.setdefault(word, len(self._ids)) for words in plain for word in words]
        lengths = [len(words) for words in plain]
        return np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64)

    def _index(
        self, codes: Ints, caption: Ints, gram: Ints, owner: Ints, documents: Bools
    ) -> _Grams:
        caption, gram, count = _tally(caption, gram)
        counted = documents[caption]
        _, seen, _ = _tally(owner[caption[counted]], gram[counted])
        frequency = np.append(np.bincount(seen, minlength=len(codes)), 0)
        rarity = math.log(len(np.unique(owner[documents]))) - np.log(np.maximum(frequency, 1))
        squares = np.bincount(caption, (count * rarity[gram]) ** 2, len(owner))
        keys = owner[caption] << _BITS | gram
        order = keys.argsort(kind="stable")
        return _Grams(codes, rarity, keys[order], caption[order], count[order], np.sqrt(squares))

    def _overlaps(self, words: Ints, lengths: Ints, images: Ints) -> list[_Overlap]:
        overlaps = []
        known = [grams.codes for grams in self._grams]
        for grams, (_, candidate, gram) in zip(
            self._grams, _ngrams(words, lengths, known), strict=True
        ):
            candidate, gram, count = _tally(candidate, gram)
            keys = images[candidate] << _BITS | gram
            first = np.searchsorted(grams.keys, keys)
            widths = np.searchsorted(grams.keys, keys, side="right") - first
            entry = np.repeat(np.arange(len(keys)), widths)
            pair = np.arange(len(entry)) + (first + widths - np.cumsum(widths))[entry]
            caption = grams.captions[pair]
            squares = grams.rarity[np.minimum(gram, len(grams.codes))] ** 2
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

    def _indices(self, candidates: Sequence[Words], images: Sequence[int] | None) -> Ints:
        """Return the index of each candidate's image; raises ``ValueError``."""
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
        indices = self._indices(candidates, images)
        words, lengths = self._flatten(candidates)
        return _bleu(*self._matches(self._overlaps(words, lengths, indices), lengths, indices))

    def rouge_l(self, candidates: Sequence[Words], images: Sequence[int] | None = None) -> Floats:
        """Return ROUGE-L of each candidate, 0…1: ``(candidates,)``.

        Source: Lin (2004), section 3.1, with beta 1.2; as in coco-caption the best precision and
        the best recall may be those of two references.
        """
        indices = self._indices(candidates, images)
        pairs = zip(candidates, indices.tolist(), strict=True)
        values = [_rouge_l(_as_words(words) or [""], self._words[image]) for words, image in pairs]
        return np.array(values, dtype=np.float64)

    def cider_d(self, candidates: Sequence[Words], images: Sequence[int] | None = None) -> Floats:
        """Return CIDEr-D of each candidate, 0…10: ``(candidates,)``; coco-caption calls it CIDEr.

        Source: Vedantam et al. (2015), section 6 (clipped counts, sigma 6, times 10).
        """
        indices = self._indices(candidates, images)
        words, lengths = self._flatten(candidates)
        return self._cider_d(self._overlaps(words, lengths, indices), lengths, indices)

    def score(self, candidates: Sequence[Words]) -> Scores:
        """Score one candidate an image. Raises ``ValueError`` when they are not as many."""
        indices = self._indices(candidates, None)
        words, lengths = self._flatten(candidates)
        overlaps = self._overlaps(words, lengths, indices)
        matches = self._matches(overlaps, lengths, indices)
        rouge = self.rouge_l(candidates)
        cider = self._cider_d(overlaps, lengths, indices)
        return Scores(
            bleu=_four(_bleu(*(counts.sum(axis=0) for counts in matches))),
            rouge_l=float(rouge.mean()),
            cider_d=float(cider.mean()),
            bleu_per_image=tuple(map(_four, _bleu(*matches))),
            rouge_l_per_image=tuple(rouge.tolist()),
            cider_d_per_image=tuple(cider.tolist()),
        )

    def _matches(
        self, overlaps: Sequence[_Overlap], lengths: Ints, indices: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """Return the matches and the n-grams of each candidate, and the closest reference's length.

        The first two are ``(candidates, 4)``, for n = 1…4.
        """
        matches = np.stack([overlap.matches(len(lengths)) for overlap in overlaps], axis=1)
        written = np.maximum(lengths[:, None] - np.arange(4), 0)
        bounds = zip(
            self._bounds[indices].tolist(), self._bounds[indices + 1].tolist(), strict=True
        )
        known = self._lengths.tolist()
        closest = [
            min(known[first:last], key=lambda other: (abs(other - length), other))
            for length, (first, last) in zip(lengths.tolist(), bounds, strict=True)
        ]
        return matches, written, np.array(closest)

    def _cider_d(self, overlaps: Sequence[_Overlap], lengths: Ints, indices: Ints) -> Floats:
        total = np.zeros(len(lengths))
        bigrams, others = np.maximum(lengths - 1, 0), np.maximum(self._lengths - 1, 0)
        for overlap in overlaps:
            candidate = overlap.candidates[overlap.entries]
            gap = bigrams[candidate] - others[overlap.captions]
            near = np.exp(-(gap**2) / (2.0 * _SIGMA**2))
            total += np.bincount(candidate, overlap.cosines(len(lengths)) * near, len(lengths))
        sizes = self._bounds[indices + 1] - self._bounds[indices]
        mean: Floats = 10.0 * total / 4.0 / sizes
        return mean


def _check_images(images: Sequence[Sequence[Words]]) -> None:
    if not images:
        raise ValueError("there is no image to score")
    for index, captions in enumerate(images):
        if isinstance(captions, str):
            raise TypeError(f"the references of image {index} are one string, {captions!r}")
        if not captions:
            raise ValueError(f"image {index} has no reference")


def _as_words(words: Words) -> Words:
    if isinstance(words, str) or words is None:
        raise TypeError(f"{words!r} is no list of words")
    return words


def _ngrams(
    words: Ints, lengths: Ints, known: Sequence[Ints] | None = None
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield for n = 1…4 the codes of the different n-grams, and the caption and index of each one.

    The index of an n-gram is that of its code. Its code holds the index of its first n - 1 words,
    an n-gram itself, and the id of its last word. Where the codes are ``known``, an n-gram that is
    not among them has an index from their number on.
    """
    caption = np.repeat(np.arange(len(lengths)), lengths)
    start, gram = np.arange(len(words)), np.zeros(len(words), dtype=np.int64)
    for n in range(4):
        start = start[start + n < len(words)]
        start = start[caption[start + n] == caption[start]]
        code = gram[start] << _BITS | words[start + n]
        if known is None:
            codes, gram[start] = np.unique(code, return_inverse=True)
        else:
            codes = known[n]
            gram[start] = _gram_indices(codes, code)
        yield codes, caption[start], gram[start]


def _gram_indices(codes: Ints, wanted: Ints) -> Ints:
    gram = np.searchsorted(codes, wanted)
    unknown = np.append(codes, -1)[gram] != wanted
    _, new = np.unique(wanted[unknown], return_inverse=True)
    gram[unknown] = len(codes) + new
    return gram


def _tally(caption: Ints, gram: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the different pairs of caption and n-gram, and how often each occurs."""
    keys, counts = np.unique(caption << _BITS | gram, return_counts=True)
    return keys >> _BITS, keys & ((1 << _BITS) - 1), counts


def _bleu(matches: Ints, written: Ints, closest: Ints) -> Floats:
    """Return BLEU-1…4 of n-gram counts ``(…, 4)`` and the closest reference's length ``(…)``.

    Source: Papineni et al. (2002), section 2.3, smoothed as in coco-caption.
    """
    precision = np.cumprod((matches + _TINY) / (written + _SMALL), axis=-1)
    ratio = (written[..., :1] + _TINY) / (np.asarray(closest)[..., None] + _SMALL)
    brevity: Floats = np.exp(np.minimum(1.0 - 1.0 / ratio, 0.0))
    return precision ** (1.0 / np.arange(1, 5)) * brevity


def _four(values: Floats) -> Four:
    one, two, three, four = values.tolist()
    return one, two, three, four


def _rouge_l(words: Words, references: Sequence[Words]) -> float:
    masks: dict[str, int] = {}
    for index, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << index
    common = [_common_subsequence(masks, len(words), other) for other in references]
    precision = max(common) / len(words)
    recall = max(n / len(other) for n, other in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1.0 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(masks: Mapping[str, int], length: int, other: Words) -> int:
    """Return the length of the longest common subsequence of a candidate and another caption.

    ``masks`` holds a bit mask of each word of the candidate: bit i is set where the word is at
    index i. The candidate has ``length`` words. Source: Hyyrö, "Bit-parallel LCS-length
    computation revisited" (2004), figure 2.
    """
    row = (1 << length) - 1
    for word in other:
        matched = row & masks.get(word, 0)
        row = (row + matched) | (row - matched)
    return length - (row & ((1 << length) - 1)).bit_count()


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score one caption per image against that image's references, as coco-caption does.

    nltk's ``corpus_bleu`` on the same tokens gives the same BLEU-n where every candidate has at
    least n words, and its references have some n-gram of each size. nltk counts one n-gram of a
    shorter candidate. Without a match nltk takes 0, and coco-caption a number next to 0.

    Raises:
        TypeError: A candidate or a reference is not a string.
        ValueError: The numbers of candidates and images differ, or an image has no reference.
            The message names the index.
    """
    written, wanted = tokenized(candidates, references)
    return References(wanted).score(written)


def tokenized(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return the words of the candidates, and those of each image's references."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} sets of references")
    _check_images(references)
    check_captions(candidates, "candidate")
    flat = [text for texts in references for text in texts]
    check_captions(flat, "reference")
    words = iter(ptb_tokenize(flat))
    return ptb_tokenize(candidates), [[next(words) for _ in texts] for texts in references]
