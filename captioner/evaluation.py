"""Scores of the captions and tags that a model writes for a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.checkpoint import Checkpoint
from captioner.config import SearchOptions
from captioner.dataset import Features, pixel_batches
from captioner.generation import Caption, Tag, write_captions, write_tags
from captioner.metrics import Scores, score
from captioner.readers import Example
from captioner.tags import content_words
from captioner.tokenizer import stem

__all__ = ["Evaluation", "evaluate", "feature_grids", "pixel_grids", "tag_hits"]

Grids = Iterable[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """What a model wrote for a split, and how good it is.

    ``examples`` are those whose photograph could be read; ``captions`` and ``tags`` are theirs,
    in order. ``tag_precision`` is the share of the first three tags that a caption (or the named
    objects) of the photograph has; ``different_tags`` counts the tags among the first threes.
    """

    examples: list[Example]
    captions: list[Caption]
    tags: list[list[Tag]]
    scores: Scores
    tag_precision: float
    different_tags: int

    def as_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        tags = {"tag_precision": self.tag_precision, "different_tags": self.different_tags}
        return {**self.scores.as_dict(), **tags}


def pixel_grids(
    checkpoint: Checkpoint,
    paths: Sequence[str],
    precision: torch.dtype,
    workers: int,
    unreadable: dict[int, str],
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places and grids ``(B, N, D)`` of photographs; fills ``unreadable``."""
    device = next(checkpoint.model.parameters()).device
    for batch in pixel_batches(paths, checkpoint.config.preprocessing, 32, workers):
        unreadable |= batch.unreadable
        if batch.places:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                grid = checkpoint.model.encode(batch.pixels.to(device))
            yield batch.places, grid.float()


def feature_grids(checkpoint: Checkpoint, features: Features) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places and grids of photographs whose features are at hand."""
    device = next(checkpoint.model.parameters()).device
    places = [place for place in range(len(features.rows)) if place not in features.unreadable]
    for start in range(0, len(places), 32):
        chunk = places[start : start + 32]
        rows = torch.from_numpy(features.rows[chunk]).to(device).float()
        yield chunk, checkpoint.model.project(rows)


@torch.inference_mode()
def evaluate(
    checkpoint: Checkpoint, examples: Sequence[Example], grids: Grids, options: SearchOptions
) -> Evaluation:
    """Caption and tag every example of the grids, and score the result.

    Raises ``ValueError`` when there is no grid at all.
    """
    checkpoint.model.eval()
    places: list[int] = []
    captions: list[Caption] = []
    tags: list[list[Tag]] = []
    model, words, names = checkpoint.model, checkpoint.vocabulary, checkpoint.tags.vocabulary
    for batch_places, grid in grids:
        places += batch_places
        captions += [c[0] for c in write_captions(model.caption_decoder, words, grid, options)]
        tags += write_tags(model.tag_decoder, names, checkpoint.calibration, grid)
    if not places:
        raise ValueError("none of the photographs to evaluate on could be read")
    read = [examples[place] for place in places]
    scores = score([caption.text for caption in captions], [e.captions for e in read])
    hits = [hit for e, t in zip(read, tags, strict=True) for hit in tag_hits(e, t[:3])]
    different = {tag.name for found in tags for tag in found[:3]}
    precision = sum(hits) / max(len(hits), 1)
    return Evaluation(read, captions, tags, scores, precision, len(different))


def tag_hits(example: Example, tags: Sequence[Tag]) -> list[bool]:
    """Whether each tag is one of the example's objects, or a word of its captions by its stem."""
    if example.tags is not None:
        return [tag.name in example.tags for tag in tags]
    said = {stem(word) for caption in example.captions for word in content_words(caption)}
    return [stem(tag.name) in said for tag in tags]
