"""The losses of training, each a sum over positions or captions.

The caller divides a sum by the number of positions or captions in the whole step. One process or
one micro-batch knows only its own share of this number.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.data.vocabulary import PAD

__all__ = ["attention_penalty", "no_loss", "sequence_loss"]


def sequence_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the sum of the cross-entropy, in nats, over positions that are not padding.

    ``logits`` is ``(…, V)``. ``targets`` is ``(…)``, PAD where a caption has ended.
    Label smoothing is that of Szegedy et al. (2016), section 7.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def attention_penalty(weights: Tensor, keep: Tensor) -> Tensor:
    """Return the sum over captions of how unevenly attention was spread over the grid.

    ``weights`` is ``(R, L, N)``. ``keep`` is the mask ``(R, L)``, false at padding. A caption costs
    the mean over cells of (1 - the sum of the cell's weights over time)².
    Source: Xu et al., "Show, Attend and Tell" (2015), equation 14. The sum over cells of the
    source is a mean here, so that the grid's size does not matter.
    """
    looked = (weights.float() * keep[:, :, None]).sum(dim=1)
    return ((1.0 - looked).square().mean(dim=-1) * keep.any(dim=1)).sum()


def no_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return 0, with a gradient of 0 at every parameter that learns.

    For a process without a photograph in this step: the other processes wait for its gradients.
    """
    terms = [parameter.sum() * 0.0 for parameter in parameters if parameter.requires_grad]
    return torch.stack(terms).sum()
