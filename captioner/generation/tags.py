"""From grids to tags: evidence, scores that are probabilities, and the tags that are given."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.data.calibration import Calibration, TagScoring
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, SPECIAL, UNSAID, Vocabulary
from captioner.generation.beams import Hypothesis
from captioner.generation.captions import NotFiniteError, search_tokens
from captioner.generation.options import SearchOptions, TagOptions
from captioner.generation.rules import Forbid, NoRepeat, TokenRule
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import Decoder
from captioner.settings import ConfigError

__all__ = ["Tag", "Tagger", "check_names", "score_evidence", "tag_evidence", "write_tags"]

WRITTEN_OPTIONS = SearchOptions(beam_size=1, length_penalty=0.0, max_words=8, no_repeat=0)
"""How a model without :class:`TagScoring` writes tags."""

# Powers of a tag's frequency: they trade tags that are right for tags that differ. The first is
# of a model without scoring; the second was chosen on Flickr8k's dev: of the three tags that are
# given 67.7 % are right and 224 differ, with 0.0 69.3 % and 146.
_RARITY, _RARE_FIRST = 0.1, 0.4
# The most tags that the decoder writes of a photograph; of 6,000 of Flickr8k none has more.
_LONGEST = 12
# Beyond this a probability of float32 is 0 or 1.
_CERTAIN = 15.0


class Tag(NamedTuple):
    """One tag and the calibrated probability, 0…1, that the photograph has it."""

    name: str
    score: float


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
    for _ in range(_LONGEST if len(rows) else 0):
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
    missed = missed[:, len(SPECIAL) :].clamp(-2.0 * _CERTAIN, -1e-6)
    return torch.log(torch.expm1(-missed)).clamp(-_CERTAIN, _CERTAIN)


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
        if options.threshold is not None:
            return options.threshold
        if options.min_precision is None:
            fitted = [scoring.threshold for scoring in self._scorings]
            return sum(fitted) / len(fitted) if self._scored else 0.0
        if not self._scored:
            raise ConfigError("the model has no thresholds for min_precision; train its tags anew")
        found = [scoring.threshold_of(options.min_precision) for scoring in self._scorings]
        reached = [threshold for threshold in found if threshold is not None]
        if len(reached) < len(found):
            raise ConfigError(
                f"min_precision is {options.min_precision}; the model's tags never reached that"
            )
        return max(reached)

    def check(self, options: TagOptions) -> None:
        """Raise ``ConfigError`` if the models do not have what the options name."""
        self.threshold(options)
        check_names(self.tags, "only", options.only)
        check_names(self.tags, "exclude", options.exclude)

    def choose(self, scores: Tensor, options: TagOptions) -> list[list[Tag]]:
        """Return the tags to give, those of the highest scores first, of scores ``(B, T)``.

        Of more than ``max_tags`` those stay that say most of a photograph: a tag's odds count
        divided by a power of its frequency, as in logit adjustment, Menon et al. (2021).
        """
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        allowed[self._indices(options.only) or slice(None)] = True
        allowed[self._indices(options.exclude)] = False
        threshold = max(self.threshold(options), 1e-12)
        scores = scores.cpu().masked_fill(~allowed, 0.0)
        given = (scores >= threshold) & self._telling(scores, options.max_tags)
        names, found = self.tags.names, list[list[Tag]]()
        for row, chosen in zip(scores, given, strict=True):
            columns = chosen.nonzero()[:, 0]
            best = columns[row[columns].argsort(descending=True, stable=True)]
            found.append([Tag(names[i], float(row[i])) for i in best.tolist()])
        return found

    def _telling(self, scores: Tensor, count: int) -> Tensor:
        """Return which ``count`` tags say most of each photograph: ``(B, T)`` of bool; 0 is all."""
        if not count or count >= scores.shape[1]:
            return torch.ones_like(scores, dtype=torch.bool)
        rarity = -scores.new_tensor(self.tags.frequencies).log()
        # A model without scoring has taken frequencies into account when it wrote its tags.
        weight = _RARE_FIRST if self._scored else 0.0
        order = torch.logit(scores, eps=1e-7) + weight * rarity
        chosen = order.topk(count, dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)

    def _indices(self, names: Sequence[str]) -> list[int]:
        return [token - len(SPECIAL) for token in self.tags.vocabulary.encode(names)[:-1]]


def check_names(tags: TagSet, field: str, names: Sequence[str]) -> None:
    """Raise ``ConfigError``, with the nearest ones, for names that no tag has."""
    known = set(tags.names)
    for name in names:
        if name not in known:
            near = get_close_matches(name, tags.names, n=3)
            hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
            raise ConfigError(f"{field} has {name!r}, which is no tag of the model{hint}")


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
    rarity = torch.zeros(len(tags.vocabulary), device=grids[0].device)
    rarity[len(SPECIAL) :] = -_RARITY * torch.tensor(tags.frequencies).log()
    rules: list[TokenRule] = [Forbid(UNSAID), NoRepeat()]
    return [
        _scored(hypotheses[0], tags.vocabulary, calibration)
        for hypotheses in search_tokens(
            decoders, grids, rarity, WRITTEN_OPTIONS, rules, check_finite=check_finite
        )
    ]


def _scored(best: Hypothesis, vocabulary: Vocabulary, calibration: Calibration) -> list[Tag]:
    # EOS, the last term, has no score.
    scores = map(calibration, best.token_log_probs[: len(best.tokens)])
    found = zip(vocabulary.decode(best.tokens), scores, strict=True)
    return sorted((Tag(name, score) for name, score in found), key=lambda tag: -tag.score)
