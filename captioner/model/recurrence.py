"""What an RNN does at many positions: which rows go on, products, and cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Packed", "Products", "layer", "pack", "recur"]


class Packed(NamedTuple):
    """The positions of R rows, L at most, of which each has only those that it reads: P in all.

    Rows go from the longest to the shortest, so that those that go on are always the first; K
    consecutive ones, as they were before, share an image.
    """

    order: Tensor
    """``(R,)``: which row each of them is"""
    seats: list[Tensor]
    """of each position, where the rows that go on are if each image has as many as ``ranks``"""
    ranks: list[int]
    """of each position, how many rows an image has up to the last that goes on, at most"""
    places: Tensor
    """``(R, L)``: where a row's position stands among the P"""
    reached: Tensor
    """``(R, L)``: whether it is there; its place is 0 if not"""

    @property
    def sizes(self) -> list[int]:
        """Of each position, how many rows go on."""
        return list(map(len, self.seats))


def pack(keep: Tensor, images: int) -> Packed:
    """Pack each row up to its last position in ``keep`` ``(R, L)``, or the first."""
    length = keep.shape[1]
    captions, positions = len(keep) // images, torch.arange(length, device=keep.device)
    lengths = ((positions + 1) * keep).amax(dim=1).clamp(min=1)
    order = lengths.argsort(descending=True, stable=True)
    reached = positions < lengths[:, None]
    sizes, some = reached.sum(dim=0), reached.view(images, captions, length).any(dim=0)
    ranks = (torch.arange(1, captions + 1, device=keep.device)[:, None] * some).amax(dim=0)
    places = (sizes.cumsum(0) - sizes + order.argsort()[:, None]) * reached
    counts = [pair for pair in torch.stack([sizes, ranks], dim=1).tolist() if pair[0]]
    image, rank = order // captions, order % captions
    seats = [(image * most + rank)[:size] for size, most in counts]
    return Packed(order, seats, [most for _, most in counts], places, reached)


class Products:
    """Products of what is read, position by position, with one factor; each is added to a base.

    The factor's gradient is one product for all positions. Autograd alone would make one at each
    and add it to the others', which for the rows of one step costs more than the product.

    All positions must have been called before a backward pass, and their rows be left as they are.
    """

    def __init__(self, base: Tensor, factor: Tensor, sizes: Sequence[int]) -> None:
        """Take ``base`` ``(P, O)`` and ``factor`` ``(I, O)``, both in one number type.

        Or a pair of them for each of B images, ``(B, P, O)`` and ``(B, I, O)``. The base has first
        the rows of the first position; ``sizes`` is how many rows each has, P in all.
        """
        self._rows: list[Tensor] = []
        self._factor = factor.detach()
        self._add = torch.addmm if factor.dim() == 2 else torch.baddbmm
        begun: Tensor = _Begun.apply(base, factor, self._rows)
        self._begun = iter(torch.split(begun, list(sizes), dim=-2))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return what the next position's rows ``(R, I)`` or ``(B, R, I)`` give, O wide."""
        rows = rows.to(self._factor.dtype)
        self._rows.append(rows.detach())
        return self._add(next(self._begun), rows, self._factor)


class _Begun(torch.autograd.Function):
    """The base, to which the products are added: its gradient is that of all the results.

    So with ``rows``, which are all known when it comes, the factor's gradient can be made from it.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, factor: Tensor, rows: list[Tensor]) -> Tensor:
        ctx.rows = rows
        return base.view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.cat(ctx.rows, dim=-2).mT @ gradient, None


def layer(weight: Tensor, bias: Tensor, given: Tensor, sizes: Sequence[int]) -> Products:
    """Return a linear layer, ``weight`` ``(O, I)`` and ``bias`` ``(O,)``, at each position.

    A part of what it reads may be there from the beginning: ``given``, ``(P, I')`` with
    0 <= I' <= I, is multiplied at once, and I - I' columns come at each position.
    """
    width = given.shape[1]
    known, rest = torch.split(weight, [width, weight.shape[1] - width], dim=1)
    base = F.linear(given.to(weight.dtype), known, bias) if width else bias.expand(len(given), -1)
    return Products(base, rest.t(), sizes)


def recur(
    kind: str, inner: Tensor, outer: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next hidden state and cell, both ``(R, H)``; only an LSTM has a cell.

    ``inner`` is the product of what is read, ``outer`` that of the state, ``(R, 4H)`` for an
    "lstm", ``(R, 3H)`` for a "gru" and ``(R, H)`` for an "rnn". Sources: Hochreiter and
    Schmidhuber (1997); Cho et al. (2014), equations 5 to 8, with the reset after the product, as
    torch has it; Elman (1990).
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
