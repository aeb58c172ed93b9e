"""From a grid to captions and tags: words for tokens, and rules for what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.decoder import Decoder, DecoderState
from captioner.search import Forbid, Hypothesis, NoRepeat, Shift, TokenRule, search
from captioner.tags import Calibration, TagSet
from captioner.tokenizer import detokenize
from captioner.vocabulary import BOS, PAD, SPECIAL, UNK, Vocabulary

__all__ = ["TAG_OPTIONS", "Caption", "Tag", "write_captions", "write_tags"]

_NEVER = Forbid((PAD, BOS, UNK))

TAG_OPTIONS = SearchOptions(beam_size=3, length_penalty=0.0, max_words=8)
"""How tags are searched."""

_RARITY = 0.3


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
    decoder: Decoder, tags: TagSet, calibration: Calibration, grid: Tensor
) -> list[list[Tag]]:
    """Return the tags of each image of the grid ``(B, N, D)``, best first, none twice.

    The search divides each tag's probability by a power of the tag's frequency, so that what is
    particular to a photograph is said before what is true of many: logit adjustment, Menon et
    al. (2021), equation 9. The score is that of the probability itself.
    """
    rarity = torch.zeros(len(tags.vocabulary), device=grid.device)
    rarity[len(SPECIAL) :] = -_RARITY * torch.tensor(tags.frequencies).log()
    rules: list[TokenRule] = [_NEVER, NoRepeat(), Shift(rarity)]
    return [
        _scored(hypotheses[0], tags.vocabulary, rarity.tolist(), calibration)
        for hypotheses in _search(decoder, grid, TAG_OPTIONS, rules)
    ]


def _scored(
    best: Hypothesis, vocabulary: Vocabulary, rarity: Sequence[float], calibration: Calibration
) -> list[Tag]:
    terms = zip(best.tokens, best.token_log_probs, strict=False)  # EOS has a term, but no score
    scores = [calibration(log_prob - rarity[token]) for token, log_prob in terms]
    found = zip(vocabulary.decode(best.tokens), scores, strict=True)
    return sorted((Tag(name, score) for name, score in found), key=lambda tag: -tag.score)


@torch.inference_mode()
def _search(
    decoder: Decoder, grid: Tensor, options: SearchOptions, rules: Sequence[TokenRule]
) -> list[list[Hypothesis]]:
    def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, _, state = decoder.step(tokens, state)
        return torch.log_softmax(logits.float(), dim=-1), state

    first = torch.full((len(grid),), BOS, device=grid.device)
    return search(step, first, decoder.start(grid), options, rules)
