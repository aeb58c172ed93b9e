"""The one-to-many RNN, an LSTM by default, that writes captions, and tags, from a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import DecoderConfig
from captioner.model.attention import Attention
from captioner.model.packing import PackedCell, PackedLinear, can_pack, copy_for_inference
from captioner.model.recurrence import Packed, pack, recur

__all__ = ["Decoder", "DecoderState", "Dropout"]


class DecoderState(NamedTuple):
    """A decoder's state between two steps; K = R / B consecutive rows share an image."""

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
        hidden, cell = (x.index_select(0, flat) for x in (self.hidden, self.cell))
        return DecoderState(grid, keys, hidden, cell)


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
        self.cell: nn.RNNCellBase | PackedCell
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
        self.dropout = Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        nn.init.zeros_(self.output.bias)

    def tie(self) -> None:
        """Make the output share the embedding's weight again, where the config says so."""
        if self.tied:
            self.output.weight = self.embedding.weight

    def packed(self) -> Decoder:
        """Return a copy for inference in which the products of a step are quicker on a CPU.

        Elsewhere, and in another precision than float32, it is this decoder itself. The copy
        shares all other tensors. What it computes is the same within rounding.
        """
        if isinstance(self.cell, PackedCell) or not can_pack(self.output.weight):
            return self
        decoder = copy_for_inference(self)
        decoder.cell = PackedCell(self.cell)
        layers: list[tuple[nn.Module, str]] = [(decoder, "fuse"), (decoder, "output")]
        if decoder.attention is not None:
            layers += [(decoder, "gate"), (decoder.attention, "query")]
        for module, name in layers:
            layer = getattr(module, name)
            setattr(module, name, PackedLinear(layer.weight, layer.bias))
        return decoder

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
        mask: Tensor | None = None,
        own_words: float = 0.0,
        truncation: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing: return logits ``(R, L, V)`` and weights ``(R, L, N)``.

        Args:
            grid: The grid of each image, ``(B, N, D)``.
            tokens: The words to read, ``(R, L)``, which begin with BOS; K = R / B consecutive rows
                belong to one image.
            mask: Where logits are wanted, ``(R, L)`` of bool: then those of these M positions alone
                are returned, ``(M, V)``. Nothing is computed after a row's last true position, and
                the weights there are 0. It is quickest where the captions of each image are sorted
                from the longest to the shortest.
            own_words: The share of words that are drawn from the decoder's own distribution in
                place of the given ones (Bengio et al., "Scheduled Sampling", 2015).
            truncation: The number of positions after which gradients stop going back through the
                state; 0 is never.
        """
        packed = pack(torch.ones_like(tokens) if mask is None else mask, len(grid))
        reads, weights = self._unroll(grid, tokens, packed, own_words, truncation)
        wanted = packed.packed_index.flatten() if mask is None else packed.packed_index[mask]
        logits = self._logits(reads.index_select(0, wanted))  # much quicker backward than reads[…]
        shaped = logits.view(*tokens.shape, -1) if mask is None else logits
        return shaped, weights[packed.packed_index] * packed.mask[:, :, None]

    def _unroll(
        self, grid: Tensor, tokens: Tensor, packed: Packed, own_words: float, truncation: int
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states with contexts ``(P, H + D)`` and the weights ``(P, N)``.

        Args:
            grid: As in ``forward``.
            tokens: As in ``forward``.
            packed: The rows of ``tokens`` without their padding.
            own_words: As in ``forward``.
            truncation: As in ``forward``.
        """
        sizes, state = packed.sizes, self.start(grid)
        images = packed.order // (len(tokens) // len(grid))  # of each row, longest first
        hidden, cell = (x.index_select(0, images) for x in (state.hidden, state.cell))
        columns = tokens[packed.order].unbind(dim=1)
        given = [words[:size] for words, size in zip(columns, sizes, strict=False)]
        # Known words are embedded at once: the gradient of the whole vocabulary is made only once.
        embedded = None if own_words else torch.split(self._embed(torch.cat(given)), sizes)
        reads: list[Tensor] = []
        weights: list[Tensor] = []
        for position, words in enumerate(given):
            # Rows that have ended are the last ones.
            hidden, cell = hidden[: len(words)], cell[: len(words)]
            if truncation and position and position % truncation == 0:
                hidden, cell = hidden.detach(), cell.detach()
            if embedded is None:
                words = self._mix(words, reads[-1], own_words) if position else words
            x = self._embed(words) if embedded is None else embedded[position]
            layout = packed.padded_index[position], packed.rows_per_image[position]
            state = state._replace(hidden=hidden, cell=cell)
            read, weight, (_, _, hidden, cell) = self._advance(x, state, layout)
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

    def _advance(
        self, embedded: Tensor, state: DecoderState, layout: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word a row, in search and in teacher forcing alike.

        Args:
            embedded: The words, ``(R, E)``.
            state: The state before them.
            layout: As in ``_attend``.

        Returns:
            The hidden state with the gated context ``(R, H + D)``, the weights ``(R, N)``, and the
            state after the words.
        """
        context, weights = self._attend(state, layout)
        inner, outer = self._products(torch.cat([embedded, context], dim=-1), state.hidden)
        hidden, cell = recur(self._kind, inner, outer, state.hidden, state.cell)
        state = state._replace(hidden=hidden, cell=cell)
        return torch.cat([hidden, context], dim=-1), weights, state

    def _products(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cell's products with its input ``(R, E + D)`` and with the hidden state."""
        cell = self.cell
        if isinstance(cell, PackedCell):
            return cell.inner(x), cell.outer(hidden)
        inner = F.linear(x, cell.weight_ih, cell.bias_ih)
        return inner, F.linear(hidden, cell.weight_hh, cell.bias_hh)

    def _attend(
        self, state: DecoderState, layout: tuple[Tensor, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gated context ``(R, D)`` and the weights ``(R, N)``.

        Without ``layout`` the rows are K consecutive ones an image. With it they are any rows:
        their index in a padded layout, and the number of rows of an image that it has.
        """
        grid, keys, hidden = state.grid, state.keys, state.hidden
        if self.attention is None:
            cells = grid.shape[1]
            return hidden[:, :0], keys.new_full((len(hidden), cells), 1.0 / cells)
        query = self.attention.query(hidden)
        if layout is not None:
            # The matrix products of an image need as many rows for each image: pad with zeros.
            index, rows = layout
            query = query.new_zeros(len(keys) * rows, query.shape[1]).index_copy(0, index, query)
        weights = self.attention(query, keys)
        context = torch.bmm(weights.to(grid.dtype), grid).flatten(0, 1)
        weights = weights.flatten(0, 1)
        if layout is not None:
            context, weights = (x.index_select(0, index) for x in (context, weights))
        return torch.sigmoid(self.gate(hidden)) * context, weights

    def _logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(torch.tanh(self.fuse(self.dropout(read)))))
        return logits


class Dropout(nn.Dropout):
    """Dropout with p < 1 that takes less than half the time of torch's own on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, of any shape, with a share p of its numbers set to 0 while training."""
        if not self.training or not self.p:
            return x
        if x.is_cuda:
            return super().forward(x)
        # Drawn in float32 whatever x has: bfloat16 has only 256 numbers between 0.5 and 1.
        scale = torch.rand(x.shape, device=x.device).ge_(self.p).div_(1.0 - self.p)
        return x * scale.to(x.dtype)
