"""Beam search: knows tokens and scores, nothing of images or LSTMs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.vocabulary import EOS

__all__ = [
    "Forbid",
    "Hypothesis",
    "NoRepeat",
    "State",
    "Step",
    "TokenRule",
    "search",
]

S = TypeVar("S", bound="State")


class State(Protocol):
    """What a step carries along, a row a hypothesis."""

    def select(self: S, rows: Tensor) -> S:
        """Return the state of ``rows`` ``(B', K')``; images stay in order or are dropped."""
        ...


class Step(Protocol[S]):
    """One step of a decoder: tokens ``(R,)`` to log-probabilities ``(R, V)``."""

    def __call__(self, tokens: Tensor, state: S) -> tuple[Tensor, S]:
        """Read a token a row."""
        ...


class TokenRule(Protocol):
    """What may come next, whatever the decoder thinks of it."""

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Return the log-probabilities ``(R, V)`` with -inf where a token may not follow.

        ``tokens``, ``(R, L)``, holds what each row has written so far, without BOS. A rule must
        leave each row at least one token.
        """
        ...


class Forbid:
    """Tokens that are never written."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Take the forbidden ids."""
        self._tokens = list(tokens)

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Forbid them."""
        log_probs[:, self._tokens] = -torch.inf
        return log_probs


class NoRepeat:
    """No token twice."""

    def __call__(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Forbid what each row has written."""
        return log_probs.scatter(1, tokens, -torch.inf)


class Hypothesis(NamedTuple):
    """One finished sequence."""

    tokens: tuple[int, ...]
    """Without BOS and EOS."""
    log_prob: float
    """Natural logarithm of the sequence's probability, EOS included."""
    token_log_probs: tuple[float, ...]
    """The terms of ``log_prob``: one a token and one for EOS."""


@dataclass
class _Beams:
    """The hypotheses of the B images still searched, K an image, best first."""

    images: Tensor  # (B,): which image of the batch
    tokens: Tensor  # (B, K, L): what is written; EOS repeats once a row has finished
    terms: Tensor  # (B, K, L): the log-probability of each token
    totals: Tensor  # (B, K)
    ranks: Tensor  # (B, K): totals over the length penalty
    lengths: Tensor  # (B, K): tokens written, EOS included
    finished: Tensor  # (B, K)

    def keep(self, stay: Tensor) -> _Beams:
        return _Beams(*(getattr(self, f.name)[stay] for f in fields(self)))

    def hypotheses(self, image: int, count: int) -> list[Hypothesis]:
        found = []
        order = self.ranks[image].masked_fill(~self.finished[image], -torch.inf)
        for beam in order.argsort(descending=True)[:count].tolist():
            if order[beam] > -torch.inf:
                length = int(self.lengths[image, beam])
                tokens = self.tokens[image, beam, : length - 1].tolist()
                terms = self.terms[image, beam, :length].tolist()
                total = float(self.totals[image, beam])
                found.append(Hypothesis(tuple(tokens), total, tuple(terms)))
        return found


def search(
    step: Step[S],
    first: Tensor,
    state: S,
    options: SearchOptions,
    rules: Sequence[TokenRule] = (),
) -> list[list[Hypothesis]]:
    """Return the best hypotheses of each image, best first: beam search, batched over images.

    ``first``, ``(B,)``, is the token each image starts from (BOS), and ``state`` has a row an
    image. A hypothesis that is not finished after ``options.max_words`` tokens is closed with
    EOS at its own log-probability. An image whose hypotheses the rules leave no way to finish
    gives an empty list. Images leave the batch as soon as nothing can change their result. As in
    any beam search of a width that is not full, hypotheses may push out one that ends better.

    Source: Graves (2012), section 3.2; length penalty as in Wu et al. (2016), equation 14, with
    (words + 1) for its (5 + words) / 6.
    """
    beam_size = options.beam_size
    beams = _first_beams(first, beam_size)
    rows = torch.arange(len(first), device=first.device)[:, None].expand(-1, beam_size)
    state = state.select(rows)
    last = first[:, None].expand(-1, beam_size)
    found: list[list[Hypothesis]] = [[] for _ in range(len(first))]
    for position in range(options.max_words + 1):
        log_probs, state = step(last.flatten(), state)
        for rule in rules:
            log_probs = rule(beams.tokens.flatten(0, 1), log_probs)
        if position == options.max_words:
            log_probs = _only_eos(log_probs)
        beams, parents = _extend(beams, log_probs, options.length_penalty)
        decided = _decided(beams, options)
        for index in decided.nonzero().flatten().tolist():
            found[int(beams.images[index])] = beams.hypotheses(index, options.num_captions)
        stay = ~decided
        if not stay.any():
            break
        offsets = torch.arange(len(parents), device=parents.device)[:, None] * beam_size
        state = state.select((parents + offsets)[stay])
        beams = beams.keep(stay)
        last = beams.tokens[:, :, -1]
    return found


def _first_beams(first: Tensor, beam_size: int) -> _Beams:
    images, device = len(first), first.device
    # All beams of an image start alike, so only one of them may have descendants.
    totals = torch.full((images, beam_size), -torch.inf, device=device)
    totals[:, 0] = 0.0
    return _Beams(
        images=torch.arange(images, device=device),
        tokens=torch.empty((images, beam_size, 0), dtype=torch.long, device=device),
        terms=torch.empty((images, beam_size, 0), device=device),
        totals=totals,
        ranks=totals,
        lengths=torch.zeros((images, beam_size), dtype=torch.long, device=device),
        finished=torch.zeros((images, beam_size), dtype=torch.bool, device=device),
    )


def _only_eos(log_probs: Tensor) -> Tensor:
    closed = torch.full_like(log_probs, -torch.inf)
    closed[:, EOS] = log_probs[:, EOS]
    return closed


def _extend(beams: _Beams, log_probs: Tensor, length_penalty: float) -> tuple[_Beams, Tensor]:
    """Return the K best extensions of each image and the beam ``(B, K)`` each came from."""
    images, beam_size = beams.totals.shape
    log_probs = log_probs.view(images, beam_size, -1)
    idle = torch.full_like(log_probs[0, 0], -torch.inf)
    idle[EOS] = 0.0
    log_probs = torch.where(beams.finished[:, :, None], idle, log_probs)
    lengths = beams.lengths + ~beams.finished
    totals = beams.totals[:, :, None] + log_probs
    ranks = totals / lengths[:, :, None].to(totals.dtype) ** length_penalty
    best_ranks, flat = ranks.flatten(1).topk(beam_size)
    parents, tokens = flat // log_probs.shape[-1], flat % log_probs.shape[-1]

    def extended(history: Tensor, new: Tensor) -> Tensor:
        moved = history.gather(1, parents[:, :, None].expand_as(history))
        return torch.cat([moved, new[:, :, None]], dim=-1)

    chosen = _Beams(
        images=beams.images,
        tokens=extended(beams.tokens, tokens),
        terms=extended(beams.terms, log_probs.flatten(1).gather(1, flat)),
        totals=totals.flatten(1).gather(1, flat),
        ranks=best_ranks,
        lengths=lengths.gather(1, parents),
        finished=tokens == EOS,
    )
    return chosen, parents


def _decided(beams: _Beams, options: SearchOptions) -> Tensor:
    """Whether no unfinished hypothesis of an image can still enter its result, ``(B,)``."""
    closed = beams.ranks.masked_fill(~beams.finished, -torch.inf)
    needed = closed.topk(options.num_captions).values[:, -1]
    # A total only falls, and no hypothesis grows longer than this.
    hope = beams.totals / (options.max_words + 1.0) ** options.length_penalty
    decided: Tensor = needed >= hope.masked_fill(beams.finished, -torch.inf).amax(dim=1)
    return decided
