"""Cross-entropy over time."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from captioner.vocabulary import PAD

__all__ = ["sequence_loss"]


def sequence_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over time, in nats, of the positions that are not padding.

    ``logits`` is ``(…, V)`` and ``targets`` ``(…)``, PAD where a caption has ended.
    Label smoothing as in Szegedy et al. (2016), section 7.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
    )
