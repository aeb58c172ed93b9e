"""Soft attention over the cells of the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Attention"]


class Attention(nn.Module):
    """Additive attention: e_n = v · tanh(W_k g_n + W_q h), weights = softmax(e).

    Source: Bahdanau et al. (2015), appendix A.1.2; Xu et al., "Show, Attend and Tell" (2015),
    equations 4 to 6.
    """

    def __init__(self, grid_width: int, hidden: int, width: int) -> None:
        """Attend over cells of width D with states of width H, in a space of width A."""
        super().__init__()
        self.keys = nn.Linear(grid_width, width)
        self.query = nn.Linear(hidden, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)

    def forward(self, hidden: Tensor, keys: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context ``(R, D)`` and the weights ``(R, N)`` of each row.

        ``hidden`` is ``(R, H)``; ``keys``, ``(B, N, A)``, is ``self.keys(grid)``, computed once
        an image; ``grid`` is ``(B, N, D)``. K = R / B consecutive rows belong to one image.
        """
        images, cells, width = keys.shape
        query = self.query(hidden).view(images, -1, 1, width)
        energy = self.energy(torch.tanh(keys.unsqueeze(1) + query)).squeeze(-1)
        weights = torch.softmax(energy, dim=-1)
        context = torch.bmm(weights.to(grid.dtype), grid)
        return context.flatten(0, 1), weights.view(-1, cells)
