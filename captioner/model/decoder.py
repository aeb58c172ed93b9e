"""The one-to-many RNN, an LSTM by default, that writes captions, and tags, from a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import DecoderConfig
from captioner.model.attention import Attention
from captioner.model.recurrence import Packed, Products, layer, pack, recur

__all__ = ["Decoder", "DecoderState"]


class DecoderState(NamedTuple):
    """What a decoder carries from step to step; K = R / B consecutive rows share an image."""

    grid: Tensor
    """``(B, N, D)``"""
    keys: Tensor
    """``(B, N, A)``, float32: the grid projected for attention, once an image."""
    hidden: Tensor
    """``(R, H)``"""
    cell: Tensor
    """``(R, H)`` for an LSTM, ``(R, 0)`` for cells without one"""

    def select(self, rows: Tensor) -> DecoderState:
        """Move rows: ``rows`` ``(B', K')`` holds, for each image that stays, its new rows.

        Images keep their order and may only be dropped, so the grid moves only then: this is the
        only way rows ever move.
        """
        grid, keys = self.grid, self.keys
        if len(rows) != len(grid):
            images = rows[:, 0] // (len(self.hidden) // len(grid))
            grid, keys = grid[images], keys[images]
        flat = rows.flatten()
        return DecoderState(grid, keys, self.hidden[flat], self.cell[flat])


class _Parts(NamedTuple):
    """How the parts of a position are got, for its rows alone or as one of many positions."""

    outer: Callable[[Tensor], Sequence[Tensor]]
    """from the hidden state, its products for the cell, the gate and the attention"""
    look: Callable[[Tensor], tuple[Tensor, Tensor]]
    """from the attention's query, the context and the weights"""
    inner: Callable[[Tensor], Tensor]
    """from the gated context, the cell's product of the word and of it"""


_CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Decoder(nn.Module):
    """An RNN whose state the image seeds, and which sees the grid through gated attention.

    Sources: Vinyals et al., "Show and Tell" (2015), for the plain form (``attention = false``);
    Xu et al., "Show, Attend and Tell" (2015), sections 3.1.2 and 4.2.1, for attention and its
    gate; Press and Wolf (2017) for the tied output. Cells: Hochreiter and Schmidhuber (1997),
    Cho et al. (2014), Elman (1990).
    """

    def __init__(self, config: DecoderConfig, grid_width: int, vocabulary_size: int) -> None:
        """Build a decoder over V words that reads grids of width D."""
        super().__init__()
        hidden, embedding = config.hidden, config.embedding
        context = grid_width if config.attention else 0
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self._widths = [hidden, hidden if config.cell == "lstm" else 0]
        self.initial = nn.Linear(grid_width, sum(self._widths))
        # For its weights: what it computes is in ``recur``.
        self.cell = _CELLS[config.cell](embedding + context, hidden)
        self._kind = config.cell
        self.attention: Attention | None = None
        if config.attention:
            self.attention = Attention(grid_width, hidden, config.attention_width)
            self.gate = nn.Linear(hidden, grid_width)
        self.fuse = nn.Linear(hidden + context, embedding)
        self.output = nn.Linear(embedding, vocabulary_size)
        self.tied = config.tied
        self.tie()
        self.dropout = _Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        nn.init.zeros_(self.output.bias)

    def tie(self) -> None:
        """Make the output share the embedding's weight again, where the config says so."""
        if self.tied:
            self.output.weight = self.embedding.weight

    def start(self, grid: Tensor) -> DecoderState:
        """Return the state before the first word: one row an image, ``grid`` ``(B, N, D)``."""
        hidden, cell = torch.split(torch.tanh(self.initial(grid.mean(dim=1))), self._widths, dim=-1)
        keys = grid[:, :, :0] if self.attention is None else self.attention.project(grid)
        return DecoderState(grid, keys, hidden, cell)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word a row: ``(R,)`` to logits ``(R, V)``, weights ``(R, N)`` and the state.

        Without attention the weights are uniform.
        """
        grid, keys, hidden, cell = state
        look = partial(self._look, keys, lambda weights: weights.to(grid.dtype) @ grid)
        linear = partial(F.linear, weight=self.cell.weight_ih, bias=self.cell.bias_ih)
        parts = _Parts(self._state_products, look, self._input_product(tokens, linear))
        read, weights, hidden, cell = self._advance(hidden, cell, parts)
        return self._logits(read), weights, state._replace(hidden=hidden, cell=cell)

    def forward(
        self,
        grid: Tensor,
        tokens: Tensor,
        keep: Tensor | None = None,
        own_words: float = 0.0,
        truncation: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing: ``(B, N, D)`` and ``(R, L)`` to logits ``(R, L, V)`` and weights.

        ``tokens`` begins with BOS; K = R / B consecutive rows belong to one image. The weights
        are ``(R, L, N)``. ``keep``, ``(R, L)`` of bool, asks for the logits of M positions alone,
        ``(M, V)``. What comes after a row's last of them is not computed, and its weights are 0;
        it is quickest with each image's captions from the longest to the shortest.

        ``own_words`` is the share of words that are not the given ones, but drawn from what the
        decoder said before (Bengio et al., "Scheduled Sampling", 2015). Gradients go back through
        the state for at most ``truncation`` positions, or all the way if it is 0.
        """
        packed = pack(torch.ones_like(tokens) if keep is None else keep, len(grid))
        reads, weights = self._unroll(grid, tokens, packed, own_words, truncation)
        places, reached = packed.places, packed.reached
        wanted = places.flatten() if keep is None else places[keep]
        logits = self._logits(reads.index_select(0, wanted))  # much quicker backward than reads[…]
        shaped = logits.view(*tokens.shape, -1) if keep is None else logits
        return shaped, weights[places] * reached[:, :, None]

    def _unroll(
        self, grid: Tensor, tokens: Tensor, packed: Packed, own_words: float, truncation: int
    ) -> tuple[Tensor, Tensor]:
        """Return what the rows of all positions read ``(P, H + D)``, and their weights ``(P, N)``.

        ``tokens`` ``(R, L)``, ``own_words`` and ``truncation`` are those of ``forward``.
        """
        _, keys, *state = self.start(grid)
        hidden, cell = (x[packed.order // (len(tokens) // len(grid))] for x in state)
        sizes, columns = packed.sizes, tokens[packed.order].unbind(dim=1)
        given = [words[:size] for words, size in zip(columns, sizes, strict=False)]
        known = None if own_words else torch.cat(given)
        product = self._input_layer(known, sizes, hidden.dtype)
        inner: Callable[[Tensor], Tensor] = product
        outer = self._state_layer(sizes, hidden.dtype)
        sums = self._sums_layer(grid, packed.ranks)
        reads: list[Tensor] = []
        weights: list[Tensor] = []
        for position, (words, seats) in enumerate(zip(given, packed.seats, strict=True)):
            hidden, cell = hidden[: len(words)], cell[: len(words)]
            if truncation and position and position % truncation == 0:
                hidden, cell = hidden.detach(), cell.detach()
            if own_words:
                words = self._mix(words, reads[-1], own_words) if position else words
                inner = self._input_product(words, product)
            look = partial(self._look_from, keys, sums, seats, packed.ranks[position])
            read, weight, hidden, cell = self._advance(hidden, cell, _Parts(outer, look, inner))
            reads.append(read)
            weights.append(weight)
        return torch.cat(reads), torch.cat(weights)

    @torch.no_grad()
    def _mix(self, given: Tensor, read: Tensor, share: float) -> Tensor:
        """Return the words ``(R,)``, some drawn from what the first R rows have read last."""
        own = (torch.rand(len(given), device=given.device) < share).nonzero()[:, 0]
        logits = self._logits(read[own]).float()
        # The Gumbel trick, which unlike torch.multinomial also takes what is not finite: such a
        # step is left out further on.
        drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
        return given.index_copy(0, own, drawn)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return self.dropout(embedded)  # type: ignore[no-any-return]

    def _input_product(
        self, tokens: Tensor, linear: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Return how the cell's product of each row's word and context is got from the context."""
        embedded = self._embed(tokens)
        return lambda context: linear(torch.cat([embedded, context], dim=-1))

    def _input_layer(
        self, tokens: Tensor | None, sizes: Sequence[int], dtype: torch.dtype
    ) -> Products:
        """Return the cell's product at all positions of ``sizes`` rows; of words now, if known."""
        weight, bias = self.cell.weight_ih.to(dtype), self.cell.bias_ih.to(dtype)
        given = weight.new_empty(sum(sizes), 0) if tokens is None else self._embed(tokens)
        return layer(weight, bias, given, sizes)

    def _state_products(self, hidden: Tensor) -> Sequence[Tensor]:
        outer = F.linear(hidden, self.cell.weight_hh, self.cell.bias_hh)
        if self.attention is None:
            return outer, hidden[:, :0], hidden[:, :0]
        return outer, self.gate(hidden), self.attention.query(hidden)

    def _state_layer(
        self, sizes: Sequence[int], dtype: torch.dtype
    ) -> Callable[[Tensor], Sequence[Tensor]]:
        """Return ``_state_products`` at all positions, one after the other, of ``sizes`` rows."""
        weights, biases = [self.cell.weight_hh], [self.cell.bias_hh]
        if self.attention is not None:
            query = self.attention.query.weight
            weights += [self.gate.weight, query]
            biases += [self.gate.bias, query.new_zeros(len(query))]
        weight, bias = torch.cat(weights).to(dtype), torch.cat(biases).to(dtype)
        product = layer(weight, bias, weight.new_empty(sum(sizes), 0), sizes)
        widths = [*map(len, weights), 0, 0][:3]  # without attention, nothing is for it
        return lambda hidden: torch.split(product(hidden), widths, dim=-1)

    @staticmethod
    def _sums_layer(grid: Tensor, ranks: Sequence[int]) -> Products:
        """Return the sums over cells at all positions: of ``ranks`` rows of each image."""
        nothing = grid.new_zeros(()).expand(len(grid), sum(ranks), grid.shape[2])
        return Products(nothing, grid, ranks)

    def _logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(torch.tanh(self.fuse(self.dropout(read)))))
        return logits

    def _look(
        self, keys: Tensor, sums: Callable[[Tensor], Tensor], query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the context and the weights of rows, K consecutive ones an image.

        ``sums`` takes the sums over cells: weights ``(B, K, N)`` to ``(B, K, D)``.
        """
        if self.attention is None:
            cells = keys.shape[1]
            return query, keys.new_full((len(query), cells), 1.0 / cells)
        weights = self.attention(query, keys)
        return sums(weights).flatten(0, 1), weights.flatten(0, 1)

    def _look_from(
        self,
        keys: Tensor,
        sums: Callable[[Tensor], Tensor],
        seats: Tensor,
        ranks: int,
        query: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the same of any rows: each has its seat among ``ranks`` of each image."""
        each = query.new_zeros(len(keys) * ranks, query.shape[1]).index_copy(0, seats, query)
        context, weights = self._look(keys, sums, each)
        return context.index_select(0, seats), weights.index_select(0, seats)

    def _advance(
        self, hidden: Tensor, cell: Tensor, parts: _Parts
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what is read off a position, the weights, and the next hidden state and cell."""
        outer, gate, query = parts.outer(hidden)
        context, weights = parts.look(query)
        context = torch.sigmoid(gate) * context
        hidden, cell = recur(self._kind, parts.inner(context), outer, hidden, cell)
        return torch.cat([hidden, context], dim=-1), weights, hidden, cell


class _Dropout(nn.Dropout):
    """Dropout with p < 1, whose draws on a processor cost less than half of torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.is_cuda:
            return super().forward(x)
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * kept.to(x.dtype).div_(1.0 - self.p)
