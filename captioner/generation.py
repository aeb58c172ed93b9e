"""From a grid to captions and tags: words for tokens, and rules for what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.decoder import Decoder, DecoderState
from captioner.search import Forbid, Hypothesis, NoRepeat, TokenRule, search
from captioner.tags import Calibration
from captioner.tokenizer import detokenize
from captioner.vocabulary import BOS, PAD, UNK, Vocabulary

__all__ = ["TAG_OPTIONS", "Caption", "Tag", "write_captions", "write_tags"]

_NEVER = Forbid((PAD, BOS, UNK))

TAG_OPTIONS = SearchOptions(beam_size=3, max_words=8)
"""How tags are searched."""


class Caption(NamedTuple):
    """One caption and the natural logarithm of its probability."""

    text: str
    log_prob: float


class Tag(NamedTuple):
    """One tag and the calibrated probability, 0…1, that it is right."""

    name: str
    score: float


def write_captions(
    decoder: Decoder, vocabulary: Vocabulary, grid: Tensor, options: SearchOptions
) -> list[list[Caption]]:
    """Return the captions of each image of the grid ``(B, N, D)``, best first."""
    return [
        [Caption(detokenize(vocabulary.decode(h.tokens)), h.log_prob) for h in hypotheses]
        for hypotheses in _search(decoder, grid, options, [_NEVER])
    ]


def write_tags(
    decoder: Decoder, vocabulary: Vocabulary, calibration: Calibration, grid: Tensor
) -> list[list[Tag]]:
    """Return the tags of each image of the grid ``(B, N, D)``, best first, none twice."""
    tags: list[list[Tag]] = []
    for hypotheses in _search(decoder, grid, TAG_OPTIONS, [_NEVER, NoRepeat()]):
        best = hypotheses[0]
        names = vocabulary.decode(best.tokens)
        scores = [calibration(log_prob) for log_prob in best.token_log_probs]
        found = [Tag(name, score) for name, score in zip(names, scores, strict=False)]
        tags.append(sorted(found, key=lambda tag: -tag.score))
    return tags


@torch.inference_mode()
def _search(
    decoder: Decoder, grid: Tensor, options: SearchOptions, rules: Sequence[TokenRule]
) -> list[list[Hypothesis]]:
    def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, _, state = decoder.step(tokens, state)
        return torch.log_softmax(logits.float(), dim=-1), state

    first = torch.full((len(grid),), BOS, device=grid.device)
    return search(step, first, decoder.start(grid), options, rules)
