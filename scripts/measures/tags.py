"""How quick tags are beside the encoder, and how good the parts of their scores are alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioner.data import readers
from captioner.data.calibration import fit_scoring
from captioner.data.example import DataError, Example
from captioner.data.tags import label_matrix
from captioner.evaluation import pixel_grids
from captioner.generation.tags import score_evidence, tag_evidence
from captioner.inference import Captioner
from captioner.metrics.tags import TagMeasures, mean_average_precision, measure_tags
from captioner.model.checkpoint import Checkpoint, load_checkpoint
from captioner.model.device import choose_device
from measures.timing import Figures, Named, in_turn, ratio

Array = np.ndarray[Any, Any]
# The kinds of evidence that make each kind of score: decoder, head, frequency.
_KINDS = {"frequencies": (2,), "decoder": (0, 2), "head": (1, 2), "both": (0, 1, 2)}


def tags(args: argparse.Namespace) -> Named:
    """Tags alone over the encoder, and captions with tags over captions alone."""
    captioner = Captioner.load(
        args.model, device=str(choose_device(args.device)), precision="float32"
    )
    paths = sorted(args.images.iterdir())[: args.count]
    pixels = [captioner.pixels(path) for path in paths]
    batches = [pixels[i : i + args.batch] for i in range(0, len(pixels), args.batch)]

    def each(*parts: Callable[[Any], object]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                grids = captioner.encode(batch)
                for part in parts:
                    part(grids)

        return run

    runs: dict[str, Callable[[], object]] = {
        "encoder": each(),
        "tags": each(captioner.tags_of),
        "captions": each(captioner.captions_of),
        "both": each(captioner.captions_of, captioner.tags_of),
    }
    taken = in_turn(runs, args.rounds)
    yield "tags / encoder", {"ratio": ratio(taken["tags"], taken["encoder"])}
    yield "both / captions", {"ratio": ratio(taken["both"], taken["captions"])}


class Compared:
    """Scores of tags on some photographs, each half by a fit to the other half."""

    def __init__(self, evidence: Array, labels: Array, kind: str) -> None:
        """Take evidence ``(photographs, T, 3)`` and labels ``(photographs, T)``."""
        columns = list(_KINDS[kind])
        self.labels, self.scores = labels, np.zeros(labels.shape, np.float32)
        self.chosen = np.zeros(labels.shape, bool)
        self.precise = np.zeros(labels.shape, bool)
        for half in (0, 1):
            ours = np.arange(len(labels)) % 2 == half
            scoring = fit_scoring(evidence[~ours][:, :, columns], labels[~ours])
            theirs = torch.from_numpy(evidence[ours][:, :, columns])
            self.scores[ours] = score_evidence(theirs, scoring).numpy()
            self.chosen[ours] = self.scores[ours] >= scoring.threshold
            self.precise[ours] = self.scores[ours] >= (scoring.threshold_of(0.9) or 1.0)

    def measures(self) -> TagMeasures:
        """Return all measures, with the thresholds of the other half."""
        return measure_tags(self.scores, self.labels, self.chosen)

    def precision_at_90(self) -> float:
        """Return the precision from the threshold on that had 0.9 in the other half."""
        known = self.precise & (self.labels >= 0)
        return float((self.labels[known] > 0).mean()) if known.any() else 0.0

    def of(self, rows: Array) -> tuple[float, float]:
        """Return the mean average precision and overall F1 of some of the photographs."""
        labels, chosen = self.labels[rows], self.chosen[rows]
        right, given = (chosen & (labels > 0)).sum(), (chosen & (labels >= 0)).sum()
        f1 = 2.0 * right / max(given + (labels > 0).sum(), 1)
        return mean_average_precision(self.scores[rows], labels), float(f1)


def evidence_of(checkpoint: Checkpoint, examples: Sequence[Example], workers: int) -> Array:
    """Return what a model says of the tags of the examples' photographs.

    Raises ``DataError`` if one of them cannot be read.
    """
    found: dict[int, Array] = {}
    unreadable: dict[int, str] = {}
    paths = [str(example.image) for example in examples]
    checkpoint.model.eval()
    with torch.inference_mode():
        for places, grid in pixel_grids(checkpoint, paths, workers, unreadable):
            rows = tag_evidence(checkpoint, grid).numpy()
            found |= dict(zip(places, rows, strict=True))
    for index, why in unreadable.items():
        raise DataError(f"{paths[index]} cannot be compared: {why}")
    return np.stack([found[index] for index in range(len(examples))])


def resampled(one: Compared, draws: int) -> Array:
    """Return mean average precision and overall F1 of photographs drawn anew: ``(draws, 2)``.

    The draws are the same for all that is compared. :func:`captioner.metrics.paired_bootstrap` is
    for means over photographs, and neither figure is one. Source: Efron and Tibshirani, "An
    Introduction to the Bootstrap" (1993), section 13.3.
    """
    generator, count = np.random.default_rng(0), len(one.labels)
    return np.array([one.of(generator.integers(count, size=count)) for _ in range(draws)])


def ahead(one: Compared, baseline: Compared, draws: int) -> Figures:
    """Return how far one is ahead, in points, with the 95 % intervals."""
    everything = np.arange(len(one.labels))
    gap = 100 * np.subtract(one.of(everything), baseline.of(everything))
    gaps = 100 * (resampled(one, draws) - resampled(baseline, draws))
    low, high = np.percentile(gaps, (2.5, 97.5), axis=0)
    return {
        f"{name} ahead": f"{gap[n]:.2f} ({low[n]:.2f} to {high[n]:.2f})"
        for n, name in enumerate(("map", "o_f1"))
    }


def compare_tags(args: argparse.Namespace) -> Named:
    """The tag decoder, the head and both, of several models with the same tags."""
    examples = readers.load(args.captions, args.images, args.split, None)[0]
    compared: dict[str, Compared] = {}
    for path in map(Path, args.models):
        checkpoint = load_checkpoint(path)
        labels = label_matrix(checkpoint.tags, examples)
        evidence = evidence_of(checkpoint, examples, args.workers)
        for kind in _KINDS:
            compared[f"{path.parent.name} {kind}"] = Compared(evidence, labels, kind)
    if args.baseline and args.baseline not in compared:
        raise DataError(f"--baseline is {args.baseline!r}; it takes {', '.join(compared)}")
    baseline = compared.get(args.baseline)
    for name, one in compared.items():
        measures = one.measures().as_dict()
        figures: Figures = {key: round(100 * value, 2) for key, value in measures.items()}
        figures["precision at 0.9"] = round(100 * one.precision_at_90(), 2)
        if baseline is not None and one is not baseline:
            figures |= ahead(one, baseline, args.draws)
        yield name, figures
