"""Rules for the next token: what may follow, whatever the decoder thinks of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from captioner.data.vocabulary import EOS
from captioner.generation.options import SearchOptions

__all__ = ["Forbid", "NoEnding", "NoRepeat", "TokenRule", "number_rules"]


class TokenRule(Protocol):
    """A constraint on the next token that overrides the decoder's probabilities."""

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Return the log-probabilities ``(R, V)`` with -inf where a token may not follow.

        ``tokens``, ``(R, L)``, holds what each row has written so far, without BOS. A rule may
        write into ``log_probs``. A row that the rules leave no token ends unfinished.
        """
        ...


class Forbid:
    """Tokens that are never written."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Take the forbidden ids."""
        self._tokens = torch.tensor(list(tokens), dtype=torch.long)

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Forbid them."""
        self._tokens = self._tokens.to(log_probs.device)
        return log_probs.index_fill_(1, self._tokens, -torch.inf)


class NoRepeat:
    """No run of n tokens twice; no token twice where n is 1.

    Source: Paulus et al., "A Deep Reinforced Model for Abstractive Summarization" (2018),
    section 2.5.
    """

    def __init__(self, n: int = 1) -> None:
        """Take the length of the runs."""
        self._n = n

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Forbid what would end a run that a row has written before."""
        n = self._n
        if tokens.shape[1] < n:
            return log_probs
        runs = tokens.unfold(1, n, 1)
        tail = tokens[:, None, tokens.shape[1] - n + 1 :]
        again = (runs[:, :, :-1] == tail).all(dim=-1)
        # Added, since several runs may end on one token.
        return log_probs.scatter_add_(1, runs[:, :, -1], torch.where(again, -torch.inf, 0.0))


class NoEnding:
    """Tokens that are never the last."""

    def __init__(self, tokens: Sequence[int], max_words: int) -> None:
        """Take the ids, and how many tokens a row may write."""
        self._tokens, self._max_words = torch.tensor(list(tokens), dtype=torch.long), max_words

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Forbid EOS after them, and them where only EOS could follow."""
        self._tokens = self._tokens.to(log_probs.device)
        ends = (tokens[:, -1:, None] == self._tokens).any(dim=2).any(dim=1)
        log_probs[:, EOS].masked_fill_(ends, -torch.inf)
        if tokens.shape[1] == self._max_words - 1:
            log_probs.index_fill_(1, self._tokens, -torch.inf)
        return log_probs


class _MinWords:
    """No EOS before so many tokens."""

    def __init__(self, words: int) -> None:
        self._words = words

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        if tokens.shape[1] < self._words:
            log_probs[:, EOS] = -torch.inf
        return log_probs


def number_rules(options: SearchOptions) -> Iterator[TokenRule]:
    """Yield the rules that the numbers of the options make."""
    if options.min_words:
        yield _MinWords(options.min_words)
    if options.no_repeat:
        yield NoRepeat(options.no_repeat)
