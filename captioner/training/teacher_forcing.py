"""Learning from people's captions: each word is predicted from those before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.config import TrainingConfig
from captioner.data.dataset import Batch
from captioner.data.vocabulary import PAD
from captioner.model.device import autocast
from captioner.model.model import CaptionModel
from captioner.training.losses import attention_penalty, no_loss, sequence_loss
from captioner.training.optimization import ramp

__all__ = ["TeacherForcing"]


class TeacherForcing(nn.Module):
    """The loss of a batch: of its captions, and ``tag_weight`` times that of its tags.

    Each is the mean over the tokens of a whole step, of which a batch may be only a part: the
    parts' losses, and so their gradients, add up to the step's. ``own_words`` is the present share
    of scheduled sampling.
    """

    def __init__(
        self, model: CaptionModel, settings: TrainingConfig, precision: torch.dtype
    ) -> None:
        """Take the model that learns, and the number type of its forward pass."""
        super().__init__()
        self.model, self._settings, self._precision = model, settings, precision
        self.own_words = 0.0

    def begin_step(self, seed: int, step: int, steps: int) -> None:
        """Set the share of scheduled sampling of a step of ``steps``; ``seed`` is not needed."""
        self.own_words = ramp(step, steps, self._settings.own_words)

    def counts(self, batch: Batch) -> Tensor:
        """Return how many words, tags and captions a batch is judged on: ``(3,)``."""
        words, tags = batch.words[:, 1:] != PAD, batch.tags[:, 1:] != PAD
        return torch.stack([words.sum(), tags.sum(), words.any(dim=1).sum()]).float()

    def forward(self, batch: Batch, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's part of the step's loss, and the same as a figure without gradient.

        ``totals`` is the sum of ``counts`` over the parts of the step.
        """
        if not len(batch.images):
            loss = no_loss(self.parameters())
        else:
            with autocast(totals.device, self._precision):
                loss = self._loss(batch, totals.clamp(min=1.0))
        return loss, loss.detach()

    def _loss(self, batch: Batch, totals: Tensor) -> Tensor:
        settings, images = self._settings, batch.images.to(totals.device)
        model, pixels = self.model, images.dtype == torch.uint8
        grid = model.encode(images) if pixels else model.project(images.float())

        words = batch.words.to(totals.device)
        keep = words[:, 1:] != PAD
        logits, weights = model.caption_decoder(
            grid, words[:, :-1], keep, self.own_words, settings.truncation
        )
        loss = sequence_loss(logits, words[:, 1:][keep], settings.label_smoothing) / totals[0]
        if settings.attention_penalty:
            loss += settings.attention_penalty * attention_penalty(weights, keep) / totals[2]

        tags = batch.tags.to(totals.device)
        keep = tags[:, 1:] != PAD
        logits, _ = model.tag_decoder(grid, tags[:, :-1], keep)
        tag_loss: Tensor = sequence_loss(logits, tags[:, 1:][keep]) / totals[1]
        return loss + settings.tag_weight * tag_loss
