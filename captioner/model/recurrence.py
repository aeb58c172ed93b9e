"""The cells of an RNN, and how the rows of teacher forcing are packed for one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "pack", "recur"]


class Packed(NamedTuple):
    """R rows of at most L positions without their padding: P positions in all.

    The rows are sorted from the longest to the shortest, so that the rows that are still active
    are always the first ones. The P positions are stored one after the other: first position 0 of
    all rows, then position 1 of those that have one, and so on. K consecutive rows, in the order
    before sorting, share an image.
    """

    order: Tensor
    """``(R,)``: the row that stands n-th, from the longest to the shortest"""
    padded_index: list[Tensor]
    """for each position t: the index of each row still active at t in the padded
    ``(B, rows_per_image[t])`` layout that batched attention needs"""
    rows_per_image: list[int]
    """for each position t: the number of rows of an image that the padded layout has"""
    packed_index: Tensor
    """``(R, L)``: the index of each position of a row among the P; 0 at padding"""
    mask: Tensor
    """``(R, L)``: true where a row has the position, false at padding"""

    @property
    def sizes(self) -> list[int]:
        """For each position, the number of rows still active."""
        return list(map(len, self.padded_index))


def pack(mask: Tensor, images: int) -> Packed:
    """Pack rows without the padding at their ends.

    A row ends after its last true position in ``mask`` ``(R, L)``; a row without one keeps its
    first position. R is a multiple of ``images``.
    """
    length = mask.shape[1]
    captions, positions = len(mask) // images, torch.arange(length, device=mask.device)
    lengths = ((positions + 1) * mask).amax(dim=1).clamp(min=1)
    order = lengths.argsort(descending=True, stable=True)
    reached = positions < lengths[:, None]
    sizes, some = reached.sum(dim=0), reached.view(images, captions, length).any(dim=0)
    # The last caption of any image that is still active says how many rows the layout needs.
    widths = (torch.arange(1, captions + 1, device=mask.device)[:, None] * some).amax(dim=0)
    # Position t of the row that stands n-th comes n places after all positions before t.
    index = (sizes.cumsum(0) - sizes + order.argsort()[:, None]) * reached
    # One transfer from the device for all positions.
    counts = [pair for pair in torch.stack([sizes, widths], dim=1).tolist() if pair[0]]
    image, caption = order // captions, order % captions
    padded_index = [(image * width + caption)[:size] for size, width in counts]
    return Packed(order, padded_index, [width for _, width in counts], index, reached)


def recur(
    kind: str, inner: Tensor, outer: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next hidden state and cell, both ``(R, H)``; only an LSTM has a cell.

    Sources: Hochreiter and Schmidhuber (1997); Cho et al. (2014), equations 5 to 8, with the reset
    after the product, as torch has it; Elman (1990).

    Args:
        kind: "lstm", "gru" or "rnn".
        inner: The input times its weights, plus bias: ``(R, 4H)`` for an "lstm", ``(R, 3H)`` for a
            "gru", ``(R, H)`` for an "rnn".
        outer: The hidden state times its weights, plus bias; as wide as ``inner``.
        hidden: The hidden state ``(R, H)``.
        cell: The cell ``(R, H)`` of an LSTM, ``(R, 0)`` otherwise.
    """
    if kind == "rnn":
        return torch.tanh(inner + outer), cell
    if kind == "gru":
        (r, z, n), (r_, z_, n_) = inner.chunk(3, dim=-1), outer.chunk(3, dim=-1)
        new = torch.tanh(n + torch.sigmoid(r + r_) * n_)
        return torch.lerp(new, hidden, torch.sigmoid(z + z_)), cell
    i, f, g, o = (inner + outer).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell
