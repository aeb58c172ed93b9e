"""The hypotheses of a search: how they lie in rows, grow, finish, and are collected at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    "Traced",
    "extend",
    "first_beams",
    "norm",
    "undecided",
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
    norms: Tensor  # (B, K): what ranks totals: of an open row with its next token, else its own
    finished: Tensor  # (B, K)
    needed: Tensor  # (B, G, n): the best ranks of finished hypotheses in each group

    def keep(self, stay: Tensor) -> Beams:
        """Return the images at the places ``stay``."""
        return Beams(*(getattr(self, f.name)[stay] for f in fields(self)))

    def part(self, rows: slice) -> Beams:
        """Return some rows of each image."""
        of_rows = ("tokens", "totals", "norms", "finished")
        return replace(self, **{name: getattr(self, name)[:, rows] for name in of_rows})


class Traced(NamedTuple):
    """The choices of one step: of the images still searched, and of their K rows."""

    images: Tensor  # (B,)
    parents: Tensor
    tokens: Tensor
    terms: Tensor
    totals: Tensor
    ranks: Tensor  # of the hypotheses that finished at this step; -inf for all others


class Trace(NamedTuple):
    """The choices of every step, for backtracking from the end: all ``(B, L, K)``."""

    parents: Tensor
    tokens: Tensor
    terms: Tensor
    totals: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, steps: Sequence[Traced], images: int) -> Trace:
        """Return the trace of so many images; -inf and 0 where one had left the batch."""
        searched = torch.cat([step.images for step in steps])
        positions = [place for place, step in enumerate(steps) for _ in range(len(step.images))]
        there = (searched, torch.tensor(positions, device=searched.device))
        shape = (images, len(steps), steps[0].totals.shape[1])

        def whole(records: tuple[Tensor, ...]) -> Tensor:
            absent = -torch.inf if records[0].is_floating_point() else 0
            return records[0].new_full(shape, absent).index_put_(there, torch.cat(records))

        _, *records = zip(*steps, strict=True)
        return cls(*map(whole, records))


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
        norms=torch.full(shape, norm(1, options), device=device),
        finished=torch.zeros(shape, dtype=torch.bool, device=device),
        needed=torch.full(needed, -torch.inf, device=device),
    )


def norm(length: int, options: SearchOptions) -> float:
    """Return what totals are divided by to be ranked; ``length`` counts EOS."""
    base = float(length) if options.length_norm == "average" else (length + 5.0) / 6.0
    return float(base**options.length_penalty)


def extend(
    beams: Beams, choice: Choice, rows: Tensor, layout: Layout, options: SearchOptions
) -> tuple[Beams, Traced]:
    """Return the hypotheses with what was chosen for them, and what there is to trace.

    ``rows``, ``(B, K)``, are the parents as rows of all images.
    """
    before, totals, norms = (x.take(rows) for x in (beams.finished, beams.totals, beams.norms))
    totals += choice.terms
    finished = choice.tokens == EOS
    ends = finished > before  # of bool: and not
    ranks = torch.where(ends, totals / norms, -torch.inf)
    known = torch.cat([beams.needed, ranks.view(len(ranks), layout.groups, -1)], dim=2)
    written = beams.tokens.flatten(0, 1)[rows]
    longer = norm(written.shape[2] + 2, options)
    extended = Beams(
        images=beams.images,
        tokens=torch.cat([written, choice.tokens[:, :, None]], dim=2),
        totals=totals,
        norms=torch.where(finished, norms, longer),
        finished=finished,
        needed=known.topk(beams.needed.shape[2]).values,
    )
    return extended, Traced(beams.images, *choice, totals, ranks)


def undecided(beams: Beams, layout: Layout, options: SearchOptions) -> Tensor:
    """Whether an unfinished hypothesis of an image can still enter its result, ``(B,)``."""
    open_totals = beams.totals.masked_fill(beams.finished, -torch.inf)
    best = open_totals.view(len(open_totals), layout.groups, -1).amax(dim=2)
    if options.sample:
        return best[:, 0] > -torch.inf
    # A total only falls, and no hypothesis grows longer than this.
    hope = best / norm(options.max_words + 1, options)
    undecided: Tensor = (hope > beams.needed[:, :, -1]).any(dim=1)
    return undecided


class Collector:
    """Follows the trace of a search back from the ends of its hypotheses."""

    def __init__(
        self, trace: Trace, layout: Layout, options: SearchOptions, required: Sequence[int]
    ) -> None:
        self._layout, self._options, self._required = layout, options, set(required)
        self._parents, self._tokens, self._terms, self._totals, self._ranks = (
            record.tolist() for record in trace
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
        ends = [
            (rank, position, row)
            for position, ranks in enumerate(self._ranks[image])
            for row, rank in zip(rows, ranks[rows.start : rows.stop], strict=True)
            if rank > -torch.inf
        ]
        ends.sort(key=lambda end: -end[0])
        return [
            (rank, self._hypothesis(image, position, row, True))
            for rank, position, row in ends[: min(self._options.num_captions, self._layout.beams)]
        ]

    def _unfinished(self, image: int, rows: range) -> Hypothesis:
        """Return the best of the hypotheses that came furthest."""
        alive = [
            (position, row)
            for position, totals in enumerate(self._totals[image])
            for row in rows
            if totals[row] > -torch.inf
        ]
        found = [
            self._hypothesis(image, position, row, False)
            for position, row in alive
            if position == alive[-1][0]
        ]
        nothing = Hypothesis((), 0.0, (), False)
        return max(
            found,
            key=lambda h: (len(self._required.intersection(h.tokens)), h.log_prob),
            default=nothing,
        )

    def _hypothesis(self, image: int, position: int, row: int, finished: bool) -> Hypothesis:
        total = self._totals[image][position][row]
        tokens: list[int] = []
        terms: list[float] = []
        for place in range(position, -1, -1):
            tokens.insert(0, self._tokens[image][place][row])
            terms.insert(0, self._terms[image][place][row])
            row = self._parents[image][place][row]
        return Hypothesis(tuple(tokens[:-1] if finished else tokens), total, tuple(terms), finished)
