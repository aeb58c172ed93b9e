"""The hypotheses of a search: how they lie in rows, grow, finish, and are collected at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.data.vocabulary import EOS
from captioner.generation.options import SearchOptions

__all__ = [
    "Beams",
    "Choice",
    "Collector",
    "Hypothesis",
    "Layout",
    "Trace",
    "decided",
    "extend",
    "first_beams",
    "rank",
]


class Hypothesis(NamedTuple):
    """One sequence of tokens."""

    tokens: tuple[int, ...]
    """Without BOS and EOS."""
    log_prob: float
    """Natural logarithm of the sequence's probability, EOS included where it is finished."""
    token_log_probs: tuple[float, ...]
    """The terms of ``log_prob``: one a token and, where it is finished, one for EOS."""
    finished: bool = True
    """False where nothing satisfied the rules, and this is as far as the best one came."""


class Layout(NamedTuple):
    """The rows of an image: G groups of so many banks of so many beams each."""

    groups: int
    banks: int
    beams: int

    @classmethod
    def of(cls, options: SearchOptions, required: Sequence[int]) -> Layout:
        """Return the layout of a search with these options and required ids."""
        if options.sample:
            return cls(1, 1, options.num_captions)
        return cls(options.groups, len(required) + 1, options.beam_size // options.groups)

    @property
    def rows(self) -> int:
        """How many hypotheses are kept an image."""
        return self.groups * self.banks * self.beams


class Choice(NamedTuple):
    """How the hypotheses of each image go on."""

    parents: Tensor  # (B, K): the row of the image that each continues
    tokens: Tensor  # (B, K)
    terms: Tensor  # (B, K): the log-probability of each token


@dataclass
class Beams:
    """The hypotheses of the B images still searched, K rows an image."""

    images: Tensor  # (B,): which image of the batch
    tokens: Tensor  # (B, K, L): what is written; EOS repeats once a row has finished
    totals: Tensor  # (B, K): log-probabilities; -inf where there is no hypothesis
    lengths: Tensor  # (B, K): tokens written, EOS included
    finished: Tensor  # (B, K)
    needed: Tensor  # (B, G, n): the best ranks of finished hypotheses in each group

    def keep(self, stay: Tensor) -> Beams:
        """Return the images that ``stay``, a mask ``(B,)``."""
        return Beams(*(getattr(self, f.name)[stay] for f in fields(self)))


@dataclass
class Trace:
    """The choices of every step, for backtracking from the end: all ``(B, max_words + 1, K)``."""

    parents: Tensor
    tokens: Tensor
    terms: Tensor
    totals: Tensor
    ranks: Tensor  # of the hypotheses that finished at this step; -inf for all others

    @classmethod
    def empty(cls, images: int, positions: int, rows: int, device: torch.device) -> Trace:
        """Return the trace of a search that has not begun."""
        whole = torch.zeros((2, images, positions, rows), dtype=torch.long, device=device)
        real = torch.full((3, images, positions, rows), -torch.inf, device=device)
        return cls(*whole, *real)


def first_beams(images: int, layout: Layout, options: SearchOptions, device: torch.device) -> Beams:
    """Return the hypotheses that a search begins with: nothing written."""
    shape = (images, layout.rows)
    # The beams of a group start alike, so only one may have descendants; samples all do.
    totals = torch.full((images, layout.groups, layout.banks * layout.beams), -torch.inf)
    totals[:, :, : None if options.sample else 1] = 0.0
    needed = (images, layout.groups, min(options.num_captions, layout.beams))
    return Beams(
        images=torch.arange(images, device=device),
        tokens=torch.empty((*shape, 0), dtype=torch.long, device=device),
        totals=totals.view(shape).to(device),
        lengths=torch.zeros(shape, dtype=torch.long, device=device),
        finished=torch.zeros(shape, dtype=torch.bool, device=device),
        needed=torch.full(needed, -torch.inf, device=device),
    )


def rank(totals: Tensor, lengths: Tensor, options: SearchOptions) -> Tensor:
    """Return totals over the length penalty; ``lengths`` count EOS."""
    real = lengths.to(totals.dtype)
    norm = real if options.length_norm == "average" else (real + 5.0) / 6.0
    return totals / norm**options.length_penalty


def extend(
    beams: Beams, choice: Choice, layout: Layout, options: SearchOptions, trace: Trace
) -> Beams:
    """Return the hypotheses with what was chosen for them, and trace it."""
    parents, tokens, terms = choice
    before = beams.finished.gather(1, parents)
    totals = beams.totals.gather(1, parents) + terms
    lengths = beams.lengths.gather(1, parents) + ~before
    finished = tokens == EOS
    ranks = rank(totals, lengths, options).masked_fill(before | ~finished, -torch.inf)
    written = beams.tokens.gather(1, parents[:, :, None].expand_as(beams.tokens))
    step = (beams.images, written.shape[2])
    for record, value in zip(
        (getattr(trace, f.name) for f in fields(trace)),
        (parents, tokens, terms, totals, ranks),
        strict=True,
    ):
        record[step] = value
    known = torch.cat([beams.needed, ranks.view(len(ranks), layout.groups, -1)], dim=2)
    return Beams(
        images=beams.images,
        tokens=torch.cat([written, tokens[:, :, None]], dim=2),
        totals=totals,
        lengths=lengths,
        finished=finished,
        needed=known.topk(beams.needed.shape[2]).values,
    )


def decided(beams: Beams, layout: Layout, options: SearchOptions) -> Tensor:
    """Whether no unfinished hypothesis of an image can still enter its result, ``(B,)``."""
    open_totals = beams.totals.masked_fill(beams.finished, -torch.inf)
    if options.sample:
        return open_totals.amax(dim=1) == -torch.inf
    # A total only falls, and no hypothesis grows longer than this.
    longest = torch.full_like(beams.lengths, options.max_words + 1)
    hope = rank(open_totals, longest, options).view(len(longest), layout.groups, -1).amax(dim=2)
    decided: Tensor = (beams.needed[:, :, -1] >= hope).all(dim=1)
    return decided


class Collector:
    """Follows the trace of a search back from the ends of its hypotheses."""

    def __init__(
        self, trace: Trace, layout: Layout, options: SearchOptions, required: Sequence[int]
    ) -> None:
        self._layout, self._options, self._required = layout, options, set(required)
        self._totals, self._ranks = trace.totals.cpu(), trace.ranks.cpu()
        self._parents, self._tokens, self._terms = (
            record.tolist() for record in (trace.parents, trace.tokens, trace.terms)
        )

    def collect(self) -> list[list[Hypothesis]]:
        """Return the hypotheses of each image, best first."""
        collected = self._samples if self._options.sample else self._best
        return [collected(image) for image in range(len(self._ranks))]

    def _samples(self, image: int) -> list[Hypothesis]:
        found: list[tuple[float, Hypothesis]] = []
        for row in range(self._layout.rows):
            own = range(row, row + 1)
            found += self._ended(image, own) or [(-torch.inf, self._unfinished(image, own))]
        return [hypothesis for _, hypothesis in sorted(found, key=lambda pair: -pair[0])]

    def _best(self, image: int) -> list[Hypothesis]:
        """Return the best hypotheses: of groups the best of each before the second best of any."""
        rows, size = range(self._layout.rows), self._layout.rows // self._layout.groups
        groups = [self._ended(image, rows[start : start + size]) for start in rows[::size]]
        unlike: dict[tuple[int, ...], tuple[float, Hypothesis]] = {}
        for found in chain(*zip_longest(*groups)):
            if found is not None and len(unlike) < self._options.num_captions:
                unlike.setdefault(found[1].tokens, found)
        best = sorted(unlike.values(), key=lambda pair: -pair[0])
        return [hypothesis for _, hypothesis in best] or [self._unfinished(image, rows)]

    def _ended(self, image: int, rows: range) -> list[tuple[float, Hypothesis]]:
        """Return the best finished hypotheses of some rows, and their ranks."""
        ranks = self._ranks[image, :, rows.start : rows.stop]
        ends = (ranks > -torch.inf).nonzero().tolist()
        ends.sort(key=lambda end: -float(ranks[end[0], end[1]]))
        return [
            (float(ranks[position, row]), self._hypothesis(image, position, rows[row], True))
            for position, row in ends[: min(self._options.num_captions, self._layout.beams)]
        ]

    def _unfinished(self, image: int, rows: range) -> Hypothesis:
        """Return the best of the hypotheses that came furthest."""
        alive = self._totals[image, :, rows.start : rows.stop] > -torch.inf
        furthest = alive.any(dim=1).nonzero().flatten().tolist()[-1:]
        found = [
            self._hypothesis(image, position, rows[row], False)
            for position in furthest
            for row in alive[position].nonzero().flatten().tolist()
        ]
        nothing = Hypothesis((), 0.0, (), False)
        return max(
            found,
            key=lambda h: (len(self._required.intersection(h.tokens)), h.log_prob),
            default=nothing,
        )

    def _hypothesis(self, image: int, position: int, row: int, finished: bool) -> Hypothesis:
        total = float(self._totals[image, position, row])
        tokens: list[int] = []
        terms: list[float] = []
        for place in range(position, -1, -1):
            tokens.insert(0, self._tokens[image][place][row])
            terms.insert(0, self._terms[image][place][row])
            row = self._parents[image][place][row]
        return Hypothesis(tuple(tokens[:-1] if finished else tokens), total, tuple(terms), finished)
