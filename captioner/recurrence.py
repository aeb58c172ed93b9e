"""What an RNN does at many positions: which rows go on, linear layers, and cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Layer", "Packed", "pack", "recur"]


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


class Layer:
    """A linear layer at each position of a recurrence, whose gradient is one product for them all.

    A part of what it reads, the ``given``, may be there from the beginning: it is multiplied at
    once. The rest comes at each position. Autograd alone would make the weight's gradient at each
    position and add it to the others', which for the rows of one step costs more than the product.

    All positions must have been called before a backward pass, and their rows be left as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor, given: Tensor, sizes: Sequence[int]) -> None:
        """Take ``weight`` ``(O, I)`` and ``bias`` ``(O,)``, in the number type to compute with.

        ``given`` is ``(P, I')`` with 0 <= I' <= I, first the rows of the first position;
        ``sizes`` is how many rows each position has, P in all.
        """
        self._rows: list[Tensor] = []
        self._rest = weight.detach()[:, given.shape[1] :].t()
        begun: Tensor = _Begun.apply(given.to(weight.dtype), weight, bias, self._rows)
        self._begun = iter(torch.split(begun, list(sizes)))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return what the next position's rows ``(R, I - I')`` give, with its given: ``(R, O)``."""
        rows = rows.to(self._rest.dtype)
        self._rows.append(rows.detach())
        return torch.addmm(next(self._begun), rows, self._rest)


class _Begun(torch.autograd.Function):
    """The given times its part of the weight, plus the bias: ``(P, O)``.

    To it the product with the rest is added, position by position. So its gradient is that of the
    whole layer's result, and the rest, ``later``, is known when it comes.
    """

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight: Tensor, bias: Tensor, later: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.later = later
        width = given.shape[1]
        if not width:
            return bias.expand(len(given), -1)
        return torch.addmm(bias, given, weight[:, :width].t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        given, weight = ctx.saved_tensors
        of_given = gradient @ weight[:, : given.shape[1]]
        read = [given, torch.cat(ctx.later)]
        of_weight = torch.cat([gradient.t() @ rows for rows in read], dim=1)
        return of_given, of_weight, gradient.sum(dim=0), None


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
