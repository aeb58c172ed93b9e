"""The page that sums a run up: its figures, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from captioner.config import Config
from captioner.folder.report import is_report
from captioner.training.runlog import RunLog
from captioner.training.summary import write_summary
from conftest import draw_picture

Browser = webdriver.Chrome

STAGES = ["frozen", "frozen", "end to end", "self-critical"]
CIDER = [0.25, 0.41234, 0.55, 0.55]  # of two that are as good the first is the best
STEPS = 1_000  # an epoch
HOSTILE = "<script>alert(1)</script>"


def log_run(run: Path, images: list[str]) -> None:
    with RunLog(run, None, False) as log:
        for epoch, (stage, cider_d) in enumerate(zip(STAGES, CIDER, strict=True)):
            name = "reward" if stage == "self-critical" else "loss"
            for step in range(epoch * STEPS + 1, (epoch + 1) * STEPS + 1):
                gradient_norm = float("nan") if step == 500 else 1.0 + step % 7
                figures = {name: 8.0 - step / 1_000, "gradient_norm": gradient_norm}
                log.step(step, stage, figures | {"rate": 1e-3 / (epoch + 1)})
            figures = {name: 7.5 - epoch, "bleu_4": cider_d / 2, "cider_d": cider_d}
            place = {"epoch": epoch + 1, "step": (epoch + 1) * STEPS, "stage": stage}
            captions = [f"{HOSTILE} {epoch + 1}"] * len(images)
            more = {"different_tags": 1 + epoch, "seconds": 1_800.4, "steps": STEPS}
            log.evaluation({**place, **figures, **more}, images, captions)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a run in three stages."""
    folder = tmp_path_factory.mktemp("summary")
    images = [
        str(draw_picture(folder / "a.png", "red", (90, 60))),
        str(draw_picture(folder / "<b>{{ 7 }}\udce9.png", "blue")),
        str(folder / "gone.png"),
    ]
    run = folder / "<i>run"
    run.mkdir()
    log_run(run, images)
    default = Config()
    config = replace(
        default,
        data=replace(default.data, images="<u>photos", min_count=5),
        training=replace(default.training, augment=False),
        model=replace(default.model, tags=replace(default.model.tags, hidden=99)),
    )
    references = {image: [f"one of {n}", "<b>two</b>"] for n, image in enumerate(images)}
    path = write_summary(run, config, references)
    assert path == run / "summary.html"
    return path


@pytest.fixture
def shown(browser: Browser, page: Path) -> Browser:
    browser.get(page.as_uri())
    return browser


def texts(browser: Browser, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def table(browser: Browser, name: str) -> list[list[str]]:
    rows = browser.find_elements(By.CSS_SELECTOR, f"[aria-label='{name}'] tr")
    return [[c.text for c in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]


def test_the_best_epoch_and_the_times_are_told(shown: Browser) -> None:
    assert texts(shown, "h1") == ["<i>run"]
    best = "Best: epoch 3, end to end: CIDEr-D 55.0, BLEU-4 27.5. 2 h 0 min of training."
    assert texts(shown, "header p") == [best]
    assert table(shown, "Stages") == [
        ["", "Stage", "Steps", "Time", "A step"],
        ["1", "frozen", "2,000", "1 h 0 min", "1.8 s"],
        ["2", "end to end", "1,000", "30 min 0 s", "1.8 s"],
        ["3", "self-critical", "1,000", "30 min 0 s", "1.8 s"],
    ]


def test_evaluations_are_a_table(shown: Browser) -> None:
    head, *rows = table(shown, "Evaluations")
    assert head == [
        *("Epoch", "Step", "Stage", "Loss", "BLEU-4", "CIDEr-D"),
        *("Different tags", "Seconds", "Steps", "Reward"),
    ]
    assert rows[1] == ["2", "2,000", "frozen", "6.500", "20.6", "41.2", "2", "1,800", "1,000", "–"]
    assert rows[2][0] == "3 ★"
    assert rows[3] == [
        "4",
        "4,000",
        "self-critical",
        "–",
        "27.5",
        "55.0",
        "4",
        "1,800",
        "1,000",
        "4.500",
    ]
    assert texts(shown, "tr.best td:first-child") == ["3 ★"]


def test_settings_that_differ_are_shown(shown: Browser) -> None:
    assert table(shown, "Settings") == [
        ["Key", "Value", "Default"],
        ["data.images", '"<u>photos"', '""'],
        ["data.min_count", "5", "3"],
        ["model.tags.hidden", "99", "256"],
        ["training.augment", "false", "true"],
    ]


def test_photographs_have_captions_of_the_best_and_references(shown: Browser) -> None:
    assert texts(shown, "article .caption") == [f"{HOSTILE} 3"] * 3
    assert texts(shown, "article .name") == ["a.png", "<b>{{ 7 }}\\udce9.png", "gone.png"]
    assert texts(shown, "article:nth-child(2) li") == ["one of 1", "<b>two</b>"]
    loaded = "return [...document.images].map(i => [i.naturalWidth, i.src.slice(0, 11)])"
    assert shown.execute_script(loaded) == [[90, "data:image/"], [64, "data:image/"]]


def test_what_others_wrote_is_text_and_nothing_is_loaded(page: Path, shown: Browser) -> None:
    time.sleep(0.3)
    assert shown.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert shown.find_elements(By.CSS_SELECTOR, "script, main b, h1 i, td u") == []
    resources = "return performance.getEntriesByType('resource').map(r => r.name.slice(0, 5))"
    assert set(shown.execute_script(resources)) <= {"data:"}
    assert "http" not in page.read_text().replace("http-equiv", "")
    assert not is_report(str(page))  # so that --report does not take its place


def charts(page: Path) -> dict[str, str]:
    figures = re.findall(r"<figcaption>(.*?) <small>.*?</figcaption>(.*?)</figure>",
                         page.read_text(), re.DOTALL)  # fmt: skip
    return dict(figures)


def curves(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="(.*?)"', svg)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]  # type: ignore[misc]


def test_curves_lie_where_their_values_are(page: Path) -> None:
    found = charts(page)
    assert list(found) == [
        *("Loss", "Reward", "Learning rate", "Norm of the gradient", "CIDEr-D", "BLEU-4")
    ]
    left, right, top, bottom = 44.0, 392.0, 18.0, 182.0
    for svg in found.values():
        assert svg.count('class="band"') == 3
        assert svg.count('<path class="best" d="M305.0 ') == 1  # at three quarters
        xy = [point for line in curves(svg) for point in line]
        assert all(left <= x <= right and top <= y <= bottom for x, y in xy)
    frozen, free = curves(found["Loss"])
    # From 7.99 at step 10 to 5.0 at step 3000, on an axis from 5 to 8.
    assert frozen[0] == pytest.approx((44.9, 18.5), abs=0.1)
    assert free[-1] == (305.0, 182.0)
    (reward,) = curves(found["Reward"])
    assert reward[-1][0] == right
    rates = curves(found["Learning rate"])
    assert [len({y for _, y in stage}) for stage in rates] == [2, 1, 1]
    (cider_d,) = curves(found["CIDEr-D"])
    assert [x for x, _ in cider_d] == [131.0, 218.0, 305.0, 392.0]
    # Axis from 20 to 60.
    assert [y for _, y in cider_d] == pytest.approx([161.5, 94.9, 38.5, 38.5], abs=0.1)
    assert "<title>epoch 2, step 2,000: 41.2</title>" in found["CIDEr-D"]
    assert found["CIDEr-D"].count("(best)</title>") == 1


def test_many_steps_are_few_points(tmp_path: Path) -> None:
    with RunLog(tmp_path, None, False) as log:
        for step in range(10, 30_010, 10):
            log.step(step, "frozen", {"loss": 2.0 if step % 20 else 4.0})
    write_summary(tmp_path, Config(), {})
    (line,) = curves(charts(tmp_path / "summary.html")["Loss"])
    assert len(line) == 200
    assert len({y for _, y in line}) <= 2  # of means of 15


def test_without_steps_the_evaluations_are_the_curve(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"epoch": n, "step": n, "stage": "frozen", "loss": 1.0 / n, "cider_d": 0.0, "bleu_4": 0.0,
         "samples": {}} for n in (1, 2, 4)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(tmp_path, Config(), {})
    found = charts(tmp_path / "summary.html")
    assert list(found) == ["Loss", "CIDEr-D", "BLEU-4"]
    assert curves(found["Loss"]) == [
        [(131.0, 18.0), (218.0, 120.5), (392.0, 171.8)]
    ]  # from 0.2 to 1
    assert found["Loss"].count("<circle") == 3


def test_a_run_that_logged_nothing_has_a_page(tmp_path: Path) -> None:
    text = write_summary(tmp_path, Config(), {}).read_text()
    assert "Nothing is logged yet." in text
    assert "All are the defaults." in text
    assert "<svg" not in text


def test_on_a_phone(phone: Browser, page: Path) -> None:
    phone.get(page.as_uri())
    assert phone.execute_script("return document.documentElement.scrollWidth") == 360
    for element in phone.find_elements(By.CSS_SELECTOR, "svg, article, .scroll"):
        assert element.rect["x"] + element.rect["width"] <= 360
