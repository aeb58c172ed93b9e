"""What a decoder is to make small: sums over positions and captions, to be divided by their number.

Sums, because one process or one part of a batch knows only its own share of that number.
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

    ``logits`` is ``(…, V)`` and ``targets`` ``(…)``, PAD where a caption has ended.
    Label smoothing as in Szegedy et al. (2016), section 7.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def attention_penalty(weights: Tensor, keep: Tensor) -> Tensor:
    """Return the sum over captions of how unevenly each looked at the grid.

    ``weights`` is ``(R, L, N)``, ``keep`` ``(R, L)``: the positions that count. A caption costs the
    mean over cells of (1 - the sum of its weights over time)². Source: Xu et al., "Show, Attend and
    Tell" (2015), equation 14, whose sum over cells is a mean here, so that the grid's size does not
    matter.
    """
    looked = (weights.float() * keep[:, :, None]).sum(dim=1)
    return ((1.0 - looked).square().mean(dim=-1) * keep.any(dim=1)).sum()


def no_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return 0, with a gradient of 0 at every parameter that learns.

    For a process that has no photograph of a step: the others wait for its gradients.
    """
    terms = [parameter.sum() * 0.0 for parameter in parameters if parameter.requires_grad]
    return torch.stack(terms).sum()
