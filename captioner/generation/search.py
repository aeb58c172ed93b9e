"""One search, greedy to sampled: knows tokens and scores, nothing of images or LSTMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from captioner.data.vocabulary import EOS
from captioner.generation.beams import (
    Beams,
    Choice,
    Collector,
    Hypothesis,
    Layout,
    Trace,
    Traced,
    extend,
    first_beams,
    undecided,
)
from captioner.generation.options import SearchOptions
from captioner.generation.rules import TokenRule, number_rules

__all__ = ["State", "Step", "draw_noise", "search"]

S = TypeVar("S", bound="State")

# Off the CPU, asking whether images are decided makes the host wait for the device.
_STEPS_BETWEEN_QUESTIONS = 4
_BLOCK = 128
# Of so few scores the highest are found sooner without a look at blocks.
_FEW = 20_000


class State(Protocol):
    """The state that a decoder passes from step to step, one row for each hypothesis."""

    def select(self: S, rows: Tensor) -> S:
        """Return the state of ``rows`` ``(B', K')``; images stay in order or are dropped."""
        ...


class Step(Protocol[S]):
    """One step of a decoder: tokens ``(R,)`` to log-probabilities ``(R, V)``, float32."""

    def __call__(self, tokens: Tensor, state: S) -> tuple[Tensor, S]:
        """Read a token a row."""
        ...


def draw_noise(images: int, options: SearchOptions, generator: torch.Generator) -> Tensor:
    """Return the uniform numbers, ``(images, max_words + 1, num_captions)``, of one sampling."""
    shape = (images, options.max_words + 1, options.num_captions)
    return torch.rand(shape, generator=generator, device=generator.device)


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
    layout = Layout.of(options, required)
    wanted = torch.tensor(list(required), dtype=torch.long, device=first.device)
    rules = [*rules, *number_rules(options)]
    beams = first_beams(len(first), layout, options, first.device)
    noise = _noise(first, options, noise)
    images = torch.arange(len(first), device=first.device)[:, None]
    state, starts = state.select(images.expand(-1, layout.rows)), images * layout.rows
    last = first[:, None].expand(-1, layout.rows)
    steps: list[Traced] = []
    for position in range(options.max_words + 1):
        log_probs, state = step(last.flatten(), state)
        written = beams.tokens.flatten(0, 1)
        for rule in rules:
            log_probs = rule(written, log_probs)
        if position == options.max_words:
            log_probs = _only_eos(log_probs)
        if noise is None:
            choice = _choose(beams, log_probs, layout, options, wanted)
        else:
            choice = _draw(beams, log_probs, noise[:, position], options)
        rows = choice.parents + starts
        beams, traced = extend(beams, choice, rows, layout, options)
        steps.append(traced)
        last = choice.tokens
        if _asks(position, first.device):
            stay = undecided(beams, layout, options).nonzero()[:, 0]
            if not len(stay):
                break
            if len(stay) < len(rows):
                beams, rows, last = beams.keep(stay), rows[stay], last[stay]
                starts = starts[: len(stay)]
        state = state.select(rows)
    return Collector(Trace.of(steps, len(first)), layout, options, required).collect()


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


def _only_eos(log_probs: Tensor) -> Tensor:
    closed = torch.full_like(log_probs, -torch.inf)
    closed[:, EOS] = log_probs[:, EOS]
    return closed


def _choose(
    beams: Beams, log_probs: Tensor, layout: Layout, options: SearchOptions, wanted: Tensor
) -> Choice:
    """Return the best continuations in each bank of each group."""
    by_row = log_probs.view(*beams.totals.shape, -1)
    if layout.groups == 1:
        return _choose_in_group(beams, by_row, None, layout, wanted)[0]
    size = layout.rows // layout.groups
    said = torch.zeros_like(by_row[:, 0])
    choices: list[Choice] = []
    for start in range(0, layout.rows, size):
        here = slice(start, start + size)
        group = beams.part(here)
        choice, kept = _choose_in_group(group, by_row[:, here], said, layout, wanted)
        goes_on = ~group.finished.gather(1, choice.parents) & (kept > -torch.inf)
        said = said.scatter_add(1, choice.tokens, options.diversity * goes_on)
        choices.append(choice._replace(parents=choice.parents + start))
    return Choice(*(torch.cat(parts, dim=1) for parts in zip(*choices, strict=True)))


def _choose_in_group(
    beams: Beams, log_probs: Tensor, cost: Tensor | None, layout: Layout, wanted: Tensor
) -> tuple[Choice, Tensor]:
    """Return the best continuations in each bank, and their ranks.

    Args:
        beams: The K rows of a group.
        log_probs: ``(B, K, V)``.
        cost: What each token costs because earlier groups say it, ``(B, V)``.
        layout: The rows of an image.
        wanted: The ids that every hypothesis has.
    """
    found = _candidates(log_probs, beams, cost, layout, wanted)
    ranks = (beams.totals[:, :, None] + found.scores) / beams.norms[:, :, None]
    kept, best = _best_of_banks(ranks, found.banks, layout)
    tokens, terms = (x.flatten(1).gather(1, best) for x in (found.tokens, found.terms))
    if found.banks is not None:
        # A bank that is not full is filled up with what belongs to others.
        terms = terms.masked_fill(kept == -torch.inf, -torch.inf)
    return Choice(best // found.tokens.shape[-1], tokens, terms), kept


class _Candidates(NamedTuple):
    """The candidates for the next token of each row of a group: W tokens a row."""

    tokens: Tensor  # (B, K, W)
    terms: Tensor  # (B, K, W): log-probabilities
    scores: Tensor  # (B, K, W): log-probabilities less what earlier groups make them cost
    banks: Tensor | None  # (B, K, W): how many required tokens are written; None if there are none


def _candidates(
    log_probs: Tensor, beams: Beams, cost: Tensor | None, layout: Layout, wanted: Tensor
) -> _Candidates:
    """Return the candidates of a group; the arguments are those of ``_choose_in_group``."""
    banks = asked = None
    if len(wanted):
        met = (beams.tokens[..., None] == wanted).any(dim=2)
        log_probs[:, :, EOS].masked_fill_(~met.all(dim=-1), -torch.inf)
        asked = log_probs[:, :, wanted]
        log_probs[:, :, wanted] = -torch.inf  # they are candidates anyway
    if cost is None:
        terms, tokens = _top(log_probs, layout.beams)
    else:
        tokens = _top(log_probs - cost[:, None], layout.beams)[1]
        terms = log_probs.gather(2, tokens)
    if asked is not None:
        count = met.sum(dim=-1, keepdim=True)
        banks = torch.cat([count.expand_as(tokens), count + ~met], dim=2)
        tokens = torch.cat([tokens, wanted.expand_as(asked)], dim=2)
        terms = torch.cat([terms, asked], dim=2)
    # A finished row goes on as it is, and once.
    finished = beams.finished[:, :, None]
    tokens.masked_fill_(finished, EOS)
    terms.masked_fill_(finished, -torch.inf)[:, :, 0].masked_fill_(beams.finished, 0.0)
    if cost is None:
        return _Candidates(tokens, terms, terms, banks)
    costs = cost.gather(1, tokens.flatten(1)).view_as(tokens)
    return _Candidates(tokens, terms, terms - costs.masked_fill(finished, 0.0), banks)


def _best_of_banks(ranks: Tensor, banks: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the ranks that are kept and their places, flat, among the candidates ``(B, K, W)``."""
    if banks is None:
        return _keep(ranks, layout.beams)
    own = (ranks.masked_fill(banks != bank, -torch.inf) for bank in range(layout.banks))
    values, places = zip(*(_keep(bank, layout.beams) for bank in own), strict=True)
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


def _keep(ranks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, places = ranks.flatten(1).topk(count)
    return values, places


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest scores of each row of ``(B, K, V)``, and their places."""
    count = min(count, scores.shape[-1])
    blocks = scores.shape[-1] // _BLOCK
    if blocks <= 2 * count or scores.numel() < _FEW:
        values, places = scores.topk(count)
        return values, places
    # The highest scores lie in the blocks with the highest maxima: one quick look at all scores.
    whole = scores[:, :, : blocks * _BLOCK].view(*scores.shape[:2], blocks, _BLOCK)
    best = whole.amax(dim=-1).topk(count).indices
    inside = torch.arange(_BLOCK, device=scores.device)
    places = (best[..., None] * _BLOCK + inside).flatten(2)
    rest = torch.arange(blocks * _BLOCK, scores.shape[-1], device=scores.device)
    places = torch.cat([places, rest.expand(*places.shape[:2], -1)], dim=2)
    values, chosen = scores.gather(2, places).topk(count)
    return values, places.gather(2, chosen)


def _draw(beams: Beams, log_probs: Tensor, noise: Tensor, options: SearchOptions) -> Choice:
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
    return Choice(parents, drawn[..., 0].masked_fill(beams.finished, EOS), terms)
