"""How good a model is on the validation split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from captioner.data.calibration import Confidence, fit_confidence, fit_scoring
from captioner.data.dataset import Features
from captioner.data.example import Example
from captioner.data.tags import label_matrix
from captioner.data.things import names_right
from captioner.evaluation import Described, Evaluation, describe, feature_grids, judge, pixel_grids
from captioner.generation.confidence import caption_evidence
from captioner.generation.description import Caption
from captioner.generation.options import SearchOptions
from captioner.generation.tags import score_evidence, tag_evidence
from captioner.model.checkpoint import Checkpoint
from captioner.training.distributed import Group

__all__ = ["Validation"]


class Validation:
    """Captions and tags that a model writes for the validation split, shared out to all processes.

    ``unreadable`` holds the reason for each photograph, by its path, that could not be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, examples: Sequence[Example], group: Group, beam_size: int
    ) -> None:
        """Take what to judge.

        Args:
            checkpoint: The model, whose calibration of tags is fitted anew each time.
            examples: The validation split.
            group: The processes among which the photographs are shared out.
            beam_size: The beam size of the captions.
        """
        self._checkpoint, self._examples, self._group = checkpoint, examples, group
        self._options = SearchOptions(beam_size=beam_size)
        self.unreadable: dict[str, str] = {}
        self.captions_change = True
        """Whether the model may write other captions than when it was judged last."""
        self._written: dict[int, Caption] | None = None

    def of_features(self, features: Features) -> Evaluation:
        """Judge the model on the kept features of the whole split."""
        indices = self._own_indices()
        grids = feature_grids(self._checkpoint, features, indices)
        return self._judge(grids, features.unreadable)

    def of_pixels(self, workers: int, dtype: torch.dtype) -> Evaluation:
        """Judge the model on photographs, read by worker processes and encoded in a number type."""
        indices = self._own_indices()
        paths = [str(self._examples[index].image) for index in indices]
        found: dict[int, str] = {}
        unreadable: dict[int, str] = {}

        def grids() -> Iterator[tuple[list[int], Tensor]]:
            for own, grid in pixel_grids(self._checkpoint, paths, workers, found, dtype):
                yield [indices[position] for position in own], grid
            unreadable.update((indices[position], why) for position, why in found.items())

        return self._judge(grids(), unreadable)

    def _own_indices(self) -> range:
        return range(self._group.rank, len(self._examples), self._group.size)

    def _judge(
        self, grids: Iterator[tuple[list[int], Tensor]], unreadable: dict[int, str]
    ) -> Evaluation:
        """Caption and tag the split, fit the scores of tags on it, and judge both."""
        checkpoint = self._checkpoint
        read_tags = partial(tag_evidence, checkpoint)
        written = None if self.captions_change else self._written
        own = describe(checkpoint, grids, self._options, read_tags, written)
        kept = {index: of_one.caption for index, of_one in own.items()}
        self._written = None if self.captions_change else kept
        described = self._group.merge(own)
        reasons = self._group.merge(unreadable)  # complete only after the grids have been read
        self.unreadable = {str(self._examples[i].image): why for i, why in reasons.items()}
        if described:
            read = [self._examples[index] for index in described]
            evidence = np.stack([of_one.tags for of_one in described.values()])
            checkpoint.scoring = fit_scoring(evidence, label_matrix(checkpoint.tags, read))
            rows = score_evidence(torch.from_numpy(evidence), checkpoint.scoring).numpy()
            described = {
                index: of_one._replace(tags=row)
                for (index, of_one), row in zip(described.items(), rows, strict=True)
            }
            checkpoint.confidence = self._fit_confidence(described)
        return judge(self._examples, described, checkpoint)

    def _fit_confidence(self, described: Mapping[int, Described]) -> Confidence:
        """Fit how sure a caption is to the captions of the split, by the examples' indices."""
        evidence = [
            caption_evidence(of_one.caption, self._checkpoint.tags, of_one.tags)
            for of_one in described.values()
        ]
        right = [
            names_right(of_one.caption.text, self._examples[index].captions)
            for index, of_one in described.items()
        ]
        return fit_confidence(np.array(evidence), np.array(right))
