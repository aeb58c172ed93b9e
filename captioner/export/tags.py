"""The scores of all tags as ONNX nodes: those of :class:`captioner.generation.tags.Tagger`.

B images, V words of the tag vocabulary, T tags.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from captioner.data.calibration import TagScoring
from captioner.data.vocabulary import BOS, EOS, SPECIAL, UNSAID
from captioner.export.decoder import DecoderGraph, State
from captioner.export.graph import Graph, Value
from captioner.export.search import Rules, search_nodes
from captioner.generation.tags import CERTAIN, LONGEST, WRITTEN_OPTIONS, tag_adjustment
from captioner.model.checkpoint import Checkpoint

__all__ = ["tag_nodes"]

_BOOL, _INT = 9, 7  # of TensorProto


def tag_nodes(graph: Graph, checkpoint: Checkpoint, grid: Value, head: Value | None) -> Value:
    """Add the scores ``(B, T)`` of tags, of a grid ``(B, N, D)`` and the head's logits ``(B, V)``.

    A model without scoring has those of the tags that it writes, and 0 for the others.
    """
    decoder = DecoderGraph(graph, "tag_decoder", checkpoint.config.model.tags)
    if checkpoint.scoring is None:
        return _written(graph, decoder, checkpoint, grid)
    words = len(checkpoint.tags.vocabulary)
    missed = _missed(graph, decoder, grid, words)
    return _scored(graph, checkpoint, checkpoint.scoring, missed, head)


def _written(graph: Graph, decoder: DecoderGraph, checkpoint: Checkpoint, grid: Value) -> Value:
    tags, calibration = checkpoint.tags, checkpoint.calibration
    words = len(tags.vocabulary)
    rules = Rules(words, UNSAID, adjustment=tag_adjustment(tags).numpy())
    found = search_nodes(graph, decoder, grid, 0, replace(WRITTEN_OPTIONS, no_repeat=1), rules)
    tokens, terms = (graph.op("Squeeze", x, [1]) for x in (found.tokens, found.terms))
    p = graph.op("Clip", graph.op("Exp", terms), 1e-6, 1.0 - 1e-6)
    odds = graph.op("Div", p, graph.op("Sub", 1.0, p))
    scaled = graph.op("Mul", graph.op("Log", odds), float(calibration.slope))
    scores = graph.op("Sigmoid", graph.op("Add", scaled, float(calibration.offset)))
    # EOS, and what follows it, is written where PAD's score would be: nobody reads that.
    ids = graph.op("Where", graph.op("Less", tokens, len(SPECIAL)), 0, tokens)
    scattered = graph.op("ScatterElements", _filled(graph, grid, words, 0.0), ids, scores, axis=1)
    return _named(graph, scattered, words)


def _filled(graph: Graph, grid: Value, count: int, value: float | bool) -> Value:
    images = graph.op("Slice", graph.op("Shape", grid), [0], [1])
    return graph.op("Expand", value, graph.op("Concat", images, [count], axis=0))


def _named(graph: Graph, of_words: Value, words: int) -> Value:
    """Return the columns of tags, ``(B, T)``, of those of all words, ``(B, V)``."""
    return graph.op("Slice", of_words, [len(SPECIAL)], [words], [1])


def _missed(graph: Graph, decoder: DecoderGraph, grid: Value, words: int) -> Value:
    """Return the logarithms ``(B, V)`` of the probability that no step says a word.

    In a list of the likeliest tags, each step without those before it.
    """
    body = graph.body()
    state = decoder.start(grid, 1)
    ids = np.arange(words)
    first = graph.op("Expand", BOS, graph.op("Concat", _images(graph, grid), [1], axis=0))
    unsaid = np.isin(ids, UNSAID)
    before: dict[str, Value] = {
        "token": first,
        **{f"state {k}": x for k, x in state._asdict().items() if x is not None},
        "closed": graph.op("Or", _filled(graph, grid, words, False), unsaid),
        "missed": _filled(graph, grid, words, 0.0),
    }
    inside = {name: body.name(name.replace(" ", "_")) for name in before}
    stepped = decoder.step(
        body, inside["token"], State(inside["state hidden"], inside.get("state cell"))
    )
    logits = body.op("Squeeze", stepped.logits, [1])
    open_logits = body.op("Where", inside["closed"], -float("inf"), logits)
    p = body.op("Softmax", open_logits, axis=-1)
    p = body.op("Min", p, 1.0 - 1e-6)
    # A list that has ended says nothing more.
    active = body.op("Not", body.op("Equal", inside["token"], EOS))
    said = body.op("Where", active, _log_of_rest(body, p), 0.0)
    likeliest = body.op("ArgMax", open_logits, axis=1, keepdims=1)
    token = body.op("Where", active, likeliest, EOS)
    after = {
        "token": token,
        **{f"state {k}": x for k, x in stepped.state._asdict().items() if x is not None},
        "closed": body.op("Or", inside["closed"], body.op("Equal", ids, token)),
        "missed": body.op("Add", inside["missed"], said),
    }
    going = body.op("Cast", body.op("Not", body.op("Equal", token, EOS)), to=_INT)
    goes_on = body.op("Cast", body.op("ReduceMax", going, keepdims=0), to=_BOOL)
    carried = {name: (before[name], inside[name], after[name]) for name in before}
    ended = graph.loop(body, LONGEST, carried, body.name("position"), goes_on)
    return ended["missed"]


def _images(graph: Graph, grid: Value) -> Value:
    return graph.op("Slice", graph.op("Shape", grid), [0], [1])


def _log_of_rest(g: Graph, p: Value) -> Value:
    """Return log(1 - p), also of a p that is lost beside 1."""
    series = g.op("Mul", p, g.op("Add", g.op("Mul", p, -0.5), -1.0))
    whole = g.op("Log", g.op("Sub", 1.0, p))
    return g.op("Where", g.op("Less", p, 1e-3), series, whole)


def _scored(
    graph: Graph, checkpoint: Checkpoint, scoring: TagScoring, missed: Value, head: Value | None
) -> Value:
    words = len(checkpoint.tags.vocabulary)
    said = graph.op("Neg", _named(graph, missed, words))
    said = graph.op("Clip", said, 1e-6, 2.0 * CERTAIN)
    # exp(x) - 1, also of an x that is lost beside 1.
    series = graph.op("Mul", said, graph.op("Add", graph.op("Mul", said, 0.5), 1.0))
    whole = graph.op("Sub", graph.op("Exp", said), 1.0)
    odds = graph.op("Where", graph.op("Less", said, 1e-3), series, whole)
    marginal = graph.op("Clip", graph.op("Log", odds), -CERTAIN, CERTAIN)
    of_marginal, of_head, of_frequency, offset = scoring.weights
    shares = np.log(np.asarray(checkpoint.tags.frequencies)) * of_frequency + offset
    logits = graph.op("Add", graph.op("Mul", marginal, of_marginal), shares)
    if head is not None:
        of_tags = graph.op("Mul", _named(graph, head, words), of_head)
        logits = graph.op("Add", logits, of_tags)
    return graph.op("Sigmoid", logits)
