"""Scores of the captions and tags that a model writes for a split."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.data.dataset import Features, pixel_batches
from captioner.data.example import DataError, Example, ImageId, coco_image_id
from captioner.data.tags import TagSet, content_words
from captioner.data.tokenizer import stem
from captioner.generation.captions import Caption, Tag, write_captions, write_tags
from captioner.generation.options import SearchOptions
from captioner.metrics import Scores, diversity, meteor, paired_bootstrap, score, spice
from captioner.model.checkpoint import Checkpoint
from captioner.model.device import autocast, own_settings

__all__ = [
    "Evaluation",
    "coco_form",
    "compare_images",
    "describe",
    "describe_captions",
    "evaluate_images",
    "feature_grids",
    "judge",
    "pixel_grids",
    "tag_hits",
    "versions",
]

Grids = Iterable[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """A model's captions and tags for a split, with their scores.

    ``examples`` are those whose photograph could be read; ``captions`` and ``tags`` are theirs,
    in order. ``tag_precision`` is the share of the first three tags that a caption (or the named
    objects) of the photograph has, ``tag_baseline`` that of the three most frequent tags said of
    every photograph; ``different_tags`` counts the tags among the first threes.
    """

    examples: list[Example]
    captions: list[Caption]
    tags: list[list[Tag]]
    scores: Scores
    tag_precision: float
    tag_baseline: float
    different_tags: int

    def tag_figures(self) -> dict[str, float]:
        """Return the figures of the tags by name."""
        names = ("tag_precision", "tag_baseline", "different_tags")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return {**self.scores.as_dict(), **self.tag_figures()}


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
    checkpoint: Checkpoint, grids: Grids, options: SearchOptions
) -> dict[int, tuple[Caption, list[Tag]]]:
    """Caption and tag the photographs of the grids; keyed by their places."""
    checkpoint.model.eval()
    found: dict[int, tuple[Caption, list[Tag]]] = {}
    model, words = checkpoint.model, checkpoint.vocabulary
    for places, grid in grids:
        captions = write_captions(
            [model.caption_decoder], words, [grid], options, check_finite=False
        )
        tags = write_tags(
            [model.tag_decoder], checkpoint.tags, checkpoint.calibration, [grid], False
        )
        best = [alternatives[0] for alternatives in captions]
        found |= dict(zip(places, zip(best, tags, strict=True), strict=True))
    return found


def judge(
    examples: Sequence[Example], found: Mapping[int, tuple[Caption, list[Tag]]], names: TagSet
) -> Evaluation:
    """Score what :func:`describe` wrote of the examples, by their places.

    Raises ``DataError`` when there is nothing at all.
    """
    if not found:
        raise DataError("none of the photographs to evaluate on could be read")
    read = [examples[place] for place in found]
    captions, tags = [c for c, _ in found.values()], [t for _, t in found.values()]
    scores = score([caption.text for caption in captions], [e.captions for e in read])
    first = [of_one[:3] for of_one in tags]
    frequent = [Tag(name, 1.0) for name in names.most_frequent(3)]
    return Evaluation(
        read,
        captions,
        tags,
        scores,
        tag_precision=_precision(read, first),
        tag_baseline=_precision(read, [frequent] * len(read)),
        different_tags=len({tag.name for of_one in first for tag in of_one}),
    )


def evaluate_images(
    checkpoint: Checkpoint, examples: Sequence[Example], options: SearchOptions, workers: int
) -> tuple[Evaluation, dict[str, str]]:
    """Evaluate on the examples' photographs; also return which could not be read, and why."""
    paths = [str(example.image) for example in examples]
    unreadable: dict[int, str] = {}
    grids = pixel_grids(checkpoint, paths, workers, unreadable)
    result = judge(examples, describe(checkpoint, grids, options), checkpoint.tags)
    return result, {paths[place]: why for place, why in unreadable.items()}


def compare_images(
    checkpoint: Checkpoint, result: Evaluation, images: Path, options: SearchOptions, workers: int
) -> dict[str, float | tuple[float, float]]:
    """Evaluate on the same photographs (by name) in another folder.

    Returns its CIDEr-D, the mean of the result's minus it, and the 95 % interval of that by a
    paired bootstrap over photographs. Raises ``DataError`` when one of them cannot be read.
    """
    examples = [replace(e, image=images / e.image.name) for e in result.examples]
    other, unreadable = evaluate_images(checkpoint, examples, options, workers)
    for path, why in unreadable.items():
        raise DataError(f"{path} cannot be compared: {why}")
    mean, low, high = paired_bootstrap(
        result.scores.cider_d_per_image, other.scores.cider_d_per_image
    )
    return {"cider_d_there": other.scores.cider_d, "gap": mean, "gap_95": (low, high)}


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
    found = {"python": platform.python_version()}
    for package in ("captioner", "torch", "torchvision", "numpy", "Pillow", "pycocoevalcap"):
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


def _precision(examples: Sequence[Example], tags: Sequence[Sequence[Tag]]) -> float:
    hits = [hit for e, found in zip(examples, tags, strict=True) for hit in tag_hits(e, found)]
    return sum(hits) / max(len(hits), 1)


def tag_hits(example: Example, tags: Sequence[Tag]) -> list[bool]:
    """Whether each tag is one of the example's objects, or a word of its captions by its stem."""
    if example.tags is not None:
        return [tag.name in example.tags for tag in tags]
    said = {stem(word) for caption in example.captions for word in content_words(caption)}
    return [stem(tag.name) in said for tag in tags]
