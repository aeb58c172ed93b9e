"""The vocabulary: words to token ids and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["BOS", "EOS", "PAD", "SPECIAL", "UNK", "UNSAID", "Vocabulary"]

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

UNSAID = (PAD, BOS, UNK)
"""The ids of words that a caption never contains."""


class Vocabulary:
    """V words. The first four are ``<pad>``, ``<bos>``, ``<eos>`` and ``<unk>``.

    The words of a caption vocabulary are words, and those of a tag vocabulary are tags.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Give the words the ids from 4 on; raises ``ValueError`` for a repeated word."""
        self.words = (*SPECIAL, *words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the word {repeated!r} stands twice in a vocabulary")

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], size: int, min_count: int) -> Vocabulary:
        """Return a vocabulary of the most frequent words.

        Words of one frequency are in alphabetical order, so that the same captions always give the
        same vocabulary.

        Args:
            sentences: Captions, each a list of words.
            size: The most words it may have, the four special ones included.
            min_count: How often a word must stand in the captions to be in the vocabulary.
        """
        counts = Counter(word for sentence in sentences for word in sentence)
        by_frequency = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        words = [w for w, count in by_frequency if count >= min_count and w not in SPECIAL]
        return cls(words[: max(size - len(SPECIAL), 0)])

    def __len__(self) -> int:
        """Return V, the number of words with the special ones."""
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        """Whether the word has an id of its own."""
        return word in self._ids

    def encode(self, words: Sequence[str]) -> list[int]:
        """Return the ids of the words and a closing EOS; an unknown word becomes UNK."""
        return [*(self._ids.get(word, UNK) for word in words), EOS]

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """Return the words of the ids, up to the first EOS."""
        words: list[str] = []
        for token in tokens:
            if token == EOS:
                break
            words.append(self.words[token])
        return words
