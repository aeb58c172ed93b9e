"""Words to ids and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["BOS", "EOS", "PAD", "SPECIAL", "UNK", "UNSAID", "Vocabulary"]

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

UNSAID = (PAD, BOS, UNK)
"""Ids that stand in no caption."""


class Vocabulary:
    """V words, the first four of which are ``<pad>``, ``<bos>``, ``<eos>`` and ``<unk>``.

    The same class serves captions (its words are words) and tags (its words are tags).
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Take words, numbered from 4 on; raises ``ValueError`` if one stands twice."""
        self.words = (*SPECIAL, *words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the word {twice!r} stands twice in a vocabulary")

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], size: int, min_count: int) -> Vocabulary:
        """Keep the most frequent words, at most ``size`` with the special ones.

        Words seen fewer than ``min_count`` times are left out; ties are broken by spelling,
        so that the same captions always give the same vocabulary.
        """
        counts = Counter(word for sentence in sentences for word in sentence)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [word for word, count in ranked if count >= min_count and word not in SPECIAL]
        return cls(kept[: max(size - len(SPECIAL), 0)])

    def __len__(self) -> int:
        """V, the special words included."""
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
