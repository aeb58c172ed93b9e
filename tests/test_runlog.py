"""The log of a run: what it holds, and that a kill neither loses nor repeats anything."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioner.settings import ConfigError
from captioner.training.runlog import RunLog, read_log
from conftest import draw_picture

IMAGES = [f"{n}.png" for n in range(17)]
EPOCH, EPOCHS = 35, 3  # steps an epoch, no multiple of what is logged


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the log gets a chance to tidy up."""


def figures(step: int) -> dict[str, Any]:
    return {"loss": 1.0 / step, "rate": 0.1 * step, "gradient_norm": torch.tensor(0.5 * step)}


def train(
    run: Path, done: int, evaluated: int, until: float = math.inf, tensorboard: bool = False
) -> None:
    """Log as a run does that goes on where its saved state says, and is killed at a step.

    Half a step later is after its evaluation.
    """
    run.mkdir(exist_ok=True)
    with RunLog(run, done or None, tensorboard) as log:
        for step in range(done, EPOCH * EPOCHS + 1):
            if step > done:
                log.step(step, "frozen" if step <= EPOCH else "end to end", figures(step))
            if step >= until:
                raise KilledError
            if step % EPOCH == 0 and step > evaluated:
                epoch = step // EPOCH
                scores = {"epoch": epoch, "step": step, "stage": "frozen", "cider_d": 0.1 * epoch}
                log.evaluation(scores, IMAGES, [f"{image} at {step}" for image in IMAGES])
            if step + 0.5 >= until:
                raise KilledError


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """Return the log of a run that nothing disturbed."""
    train(tmp_path / "whole", 0, 0)
    return (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_the_log_is_plain_json_lines(whole: bytes) -> None:
    records = [json.loads(line) for line in whole.splitlines()]
    steps = [record for record in records if "epoch" not in record]
    assert [record["step"] for record in steps] == list(range(10, 106, 10))
    first = {"step": 10, "stage": "frozen", "loss": 0.1, "rate": 1.0, "gradient_norm": 5.0}
    assert steps[0] == first
    assert [r["step"] for r in records if "epoch" in r] == [35, 70, 105]
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    samples = records[-1]["samples"]
    assert list(samples) == [IMAGES[n] for n in (0, 2, 4, 6, 8, 10, 12, 14)]
    assert samples["14.png"] == "14.png at 105"


def test_only_figures_that_are_logged_are_asked_for(tmp_path: Path) -> None:
    class Waits:
        def __float__(self) -> float:
            raise AssertionError("this would wait for the device")

    with RunLog(tmp_path, None, False) as log:
        log.step(9, "frozen", {"loss": Waits()})
        with pytest.raises(AssertionError, match="would wait"):
            log.step(10, "frozen", {"loss": Waits()})


@pytest.mark.parametrize("saved", [0, 20, 34, 35, 36, 70, 104, 105])
@pytest.mark.parametrize("until", [5, 34, 35, 35.5, 36, 69, 70, 70.5, 104, 105, 105.5])
def test_killed_and_continued_it_is_that_of_an_undisturbed_run(
    tmp_path: Path, whole: bytes, saved: int, until: float
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "cut", 0, 0, max(until, saved))
    # The state was saved before the evaluation of its step, which may be done a second time.
    train(tmp_path / "cut", saved, max(saved - 1, 0))
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == whole


def test_cut_off_anywhere_it_goes_on(tmp_path: Path, whole: bytes) -> None:
    run = tmp_path / "cut"
    run.mkdir()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        (run / "log.jsonl").write_bytes(whole[:cut])
        kept = max((end for end in ends if end <= cut), default=0)
        assert len(read_log(run)) == sum(end <= cut for end in ends)
        with RunLog(run, 1000, False):
            assert (run / "log.jsonl").read_bytes() == whole[:kept]


def test_begun_anew_it_holds_nothing_of_before(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0, "stage": "frozen"}\n')
    with RunLog(tmp_path, None, False):
        assert read_log(tmp_path) == []
    assert read_log(tmp_path / "nowhere") == []


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    good = b'{"step": 1, "stage": "frozen"}\n'
    damaged = (b"[" * 200_000, b"[1]", b'{"step": "2"}', b'{"step": null}', b"\xff")
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(damaged) + b"\n" + good)
    assert read_log(tmp_path) == [{"step": 1, "stage": "frozen"}]
    with RunLog(tmp_path, 1, False):
        assert (tmp_path / "log.jsonl").read_bytes() == good


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, None, False) as log:
        log.step(10, "frozen", {"loss": float("nan"), "gradient_norm": torch.tensor(torch.inf)})
    text = (tmp_path / "log.jsonl").read_text()
    assert text == '{"step": 10, "stage": "frozen", "loss": null, "gradient_norm": null}\n'


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_shows_the_same_after_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train(run, 0, 0, 84, tensorboard=True)
    train(run, 52, 35, tensorboard=True)
    found = events(run)
    logged = [record for record in read_log(run) if "epoch" not in record]
    assert [record["step"] for record in logged] == list(range(10, 106, 10))
    for name in ("loss", "rate", "gradient_norm"):
        shown = [(event.step, event.value) for event in found.Scalars(f"step/{name}")]
        assert [step for step, _ in shown] == [record["step"] for record in logged]
        assert [v for _, v in shown] == pytest.approx([record[name] for record in logged])
    scores = [(event.step, event.value) for event in found.Scalars("evaluation/cider_d")]
    assert [step for step, _ in scores] == [35, 70, 105]
    assert [value for _, value in scores] == pytest.approx([0.1, 0.2, 0.3])
    assert "evaluation/step" not in found.Tags()["scalars"]


def test_tensorboard_shows_photographs_with_their_captions(tmp_path: Path) -> None:
    pictures = [
        str(draw_picture(tmp_path / "a.png", "red", (640, 480))),
        str(draw_picture(tmp_path / "caf\udce9.png", "blue", (30, 300))),
        str(tmp_path / "gone.png"),
    ]
    captions = ["a dog", "a dog runs on the grass with a ball in its mouth", "a hat"]
    with RunLog(tmp_path, None, True) as log:
        log.evaluation({"epoch": 1, "step": 4, "stage": "frozen"}, pictures, captions)
    found = events(tmp_path)
    assert found.Tags()["images"] == ["samples/1", "samples/2"]
    texts = [
        found.Tensors(f"samples/{n}/text_summary")[0].tensor_proto.string_val[0] for n in (1, 2, 3)
    ]
    assert texts == [
        b"a.png: a dog",
        b"caf\\udce9.png: a dog runs on the grass with a ball in its mouth",
        b"gone.png: a hat",
    ]
    for number, height, lines in ((1, 192, 1), (2, 256, 2)):
        (image,) = found.Images(f"samples/{number}")
        assert (image.width, image.height) == (256, height + 18 * lines + 8)
        file = tmp_path / "shown.png"
        file.write_bytes(image.encoded_image_string)
        pixels = np.asarray(Image.open(file).convert("L"))
        for line in range(lines):  # each has letters on it
            written = pixels[height + 4 + 18 * line : height + 18 + 18 * line]
            assert written.min() < 80
            assert written.max() == 255
    assert list(read_log(tmp_path)[0]["samples"].values()) == captions


def test_tensorboard_that_is_not_there_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 7, "stage": "frozen"}\n')
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install "captioner\[tensorboard\]"'):
        RunLog(tmp_path, None, True)
    assert len(read_log(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "log.jsonl"]
