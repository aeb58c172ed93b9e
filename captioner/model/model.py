"""The whole network: encoder, caption decoder and tag decoder."""

from __future__ import annotations

from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.model.decoder import Decoder, Dropout
from captioner.model.encoder import Encoder

__all__ = ["CaptionModel"]


class CaptionModel(nn.Module):
    """One encoder, one grid, two decoders of the same class: of words and of tags."""

    def __init__(self, config: ModelConfig, encoder: Encoder, words: int, tags: int) -> None:
        """Put decoders over ``words`` words and ``tags`` tags behind an encoder."""
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(
            nn.Linear(encoder.width, config.grid_width), nn.ReLU(), Dropout(config.grid_dropout)
        )
        self.caption_decoder = Decoder(config.caption, config.grid_width, words)
        self.tag_decoder = Decoder(config.tags, config.grid_width, tags)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the grid ``(B, N, D)`` of pixels ``(B, 3, h, w)``, uint8."""
        return self.project(self.encoder(pixels))

    def project(self, features: Tensor) -> Tensor:
        """Return the grid ``(B, N, D)`` of the encoder's features ``(B, N, encoder.width)``."""
        grid: Tensor = self.projection(features)
        return grid
