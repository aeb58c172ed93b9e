"""One search, greedy to sampled: knows tokens and scores, nothing of images or LSTMs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, zip_longest
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from captioner.options import SearchOptions
from captioner.vocabulary import EOS

__all__ = [
    "Forbid",
    "Hypothesis",
    "NoEnding",
    "NoRepeat",
    "State",
    "Step",
    "TokenRule",
    "draw_noise",
    "search",
]

S = TypeVar("S", bound="State")

# Off the CPU, asking whether images are decided makes the host wait for the device.
_STEPS_BETWEEN_QUESTIONS = 4
_BLOCK = 128


class State(Protocol):
    """What a step carries along, a row a hypothesis."""

    def select(self: S, rows: Tensor) -> S:
        """Return the state of ``rows`` ``(B', K')``; images stay in order or are dropped."""
        ...


class Step(Protocol[S]):
    """One step of a decoder: tokens ``(R,)`` to log-probabilities ``(R, V)``, float32."""

    def __call__(self, tokens: Tensor, state: S) -> tuple[Tensor, S]:
        """Read a token a row."""
        ...


class TokenRule(Protocol):
    """What may come next, whatever the decoder thinks of it."""

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
        bound = torch.full_like(again, torch.inf, dtype=log_probs.dtype)
        bound = bound.masked_fill(again, -torch.inf)
        return log_probs.scatter_reduce(1, runs[:, :, -1], bound, "amin")


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


def draw_noise(images: int, options: SearchOptions, generator: torch.Generator) -> Tensor:
    """Return the uniform numbers, ``(images, max_words + 1, num_captions)``, of one sampling."""
    shape = (images, options.max_words + 1, options.num_captions)
    return torch.rand(shape, generator=generator, device=generator.device)


class _Layout(NamedTuple):
    """The rows of an image: G groups of so many banks of so many beams each."""

    groups: int
    banks: int
    beams: int

    @classmethod
    def of(cls, options: SearchOptions, required: Sequence[int]) -> _Layout:
        if options.sample:
            return cls(1, 1, options.num_captions)
        return cls(options.groups, len(required) + 1, options.beam_size // options.groups)

    @property
    def rows(self) -> int:
        return self.groups * self.banks * self.beams


class _Choice(NamedTuple):
    """How the hypotheses of each image go on."""

    parents: Tensor  # (B, K): the row of the image that each continues
    tokens: Tensor  # (B, K)
    terms: Tensor  # (B, K): the log-probability of each token


@dataclass
class _Beams:
    """The hypotheses of the B images still searched, K rows an image."""

    images: Tensor  # (B,): which image of the batch
    tokens: Tensor  # (B, K, L): what is written; EOS repeats once a row has finished
    totals: Tensor  # (B, K): log-probabilities; -inf where there is no hypothesis
    lengths: Tensor  # (B, K): tokens written, EOS included
    finished: Tensor  # (B, K)
    needed: Tensor  # (B, G, n): the best ranks of finished hypotheses in each group

    def keep(self, stay: Tensor) -> _Beams:
        return _Beams(*(getattr(self, f.name)[stay] for f in fields(self)))


@dataclass
class _Trace:
    """What each step chose, to follow back from the end: all ``(B, max_words + 1, K)``."""

    parents: Tensor
    tokens: Tensor
    terms: Tensor
    totals: Tensor
    ranks: Tensor  # of the hypotheses that finished at this step; -inf for all others

    @classmethod
    def empty(cls, images: int, positions: int, rows: int, device: torch.device) -> _Trace:
        whole = torch.zeros((2, images, positions, rows), dtype=torch.long, device=device)
        real = torch.full((3, images, positions, rows), -torch.inf, device=device)
        return cls(*whole, *real)


def search(
    step: Step[S],
    first: Tensor,
    state: S,
    options: SearchOptions,
    rules: Sequence[TokenRule] = (),
    required: Sequence[int] = (),
    noise: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Return the best ``options.num_captions`` hypotheses of each image, best first.

    ``first``, ``(B,)``, is the token each image starts from (BOS), and ``state`` has a row an
    image. Numbers come from ``options``; its words come as ``rules`` and as the ids
    ``required``, different ones. ``noise``, from :func:`draw_noise`, is what sampling draws by;
    without it all images draw by the same numbers, those of ``options.seed``, so that an image's
    samples do not depend on its neighbours. A hypothesis that is not finished after
    ``options.max_words`` tokens is closed with EOS at its own log-probability. An image for which
    the search finds nothing that the rules allow gives its best unfinished hypothesis. Images
    leave the batch once nothing can change their result: a finished hypothesis is never lost, and
    a log-probability only falls, so an unfinished one can at best become as long as allowed at no
    further cost.

    Sources: Graves (2012), section 3.2; length norm: Wu et al. (2016), equation 14; groups:
    Vijayakumar et al., "Diverse Beam Search" (2016), equation 6 with Hamming diversity, which
    acts on the choice and not on log-probabilities; required tokens: a beam for each number of
    them written, as in the grid of Hokamp and Liu (2017), which merges the states of Anderson et
    al., "Guided Open Vocabulary Image Captioning" (2017), section 3.2, that count alike, with
    the candidates of Post and Vilar (2018), section 3.1.
    """
    if not len(first):
        return []
    layout = _Layout.of(options, required)
    wanted = torch.tensor(list(required), dtype=torch.long, device=first.device)
    rules = [*rules, *_number_rules(options)]
    beams = _first_beams(len(first), layout, options, first.device)
    trace = _Trace.empty(len(first), options.max_words + 1, layout.rows, first.device)
    noise = _noise(first, options, noise)
    state = state.select(_offsets(len(first), 1, first.device).expand(-1, layout.rows))
    last = first[:, None].expand(-1, layout.rows)
    for position in range(options.max_words + 1):
        log_probs, state = step(last.flatten(), state)
        for rule in rules:
            log_probs = rule(beams.tokens.flatten(0, 1), log_probs)
        if position == options.max_words:
            log_probs = _only_eos(log_probs)
        if noise is None:
            choice = _choose(beams, log_probs, layout, options, wanted)
        else:
            choice = _draw(beams, log_probs, noise[:, position], options)
        beams = _extend(beams, choice, layout, options, trace)
        rows = choice.parents + _offsets(len(choice.parents), layout.rows, first.device)
        if _asks(position, first.device):
            stay = ~_decided(beams, layout, options)
            if not stay.any():
                break
            beams, rows = beams.keep(stay), rows[stay]
        state, last = state.select(rows), beams.tokens[:, :, -1]
    return _Collector(trace, layout, options, required).collect()


def _number_rules(options: SearchOptions) -> Iterator[TokenRule]:
    if options.min_words:
        yield _MinWords(options.min_words)
    if options.no_repeat:
        yield NoRepeat(options.no_repeat)


def _offsets(images: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(images, device=device)[:, None] * rows


def _noise(first: Tensor, options: SearchOptions, given: Tensor | None) -> Tensor | None:
    if not options.sample:
        return None
    if given is None:
        generator = torch.Generator().manual_seed(options.seed)
        given = draw_noise(1, options, generator).expand(len(first), -1, -1)
    return given.to(first.device)


def _asks(position: int, device: torch.device) -> bool:
    """Whether to ask, after this position, which images are decided."""
    return device.type == "cpu" or position % _STEPS_BETWEEN_QUESTIONS == 0


def _first_beams(
    images: int, layout: _Layout, options: SearchOptions, device: torch.device
) -> _Beams:
    shape = (images, layout.rows)
    # The beams of a group start alike, so only one may have descendants; samples all do.
    totals = torch.full((images, layout.groups, layout.banks * layout.beams), -torch.inf)
    totals[:, :, : None if options.sample else 1] = 0.0
    needed = (images, layout.groups, min(options.num_captions, layout.beams))
    return _Beams(
        images=torch.arange(images, device=device),
        tokens=torch.empty((*shape, 0), dtype=torch.long, device=device),
        totals=totals.view(shape).to(device),
        lengths=torch.zeros(shape, dtype=torch.long, device=device),
        finished=torch.zeros(shape, dtype=torch.bool, device=device),
        needed=torch.full(needed, -torch.inf, device=device),
    )


def _only_eos(log_probs: Tensor) -> Tensor:
    closed = torch.full_like(log_probs, -torch.inf)
    closed[:, EOS] = log_probs[:, EOS]
    return closed


def _rank(totals: Tensor, lengths: Tensor, options: SearchOptions) -> Tensor:
    """Return totals over the length penalty; ``lengths`` count EOS."""
    real = lengths.to(totals.dtype)
    norm = real if options.length_norm == "average" else (real + 5.0) / 6.0
    return totals / norm**options.length_penalty


def _choose(
    beams: _Beams, log_probs: Tensor, layout: _Layout, options: SearchOptions, wanted: Tensor
) -> _Choice:
    """Return the best continuations in each bank of each group."""
    rows = layout.banks * layout.beams
    by_group = log_probs.view(-1, layout.groups, rows, log_probs.shape[-1]).unbind(dim=1)
    said: Tensor | None = None
    choices: list[_Choice] = []
    for group, own in enumerate(by_group):
        here = slice(group * rows, (group + 1) * rows)
        written, finished = beams.tokens[:, here], beams.finished[:, here]
        found = _candidates(own, written, finished, said, layout, wanted)
        lengths = beams.lengths[:, here] + ~finished
        totals = beams.totals[:, here, None] + found.scores
        ranks = _rank(totals, lengths[:, :, None], options)
        kept, best = _best_of_banks(ranks, found.banks, layout)
        tokens, terms = (x.flatten(1).gather(1, best) for x in (found.tokens, found.terms))
        # A bank that is not full is filled up with what belongs to others.
        terms = terms.masked_fill(kept == -torch.inf, -torch.inf)
        parents = best // found.tokens.shape[-1]
        choice = _Choice(parents + here.start, tokens, terms)
        choices.append(choice)
        if layout.groups > 1:
            cost = options.diversity * (~finished.gather(1, parents) & (kept > -torch.inf))
            said = torch.zeros_like(own[:, 0]) if said is None else said
            said = said.scatter_add(1, choice.tokens, cost.to(said.dtype))
    return _Choice(*(torch.cat(parts, dim=1) for parts in zip(*choices, strict=True)))


class _Candidates(NamedTuple):
    """What may follow each row of a group: W tokens a row."""

    tokens: Tensor  # (B, K, W)
    terms: Tensor  # (B, K, W): log-probabilities
    scores: Tensor  # (B, K, W): log-probabilities less what earlier groups make them cost
    banks: Tensor | None  # (B, K, W): how many required tokens are written; None if there are none


def _candidates(
    log_probs: Tensor,
    written: Tensor,
    finished: Tensor,
    cost: Tensor | None,
    layout: _Layout,
    wanted: Tensor,
) -> _Candidates:
    banks = asked = None
    if len(wanted):
        met = (written[..., None] == wanted).any(dim=2)
        log_probs[:, :, EOS].masked_fill_(~met.all(dim=-1), -torch.inf)
        asked = log_probs[:, :, wanted]
        log_probs[:, :, wanted] = -torch.inf  # they are candidates anyway
    scores = log_probs if cost is None else log_probs - cost[:, None]
    tokens = _top(scores, layout.beams)
    terms = log_probs.gather(2, tokens)
    if asked is not None:
        count = met.sum(dim=-1, keepdim=True)
        banks = torch.cat([count.expand_as(tokens), count + ~met], dim=2)
        tokens = torch.cat([tokens, wanted.expand_as(asked)], dim=2)
        terms = torch.cat([terms, asked], dim=2)
    idle = torch.full_like(terms[0, 0], -torch.inf)
    idle[0] = 0.0
    tokens = tokens.masked_fill(finished[:, :, None], EOS)
    terms = torch.where(finished[:, :, None], idle, terms)
    if cost is None:
        return _Candidates(tokens, terms, terms, banks)
    costs = cost.gather(1, tokens.flatten(1)).view_as(tokens)
    return _Candidates(tokens, terms, terms - costs.masked_fill(finished[:, :, None], 0.0), banks)


def _best_of_banks(ranks: Tensor, banks: Tensor | None, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Return the ranks that are kept and their places, flat, among the candidates ``(B, K, W)``."""
    if banks is None:
        return _keep(ranks, layout.beams)
    own = (ranks.masked_fill(banks != bank, -torch.inf) for bank in range(layout.banks))
    values, places = zip(*(_keep(bank, layout.beams) for bank in own), strict=True)
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


def _keep(ranks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, places = ranks.flatten(1).topk(count)
    return values, places


def _top(scores: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` highest scores of each row, ``(B, K, V)``."""
    count = min(count, scores.shape[-1])
    blocks = scores.shape[-1] // _BLOCK
    if blocks <= 2 * count:
        return scores.topk(count).indices
    # The highest scores lie in the blocks with the highest maxima: one quick look at all scores.
    whole = scores[:, :, : blocks * _BLOCK].view(*scores.shape[:2], blocks, _BLOCK)
    best = whole.amax(dim=-1).topk(count).indices
    inside = torch.arange(_BLOCK, device=scores.device)
    places = (best[..., None] * _BLOCK + inside).flatten(2)
    rest = torch.arange(blocks * _BLOCK, scores.shape[-1], device=scores.device)
    places = torch.cat([places, rest.expand(*places.shape[:2], -1)], dim=2)
    return places.gather(2, scores.gather(2, places).topk(count).indices)


def _draw(beams: _Beams, log_probs: Tensor, noise: Tensor, options: SearchOptions) -> _Choice:
    """Return a token drawn for each row: the one at which the summed probability passes the noise.

    In double precision, where the device has it, so that a noise below 1 never passes the last
    token with any probability.
    """
    noise = noise[beams.images]
    exact = torch.float32 if noise.device.type == "mps" else torch.float64
    log_probs = log_probs.view(*noise.shape, -1)
    probs = torch.softmax(log_probs.to(exact) / options.temperature, dim=-1)
    if options.top_k or options.top_p < 1.0:
        probs, tokens = probs.topk(min(options.top_k or probs.shape[-1], probs.shape[-1]))
        probs = probs / probs.sum(dim=-1, keepdim=True)
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill((before >= options.top_p) & (before > 0.0), 0.0)
    else:
        tokens = torch.arange(probs.shape[-1], device=probs.device).expand_as(probs)
    sums = probs.cumsum(dim=-1)
    drawn = (sums <= noise[:, :, None] * sums[:, :, -1:]).sum(dim=-1, keepdim=True)
    drawn = tokens.gather(2, drawn.clamp(max=tokens.shape[-1] - 1))
    terms = log_probs.gather(2, drawn)[..., 0].masked_fill(beams.finished, 0.0)
    parents = torch.arange(noise.shape[1], device=noise.device).expand_as(beams.finished)
    return _Choice(parents, drawn[..., 0].masked_fill(beams.finished, EOS), terms)


def _extend(
    beams: _Beams, choice: _Choice, layout: _Layout, options: SearchOptions, trace: _Trace
) -> _Beams:
    """Return the hypotheses with what was chosen for them, and trace it."""
    parents, tokens, terms = choice
    before = beams.finished.gather(1, parents)
    totals = beams.totals.gather(1, parents) + terms
    lengths = beams.lengths.gather(1, parents) + ~before
    finished = tokens == EOS
    ranks = _rank(totals, lengths, options).masked_fill(before | ~finished, -torch.inf)
    written = beams.tokens.gather(1, parents[:, :, None].expand_as(beams.tokens))
    step = (beams.images, written.shape[2])
    for record, value in zip(
        (getattr(trace, f.name) for f in fields(trace)),
        (parents, tokens, terms, totals, ranks),
        strict=True,
    ):
        record[step] = value
    known = torch.cat([beams.needed, ranks.view(len(ranks), layout.groups, -1)], dim=2)
    return _Beams(
        images=beams.images,
        tokens=torch.cat([written, tokens[:, :, None]], dim=2),
        totals=totals,
        lengths=lengths,
        finished=finished,
        needed=known.topk(beams.needed.shape[2]).values,
    )


def _decided(beams: _Beams, layout: _Layout, options: SearchOptions) -> Tensor:
    """Whether no unfinished hypothesis of an image can still enter its result, ``(B,)``."""
    open_totals = beams.totals.masked_fill(beams.finished, -torch.inf)
    if options.sample:
        return open_totals.amax(dim=1) == -torch.inf
    # A total only falls, and no hypothesis grows longer than this.
    longest = torch.full_like(beams.lengths, options.max_words + 1)
    hope = _rank(open_totals, longest, options).view(len(longest), layout.groups, -1).amax(dim=2)
    decided: Tensor = (beams.needed[:, :, -1] >= hope).all(dim=1)
    return decided


class _Collector:
    """Follows the trace of a search back from the ends of its hypotheses."""

    def __init__(
        self, trace: _Trace, layout: _Layout, options: SearchOptions, required: Sequence[int]
    ) -> None:
        self._layout, self._options, self._required = layout, options, set(required)
        self._totals, self._ranks = trace.totals.cpu(), trace.ranks.cpu()
        self._parents, self._tokens, self._terms = (
            record.tolist() for record in (trace.parents, trace.tokens, trace.terms)
        )

    def collect(self) -> list[list[Hypothesis]]:
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
