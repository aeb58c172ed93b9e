"""METEOR and SPICE, computed by pycocoevalcap's Java programs where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from captioner.metrics.ngrams import tokenized

__all__ = ["MissingToolError", "meteor", "need_meteor", "need_spice", "spice"]


class MissingToolError(RuntimeError):
    """A score needs a program that is not installed; the message says how to install it."""


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """Return METEOR 1.5 of the whole set and then of each image, 0…1.

    Source: Denkowski and Lavie (2014). Raises as :func:`captioner.metrics.ngrams.score` does, and
    ``MissingToolError`` without Java or pycocoevalcap.
    """
    need_meteor()
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    with scorer.meteor_p:  # or its pipes stay open
        total, each = scorer.compute_score(*_for_coco_caption(candidates, references))
    return (total, *each)


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """Return SPICE of the whole set and then of each image, 0…1.

    Source: Anderson et al. (2016). Raises as :func:`captioner.metrics.ngrams.score` does, and
    ``MissingToolError`` without Java, pycocoevalcap or the models that SPICE parses with.
    """
    need_spice()
    from pycocoevalcap.spice.spice import Spice

    total, each = Spice().compute_score(*_for_coco_caption(candidates, references))
    return (float(total), *(scores["All"]["f"] for scores in each))


def need_meteor() -> None:
    """Raise ``MissingToolError`` where METEOR cannot be computed; to be asked before long work."""
    _need_java("METEOR")


def need_spice() -> None:
    """Raise ``MissingToolError`` where SPICE cannot be computed; to be asked before long work."""
    _need_java("SPICE")
    from pycocoevalcap.spice import get_stanford_models as models

    if not (Path(models.SPICEDIR) / models.SPICELIB / f"{models.JAR}.jar").exists():
        raise MissingToolError(
            f"SPICE needs {models.JAR} and its models, which are not there: "
            "run python -m pycocoevalcap.spice.get_stanford_models"
        )


def _need_java(name: str) -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise MissingToolError(f'{name} needs pycocoevalcap: pip install "captioner[coco]"')
    if shutil.which("java") is None:
        raise MissingToolError(f"{name} needs Java: install a JRE, version 8 or later")


def _for_coco_caption(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return the references and candidates in the form of coco-caption's scorers."""
    written, wanted = tokenized(candidates, references)
    joined = {image: [" ".join(words) for words in texts] for image, texts in enumerate(wanted)}
    return joined, {image: [" ".join(words)] for image, words in enumerate(written)}
