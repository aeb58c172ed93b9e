"""Teacher forcing: each word of a person's caption is predicted from the words before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.config import Config
from captioner.data.dataset import Batch
from captioner.data.tags import TagSet
from captioner.data.vocabulary import PAD
from captioner.model.device import autocast
from captioner.model.model import CaptionModel
from captioner.training.losses import attention_penalty, no_loss, sequence_loss
from captioner.training.optimization import ramp
from captioner.training.tag_learning import TagLoss

__all__ = ["TeacherForcing"]


class TeacherForcing(nn.Module):
    """The loss of the captions plus ``tag_weight`` times the loss of the tags.

    Each loss is a mean over the tokens of a whole step; tags and the ends of lists of tags are the
    tokens of the second. A micro-batch yields its share of the mean. The losses and gradients of
    all micro-batches add up to those of the step. ``own_words`` is the present probability of
    scheduled sampling.
    """

    def __init__(
        self, model: CaptionModel, tags: TagSet, config: Config, dtype: torch.dtype
    ) -> None:
        """Take the model that learns.

        Args:
            model: The model.
            tags: Its tags.
            config: How it learns: the sections ``training``, ``tags`` and ``experimental``.
            dtype: The dtype of the forward pass.
        """
        super().__init__()
        self.model, self._dtype = model, dtype
        self._training, self._experimental = config.training, config.experimental
        self.tag_loss = TagLoss(model, tags, config.tags.order)
        self.own_words = 0.0

    def begin_step(self, seed: int, step: int, steps: int) -> None:
        """Set the probability of scheduled sampling; the loss does not depend on ``seed``."""
        self.own_words = ramp(step, steps, self._experimental.own_words)

    def counts(self, batch: Batch) -> Tensor:
        """Return the numbers of words, tags and captions of a micro-batch, ``(3,)``."""
        words, tags = batch.words[:, 1:] != PAD, self.tag_loss.count(batch)
        return torch.stack([words.sum(), tags, words.any(dim=1).sum()]).float()

    def forward(self, batch: Batch, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's share of the step's loss, and the same value without gradient.

        ``totals`` is the sum of ``counts`` over the micro-batches of all processes.
        """
        if not len(batch.images):
            loss = no_loss(self.parameters())
        else:
            with autocast(totals.device, self._dtype):
                loss = self._loss(batch, totals.clamp(min=1.0))
        return loss, loss.detach()

    def _loss(self, batch: Batch, totals: Tensor) -> Tensor:
        experimental, images = self._experimental, batch.images.to(totals.device)
        model, pixels = self.model, images.dtype == torch.uint8
        grid = model.encode(images) if pixels else model.project(images.float())

        # Targets are the inputs shifted by one: BOS is only an input, the last token only a target.
        words = batch.words.to(totals.device)
        inputs, targets = words[:, :-1], words[:, 1:]
        mask = targets != PAD
        logits, weights = model.caption_decoder(
            grid, inputs, mask, self.own_words, experimental.truncation
        )
        smoothing = self._training.label_smoothing
        loss = sequence_loss(logits, targets[mask], smoothing) / totals[0]
        if experimental.attention_penalty:
            loss += experimental.attention_penalty * attention_penalty(weights, mask) / totals[2]

        tag_loss: Tensor = self.tag_loss(grid, batch.tags.to(totals.device)) / totals[1]
        return loss + self._training.tag_weight * tag_loss
