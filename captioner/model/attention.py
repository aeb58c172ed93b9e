"""Soft attention over the cells of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Attention"]


# e^80 is a float32. Keys and queries beyond this would matter only where the two cancel: the tanh
# of 10 is 1 to the last bit.
_STEEPEST = 40.0

# So many float32, a megabyte, lie in the cache of one core of a processor.
_CACHED = 2**18


class Attention(nn.Module):
    """Additive attention: e_n = v · tanh(W_k g_n + W_q h), weights = softmax(e).

    Computed as tanh(x + y) = 1 - 2 / (1 + e^2x e^2y), in float32: so a step has no transcendental
    function of all cells, only of the query. The sum of v, alike for all cells, is left out.

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
        """Return e^2k for the keys k = W_k g ``(B, N, A)`` of a grid ``(B, N, D)``."""
        return _steep(self.keys(grid))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the weights ``(B, K, N)`` of queries, of which K = R / B ask about each image.

        ``query``, ``(R, A)``, is W_q h; ``keys``, ``(B, N, A)``, is ``self.project(grid)``,
        computed once an image.
        """
        steep = _steep(query).view(len(keys), -1, keys.shape[2])
        energy = _Energy.apply(keys, steep, self.energy.weight[0].to(keys.dtype))
        return torch.softmax(energy, dim=-1)


class _Energy(torch.autograd.Function):
    """-2 v · s with s = 1 / (1 + e^2k e^2q), of each query and cell: ``(B, K, N)``.

    The derivative of s by its exponent is -s (1 - s), so the gradients of keys and queries are sums
    of one tensor; autograd would go through several of its size, the largest of a step. It is not
    kept, and on a processor it is never whole: a few images at a time stay in the cache, and to
    compute s again there is quicker than to fetch it.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, energy: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, energy)
        twice = -2.0 * energy
        with torch.autocast(keys.device.type, enabled=False):
            return torch.cat([_share(k, q) @ twice for k, q in _few_by_few(keys, query)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, energy = ctx.saved_tensors
        parts = _few_by_few(keys, query, gradient.to(keys.dtype))
        sums = [_sums(_share(k, q), g) for k, q, g in parts]
        of_keys, of_query, of_energy = zip(*sums, strict=True)
        twice = 2.0 * energy
        return (
            torch.cat(of_keys).mul_(twice).div_(keys),
            torch.cat(of_query).mul_(twice).div_(query),
            torch.stack(of_energy).sum(dim=0).mul_(-2.0),
        )


def _few_by_few(keys: Tensor, query: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through the images: all at once, but on a processor few enough for its cache."""
    few = len(keys)
    if keys.device.type == "cpu":
        few = max(1, _CACHED // (query.shape[1] * keys[0].numel()))
    return zip(*(torch.split(x, few) for x in (keys, query, *others)), strict=True)


def _share(keys: Tensor, query: Tensor) -> Tensor:
    """Return s of each query and cell: ``(B, K, N, A)``."""
    one = keys.new_ones(())
    return torch.addcmul(one, keys[:, None], query[:, :, None]).reciprocal_()


def _sums(share: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s's part in the gradients of keys, queries and v, for that of the energies."""
    slope = torch.addcmul(share, share, share, value=-1.0).mul_(gradient[..., None])
    return slope.sum(dim=1), slope.sum(dim=2), gradient.flatten() @ share.flatten(0, 2)


def _steep(x: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.exp(2.0 * exact.clamp(-_STEEPEST, _STEEPEST))
