"""What is said of a photograph: captions and tags, whatever computed them. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from captioner.files import Record
from captioner.settings import ConfigError

__all__ = ["Caption", "Description", "NotFiniteError", "Tag", "as_record"]


@dataclass(frozen=True)
class Caption:
    """One caption: L words, and how sure the model was of each."""

    text: str
    log_prob: float
    """Natural logarithm of its probability, that of ending where it does included."""
    words: tuple[str, ...] = field(default=(), repr=False)
    """As they stand in the text; a clitic ("'s") is a word, written onto the one before."""
    word_log_probs: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """The terms of ``log_prob``, one a word; that of the end is not among them."""
    finished: bool = True
    """False where nothing satisfies the options, and this is as far as the best one came."""
    confidence: float | None = field(default=None, compare=False)
    """The calibrated probability, 0…1, that the caption is right: that at least two of five people
    would name each thing that it names. ``None`` where the model was trained without."""
    attention: np.ndarray[Any, np.dtype[np.float32]] | None = field(
        default=None, repr=False, compare=False
    )
    """Where the model looked for each word: ``(L, N)``, each row adds up to 1. The cells of the
    grid come row by row from the top left of the prepared picture, a square. ``None`` unless it
    was asked for, and where the model has no attention."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class NotFiniteError(ConfigError):
    """The model that was named computes numbers that are not finite: its weights make no sense."""

    def __init__(self) -> None:
        """Say so, and what to do."""
        super().__init__(
            "the model computes numbers that are not finite; its file is damaged, or its training "
            "went wrong: take another checkpoint"
        )


class Tag(NamedTuple):
    """One tag and the calibrated probability, 0…1, that the photograph has it."""

    name: str
    score: float


class Description(NamedTuple):
    """The captions and tags of one image, each best first; ``caption`` is the first caption."""

    caption: Caption
    captions: list[Caption]
    tags: list[Tag]

    def to_dict(self) -> Record:
        """Return the record that a folder run writes, without ``image``; JSON takes it as it is."""
        return as_record(self.captions, self.tags)


def as_record(
    captions: Sequence[Caption] | None, tags: Sequence[Tag] | None, min_confidence: float = 0.0
) -> Record:
    """Return what a record says of one photograph, ``image`` aside; ``None`` leaves a part out.

    A best caption of less than ``min_confidence`` is ``None`` in the record.
    ``docs/record.schema.json`` describes it.
    """
    record: Record = {}
    if captions is not None:
        entries = [_entry(caption) for caption in captions]
        best = {"caption" if key == "text" else key: value for key, value in entries[0].items()}
        best.pop("finished", None)
        if best.get("confidence", 1.0) < min_confidence:
            record = {"caption": None, "confidence": best["confidence"]}
        else:
            record = {**best, "captions": entries}
    if tags is not None:
        record["tags"] = [{"name": tag.name, "score": round(tag.score, 4)} for tag in tags]
    return record


def _entry(caption: Caption) -> Record:
    unfinished = {} if caption.finished else {"finished": False}
    sure = {} if caption.confidence is None else {"confidence": round(caption.confidence, 4)}
    return {"text": caption.text, "log_prob": round(caption.log_prob, 4)} | sure | unfinished
