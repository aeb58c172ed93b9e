"""The whole network: encoder, caption decoder and tag decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.model.decoder import Decoder, Dropout
from captioner.model.encoder import Encoder

__all__ = ["CaptionModel", "TagHead"]

# The share of the smooth maximum in a tag's logit, and how near it comes to the maximum.
_LOCAL, _SHARP = 0.3, 4.0


class TagHead(nn.Module):
    """A classifier of each tag alone, where the tag decoder sees which tags go together.

    Each cell of the grid has a logit for each tag ("cells"). A tag's logit is between their mean
    and a smooth maximum, which a thing that is small in the photograph decides: Zhu and Wu,
    "Residual Attention: A Simple but Effective Method for Multi-Label Recognition" (2021), equation
    5, with a log-sum-exp for the maximum. The plain form has the logits of the mean cell ("mean").
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        """Build a head over the V words of the tag vocabulary, the special ones too."""
        super().__init__()
        self._local = config.tag_head == "cells"
        self.dropout = Dropout(config.tags.dropout)
        self.output = nn.Linear(config.grid_width, vocabulary_size)
        # Most tags are absent: Lin et al., "Focal Loss for Dense Object Detection" (2017), 4.1.
        nn.init.constant_(self.output.bias, -4.0)

    def forward(self, grid: Tensor) -> Tensor:
        """Return the logits ``(B, V)`` of a grid ``(B, N, D)``."""
        if not self._local:
            logits: Tensor = self.output(self.dropout(grid.mean(dim=1)))
            return logits
        cells: Tensor = self.output(self.dropout(grid)).float()
        smooth = torch.logsumexp(_SHARP * cells, dim=1) - math.log(cells.shape[1])
        return torch.lerp(cells.mean(dim=1), smooth / _SHARP, _LOCAL)


class CaptionModel(nn.Module):
    """One encoder, one grid, two decoders of the same class, of words and of tags, and a head."""

    def __init__(self, config: ModelConfig, encoder: Encoder, words: int, tags: int) -> None:
        """Put decoders over ``words`` words and ``tags`` tags behind an encoder."""
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(
            nn.Linear(encoder.width, config.grid_width), nn.ReLU(), Dropout(config.grid_dropout)
        )
        self.caption_decoder = Decoder(config.caption, config.grid_width, words)
        self.tag_decoder = Decoder(config.tags, config.grid_width, tags)
        self.tag_head = None if config.tag_head == "none" else TagHead(config, tags)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the grid ``(B, N, D)`` of pixels ``(B, 3, h, w)``, uint8."""
        return self.project(self.encoder(pixels))

    def project(self, features: Tensor) -> Tensor:
        """Return the grid ``(B, N, D)`` of the encoder's features ``(B, N, encoder.width)``."""
        grid: Tensor = self.projection(features)
        return grid
