"""From a grid to captions and tags: words for tokens, and rules for what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.decoder import Decoder, DecoderState
from captioner.search import Forbid, Hypothesis, NoRepeat, TokenRule, search
from captioner.tags import Calibration, TagSet
from captioner.tokenizer import detokenize
from captioner.vocabulary import BOS, PAD, SPECIAL, UNK, Vocabulary

__all__ = ["TAG_OPTIONS", "Caption", "Tag", "write_captions", "write_tags"]

_NEVER = Forbid((PAD, BOS, UNK))

TAG_OPTIONS = SearchOptions(beam_size=1, length_penalty=0.0, max_words=8)
"""How tags are searched."""

# The power of a tag's frequency: it trades tags that are right for tags that differ.
_RARITY = 0.1


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
    even = torch.zeros((), device=grid.device)
    return [
        [Caption(detokenize(vocabulary.decode(h.tokens)), h.log_prob) for h in hypotheses]
        for hypotheses in _search(decoder, grid, even, options, [_NEVER])
    ]


def write_tags(
    decoder: Decoder, tags: TagSet, calibration: Calibration, grid: Tensor
) -> list[list[Tag]]:
    """Return the tags of each image of the grid ``(B, N, D)``, best first, none twice.

    Each tag's probability is divided by a power of the tag's frequency, so that what is
    particular to a photograph is said before what is true of many: logit adjustment, Menon et
    al. (2021), equation 9.
    """
    rarity = torch.zeros(len(tags.vocabulary), device=grid.device)
    rarity[len(SPECIAL) :] = -_RARITY * torch.tensor(tags.frequencies).log()
    return [
        _scored(hypotheses[0], tags.vocabulary, calibration)
        for hypotheses in _search(decoder, grid, rarity, TAG_OPTIONS, [_NEVER, NoRepeat()])
    ]


def _scored(best: Hypothesis, vocabulary: Vocabulary, calibration: Calibration) -> list[Tag]:
    # EOS, the last term, has no score.
    scores = map(calibration, best.token_log_probs[: len(best.tokens)])
    found = zip(vocabulary.decode(best.tokens), scores, strict=True)
    return sorted((Tag(name, score) for name, score in found), key=lambda tag: -tag.score)


@torch.inference_mode()
def _search(
    decoder: Decoder,
    grid: Tensor,
    adjustment: Tensor,
    options: SearchOptions,
    rules: Sequence[TokenRule],
) -> list[list[Hypothesis]]:
    def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, _, state = decoder.step(tokens, state)
        return torch.log_softmax(logits.float() + adjustment, dim=-1), state

    first = torch.full((len(grid),), BOS, device=grid.device)
    return search(step, first, decoder.start(grid), options, rules)
