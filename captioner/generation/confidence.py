"""How probable it is that a caption is right, from what the model knows when it writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from captioner.data.calibration import Confidence
from captioner.data.tags import TagSet
from captioner.generation.description import Caption

__all__ = ["caption_evidence", "with_confidence"]

# The least probability that the logarithm of a tag's score is taken of.
_LEAST = 1e-4


def caption_evidence(
    caption: Caption, tags: TagSet, scores: np.ndarray[Any, np.dtype[np.float32]]
) -> list[float]:
    """Return what speaks for a caption: four numbers, all natural logarithms of probabilities.

    The first is the mean of its words and its end, the second that of its least likely word. The
    other two are of the tags that the caption says, by the scores ``(T,)`` that the model gives
    the photograph: their mean, and that of the least likely. A caption that says no tag, or no
    word, counts there as one of which nothing is known: 0.
    """
    said = np.isin(tags.names, list(tags.said(caption.text)))
    agreement = np.log(np.maximum(scores[said], _LEAST)) if said.any() else np.zeros(1)
    return [
        caption.log_prob / (len(caption.words) + 1),
        min(caption.word_log_probs, default=0.0),
        float(agreement.mean()),
        float(agreement.min()),
    ]


def with_confidence(
    captions: Sequence[Caption],
    confidences: Sequence[Confidence | None],
    tags: TagSet,
    scores: np.ndarray[Any, np.dtype[np.float32]],
) -> list[Caption]:
    """Return the captions of one photograph with their confidences.

    Args:
        captions: The captions.
        confidences: Of each model of an ensemble; the mean is taken, if all models have one.
        tags: The tags of the models.
        scores: ``(T,)``, as in :func:`caption_evidence`.
    """
    fitted = [confidence for confidence in confidences if confidence is not None]
    if not fitted or len(fitted) < len(confidences):
        return list(captions)
    found: list[Caption] = []
    for caption in captions:
        evidence = caption_evidence(caption, tags, scores)
        mean = sum(confidence(evidence) for confidence in fitted) / len(fitted)
        found.append(replace(caption, confidence=mean))
    return found
