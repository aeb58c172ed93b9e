"""The one-to-many RNN, an LSTM by default, that writes captions, and tags, from a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.attention import Attention
from captioner.config import DecoderConfig
from captioner.recurrence import Layer, recur

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

    def first(self, captions: int) -> DecoderState:
        """Keep the first ``captions`` rows of each image."""
        images = len(self.grid)
        hidden, cell = (_first(rows, images, captions) for rows in (self.hidden, self.cell))
        return self._replace(hidden=hidden, cell=cell)

    def detach(self) -> DecoderState:
        """Return the same state, through which no gradient goes back to earlier positions."""
        return self._replace(hidden=self.hidden.detach(), cell=self.cell.detach())


# From a context to the cell's product of it and a word; from a hidden state to its products for the
# cell, the gate and the attention.
_FromContext = Callable[[Tensor], Tensor]
_FromHidden = Callable[[Tensor], Sequence[Tensor]]

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
        read, weights, state = self._advance(
            state, self._input_product(tokens), self._state_products
        )
        return self._logits(read), weights, state

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
        are ``(R, L, N)``. ``keep``, ``(R, L)`` of bool, asks for the logits of P positions alone,
        ``(P, V)``. No position is computed that no caption of its rank has left: it is quickest
        with each image's captions from the longest to the shortest. Weights are 0 there.

        ``own_words`` is the share of words that are not the given ones, but drawn from what the
        decoder said before (Bengio et al., "Scheduled Sampling", 2015). Gradients go back through
        the state for at most ``truncation`` positions, or all the way if it is 0.
        """
        images, captions = len(grid), len(tokens) // len(grid)
        left = [captions] * tokens.shape[1] if keep is None else _left(keep, images)
        rows = torch.arange(images, device=grid.device)[:, None]
        state = self.start(grid).select(rows.expand(-1, captions))
        given = [_first(t, images, n) for t, n in zip(tokens.unbind(dim=1), left, strict=True)]
        reads, weights = self._unroll(given, state, own_words, truncation)
        places, reached = _places(left, images, captions, grid.device)
        logits = self._logits(reads[places if keep is None else places[keep]])
        return logits, weights[places] * reached[:, :, None]

    def _unroll(
        self, given: list[Tensor], state: DecoderState, own_words: float, truncation: int
    ) -> tuple[Tensor, Tensor]:
        """Return what the rows of all positions read ``(P, H + D)``, and their weights ``(P, N)``.

        ``given`` is the tokens of each position: of the first captions of each image, never of
        more than at the position before.
        """
        images, sizes = len(state.grid), [len(tokens) for tokens in given]
        known = 1 if own_words else len(given)  # what it says itself comes later
        inner_of = self._input_products(torch.cat(given[:known]), sizes[:known], state.hidden.dtype)
        outer_of = self._state_layer(sizes, state.hidden.dtype)
        reads: list[Tensor] = []
        weights: list[Tensor] = []
        for position, tokens in enumerate(given):
            captions = len(tokens) // images
            state = state.first(captions)
            if truncation and position and position % truncation == 0:
                state = state.detach()
            if position >= known:
                mixed = self._mix(tokens, _first(reads[-1], images, captions), own_words)
                inner_of = self._input_product(mixed)
            read, weight, state = self._advance(state, inner_of, outer_of)
            reads.append(read)
            weights.append(weight)
        return torch.cat(reads), torch.cat(weights)

    @torch.no_grad()
    def _mix(self, given: Tensor, read: Tensor, share: float) -> Tensor:
        own = (torch.rand(len(given), device=given.device) < share).nonzero()[:, 0]
        logits = self._logits(read[own]).float()
        # The Gumbel trick, which unlike torch.multinomial also takes what is not finite: such a
        # step is left out further on.
        drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
        return given.index_copy(0, own, drawn)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return self.dropout(embedded)  # type: ignore[no-any-return]

    def _input_product(self, tokens: Tensor) -> _FromContext:
        """Return how the cell's product of each row's word and context is got from the context."""
        embedded, cell = self._embed(tokens), self.cell

        def product(context: Tensor) -> Tensor:
            return F.linear(torch.cat([embedded, context], dim=-1), cell.weight_ih, cell.bias_ih)

        return product

    def _input_products(
        self, tokens: Tensor, sizes: Sequence[int], dtype: torch.dtype
    ) -> _FromContext:
        """Return the same for all positions, one after the other, of ``sizes`` rows."""
        weight, bias = self.cell.weight_ih, self.cell.bias_ih
        return Layer(weight.to(dtype), bias.to(dtype), self._embed(tokens), sizes)

    def _state_products(self, hidden: Tensor) -> Sequence[Tensor]:
        outer = F.linear(hidden, self.cell.weight_hh, self.cell.bias_hh)
        if self.attention is None:
            return outer, hidden[:, :0], hidden[:, :0]
        return outer, self.gate(hidden), self.attention.query(hidden)

    def _state_layer(self, sizes: Sequence[int], dtype: torch.dtype) -> _FromHidden:
        """Return ``_state_products`` for all positions, one after the other, of ``sizes`` rows."""
        weights, biases = [self.cell.weight_hh], [self.cell.bias_hh]
        if self.attention is not None:
            query = self.attention.query.weight
            weights += [self.gate.weight, query]
            biases += [self.gate.bias, query.new_zeros(len(query))]
        weight, bias = torch.cat(weights).to(dtype), torch.cat(biases).to(dtype)
        layer = Layer(weight, bias, weight.new_empty(sum(sizes), 0), sizes)
        widths = [*map(len, weights), 0, 0][:3]
        return lambda hidden: torch.split(layer(hidden), widths, dim=-1)

    def _logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(torch.tanh(self.fuse(self.dropout(read)))))
        return logits

    def _advance(
        self, state: DecoderState, inner_of: _FromContext, outer_of: _FromHidden
    ) -> tuple[Tensor, Tensor, DecoderState]:
        grid, keys, hidden, cell = state
        outer, gate, query = outer_of(hidden)
        if self.attention is None:
            cells = grid.shape[1]
            context, weights = gate, grid.new_full((len(hidden), cells), 1.0 / cells)
        else:
            context, weights = self.attention(query, keys, grid)
            context = torch.sigmoid(gate) * context
        hidden, cell = recur(self._kind, inner_of(context), outer, hidden, cell)
        read = torch.cat([hidden, context], dim=-1)
        return read, weights, state._replace(hidden=hidden, cell=cell)


class _Dropout(nn.Dropout):
    """Dropout with p < 1, whose draws on a processor cost less than half of torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.is_cuda:
            return super().forward(x)
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * kept.to(x.dtype).div_(1.0 - self.p)


def _left(keep: Tensor, images: int) -> list[int]:
    """Return how many rows an image has to go on with at each position, at most."""
    wanted = keep.view(images, -1, keep.shape[1]).any(dim=0)
    ranks = torch.arange(1, len(wanted) + 1, device=keep.device)[:, None]
    last = (wanted * ranks).amax(dim=0).clamp(min=1)
    found: list[int] = last.flip(0).cummax(dim=0).values.flip(0).tolist()
    return found


def _first(rows: Tensor, images: int, captions: int) -> Tensor:
    """Return the rows of each image's first captions."""
    return rows.view(images, len(rows) // images, *rows.shape[1:])[:, :captions].flatten(0, 1)


def _places(
    left: Sequence[int], images: int, captions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return where each row's positions stand among all computed, and which are: ``(R, L)``."""
    ranks = torch.arange(captions, device=device)
    reached = (ranks < torch.tensor(left, device=device)[:, None])[:, None].expand(-1, images, -1)
    places = reached.flatten().cumsum(0).view(reached.shape) - 1
    places, reached = (x.permute(1, 2, 0).flatten(0, 1) for x in (places, reached))
    return places, reached
