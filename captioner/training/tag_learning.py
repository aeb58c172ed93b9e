"""Learning tags: a set, that the tag decoder writes one after the other, and each tag alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import TagsConfig
from captioner.data.dataset import Batch
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, SPECIAL
from captioner.model.decoder import Decoder
from captioner.model.device import autocast
from captioner.model.model import CaptionModel
from captioner.training.losses import no_loss

__all__ = ["TagLearning", "TagLoss", "decoder_loss", "head_loss", "tag_priorities"]


def tag_priorities(tags: TagSet, order: str) -> Tensor | None:
    """Return which of a photograph's tags comes first, the highest: ``(V,)``.

    ``order`` is as in :class:`TagsConfig`; ``None`` is for "free", which the model decides.
    """
    if order == "free":
        return None
    shares = torch.tensor([0.0] * len(SPECIAL) + list(tags.frequencies))
    return shares if order == "frequent" else -shares


def decoder_loss(
    decoder: Decoder, grid: Tensor, labels: Tensor, priorities: Tensor | None = None
) -> Tensor:
    """Return the sum of the cross-entropy, in nats, over all tags and ends.

    At each step a photograph's target is one of the tags that it has and that have not been
    written yet, and then the end. By default it is the one that the model finds likeliest, so
    that no order is punished: the minimal loss alignment of Yazici et al., "Orderless Recurrent
    Models for Multi-label Classification" (2020), step by step. Neither what has been written nor
    what is not known competes with it.

    Args:
        decoder: The tag decoder.
        grid: ``(B, N, D)``
        labels: ``(B, V)``, as in :class:`Batch`.
        priorities: ``(V,)`` from :func:`tag_priorities`.
    """
    state, tokens = decoder.start(grid), torch.full_like(labels[:, 0], BOS, dtype=torch.long)
    remaining, closed = labels == 1, labels < 0
    loss = grid.new_zeros((), dtype=torch.float32)
    while len(tokens):
        logits, _, state = decoder.step(tokens, state)
        log_probs = torch.log_softmax(logits.float().masked_fill(closed, -torch.inf), dim=-1)
        first = log_probs.detach() if priorities is None else priorities.expand_as(log_probs)
        going_on = remaining.any(dim=1)
        tokens = first.masked_fill(~remaining, -torch.inf).argmax(dim=1)
        tokens = tokens.where(going_on, torch.full_like(tokens, EOS))
        loss = loss - log_probs.gather(1, tokens[:, None]).sum()
        rows = going_on.nonzero()
        # Rows that have ended leave; ``select`` takes (B', 1), one row an image.
        state, tokens = state.select(rows), tokens[rows[:, 0]]
        remaining = remaining[rows[:, 0]].scatter(1, tokens[:, None], False)
        closed = closed[rows[:, 0]].scatter(1, tokens[:, None], True)
    return loss


def head_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the binary cross-entropy, in nats, over what is known; both ``(B, V)``."""
    known = labels >= 0
    known[:, : len(SPECIAL)] = False
    targets = (labels[known] > 0).float()
    return F.binary_cross_entropy_with_logits(logits[known].float(), targets, reduction="sum")


class TagLoss(nn.Module):
    """The loss of the tags of a batch: the tag decoder's, and the head's where there is one."""

    priorities: Tensor | None

    def __init__(self, model: CaptionModel, tags: TagSet, order: str) -> None:
        """Take the model that learns, its tags, and the order of :class:`TagsConfig`."""
        super().__init__()
        self.decoder, self.head = model.tag_decoder, model.tag_head
        self.register_buffer("priorities", tag_priorities(tags, order), persistent=False)

    def count(self, batch: Batch) -> Tensor:
        """Return how many tags and ends the decoder writes in a batch."""
        return (batch.tags > 0).sum() + len(batch.tags)

    def forward(self, grid: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over a batch of ``(B, N, D)`` and ``(B, V)``."""
        loss = decoder_loss(self.decoder, grid, labels, self.priorities)
        return loss if self.head is None else loss + head_loss(self.head(grid), labels)


class TagLearning(nn.Module):
    """The loss of a batch of features: the tag decoder and the tag head alone learn."""

    def __init__(
        self, model: CaptionModel, tags: TagSet, settings: TagsConfig, precision: torch.dtype
    ) -> None:
        """Take the model whose tags are learnt.

        Args:
            model: The model.
            tags: Its tags.
            settings: How they are learnt.
            precision: The number type of the forward pass.
        """
        super().__init__()
        self.loss, self._project = TagLoss(model, tags, settings.order), model.project
        self._precision = precision

    def begin_step(self, seed: int, step: int, steps: int) -> None:
        """Do nothing: no part of this loss depends on the step."""

    def counts(self, batch: Batch) -> Tensor:
        """Return how many tags a batch is judged on, ends included: ``(1,)``."""
        return self.loss.count(batch)[None].float()

    def forward(self, batch: Batch, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's part of the step's loss, and the same as a figure without gradient.

        ``totals`` is the sum of ``counts`` over the parts of the step.
        """
        if not len(batch.images):
            loss = no_loss(self.parameters())
            return loss, loss.detach()
        device = totals.device
        with autocast(device, self._precision):
            with torch.no_grad():
                grid = self._project(batch.images.to(device).float())
            loss = self.loss(grid, batch.tags.to(device)) / totals[0]
        return loss, loss.detach()
