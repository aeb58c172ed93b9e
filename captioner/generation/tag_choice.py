"""Which tags are given, of the scores of all. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from captioner.data.calibration import TagScoring
from captioner.generation.description import Tag
from captioner.generation.options import TagOptions
from captioner.settings import ConfigError

__all__ = ["TagChoice"]

# The power of a tag's frequency, chosen on Flickr8k's dev: of the three tags that are given 67.7 %
# are right and 224 differ, with 0.0 69.3 % and 146.
_RARE_FIRST = 0.4

Scores = np.ndarray[Any, np.dtype[np.floating[Any]]]


class TagChoice:
    """The tags that are given of T, by their scores."""

    def __init__(
        self,
        names: Sequence[str],
        frequencies: Sequence[float],
        scorings: Sequence[TagScoring] = (),
    ) -> None:
        """Take the tags, the share of photographs that have each, and the scorings of all models.

        Without a scoring, as in a model of version 0.1, a tag that is not written has score 0.
        """
        self._names, self._frequencies, self._scorings = tuple(names), frequencies, scorings
        self._ids = {name: place for place, name in enumerate(self._names)}

    def threshold(self, options: TagOptions) -> float:
        """Return the lowest score that is given; ``ConfigError`` where a precision has none."""
        if options.threshold is not None:
            return options.threshold
        if options.min_precision is None:
            fitted = [scoring.threshold for scoring in self._scorings]
            return sum(fitted) / len(fitted) if fitted else 0.0
        if not self._scorings:
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
        _check_names(self._names, "only", options.only)
        _check_names(self._names, "exclude", options.exclude)

    def choose(self, scores: Scores, options: TagOptions) -> list[list[Tag]]:
        """Return the tags to give, those of the highest scores first, of scores ``(B, T)``.

        Of more than ``max_tags`` those stay that say most of a photograph: a tag's odds count
        divided by a power of its frequency, as in logit adjustment, Menon et al. (2021).
        """
        allowed = np.zeros(scores.shape[1], dtype=bool)
        allowed[self._indices(options.only) or slice(None)] = True
        allowed[self._indices(options.exclude)] = False
        threshold = max(self.threshold(options), 1e-12)
        scores = np.where(allowed, scores, 0.0)
        given = (scores >= threshold) & self._telling(scores, options.max_tags)
        found: list[list[Tag]] = []
        for row, chosen in zip(scores, given, strict=True):
            columns = np.flatnonzero(chosen)
            best = columns[np.argsort(-row[columns], kind="stable")]
            found.append([Tag(self._names[i], float(row[i])) for i in best.tolist()])
        return found

    def _telling(self, scores: Scores, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which ``count`` tags say most of each photograph: ``(B, T)``; 0 is all."""
        if not count or count >= scores.shape[1]:
            return np.ones(scores.shape, dtype=bool)
        # A model without scoring has taken frequencies into account when it wrote its tags.
        weight = _RARE_FIRST if self._scorings else 0.0
        p = scores.astype(np.float64).clip(1e-7, 1.0 - 1e-7)
        order = np.log(p / (1.0 - p)) - weight * np.log(np.asarray(self._frequencies))
        chosen = np.argsort(-order, axis=1, kind="stable")[:, :count]
        telling = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(telling, chosen, True, axis=1)
        return telling

    def _indices(self, names: Sequence[str]) -> list[int]:
        return [self._ids[name] for name in names]


def _check_names(known: Sequence[str], field: str, names: Sequence[str]) -> None:
    """Raise ``ConfigError``, with the nearest ones, for names that no tag has."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
            raise ConfigError(f"{field} has {name!r}, which is no tag of the model{hint}")
