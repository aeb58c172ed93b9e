"""A decoder's step as ONNX nodes; it computes what :class:`captioner.model.decoder.Decoder` does.

Rows are ``(B, K, …)`` here, K of each image, where the model has ``(R, …)``.
"""

from __future__ import annotations

from typing import NamedTuple

from captioner.config import DecoderConfig
from captioner.export.graph import Graph, Value

__all__ = ["DecoderGraph", "State", "Stepped"]

_LARGEST = 40.0  # as in captioner.model.attention, whose exponentials these are


class State(NamedTuple):
    """What recurs, each ``(B, K, H)``."""

    hidden: Value
    cell: Value | None
    """``None`` for cells without one."""


class Stepped(NamedTuple):
    """What a step gives."""

    logits: Value  # (B, K, V)
    weights: Value | None  # (B, K, N), of a decoder with attention
    state: State


class DecoderGraph:
    """Makes the nodes of one decoder."""

    def __init__(self, graph: Graph, prefix: str, config: DecoderConfig) -> None:
        """Take the graph of the grid, and how the decoder's weights are called: ``prefix.…``."""
        self._prefix, self._config = prefix, config
        self._gates = {"lstm": 4, "gru": 3, "rnn": 1}[config.cell]
        self._grid: Value = ""
        self._keys: Value = ""
        self._graph = graph

    def start(self, grid: Value, beams: int) -> State:
        """Return the state before the first token: ``(B, N, D)`` to K equal rows an image."""
        g, config = self._graph, self._config
        self._grid = grid
        if config.attention:
            keys = self._exponential(g, self._linear(g, grid, "attention.keys"))
            self._keys = g.op("Unsqueeze", keys, [1])
        mean = g.op("ReduceMean", grid, [1], keepdims=1)
        first = g.op("Tanh", self._linear(g, mean, "initial"))
        beams_of = [first] if beams == 1 else [g.op("Expand", first, [1, beams, 1])]
        if config.cell != "lstm":
            return State(beams_of[0], None)
        return State(*g.ops("Split", 2, *beams_of, [config.hidden] * 2, axis=-1))

    def step(self, g: Graph, tokens: Value, state: State) -> Stepped:
        """Read a token a row, ``(B, K)``, in the graph ``g`` of a loop's body."""
        config = self._config
        embedded = g.op("Gather", g.weight(f"{self._prefix}.embedding.weight"), tokens)
        embedded = g.op("Mul", embedded, config.embedding**0.5)
        context, weights = self._attend(g, state.hidden)
        read = [embedded] if context is None else [embedded, context]
        after = self._recur(g, self._joined(g, read), state)
        seen = [after.hidden] if context is None else [after.hidden, context]
        fused = g.op("Tanh", self._linear(g, self._joined(g, seen), "fuse"))
        output = "embedding.weight" if config.tied else "output.weight"
        logits = self._product(g, fused, output, "output.bias")
        return Stepped(logits, weights, after)

    def _attend(self, g: Graph, hidden: Value) -> tuple[Value | None, Value | None]:
        if not self._config.attention:
            return None, None
        query = self._product(g, hidden, "attention.query.weight")
        query = g.op("Unsqueeze", self._exponential(g, query), [2])
        share = g.op("Reciprocal", g.op("Add", g.op("Mul", self._keys, query), 1.0))
        energy = g.op("Mul", self._product(g, share, "attention.energy.weight"), -2.0)
        weights = g.op("Softmax", g.op("Squeeze", energy, [3]), axis=-1)
        gate = g.op("Sigmoid", self._linear(g, hidden, "gate"))
        return g.op("Mul", gate, g.op("MatMul", weights, self._grid)), weights

    def _recur(self, g: Graph, read: Value, state: State) -> State:
        inner = self._product(g, read, "cell.weight_ih", "cell.bias_ih")
        outer = self._product(g, state.hidden, "cell.weight_hh", "cell.bias_hh")
        if self._config.cell == "rnn":
            return State(g.op("Tanh", g.op("Add", inner, outer)), None)
        if self._config.cell == "gru":
            return State(self._gated(g, inner, outer, state.hidden), None)
        i, f, new, o = self._split(g, g.op("Add", inner, outer))
        assert state.cell is not None  # an LSTM has one
        kept = g.op("Mul", g.op("Sigmoid", f), state.cell)
        cell = g.op("Add", kept, g.op("Mul", g.op("Sigmoid", i), g.op("Tanh", new)))
        return State(g.op("Mul", g.op("Sigmoid", o), g.op("Tanh", cell)), cell)

    def _gated(self, g: Graph, inner: Value, outer: Value, hidden: Value) -> Value:
        (r, z, n), (r_, z_, n_) = self._split(g, inner), self._split(g, outer)
        reset = g.op("Sigmoid", g.op("Add", r, r_))
        new = g.op("Tanh", g.op("Add", n, g.op("Mul", reset, n_)))
        update = g.op("Sigmoid", g.op("Add", z, z_))
        return g.op("Add", new, g.op("Mul", update, g.op("Sub", hidden, new)))

    def _split(self, g: Graph, gates: Value) -> list[Value]:
        sizes = [self._config.hidden] * self._gates
        return g.ops("Split", self._gates, gates, sizes, axis=-1)

    def _joined(self, g: Graph, parts: list[Value]) -> Value:
        return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)

    def _exponential(self, g: Graph, x: Value) -> Value:
        return g.op("Exp", g.op("Mul", g.op("Clip", x, -_LARGEST, _LARGEST), 2.0))

    def _linear(self, g: Graph, x: Value, name: str) -> Value:
        return self._product(g, x, f"{name}.weight", f"{name}.bias")

    def _product(self, g: Graph, x: Value, weight: str, bias: str = "") -> Value:
        y = g.op("MatMul", x, g.transposed(f"{self._prefix}.{weight}"))
        return g.op("Add", y, g.weight(f"{self._prefix}.{bias}")) if bias else y
