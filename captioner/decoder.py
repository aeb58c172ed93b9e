"""The one-to-many LSTM that writes captions, and tags, from a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    """``(R, H)``"""

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


class Decoder(nn.Module):
    """An LSTM whose state the image seeds, and which sees the grid through gated attention.

    Sources: Vinyals et al., "Show and Tell" (2015), for the plain form (``attention = false``);
    Xu et al., "Show, Attend and Tell" (2015), sections 3.1.2 and 4.2.1, for attention and its
    gate; Press and Wolf (2017) for the tied output.
    """

    def __init__(self, config: DecoderConfig, grid_width: int, vocabulary_size: int) -> None:
        """Build a decoder over V words that reads grids of width D."""
        super().__init__()
        hidden, embedding = config.hidden, config.embedding
        context = grid_width if config.attention else 0
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.initial = nn.Linear(grid_width, 2 * hidden)
        self.cell = nn.LSTMCell(embedding + context, hidden)
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
        hidden, cell = torch.tanh(self.initial(grid.mean(dim=1))).chunk(2, dim=-1)
        keys = grid[:, :, :0] if self.attention is None else self.attention.project(grid)
        return DecoderState(grid, keys, hidden, cell)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word a row: ``(R,)`` to logits ``(R, V)``, weights ``(R, N)`` and the state.

        Without attention the weights are uniform.
        """
        features, weights, state = self._advance(self._embed(tokens), state)
        return self.output(self.dropout(features)), weights, state

    def forward(
        self, grid: Tensor, tokens: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing: ``(B, N, D)`` and ``(R, L)`` to logits ``(R, L, V)`` and weights.

        ``tokens`` begins with BOS; K = R / B consecutive rows belong to one image. The weights
        are ``(R, L, N)``. ``keep``, ``(R, L)`` of bool, asks for the logits of P positions alone,
        ``(P, V)``: no time is spent on padding.
        """
        rows = torch.arange(len(grid), device=grid.device)[:, None]
        state = self.start(grid).select(rows.expand(-1, len(tokens) // len(grid)))
        features, weights = [], []
        for embedded in self._embed(tokens).unbind(dim=1):
            feature, weight, state = self._advance(embedded, state)
            features.append(feature)
            weights.append(weight)
        stacked = self.dropout(torch.stack(features, dim=1))
        kept = stacked if keep is None else stacked[keep]
        return self.output(kept), torch.stack(weights, dim=1)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return self.dropout(embedded)  # type: ignore[no-any-return]

    def _advance(
        self, embedded: Tensor, state: DecoderState
    ) -> tuple[Tensor, Tensor, DecoderState]:
        grid, keys, hidden, cell = state
        if self.attention is None:
            weights = grid.new_full((len(hidden), grid.shape[1]), 1.0 / grid.shape[1])
            hidden, cell = self.cell(embedded, (hidden, cell))
            fused = self.fuse(self.dropout(hidden))
        else:
            context, weights = self.attention(hidden, keys, grid)
            context = torch.sigmoid(self.gate(hidden)) * context
            hidden, cell = self.cell(torch.cat([embedded, context], dim=-1), (hidden, cell))
            fused = self.fuse(self.dropout(torch.cat([hidden, context], dim=-1)))
        return torch.tanh(fused), weights, DecoderState(grid, keys, hidden, cell)
