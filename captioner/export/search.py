"""The beam search as ONNX nodes: a Loop of which each step writes a token a row.

It finds what :func:`captioner.generation.search.search` does with one group and no required
words. Letters as in the package: B images, K beams, N cells, V words; n is the number of captions
and P the most words plus one, for EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.export.decoder import DecoderGraph, State
from captioner.export.graph import Graph, Value
from captioner.generation.options import SearchOptions

__all__ = ["Found", "Rules", "search_nodes"]

# What is unfinished ranks below all that is finished, and the further it came the higher.
_UNFINISHED, _LOWEST_FINISHED = -1e30, -1e20
_INFINITY = float("inf")
_BOOL, _FLOAT, _INT = 9, 1, 7  # of TensorProto


@dataclass(frozen=True)
class Rules:
    """What may be written: ids over V words, and what is added to the logits."""

    words: int
    never: Sequence[int]
    no_ending: Sequence[int] = ()
    adjustment: np.ndarray[Any, Any] | None = None  # (V,)


@dataclass(frozen=True)
class Found:
    """The n best hypotheses of each image, best first."""

    tokens: Value  # (B, n, P): after its end EOS or -1
    terms: Value  # (B, n, P): the log-probability of each token; 0 after EOS
    attention: Value | None  # (B, n, P, N): the weights by which each token was chosen
    log_probs: Value  # (B, n): -inf where there are fewer than n
    lengths: Value  # (B, n): without EOS
    finished: Value  # (B, n)


_Picker = Callable[[Value], Value]
"""Picks rows of each image, of a value ``(B, K, …)``."""


class _Rows(NamedTuple):
    """Hypotheses, K or n an image."""

    tokens: Value  # (B, K, P)
    terms: Value  # (B, K, P)
    totals: Value  # (B, K)
    lengths: Value  # (B, K): EOS included
    attention: Value | None = None  # (B, K, P, N)

    def each(self) -> dict[str, Value]:
        """Return those that there are, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


def search_nodes(
    graph: Graph, decoder: DecoderGraph, grid: Value, cells: int, options: SearchOptions,
    rules: Rules, attention: bool = False,
) -> Found:  # fmt: skip
    """Add the search to a graph.

    Args:
        graph: The graph of the grid.
        decoder: Makes the decoder's nodes.
        grid: ``(B, N, D)``.
        cells: N.
        options: Its numbers hold; its words do not, nor groups and sampling.
        rules: What the options' words mean for ids.
        attention: Whether the weights are found too.
    """
    search = _Search(graph, decoder, options, rules)
    return search.run(grid, cells if attention else 0)


class _Search:
    def __init__(
        self, graph: Graph, decoder: DecoderGraph, options: SearchOptions, rules: Rules
    ) -> None:
        self._graph, self._decoder, self._options, self._rules = graph, decoder, options, rules
        self._positions = options.max_words + 1

    def run(self, grid: Value, cells: int) -> Found:
        g, options = self._graph, self._options
        images = g.op("Slice", g.op("Shape", grid), [0], [1])
        beams, best = (
            self._empty(images, count, cells) for count in (options.beam_size, options.num_captions)
        )
        # All beams start alike, so only one may have descendants.
        first = np.full(options.beam_size, -_INFINITY)
        first[0] = 0.0
        beams = beams._replace(totals=self._filled(images, [options.beam_size], first))
        state = self._decoder.start(grid, options.beam_size)
        before = {
            "last": self._filled(images, [options.beam_size], BOS),
            **{f"state {k}": x for k, x in state._asdict().items() if x is not None},
            **{f"beam {k}": x for k, x in beams.each().items()},
            "ranks": best.totals,
            **{f"best {k}": x for k, x in best.each().items()},
        }
        ended = self._loop(before)
        return self._found(ended["ranks"], _named(ended, "best"))

    def _filled(
        self, images: Value, shape: Sequence[int], value: float | np.ndarray[Any, Any]
    ) -> Value:
        """Return ``(B, *shape)``, each image with the same value."""
        whole = self._graph.op("Concat", images, list(shape), axis=0)
        return self._graph.op("Expand", value, whole)

    def _empty(self, images: Value, count: int, cells: int) -> _Rows:
        p = self._positions
        return _Rows(
            self._filled(images, [count, p], -1),
            self._filled(images, [count, p], 0.0),
            self._filled(images, [count], -_INFINITY),
            self._filled(images, [count], 0),
            self._filled(images, [count, p, cells], 0.0) if cells else None,
        )

    def _loop(self, before: dict[str, Value]) -> dict[str, Value]:
        body = self._graph.body()
        inside = {name: body.name(name.replace(" ", "_")) for name in before}
        position = body.name("position")
        step = _Step(body, self._decoder, self._options, self._rules, position)
        goes_on, after = step.take(inside)
        carried = {name: (before[name], inside[name], after[name]) for name in before}
        return self._graph.loop(body, self._positions, carried, position, goes_on)

    def _found(self, ranks: Value, best: _Rows) -> Found:
        g = self._graph
        finished = g.op("Greater", ranks, _LOWEST_FINISHED)
        # Only where nothing finished does something unfinished count, and then the first.
        is_first = np.arange(self._options.num_captions) == 0
        something = g.op("Not", g.op("IsInf", ranks))
        there = g.op("Or", finished, g.op("And", is_first, something))
        lengths = g.op("Sub", best.lengths, g.op("Cast", finished, to=_INT))
        totals = g.op("Where", there, best.totals, -_INFINITY)
        lengths = g.op("Where", there, lengths, 0)
        return Found(best.tokens, best.terms, best.attention, totals, lengths, finished)


def _named(values: dict[str, Value], kind: str) -> _Rows:
    return _Rows(**{k.split()[1]: x for k, x in values.items() if k.startswith(f"{kind} ")})


class _Step:
    """The nodes of one step, in the body of the loop."""

    def __init__(
        self, body: Graph, decoder: DecoderGraph, options: SearchOptions, rules: Rules,
        position: Value,
    ) -> None:  # fmt: skip
        self._g, self._decoder, self._position = body, decoder, position
        self._options, self._rules = options, rules
        self._beams, self._positions = options.beam_size, options.max_words + 1

    def take(self, before: dict[str, Value]) -> tuple[Value, dict[str, Value]]:
        """Return whether the loop goes on, and by name the values after the step."""
        g, last, rows = self._g, before["last"], _named(before, "beam")
        finished = g.op("Equal", last, EOS)
        state = State(before["state hidden"], before.get("state cell"))
        stepped = self._decoder.step(g, last, state)
        log_probs = self._ruled(stepped.logits, last, rows.tokens)
        parents, tokens, terms = self._choose(log_probs, rows, finished)
        pick = self._picker(parents)
        rows = self._write(rows, pick, tokens, terms, stepped.weights, finished)
        ended, was = g.op("Equal", tokens, EOS), pick(finished)
        new = g.op("And", g.op("Not", was), ended)
        still_open = g.op("Where", ended, -_INFINITY, rows.totals)
        known = self._ranked(rows, new, still_open)
        ranks, best = self._collect(known, rows, before["ranks"], _named(before, "best"))
        states = {k: pick(x) for k, x in stepped.state._asdict().items() if x is not None}
        after = {
            "last": tokens,
            **{f"state {k}": x for k, x in states.items()},
            **{f"beam {k}": x for k, x in rows.each().items()},
            "ranks": ranks,
            **{f"best {k}": x for k, x in best.each().items()},
        }
        return self._goes_on(ranks, still_open), after

    def _picker(self, rows: Value) -> _Picker:
        """Return a function that picks rows ``(B, K')`` of each image."""
        index = self._g.op("Unsqueeze", rows, [2])
        return lambda x: self._g.op("GatherND", x, index, batch_dims=1)

    def _ruled(self, logits: Value, last: Value, tokens: Value) -> Value:
        """Return log-probabilities ``(B, K, V)``, -inf where a token may not follow."""
        g, options, rules = self._g, self._options, self._rules
        if rules.adjustment is not None:
            logits = g.op("Add", logits, rules.adjustment)
        log_probs = g.op("LogSoftmax", logits, axis=-1)
        is_eos = np.arange(rules.words) == EOS
        at_end = g.op("Equal", self._position, options.max_words)
        closed = g.op("Or", _mask(rules.words, rules.never), g.op("And", at_end, ~is_eos))
        if options.min_words:
            early = g.op("Less", self._position, options.min_words)
            closed = g.op("Or", closed, g.op("And", early, is_eos))
        if rules.no_ending:
            closed = self._no_ending(closed, last, is_eos)
        log_probs = g.op("Where", closed, -_INFINITY, log_probs)
        n = options.no_repeat
        return self._no_repeat(log_probs, tokens, n) if 0 < n <= options.max_words else log_probs

    def _no_ending(self, closed: Value, last: Value, is_eos: np.ndarray[Any, Any]) -> Value:
        g, ids = self._g, self._rules.no_ending
        next_to_end = g.op("Equal", self._position, self._options.max_words - 1)
        closed = g.op("Or", closed, g.op("And", next_to_end, _mask(self._rules.words, ids)))
        # A Gather among V booleans says of each row whether its last word is one of them.
        bad = g.op("Gather", _mask(self._rules.words, ids), last)
        return g.op("Or", closed, g.op("And", g.op("Unsqueeze", bad, [2]), is_eos))

    def _no_repeat(self, log_probs: Value, tokens: Value, n: int) -> Value:
        g, starts = self._g, self._positions - n + 1
        runs = [g.op("Slice", tokens, [i], [i + starts], [2]) for i in range(n)]
        again = g.op("Less", np.arange(starts) + n - 1, self._position)
        for i in range(n - 1):
            place = g.op("Max", g.op("Sub", self._position, n - 1 - i), 0)
            tail = g.op("Gather", tokens, g.op("Unsqueeze", place, [0]), axis=2)
            again = g.op("And", again, g.op("Equal", runs[i], tail))
        # PAD is never written anyway.
        ids = g.op("Where", again, runs[-1], PAD)
        never = g.op("Expand", -_INFINITY, g.op("Shape", ids))
        return g.op("ScatterElements", log_probs, ids, never, axis=2)

    def _choose(self, log_probs: Value, rows: _Rows, finished: Value) -> tuple[Value, Value, Value]:
        """Return the parents, tokens and terms, ``(B, K)`` each, of the best continuations."""
        g, k = self._g, self._beams
        wide = min(k, self._rules.words)
        terms, tokens = g.ops("TopK", 2, log_probs, [wide], axis=-1)
        idle = np.where(np.arange(wide) == 0, 0.0, -_INFINITY)
        done = g.op("Unsqueeze", finished, [2])
        tokens, terms = g.op("Where", done, EOS, tokens), g.op("Where", done, idle, terms)
        lengths = g.op("Add", rows.lengths, g.op("Cast", g.op("Not", finished), to=_INT))
        totals = g.op("Add", g.op("Unsqueeze", rows.totals, [2]), terms)
        ranks = self._rank(totals, g.op("Unsqueeze", lengths, [2]))
        kept, places = g.ops("TopK", 2, self._flat(ranks, wide), [k], axis=-1)
        tokens, terms = (
            g.op("GatherElements", self._flat(x, wide), places, axis=1) for x in (tokens, terms)
        )
        terms = g.op("Where", g.op("IsInf", kept), -_INFINITY, terms)
        return g.op("Div", places, wide), tokens, terms

    def _flat(self, x: Value, wide: int) -> Value:
        return self._g.op("Reshape", x, [0, self._beams * wide])

    def _write(
        self, rows: _Rows, pick: _Picker, tokens: Value, terms: Value, weights: Value | None,
        finished: Value,
    ) -> _Rows:  # fmt: skip
        """Return the rows that were chosen, each with its new token."""
        g = self._g
        here = g.op("Equal", np.arange(self._positions), self._position)

        def put(new: Value, old: Value, mask: Value = here) -> Value:
            return g.op("Where", mask, g.op("Unsqueeze", new, [2]), pick(old))

        grown = g.op("Cast", g.op("Not", pick(finished)), to=_INT)
        looked = None
        if rows.attention is not None and weights is not None:
            looked = put(pick(weights), rows.attention, g.op("Unsqueeze", here, [1]))
        return _Rows(
            put(tokens, rows.tokens),
            put(terms, rows.terms),
            g.op("Add", pick(rows.totals), terms),
            g.op("Add", pick(rows.lengths), grown),
            looked,
        )

    def _rank(self, totals: Value, lengths: Value | np.ndarray[Any, Any]) -> Value:
        """Return totals over the length penalty; ``lengths`` count EOS."""
        g, options = self._g, self._options
        real = g.op("Cast", lengths, to=_FLOAT)
        if options.length_norm != "average":
            real = g.op("Div", g.op("Add", real, 5.0), 6.0)
        return g.op("Div", totals, g.op("Pow", real, options.length_penalty))

    def _ranked(self, rows: _Rows, new: Value, still_open: Value) -> Value:
        """Return the ranks ``(B, K)`` of rows that ended now, and of the best one still open."""
        g = self._g
        highest = g.op("ReduceMax", still_open, [1], keepdims=1)
        furthest = g.op("ArgMax", still_open, axis=1, keepdims=1)
        is_furthest = g.op("Equal", np.arange(self._beams), furthest)
        is_furthest = g.op("And", is_furthest, g.op("Not", g.op("IsInf", highest)))
        after = g.op("Cast", g.op("Add", self._position, 1), to=_FLOAT)
        unfinished = g.op("Where", is_furthest, g.op("Div", _UNFINISHED, after), -_INFINITY)
        return g.op("Where", new, self._rank(rows.totals, rows.lengths), unfinished)

    def _collect(self, known: Value, rows: _Rows, ranks: Value, best: _Rows) -> tuple[Value, _Rows]:
        g, count = self._g, self._options.num_captions
        ranks, places = g.ops("TopK", 2, g.op("Concat", ranks, known, axis=1), [count], axis=-1)
        pick, mine = self._picker(places), rows.each()
        kept = {k: pick(g.op("Concat", x, mine[k], axis=1)) for k, x in best.each().items()}
        return ranks, _Rows(**kept)

    def _goes_on(self, ranks: Value, still_open: Value) -> Value:
        """Whether an unfinished hypothesis of any image can still enter its result."""
        g, options = self._g, self._options
        # A total only falls, and no hypothesis grows longer than this.
        hope = self._rank(still_open, np.array([self._positions]))
        hope = g.op("ReduceMax", hope, [1], keepdims=0)
        last = g.op("Gather", ranks, options.num_captions - 1, axis=1)
        decided = g.op("Cast", g.op("GreaterOrEqual", last, hope), to=_INT)
        return g.op("Equal", g.op("ReduceMin", decided, keepdims=0), 0)


def _mask(words: int, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    mask = np.zeros(words, dtype=bool)
    mask[list(ids)] = True
    return mask
