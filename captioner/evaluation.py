"""Scores of the captions and tags that a model writes for a split."""

from __future__ import annotations

import platform
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioner.data.dataset import Features, pixel_batches
from captioner.data.example import DataError, Example, ImageId, coco_image_id
from captioner.data.tags import TagSet, label_matrix
from captioner.data.things import names_right
from captioner.generation.captions import write_captions
from captioner.generation.confidence import with_confidence
from captioner.generation.description import Caption, Tag
from captioner.generation.options import SearchOptions, TagOptions
from captioner.generation.tags import Tagger
from captioner.metrics import Scores, diversity, meteor, paired_bootstrap, score, spice
from captioner.metrics.reliability import ConfidenceMeasures, measure_confidence
from captioner.metrics.tags import (
    TagMeasures,
    mean_average_precision,
    measure_tags,
    most_likely,
)
from captioner.model.checkpoint import Checkpoint
from captioner.model.device import autocast, own_settings
from captioner.version import __version__

__all__ = [
    "Described",
    "Evaluation",
    "coco_form",
    "compare_images",
    "describe",
    "describe_captions",
    "evaluate_images",
    "feature_grids",
    "judge",
    "pixel_grids",
    "versions",
]

Grids = Iterable[tuple[list[int], Tensor]]


class Described(NamedTuple):
    """What a model says of one photograph: its best caption, and the scores ``(T,)`` of tags."""

    caption: Caption
    tags: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Evaluation:
    """A model's captions and tags for a split, with their scores.

    ``examples`` are those whose photograph could be read; ``captions`` and ``tags`` are theirs,
    in order. ``tag_precision`` is the share of three tags that a caption (or the named objects) of
    the photograph has, those that are given where three are asked for; ``tag_baseline`` is that
    of the three most frequent tags said of every photograph; ``different_tags`` counts the tags
    among the threes.

    Beside the mean average precision in ``tag_measures``, that of two guesses: ``map_frequent``,
    which gives every photograph the tags' frequencies as scores, and ``map_words``, which gives it
    the tags that its generated caption says.

    ``confidence`` says how many captions are right (:func:`captioner.data.things.names_right`)
    and how well their confidences say which, if the model gives any.
    """

    examples: list[Example]
    captions: list[Caption]
    tags: list[list[Tag]]
    scores: Scores
    tag_measures: TagMeasures
    tag_precision: float
    tag_baseline: float
    different_tags: int
    map_frequent: float
    map_words: float
    confidence: ConfidenceMeasures

    def tag_figures(self) -> dict[str, float]:
        """Return the figures of the tags by name."""
        names = ("tag_precision", "tag_baseline", "different_tags", "map_frequent", "map_words")
        return {name: getattr(self, name) for name in names} | self.tag_measures.as_dict()

    def as_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return {**self.scores.as_dict(), **self.tag_figures(), **self.confidence_figures()}

    def confidence_figures(self) -> dict[str, float]:
        """Return the figures of the captions' confidences by name; of a model without, one."""
        right, error, *covered = self.confidence
        if not self.captions or self.captions[0].confidence is None:
            return {"right": right}
        names = ("coverage_50", "right_50", "coverage_70", "right_70")
        return {"right": right, "confidence_ece": error, **dict(zip(names, covered, strict=True))}


def pixel_grids(
    checkpoint: Checkpoint,
    paths: Sequence[str],
    workers: int,
    unreadable: dict[int, str],
    precision: torch.dtype = torch.float32,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places and grids ``(B, N, D)`` of photographs; fills ``unreadable``.

    ``precision`` is the number type of the encoder's products, where it is not the model's own.
    """
    weight = next(checkpoint.model.parameters())
    for batch in pixel_batches(paths, checkpoint.config.preprocessing, 32, workers):
        unreadable |= batch.unreadable
        if batch.indices:
            with autocast(weight.device, precision):
                grid = checkpoint.model.encode(batch.pixels.to(weight.device))
            yield batch.indices, grid.to(weight.dtype)


def feature_grids(
    checkpoint: Checkpoint, features: Features, places: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places and grids of those photographs at ``places`` that have features."""
    device = next(checkpoint.model.parameters()).device
    readable = [place for place in places if place not in features.unreadable]
    for start in range(0, len(readable), 32):
        chunk = readable[start : start + 32]
        rows = torch.from_numpy(features.rows[chunk]).to(device).float()
        yield chunk, checkpoint.model.project(rows)


@own_settings()
@torch.inference_mode()
def describe(
    checkpoint: Checkpoint,
    grids: Grids,
    options: SearchOptions,
    read_tags: Callable[[Tensor], Tensor] | None = None,
    written: Mapping[int, Caption] | None = None,
) -> dict[int, Described]:
    """Caption and tag the photographs of the grids; keyed by their places.

    Args:
        checkpoint: The model.
        grids: Places and grids.
        options: How captions are searched.
        read_tags: Takes a grid ``(B, N, D)`` to what is kept of the tags: their scores by default.
        written: The captions, where they are known already.
    """
    checkpoint.model.eval()
    tagger, found = Tagger([checkpoint], check_finite=False), dict[int, Described]()
    for places, grid in grids:
        if written is None:
            decoders, words = [checkpoint.model.caption_decoder], checkpoint.vocabulary
            each = write_captions(decoders, words, [grid], options, check_finite=False)
            captions = [alternatives[0] for alternatives in each]
        else:
            captions = [written[place] for place in places]
        tags = tagger.scores([grid]) if read_tags is None else read_tags(grid)
        rows = tags.float().cpu().numpy()
        found |= dict(zip(places, map(Described, captions, rows), strict=True))
    return found


def judge(
    examples: Sequence[Example], found: Mapping[int, Described], checkpoint: Checkpoint
) -> Evaluation:
    """Score what :func:`describe` said of the examples, by their places.

    Raises ``DataError`` when there is nothing at all.
    """
    if not found:
        raise DataError("none of the photographs to evaluate on could be read")
    read = [examples[place] for place in found]
    tags = checkpoint.tags
    scores = np.stack([described.tags for described in found.values()])
    captions = [described.caption for described in found.values()]
    captions = [
        with_confidence([caption], [checkpoint.confidence], tags, row)[0]
        for caption, row in zip(captions, scores, strict=True)
    ]
    texts = [caption.text for caption in captions]
    tagger, labels = Tagger([checkpoint]), label_matrix(tags, read)
    given = tagger.choose(torch.from_numpy(scores), TagOptions())
    frequent = np.broadcast_to(np.asarray(tags.frequencies, np.float32), scores.shape)
    words = _membership([tags.said(text) for text in texts], tags)
    said = _membership([_right(tags, example) for example in read], tags)
    three = tagger.choose(torch.from_numpy(scores), TagOptions(threshold=0.0, max_tags=3))
    first = _membership([{tag.name for tag in one} for one in three], tags)
    return Evaluation(
        read,
        captions,
        given,
        score(texts, [e.captions for e in read]),
        measure_tags(scores, labels, _membership([{t.name for t in one} for one in given], tags)),
        tag_precision=float(said[first].mean()) if first.any() else 0.0,
        tag_baseline=float(said[most_likely(frequent, 3)].mean()),
        different_tags=int(first.any(axis=0).sum()),
        map_frequent=mean_average_precision(frequent, labels),
        map_words=mean_average_precision(words.astype(np.float32), labels),
        confidence=measure_confidence(
            np.array([caption.confidence or 0.0 for caption in captions]),
            np.array([names_right(text, e.captions) for text, e in zip(texts, read, strict=True)]),
        ),
    )


def _membership(
    names: Sequence[Container[str]], tags: TagSet
) -> np.ndarray[Any, np.dtype[np.bool]]:
    """Return which tags are among the names of each photograph: ``(photographs, T)``."""
    return np.array([[name in each for name in tags.names] for each in names], bool)


def _right(tags: TagSet, example: Example) -> set[str]:
    """Return the example's named objects or, if it has none, the tags that a caption says."""
    labels = tags.labels(example)
    return {*labels.present, *(labels.unclear if example.tags is None else ())}


def evaluate_images(
    checkpoint: Checkpoint, examples: Sequence[Example], options: SearchOptions, workers: int
) -> tuple[Evaluation, dict[str, str]]:
    """Evaluate on the examples' photographs; also return which could not be read, and why."""
    paths = [str(example.image) for example in examples]
    unreadable: dict[int, str] = {}
    grids = pixel_grids(checkpoint, paths, workers, unreadable)
    result = judge(examples, describe(checkpoint, grids, options), checkpoint)
    return result, {paths[place]: why for place, why in unreadable.items()}


def compare_images(
    checkpoint: Checkpoint, result: Evaluation, images: Path, options: SearchOptions, workers: int
) -> dict[str, float | tuple[float, float]]:
    """Evaluate on the same photographs (by name) in another folder.

    Returns its CIDEr-D, the mean of the result's minus it, the 95 % interval of that by a paired
    bootstrap over photographs, and the share of captions that are others there. Raises
    ``DataError`` when one of them cannot be read.
    """
    examples = [replace(e, image=images / e.image.name) for e in result.examples]
    other, unreadable = evaluate_images(checkpoint, examples, options, workers)
    for path, why in unreadable.items():
        raise DataError(f"{path} cannot be compared: {why}")
    mean, low, high = paired_bootstrap(
        result.scores.cider_d_per_image, other.scores.cider_d_per_image
    )
    pairs = zip(result.captions, other.captions, strict=True)
    changed = sum(ours.text != theirs.text for ours, theirs in pairs) / len(result.captions)
    return {
        "cider_d_there": other.scores.cider_d,
        "gap": mean,
        "gap_95": (low, high),
        "captions_changed": changed,
    }


def describe_captions(
    examples: Sequence[Example],
    captions: Sequence[str],
    training: Sequence[str] | None = None,
    with_meteor: bool = False,
    with_spice: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return all figures of a caption an example, and an entry a photograph with its scores.

    Raises ``MissingToolError`` when METEOR or SPICE is asked for and cannot be had.
    """
    references = [example.captions for example in examples]
    scores = score(captions, references)
    each: dict[str, Sequence[Any]] = {
        "bleu": scores.bleu_per_image,
        "rouge_l": scores.rouge_l_per_image,
        "cider_d": scores.cider_d_per_image,
    }
    figures: dict[str, Any] = {"photographs": len(examples), **scores.as_dict()}
    for name, wanted, by_java in (("meteor", with_meteor, meteor), ("spice", with_spice, spice)):
        if wanted:
            figures[name], *each[name] = by_java(captions, references)
    described = asdict(diversity(captions, training))
    figures |= {name: value for name, value in described.items() if value is not None}
    entries = [
        {"image": str(example.image), "caption": caption, **dict(zip(each, values, strict=True))}
        for example, caption, *values in zip(examples, captions, *each.values(), strict=True)
    ]
    return figures, entries


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures may depend on."""
    found = {"python": platform.python_version(), "captioner": __version__}
    for package in ("torch", "torchvision", "numpy", "Pillow", "pycocoevalcap"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def coco_form(
    examples: Sequence[Example], captions: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return captions in COCO's results form, and the examples in COCO's captions form.

    Where the data has no ids, an image's id is the number that ends its name or, where these are
    not all different, its index from 1.
    """
    ids = _image_ids(examples)
    results = [{"image_id": i, "caption": text} for i, text in zip(ids, captions, strict=True)]
    images = [{"id": i, "file_name": e.image.name} for i, e in zip(ids, examples, strict=True)]
    pairs = [(i, text) for i, e in zip(ids, examples, strict=True) for text in e.captions]
    annotations = [
        {"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(pairs, 1)
    ]
    return results, {"images": images, "annotations": annotations, "type": "captions", "info": {}}


def _image_ids(examples: Sequence[Example]) -> list[ImageId]:
    own = [example.image_id for example in examples]
    numbers = [coco_image_id(str(example.image)) for example in examples]
    for ids in (own, numbers):
        known = [image_id for image_id in ids if image_id is not None]
        if len({*known}) == len(examples):
            return known
    return list(range(1, len(examples) + 1))
