"""Tags: content words, one a stem, in the order of agreement; scores that are probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from captioner.data.calibration import Calibration, fit_calibration
from captioner.data.example import DataError, Example
from captioner.data.tags import TagSet, content_words, label_matrix

CAPTIONS = (
    "a brown dog runs on the beach",
    "the dog is running along the beach",
    "a dog on sand",
)


def test_content_words_are_no_function_words() -> None:
    assert content_words("Two men are standing in front of the man's red car .") == [
        "men",
        "standing",
        "man",
        "red",
        "car",
    ]


def test_tags_from_captions() -> None:
    examples = [
        Example(Path("1.jpg"), CAPTIONS),
        Example(Path("2.jpg"), ("a man runs", "a man is running", "the man can run fast")),
    ]
    tags = TagSet.build(examples, size=10, min_count=1)
    assert "run" in tags.vocabulary
    assert "running" not in tags.vocabulary
    assert tags.labels(examples[0]).present == ["dog", "beach", "run"]
    assert tags.labels(Example(Path("3.jpg"), ("a dog runs",))).present == ["dog", "run"]
    assert list(TagSet.build(examples, 10, min_count=2).vocabulary.words[4:]) == ["run"]


def test_named_objects_are_taken_as_they_are() -> None:
    examples = [
        Example(Path("1.jpg"), CAPTIONS, ("traffic light", "dog")),
        Example(Path("2.jpg"), CAPTIONS, ("dog",)),
    ]
    tags = TagSet.build(examples, size=10, min_count=1)
    assert tags.vocabulary.words[4:] == ("dog", "traffic light")
    assert tags.labels(examples[0]).present == ["traffic light", "dog"]


def test_one_form_a_tag_and_compounds() -> None:
    captions = ("two dogs near a fire hydrant", "a dog at the fire hydrant", "a running dog")
    examples = [Example(Path(f"{n}.jpg"), captions) for n in range(12)]
    others = ("men ran on grassy land", "a man runs on grass", "the man is running over the grass")
    examples += [Example(Path(f"{n}.jpg"), others) for n in range(12, 24)]
    tags = TagSet.build(examples, size=10, min_count=10)
    assert set(tags.names) == {"dog", "fire hydrant", "man", "run", "grass"}
    assert tags.frequencies == (0.5,) * 5
    found = tags.labels(examples[0])
    assert set(found.present) == {"dog", "fire hydrant"}
    assert found.unclear == {"run"}
    assert tags.said("Dogs by hydrants.") == {"dog"}


def test_sources_make_one_set() -> None:
    """Captions' words and named objects; neither says that what the other names is absent."""
    captioned = [Example(Path(f"{n}.jpg"), ("a man on skis", "men ski")) for n in range(3)]
    objects = [
        Example(Path("4.jpg"), ("a man skis",), ("person", "Skis")),
        Example(Path("5.jpg"), ("an oven",), ("oven",)),
    ]
    tags = TagSet.build(captioned + objects, size=10, min_count=1)
    assert set(tags.names) == {"man", "ski", "person", "oven"}
    column = {name: place for place, name in enumerate(tags.names)}
    found = label_matrix(tags, objects)
    # The first names persons and skis, and its caption says a man; the second has an oven.
    assert {name: found[0, place] for name, place in column.items()} == {
        "man": -1, "ski": 1, "person": 1, "oven": 0,
    }  # fmt: skip
    assert found[1].tolist().count(1) == 1
    # Captions are free to say anything: what none of them says is absent.
    assert label_matrix(tags, captioned)[0, column["oven"]] == 0


def test_a_list_of_tags_is_read_as_it_was_written_or_edited(tmp_path: Path) -> None:
    examples = [Example(Path("1.jpg"), CAPTIONS), Example(Path("2.jpg"), ("a cat runs",))]
    tags, path = TagSet.build(examples, size=10, min_count=1), tmp_path / "tags.tsv"
    tags.write(path, len(examples))
    read = TagSet.read(path)
    assert read.names == tags.names
    assert read.forms == tags.forms
    assert read.counted(examples).frequencies == tags.frequencies
    assert "\nrun\t2\trun" in path.read_text()
    path.write_text("\ufeff# mine\n\nPet\t3\tDog\tcat\r\nrun\t2\truns\nheron\n", encoding="utf-8")
    edited = TagSet.read(path)
    assert edited.names == ("Pet", "run", "heron")
    counted = edited.counted(examples)
    assert counted.names == ("Pet", "run")
    assert counted.labels(examples[0]).present == ["Pet"]
    assert counted.labels(examples[1]).present == ["run", "Pet"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog\ncat\ndog\n", r"line 3: 'dog' stands twice"),
        (b"dog\n\t3\tcat\n", r"line 2: '' is no name"),
        (b"<eos>\n", r"line 1: '<eos>' is no name"),
        (b"# nothing\n", r"there is none"),
        (b"\xff\xfe", r"cannot be read"),
    ],
)
def test_what_is_no_list_of_tags_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tags.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        TagSet.read(tmp_path / "tags.tsv")


def test_calibration_is_a_probability() -> None:
    generator = np.random.default_rng(0)
    log_probs = np.log(generator.uniform(0.01, 0.99, 20_000))
    # Platt's own model, with a known slope and offset.
    truth = Calibration(0.6, 0.4)
    right = [bool(generator.random() < truth(float(lp))) for lp in log_probs]
    fitted = fit_calibration([float(lp) for lp in log_probs], right)
    assert fitted.slope == pytest.approx(0.6, abs=0.05)
    assert fitted.offset == pytest.approx(0.4, abs=0.05)


def test_calibration_without_data_is_the_identity() -> None:
    assert fit_calibration([], [])(math.log(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("probabilities", "right"),
    [
        ([0.3] * 3000, [True] * 900 + [False] * 2100),
        ([0.331, 0.332] * 1500, [True, False] * 1500),
        ([1e-9, 1.0] * 1500, [False, True] * 1500),
        ([1e-9, 1.0] * 1500, [True, False] * 1500),
        ([0.2, 0.4, 0.9], [True, True, True]),
    ],
)
def test_calibration_of_any_data_is_the_share_that_is_right(
    probabilities: list[float], right: list[bool]
) -> None:
    log_probs = [math.log(p) for p in probabilities]
    calibration = fit_calibration(log_probs, right)
    assert math.isfinite(calibration.slope)
    if len(right) > 100:
        mean = sum(map(calibration, log_probs)) / len(right)
        assert mean == pytest.approx(sum(right) / len(right), abs=0.01)
