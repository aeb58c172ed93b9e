"""From grids to tags: evidence, scores that are probabilities, and the tags that are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.data.calibration import Calibration, TagScoring
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, SPECIAL, UNSAID, Vocabulary
from captioner.generation.beams import Hypothesis
from captioner.generation.captions import search_tokens
from captioner.generation.description import NotFiniteError, Tag
from captioner.generation.options import SearchOptions, TagOptions
from captioner.generation.rules import Forbid, NoRepeat, TokenRule
from captioner.generation.tag_choice import TagChoice
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import Decoder

__all__ = [
    "CERTAIN",
    "LONGEST",
    "WRITTEN_OPTIONS",
    "Tagger",
    "score_evidence",
    "tag_adjustment",
    "tag_evidence",
    "write_tags",
]

WRITTEN_OPTIONS = SearchOptions(beam_size=1, length_penalty=0.0, max_words=8, no_repeat=0)
"""How a model without :class:`TagScoring` writes tags."""

# The power of a tag's frequency: it trades tags that are right for tags that differ.
_RARITY = 0.1

LONGEST = 12
"""The most tags that the decoder writes of a photograph; of 6,000 of Flickr8k none has more."""

CERTAIN = 15.0
"""The largest logit: beyond it a probability of float32 is 0 or 1."""


@torch.inference_mode()
def tag_evidence(checkpoint: Checkpoint, grid: Tensor) -> Tensor:
    """Return what a model says of each tag, ``(B, T, 3)``, of grids ``(B, N, D)``.

    The first is the logit of the marginal probability of the tag decoder, the second the logit of
    the head (0 without one), the third the logarithm of the tag's frequency in training.
    """
    model, tags = checkpoint.model, checkpoint.tags
    marginal = _marginals(model.tag_decoder, grid)
    head = torch.zeros_like(marginal)
    if model.tag_head is not None:
        head = model.tag_head(grid)[:, len(SPECIAL) :].float()
    frequency = torch.tensor(tags.frequencies, device=grid.device).log().expand_as(marginal)
    return torch.stack([marginal, head, frequency], dim=-1)


def _marginals(decoder: Decoder, grid: Tensor) -> Tensor:
    """Return the logits ``(B, T)`` of the probability that the decoder writes each tag at all.

    The sum over all orders of all sets cannot be had. The decoder writes one list, its likeliest
    tag at each step, until its end; a tag's probability is that at least one of the steps had said
    it, had it been drawn there: 1 - Π (1 - p). So the marginals cost one step a tag of the list,
    as writing the list does. A step's p leaves out the tags of the list so far.
    """
    state, tokens = decoder.start(grid), torch.full((len(grid),), BOS, device=grid.device)
    closed = torch.zeros(len(grid), len(decoder.output.bias), dtype=torch.bool, device=grid.device)
    closed[:, list(UNSAID)] = True
    missed = torch.zeros(len(grid), closed.shape[1], device=grid.device)
    rows = torch.arange(len(grid), device=grid.device)
    for _ in range(LONGEST if len(rows) else 0):
        logits, _, state = decoder.step(tokens, state)
        probabilities = logits.float().masked_fill(closed[rows], -torch.inf).softmax(dim=-1)
        missed[rows] += torch.log1p(-probabilities.clamp(max=1.0 - 1e-6))
        tokens = probabilities.argmax(dim=-1)
        kept = (tokens != EOS).nonzero()
        if not len(kept):
            break
        # Rows that have ended leave; ``select`` takes (B', 1), one row an image.
        state, tokens, rows = state.select(kept), tokens[kept[:, 0]], rows[kept[:, 0]]
        closed[rows, tokens] = True
    missed = missed[:, len(SPECIAL) :].clamp(-2.0 * CERTAIN, -1e-6)
    return torch.log(torch.expm1(-missed)).clamp(-CERTAIN, CERTAIN)


def score_evidence(evidence: Tensor, scoring: TagScoring) -> Tensor:
    """Return the scores ``(…,)``, in 0…1, of evidence ``(…, kinds)``."""
    *weights, offset = scoring.weights
    return torch.sigmoid(evidence @ evidence.new_tensor(weights) + offset)


class Tagger:
    """Tags of images by one model, or by several whose scores are averaged."""

    def __init__(self, checkpoints: Sequence[Checkpoint], check_finite: bool = True) -> None:
        """Take models with the same tags.

        Without ``check_finite`` scores may be NaN: a training run that diverges is validated so.
        """
        self._checkpoints, self._check_finite = checkpoints, check_finite
        self.tags = checkpoints[0].tags
        self._scorings = [c.scoring for c in checkpoints if c.scoring is not None]
        self._scored = len(self._scorings) == len(checkpoints)
        scorings = self._scorings if self._scored else ()
        self._choice = TagChoice(self.tags.names, self.tags.frequencies, scorings)

    def scores(self, grids: Sequence[Tensor]) -> Tensor:
        """Return the scores ``(B, T)`` of all tags, of a grid ``(B, N, D)`` for each model.

        Where a model has no :class:`TagScoring`, the score of a tag that it does not write is 0.
        Raises ``NotFiniteError`` for a model that computes NaN.
        """
        if not self._scored:
            return self._written_scores(grids)
        each = [
            score_evidence(tag_evidence(checkpoint, grid), scoring)
            for checkpoint, grid, scoring in zip(
                self._checkpoints, grids, self._scorings, strict=True
            )
        ]
        scores = torch.stack(each).mean(dim=0)
        if self._check_finite and bool(scores.isnan().any()):
            raise NotFiniteError
        return scores

    def _written_scores(self, grids: Sequence[Tensor]) -> Tensor:
        ids = {name: place for place, name in enumerate(self.tags.names)}
        # Platt scaling is linear in the logits that the models' probabilities come from.
        count = len(self._checkpoints)
        calibration = Calibration(
            sum(c.calibration.slope for c in self._checkpoints) / count,
            sum(c.calibration.offset for c in self._checkpoints) / count,
        )
        decoders = [checkpoint.model.tag_decoder for checkpoint in self._checkpoints]
        scores = torch.zeros(len(grids[0]), len(ids), dtype=torch.float64)
        written = write_tags(decoders, self.tags, calibration, grids, self._check_finite)
        for row, found in zip(scores, written, strict=True):
            for tag in found:
                row[ids[tag.name]] = tag.score
        return scores

    def threshold(self, options: TagOptions) -> float:
        """Return the lowest score that is given; ``ConfigError`` where a precision has none."""
        return self._choice.threshold(options)

    def check(self, options: TagOptions) -> None:
        """Raise ``ConfigError`` if the models do not have what the options name."""
        self._choice.check(options)

    def choose(self, scores: Tensor, options: TagOptions) -> list[list[Tag]]:
        """Return the tags to give, best first, of scores ``(B, T)``."""
        return self._choice.choose(scores.cpu().numpy(), options)


def write_tags(
    decoders: Sequence[Decoder],
    tags: TagSet,
    calibration: Calibration,
    grids: Sequence[Tensor],
    check_finite: bool = True,
) -> list[list[Tag]]:
    """Return the tags of each image as a model without scoring writes them, best first.

    None is there twice. ``grids`` and ``check_finite`` are as for captions.

    Each tag's probability is divided by a power of the tag's frequency, so that what is
    particular to a photograph is said before what is true of many: logit adjustment, Menon et
    al. (2021), equation 9.
    """
    rarity = tag_adjustment(tags).to(grids[0].device)
    rules: list[TokenRule] = [Forbid(UNSAID), NoRepeat()]
    return [
        _scored(hypotheses[0], tags.vocabulary, calibration)
        for hypotheses in search_tokens(
            decoders, grids, rarity, WRITTEN_OPTIONS, rules, check_finite=check_finite
        )
    ]


def tag_adjustment(tags: TagSet) -> Tensor:
    """Return what is added to the logits of a tag decoder: ``(V,)`` of the tags' vocabulary."""
    rarity = torch.zeros(len(tags.vocabulary))
    rarity[len(SPECIAL) :] = -_RARITY * torch.tensor(tags.frequencies).log()
    return rarity


def _scored(best: Hypothesis, vocabulary: Vocabulary, calibration: Calibration) -> list[Tag]:
    # EOS, the last term, has no score.
    scores = map(calibration, best.token_log_probs[: len(best.tokens)])
    found = zip(vocabulary.decode(best.tokens), scores, strict=True)
    return sorted((Tag(name, score) for name, score in found), key=lambda tag: -tag.score)
