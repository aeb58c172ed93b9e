"""How sure a caption is: fitted, stored, measured, and what is left out for it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from captioner.cli import main
from captioner.data.calibration import Confidence, fit_confidence
from captioner.data.tags import TagSet
from captioner.folder import FolderRun
from captioner.folder.outputs import TerminalStream, csv_line, output_file
from captioner.generation.confidence import caption_evidence, with_confidence
from captioner.generation.description import Caption
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.metrics.reliability import measure_confidence, reliability
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.settings import ConfigError
from conftest import draw_picture

ROOT = Path(__file__).resolve().parents[1]
TAGS = TagSet(["dog", "beach", "run"], [0.5, 0.2, 0.3])
CAPTION = Caption("a dog runs", -3.0, ("a", "dog", "runs"), (-0.25, -1.5, -0.75))
SURE = Confidence((1.0, 0.5, 0.25, 0.125, 2.0))


def test_the_evidence_is_of_the_words_and_of_the_tags_that_they_say() -> None:
    scores = np.array([0.5, 0.9, 0.25], np.float32)
    assert caption_evidence(CAPTION, TAGS, scores) == pytest.approx(
        [-3.0 / 4, -1.5, (np.log(0.5) + np.log(0.25)) / 2, np.log(0.25)]
    )


def test_a_caption_without_tags_or_words_has_evidence_too() -> None:
    nothing = Caption("", -2.0)
    assert caption_evidence(nothing, TAGS, np.zeros(3, np.float32)) == [-2.0, 0.0, 0.0, 0.0]


def test_a_tag_that_is_impossible_stays_finite() -> None:
    evidence = caption_evidence(CAPTION, TAGS, np.zeros(3, np.float32))
    assert evidence[2:] == pytest.approx([np.log(1e-4)] * 2, rel=1e-5)


def test_the_confidence_is_the_logistic_function_of_the_evidence() -> None:
    assert Confidence((2.0, -1.0))([1.5]) == pytest.approx(1.0 / (1.0 + np.exp(-2.0)))
    assert 0.0 <= Confidence((1e4, 0.0))([-1e9]) < 1e-300


@pytest.mark.parametrize("weights", [(), (1.0,), (float("nan"), 0.0), (1e5, 0.0)])
def test_nonsense_is_no_confidence(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="make no sense"):
        Confidence(weights)


def test_the_fit_finds_the_weights_that_drew_the_answers() -> None:
    rng = np.random.default_rng(0)
    evidence = rng.normal(size=(20_000, 2))
    probability = 1.0 / (1.0 + np.exp(-(2.0 * evidence[:, 0] - evidence[:, 1] + 0.5)))
    fitted = fit_confidence(evidence, rng.random(20_000) < probability)
    assert fitted.weights == pytest.approx((2.0, -1.0, 0.5), abs=0.08)


def test_an_ensemble_has_the_mean_and_none_without_all() -> None:
    scores = np.array([0.5, 0.9, 0.25], np.float32)
    flat, sure = Confidence((0.0,) * 4 + (0.0,)), Confidence((0.0,) * 4 + (np.log(3.0),))
    (both,) = with_confidence([CAPTION], [flat, sure], TAGS, scores)
    assert both.confidence == pytest.approx((0.5 + 0.75) / 2)
    (none,) = with_confidence([CAPTION], [flat, None], TAGS, scores)
    assert none.confidence is None


def test_measures_are_those_of_a_calculation_by_hand() -> None:
    confidence = np.array([0.75, 0.95, 0.55, 0.15])
    right = np.array([True, True, False, False])
    measured = measure_confidence(confidence, right)
    error = ((1 - 0.75) + (1 - 0.95) + 0.55 + 0.15) / 4  # each is alone in its bin
    assert measured == pytest.approx((0.5, error, 0.75, 2 / 3, 0.5, 1.0))
    assert [part.number for part in reliability(np.array([0.0, 0.01, 1.0]), right[:3])] == [2, 1]


@pytest.fixture
def sure(small: Checkpoint) -> Checkpoint:
    """Return a small captioner whose captions have a confidence."""
    return replace(small, confidence=SURE)


def test_it_is_stored_with_the_model(sure: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(sure, tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors").confidence == SURE


def test_caption_and_describe_agree(sure: Checkpoint, small: Checkpoint, tmp_path: Path) -> None:
    paths = [draw_picture(tmp_path / f"{c}.png", c) for c in ("red", "green")]
    captioner = Captioner(sure)
    several = captioner.describe(paths, SearchOptions(num_captions=2))
    for alone, described in zip(captioner.caption(paths), several, strict=True):
        assert alone.confidence is not None
        assert alone.confidence == pytest.approx(described.caption.confidence, abs=1e-6)
        assert all(c.confidence is not None for c in described.captions)
    assert Captioner(small).caption(paths)[0].confidence is None


def test_what_is_not_sure_enough_is_left_out(sure: Checkpoint, tmp_path: Path) -> None:
    draw_picture(tmp_path / "red.png", "red")
    kept, left_out = tmp_path / "kept.jsonl", tmp_path / "left_out.jsonl"
    FolderRun(output=kept).run(Captioner(sure), [tmp_path])
    record = json.loads(kept.read_text())
    assert record["confidence"] == record["captions"][0]["confidence"]
    FolderRun(output=left_out, min_confidence=1.0).run(Captioner(sure), [tmp_path])
    without = json.loads(left_out.read_text())
    schema = json.loads((ROOT / "docs" / "record.schema.json").read_text())
    for valid in (record, without):
        Draft202012Validator(schema).validate(valid)
    assert without == {
        "image": record["image"], "caption": None, "confidence": record["confidence"],
        "tags": record["tags"],
    }  # fmt: skip


def test_only_a_model_that_was_fitted_can_leave_out(small: Checkpoint, sure: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"min_confidence is 0\.5, but .* train its tags anew"):
        Captioner(small).check_confidence(0.5)
    with pytest.raises(ConfigError, match="min_confidence is 2; it takes 0 to 1"):
        Captioner(sure).check_confidence(2)
    Captioner(small).check_confidence(0.0)


def test_the_command_line_refuses_what_is_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["caption", "x.jpg", "--min-confidence", "70"])
    assert ended.value.code == 2
    assert "expected a number from 0 to 1, not '70'" in capsys.readouterr().err


RECORD: dict[str, Any] = {"image": "a.jpg", "caption": None, "confidence": 0.3126, "tags": []}


def test_a_caption_that_was_left_out_is_empty_in_every_output(tmp_path: Path) -> None:
    (row,) = csv.reader(StringIO(csv_line(RECORD).decode()))
    assert row == ["a.jpg", "", "", "0.3126", "", ""]
    coco = output_file(str(tmp_path / "x.json"))
    coco.finish([RECORD], False)
    assert json.loads((tmp_path / "x.json").read_text()) == []
    text = StringIO()
    TerminalStream(text).write(RECORD)
    assert text.getvalue() == "a.jpg  (no caption: 31% sure)  []\n"
