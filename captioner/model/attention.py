"""Soft attention over the cells of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Attention"]


# The largest magnitude of keys and queries: the sum of two is then at most 80, and e^80 is still a
# float32. A larger one would matter only where key and query cancel: the tanh of 10 is 1 to the
# last bit.
_LARGEST = 40.0

# The number of float32 values, a megabyte, that stay in the cache of one processor core.
_CACHED = 2**18


class Attention(nn.Module):
    """Additive attention: e_n = v · tanh(W_k g_n + W_q h), weights = softmax(e).

    Computed in float32 as tanh(x + y) = 1 - 2 / (1 + e^2x e^2y). The exponentials of the keys are
    taken once an image and those of the query once a row, so that a step takes no transcendental
    function of every pair of cell and row. The sum of v is left out: it is the same for all cells,
    and softmax does not see it.

    Source: Bahdanau et al. (2015), appendix A.1.2; Xu et al., "Show, Attend and Tell" (2015),
    equations 4 to 6.
    """

    def __init__(self, grid_width: int, hidden: int, width: int) -> None:
        """Attend over cells of width D with states of width H, in a space of width A."""
        super().__init__()
        self.keys = nn.Linear(grid_width, width)
        self.query = nn.Linear(hidden, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)

    def project(self, grid: Tensor) -> Tensor:
        """Return e^2k for the keys k = W_k g: ``(B, N, D)`` to ``(B, N, A)``."""
        return _squared_exponential(self.keys(grid))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the weights ``(B, K, N)`` of queries, of which K = R / B ask about each image.

        ``query``, ``(R, A)``, is W_q h; ``keys``, ``(B, N, A)``, is ``self.project(grid)``,
        computed once an image.
        """
        queries = _squared_exponential(query).view(len(keys), -1, keys.shape[2])
        # Without gradients autograd's own call would take longer than the sums.
        energies = _Energy.apply if torch.is_grad_enabled() else _energies
        energy: Tensor = energies(keys, queries, self.energy.weight[0].to(keys.dtype))
        return torch.softmax(energy, dim=-1)


class _Energy(torch.autograd.Function):
    """-2 v · s, with s = 1 / (1 + e^2k e^2q), of each query and cell, in little memory.

    The tensor s, ``(B, K, N, A)``, is the largest of a training step. Autograd would keep s at
    every position until the backward pass: 229 MB instead of 109 MB saved by the caption decoder
    for 32 photographs with 160 captions on a 7 x 7 grid, and four times that on a 14 x 14 grid.
    Here s is computed again in the backward pass. On a CPU s is not even held for all images at
    once: a few images at a time fit the cache, and computing s twice is quicker than fetching it.
    A step on features with torch's tanh and autograd takes 1.07 times as long in float32 and 1.13
    times in bfloat16 (one thread, processor time).

    The derivative of s by its exponent 2k + 2q is -s (1 - s), so that the gradients of keys and
    queries are sums of one tensor.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, queries: Tensor, energy: Tensor) -> Tensor:
        ctx.save_for_backward(keys, queries, energy)
        return _energies(keys, queries, energy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, queries, energy = ctx.saved_tensors
        chunks = _chunks(keys, queries, gradient.to(keys.dtype))
        sums = [_sums(_share(k, q), g) for k, q, g in chunks]
        of_keys, of_queries, of_energy = zip(*sums, strict=True)
        factor = 2.0 * energy
        # The derivative of s by its factor u = e^2k, not by k, is -s (1 - s) / u.
        return (
            torch.cat(of_keys).mul_(factor).div_(keys),
            torch.cat(of_queries).mul_(factor).div_(queries),
            torch.stack(of_energy).sum(dim=0).mul_(-2.0),
        )


def _energies(keys: Tensor, queries: Tensor, energy: Tensor) -> Tensor:
    factor = -2.0 * energy
    # In autocast the product would be rounded to bfloat16, which is too coarse for a softmax.
    with torch.autocast(keys.device.type, enabled=False):
        return torch.cat([_share(k, q) @ factor for k, q in _chunks(keys, queries)])


def _chunks(keys: Tensor, queries: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors by images: few enough for the cache on a CPU, all at once elsewhere."""
    images = len(keys)
    if keys.device.type == "cpu":
        images = max(1, _CACHED // (queries.shape[1] * keys.shape[1:].numel()))
    return zip(*(torch.split(x, images) for x in (keys, queries, *others)), strict=True)


def _share(keys: Tensor, queries: Tensor) -> Tensor:
    """Return s of each query and cell: ``(B, K, N, A)``."""
    one = keys.new_ones(())
    return torch.addcmul(one, keys[:, None], queries[:, :, None]).reciprocal_()


def _sums(share: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of s (1 - s) for keys and queries, and of s for v, weighted by a gradient.

    ``share`` is s, ``(B, K, N, A)``, and ``gradient`` that of the energies, ``(B, K, N)``.
    """
    slope = torch.addcmul(share, share, share, value=-1.0).mul_(gradient[..., None])
    return slope.sum(dim=1), slope.sum(dim=2), gradient.flatten() @ share.flatten(0, 2)


def _squared_exponential(x: Tensor) -> Tensor:
    """Return e^2x in float32 at least, of x bounded so that a product of two stays finite."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.exp(2.0 * exact.clamp(-_LARGEST, _LARGEST))
