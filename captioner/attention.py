"""Soft attention over the cells of the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Attention"]


# e^80 is a float32. Keys and queries beyond this would matter only where the two cancel: the tanh
# of 10 is 1 to the last bit.
_STEEPEST = 40.0


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

    def forward(self, query: Tensor, keys: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context ``(R, D)`` and the weights ``(R, N)`` of each row.

        ``query``, ``(R, A)``, is W_q h; ``keys``, ``(B, N, A)``, is ``self.project(grid)``,
        computed once an image; ``grid`` is ``(B, N, D)``. K = R / B consecutive rows belong to
        one image.
        """
        images, cells, width = keys.shape
        steep = _steep(query).view(images, -1, width)
        energy = _Energy.apply(keys, steep, self.energy.weight[0].to(keys.dtype))
        weights = torch.softmax(energy, dim=-1)
        context = torch.bmm(weights.to(grid.dtype), grid)
        return context.flatten(0, 1), weights.view(-1, cells)


class _Energy(torch.autograd.Function):
    """-2 v · s with s = 1 / (1 + e^2k e^2q), of each query and cell: ``(B, K, N)``.

    The derivative of s by its exponent is -s (1 - s), so the gradients of keys and queries are sums
    of one tensor; autograd would go through several of its size, the largest of a step.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, energy: Tensor) -> Tensor:
        share = torch.addcmul(keys.new_ones(()), keys[:, None], query[:, :, None]).reciprocal_()
        ctx.save_for_backward(keys, query, energy, share)
        return share @ (-2.0 * energy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, energy, share = ctx.saved_tensors
        gradient = gradient.to(share.dtype)
        slope = torch.addcmul(share, share, share, value=-1.0).mul_(gradient[..., None])
        twice = 2.0 * energy
        of_keys = slope.sum(dim=1).mul_(twice).div_(keys)
        of_query = slope.sum(dim=2).mul_(twice).div_(query)
        return of_keys, of_query, (gradient.flatten() @ share.flatten(0, 2)).mul_(-2.0)


def _steep(x: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.exp(2.0 * exact.clamp(-_STEEPEST, _STEEPEST))
