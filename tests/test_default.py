"""The embedded default: what is in the package, how good it is, how soon it speaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.data import readers
from captioner.data.example import Example
from captioner.data.tags import content_words
from captioner.evaluation import Evaluation, evaluate_images
from captioner.generation.description import Caption
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.metrics import paired_bootstrap
from captioner.model.checkpoint import default_path
from conftest import draw_picture, median_ratio_within
from test_coco_caption import assert_equal, needs_java, scores_by_java

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

BEAM_3 = SearchOptions(beam_size=3)


@pytest.fixture(scope="module")
def default() -> Captioner:
    return Captioner.load(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def dev(data: Path) -> list[Example]:
    flickr = data / "flickr8k"
    captions = flickr / "captions.token.txt"
    return readers.load(captions, flickr / "images", str(flickr / "dev.txt")).examples


@pytest.fixture(scope="module")
def result(default: Captioner, dev: list[Example]) -> Iterator[Evaluation]:
    with torch.inference_mode():
        yield evaluate_images(default.checkpoint, dev, BEAM_3, workers=0)[0]


def test_the_package_holds_what_it_promises() -> None:
    installed = {path.name: path for path in files("captioner") or []}
    assert {"LICENSE", "entry_points.txt"} <= installed.keys()
    package = default_path().parent.parent
    assert (package / "py.typed").exists()
    assert (package / "weights" / "MODEL_CARD.md").exists()
    assert default_path().stat().st_size <= 16_000_000


def test_tags_are_content_words(default: Captioner) -> None:
    names = default.checkpoint.tags.vocabulary.words[4:]
    words = [word for name in names for word in name.split()]
    content = sum(content_words(word) == [word] for word in words)
    assert content >= 0.97 * len(words)  # "black and white", "parking lot" and the like


@pytest.mark.data
def test_captions_are_good(result: Evaluation) -> None:
    assert len(result.captions) == 1000
    assert result.scores.bleu[3] >= 0.237
    assert result.scores.cider_d >= 0.605


@needs_java
@pytest.mark.data
def test_scores_are_coco_captions(result: Evaluation, dev: list[Example]) -> None:
    captions = [caption.text for caption in result.captions]
    theirs = scores_by_java(captions, [example.captions for example in dev])
    assert_equal(result.scores, theirs)


@pytest.mark.data
def test_captions_read_as_a_person_writes(result: Evaluation) -> None:
    for caption in result.captions:
        assert "<" not in caption.text
        assert " '" not in caption.text
        assert caption.text == caption.text.strip() != ""


@pytest.mark.data
def test_tags_are_good(result: Evaluation) -> None:
    assert result.tag_precision >= 0.69
    assert result.tag_precision >= 2 * result.tag_baseline
    assert result.different_tags >= 250
    assert all(len({tag.name for tag in tags}) == len(tags) for tags in result.tags)


@pytest.mark.data
def test_captions_say_how_probably_they_are_right(result: Evaluation) -> None:
    assert result.confidence.right >= 0.25
    assert result.confidence.calibration_error <= 0.05


@pytest.mark.data
def test_saving_again_changes_few_captions(
    default: Captioner, result: Evaluation, tmp_path: Path
) -> None:
    again: list[Path] = []
    for place, example in enumerate(result.examples[:64]):
        again.append(tmp_path / f"{place}.jpg")
        with Image.open(example.image) as picture:
            picture.convert("RGB").save(again[-1], quality=90)
    pairs = zip(default.caption(again), result.captions, strict=False)
    assert sum(ours.text != theirs.text for ours, theirs in pairs) <= 64 / 3


@pytest.mark.data
def test_true_shapes_cost_little(default: Captioner, dev: list[Example], data: Path) -> None:
    originals = data / "flickr8k" / "dev-original"
    squashed = [e for e in dev if (originals / e.image.name).exists()]
    assert len(squashed) == 113
    own_shape = [replace(e, image=originals / e.image.name) for e in squashed]
    scores = [
        evaluate_images(default.checkpoint, examples, BEAM_3, workers=0)[0].scores
        for examples in (own_shape, squashed)
    ]
    _, _, high = paired_bootstrap(scores[0].cider_d_per_image, scores[1].cider_d_per_image)
    assert high >= -0.03


@pytest.fixture(scope="module")
def pixels(default: Captioner, dev: list[Example]) -> list[Pixels]:
    return [default.pixels(example.image) for example in dev[:128]]


def captions_in_batches(
    default: Captioner, pixels: list[Pixels], order: list[int], size: int
) -> dict[int, list[Caption]]:
    """Return the captions of each photograph, looked at in an order, so many at a time."""
    options = SearchOptions(num_captions=3)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    grids = (default.encode([pixels[place] for place in batch]) for batch in batches)
    found = (captions for grid in grids for captions in default.captions_of(grid, options))
    return dict(zip(order, found, strict=True))


@pytest.fixture(scope="module")
def by_32(default: Captioner, pixels: list[Pixels]) -> dict[int, list[Caption]]:
    return captions_in_batches(default, pixels, list(range(128)), 32)


@pytest.mark.data
@pytest.mark.parametrize("size", [1, 7, 128])
def test_neighbours_change_no_caption(
    default: Captioner, pixels: list[Pixels], by_32: dict[int, list[Caption]], size: int
) -> None:
    """All of the split, at more sizes, is what ``scripts/benchmark.py steadiness`` looks at."""
    again = captions_in_batches(default, pixels, list(range(128))[::-1], size)
    for place, several in by_32.items():
        assert [c.text for c in again[place]] == [c.text for c in several]
        for ours, theirs in zip(again[place], several, strict=True):
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)


@pytest.mark.data
def test_required_words_are_said(default: Captioner, dev: list[Example]) -> None:
    options = SearchOptions(required=("dog", "red"), no_ending=("a", "the"), no_repeat=2)
    for caption in default.caption([example.image for example in dev[:16]], options):
        assert caption.finished
        assert {"dog", "red"} <= {*caption.words}
        assert len({*pairwise(caption.words)}) == len(caption.words) - 1


def test_captioning_imports_no_compiler_and_no_torchvision(tmp_path: Path) -> None:
    """Each of them takes as long to import as torch itself."""
    picture = str(draw_picture(tmp_path / "x.jpg", "red", (64, 48)))
    code = (
        "import sys; from captioner.cli import main; main(sys.argv[1:]);"
        "print({'sympy', 'torch._dynamo', 'torchvision'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "caption", picture], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.timing
def test_the_first_caption_comes_soon(tmp_path: Path) -> None:
    picture = str(draw_picture(tmp_path / "x.jpg", "red", (640, 480)))
    ours, theirs = ["-m", "captioner", "caption", picture], ["-c", "import torch, torchvision"]
    assert median_ratio_within(1.25, ours, theirs, 5)
