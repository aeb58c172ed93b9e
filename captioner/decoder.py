"""The one-to-many RNN, an LSTM by default, that writes captions, and tags, from a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.attention import Attention
from captioner.config import DecoderConfig

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
        self.attention: Attention | None = None
        if config.attention:
            self.attention = Attention(grid_width, hidden, config.attention_width)
            self.gate = nn.Linear(hidden, grid_width)
        self.fuse = nn.Linear(hidden + context, embedding)
        self.output = nn.Linear(embedding, vocabulary_size)
        self.tied = config.tied
        self.tie()
        self.dropout = nn.Dropout(config.dropout)
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
        read, weights, state = self._advance(self._embed(tokens), state)
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
        reads: list[Tensor] = []
        weights: list[Tensor] = []
        for position, embedded in enumerate(self._embed(tokens).unbind(dim=1)):
            if own_words and position:
                embedded = self._embed(self._mix(tokens[:, position], reads[-1], own_words))
            if truncation and position and position % truncation == 0:
                state = state.detach()
            embedded = _first(embedded, images, left[position])
            read, weight, state = self._advance(embedded, state.first(left[position]))
            reads.append(_filled(read, images, captions))
            weights.append(_filled(weight, images, captions))
        stacked = torch.stack(reads, dim=1)
        kept = stacked if keep is None else stacked[keep]
        return self._logits(kept), torch.stack(weights, dim=1)

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

    def _logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(torch.tanh(self.fuse(self.dropout(read)))))
        return logits

    def _advance(
        self, embedded: Tensor, state: DecoderState
    ) -> tuple[Tensor, Tensor, DecoderState]:
        grid, keys, hidden, cell = state
        if self.attention is None:
            weights = grid.new_full((len(hidden), grid.shape[1]), 1.0 / grid.shape[1])
            hidden, cell = self._recur(embedded, hidden, cell)
            read = hidden
        else:
            context, weights = self.attention(hidden, keys, grid)
            context = torch.sigmoid(self.gate(hidden)) * context
            hidden, cell = self._recur(torch.cat([embedded, context], dim=-1), hidden, cell)
            read = torch.cat([hidden, context], dim=-1)
        return read, weights, DecoderState(grid, keys, hidden, cell)

    def _recur(self, seen: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.cell, nn.LSTMCell):
            hidden, cell = self.cell(seen, (hidden, cell))
            return hidden, cell
        return self.cell(seen, hidden), cell


def _left(keep: Tensor, images: int) -> list[int]:
    """Return how many rows an image has to go on with at each position, at most."""
    wanted = keep.view(images, -1, keep.shape[1]).any(dim=0)
    ranks = torch.arange(1, len(wanted) + 1, device=keep.device)[:, None]
    last = (wanted * ranks).amax(dim=0).clamp(min=1)
    found: list[int] = last.flip(0).cummax(dim=0).values.flip(0).tolist()
    return found


def _first(rows: Tensor, images: int, captions: int) -> Tensor:
    return _by_image(rows, images)[:, :captions].flatten(0, 1)


def _filled(rows: Tensor, images: int, captions: int) -> Tensor:
    """Add rows of zeros, so that each image has as many as it has captions."""
    some = _by_image(rows, images)
    return F.pad(some, (0, 0, 0, captions - some.shape[1])).flatten(0, 1)


def _by_image(rows: Tensor, images: int) -> Tensor:
    return rows.view(images, len(rows) // images, rows.shape[1])
