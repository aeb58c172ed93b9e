"""The report's page, in a real browser."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from base64 import b64encode
from pathlib import Path
from random import Random
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from captioner.cli import main
from captioner.folder import report
from captioner.folder.report import is_report, write_report
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.photos.workers import DecodingError
from conftest import draw_picture

Browser = webdriver.Chrome

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "<script>alert(2)<!--.png",
    'x" onmouseover="alert(3).png',
    "javascript:alert(4).png",
    "{{ 7 * 7 }}.png",
    "\u202egnp.exe",
    "line\nbreak.png",
    "caf\udce9.png",
]
CAPTION = "a man's dog runs"


def record(image: Path | str, log_prob: float = -5.0, **more: Any) -> dict[str, Any]:
    weights = [[255 if cell == word else 0 for cell in range(9)] for word in range(5)]
    return {
        "image": str(image),
        "caption": CAPTION,
        "log_prob": log_prob,
        "captions": [{"text": CAPTION, "log_prob": log_prob}, {"text": "a hat", "log_prob": -9.0}],
        "tags": [{"name": "dog", "score": 0.91}, {"name": "<b>", "score": 0.5}],
        "attention": {
            "words": ["a", "man", "'s", "dog", "runs"],
            "weights": [b64encode(bytes(row)).decode() for row in weights],
        },
        **more,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a few photographs and two errors."""
    folder = tmp_path_factory.mktemp("page")
    records = [record(draw_picture(folder / n, "red", (90, 60)), -4.0 - i)
               for i, n in enumerate(("b.png", "a.png", "c.png"))]  # fmt: skip
    records[1]["caption"] = "two cats"
    records[1]["tags"] = [{"name": "cat", "score": 0.4}]
    del records[1]["attention"]
    records += [{"image": "broken.jpg", "error": "an empty file (0 bytes)"}]
    records += [record(draw_picture(folder / "p.png", "blue").rename(folder / n)) for n in HOSTILE]
    records += [record(folder / "gone.png", caption="<script>alert(5)</script>", attention=None)]
    write_report(str(folder / "out.html"), records, len(records), 1, title="<i>photos</i>")
    return folder / "out.html"


@pytest.fixture
def shown(browser: Browser, page: Path) -> Browser:
    browser.get(page.as_uri())
    return browser


def names(browser: Browser) -> list[str]:
    """Return the names on the cards that are to be seen."""
    cards = browser.find_elements(By.CSS_SELECTOR, "article:not([hidden])")
    return [os.path.basename(str(card.find_element(By.CSS_SELECTOR, ".name a").get_property(
        "textContent"))) for card in cards]  # fmt: skip


def type_into(browser: Browser, element: str, text: str) -> None:
    field = browser.find_element(By.ID, element)
    field.clear()
    field.send_keys(text)


def test_how_sure_the_model_is_is_a_percentage_a_word(page: Path) -> None:
    first, second = page.read_text().split("<article")[1:3]
    # Four words and an end: exp(-4 / 5). Two and an end: exp(-9 / 3) and exp(-5 / 3).
    assert re.findall(r">(\d+ % a word)<", first) == ["5 % a word", "45 % a word"]
    assert re.findall(r">(\d+ % a word)<", second) == ["5 % a word", "19 % a word"]
    assert "-4.0" not in first


def test_hostile_names_are_text(shown: Browser) -> None:
    time.sleep(0.3)
    assert shown.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert (
        shown.find_elements(By.CSS_SELECTOR, "main img[src='x'], main script, main b, h1 i") == []
    )
    found = names(shown)
    assert found[:4] == ["b.png", "a.png", "c.png", "broken.jpg"]
    assert found[4:9] == HOSTILE[:5]
    assert found[9:12] == ["\\u202egnp.exe", "line\\nbreak.png", "caf\\udce9.png"]
    text = shown.find_element(By.CSS_SELECTOR, "article:last-child .caption").text
    assert text == "<script>alert(5)</script>"
    links = shown.find_elements(By.CSS_SELECTOR, ".name a")
    assert all(str(link.get_attribute("href")).startswith("file:///") for link in links)
    for link, name in list(zip(links, found, strict=True))[:4]:
        assert str(link.get_attribute("href")).endswith(f"/{name}")


def test_it_needs_nothing_else(page: Path, browser: Browser, tmp_path: Path) -> None:
    shutil.copy(page, tmp_path / "alone.html")
    browser.get((tmp_path / "alone.html").as_uri())
    time.sleep(0.3)
    loaded = browser.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.currentSrc.slice(0, 5)])"
    )
    assert loaded == [[90, "data:"]] * 3 + [[64, "data:"]] * len(HOSTILE)
    resources = "return performance.getEntriesByType('resource').map(r => r.name.slice(0, 5))"
    assert set(browser.execute_script(resources)) <= {"data:"}
    assert "http" not in page.read_text().replace("http-equiv", "")


def test_filters(shown: Browser) -> None:
    assert shown.find_element(By.ID, "count").text == "13 of 13"
    type_into(shown, "text", "TWO cats")
    assert names(shown) == ["a.png"]
    type_into(shown, "text", "0 bytes")
    assert names(shown) == ["broken.jpg"]
    type_into(shown, "text", "nothing like it")
    assert names(shown) == []
    assert shown.find_element(By.ID, "none").is_displayed()
    shown.find_element(By.ID, "text").send_keys(Keys.ESCAPE)
    type_into(shown, "tag", "cat")
    assert names(shown) == ["a.png"]
    type_into(shown, "tag", "")
    shown.find_element(By.CSS_SELECTOR, "[data-tag='dog']").click()
    assert len(names(shown)) == 11
    shown.find_element(By.CSS_SELECTOR, "[data-tag='dog']").click()
    assert len(names(shown)) == 13
    Select(shown.find_element(By.ID, "kind")).select_by_value("errors")
    assert names(shown) == ["broken.jpg"]
    Select(shown.find_element(By.ID, "kind")).select_by_value("captioned")
    assert len(names(shown)) == 12


def test_order(shown: Browser) -> None:
    order = Select(shown.find_element(By.ID, "order"))
    order.select_by_value("sure")
    assert names(shown)[0] == "b.png"
    assert names(shown)[-2:] == ["gone.png", "broken.jpg"]
    order.select_by_value("unsure")
    # "two cats" has fewer words to share its log-probability, the first one only one.
    assert names(shown)[:2] == ["gone.png", "a.png"]
    assert names(shown)[-2:] == ["b.png", "broken.jpg"]
    order.select_by_value("found")
    assert names(shown)[:3] == ["b.png", "a.png", "c.png"]


def overlay(browser: Browser) -> list[int] | None:
    """Return how strongly each cell of the overlay is coloured, if there is one."""
    return browser.execute_script(  # type: ignore[no-any-return]
        "const c = document.querySelector('canvas'); if (!c) return null;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [...d].filter((_, i) => i % 4 === 3)"
    )


def test_attention_on_hover_and_with_keys(shown: Browser) -> None:
    words = shown.find_elements(By.CSS_SELECTOR, "article:first-child .word")
    assert [word.text for word in words] == ["a", "man", "'s", "dog", "runs"]
    assert shown.find_element(By.CSS_SELECTOR, "article .caption").text == CAPTION
    assert overlay(shown) is None
    ActionChains(shown).move_to_element(words[3]).perform()
    assert overlay(shown) == [0, 0, 0, 217, 0, 0, 0, 0, 0]
    image, canvas = (shown.find_element(By.CSS_SELECTOR, f"article {e}") for e in ("img", "canvas"))
    assert image.rect == canvas.rect
    ActionChains(shown).move_to_element(shown.find_element(By.TAG_NAME, "h1")).perform()
    assert overlay(shown) is None
    shown.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_DOWN)
    for _ in range(3):
        shown.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert shown.switch_to.active_element.text == "'s"
    assert overlay(shown) == [0, 0, 217, 0, 0, 0, 0, 0, 0]
    shown.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert shown.switch_to.active_element.text == "man"
    shown.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert overlay(shown) is None
    assert shown.switch_to.active_element.get_attribute("data-place") == "1"
    shown.switch_to.active_element.send_keys("/")
    assert shown.switch_to.active_element.get_attribute("id") == "text"


def test_alternatives_open_with_the_keyboard(shown: Browser) -> None:
    summary = shown.find_element(By.CSS_SELECTOR, "article:first-child summary")
    summary.send_keys(Keys.ENTER)
    shown_texts = [e.text for e in shown.find_elements(By.CSS_SELECTOR, "details[open] li")]
    assert shown_texts == ["a hat 5 % a word"]  # exp(-9 / 3)


def test_on_a_phone(phone: Browser, page: Path) -> None:
    phone.get(page.as_uri())
    assert phone.execute_script("return document.documentElement.scrollWidth") == 360
    for element in phone.find_elements(By.CSS_SELECTOR, "input, select, article"):
        assert element.rect["x"] + element.rect["width"] <= 360
    phone.find_element(By.CSS_SELECTOR, ".word").click()
    assert overlay(phone) is not None


@pytest.mark.timing
def test_it_is_quick_with_5000_photographs(browser: Browser, tmp_path: Path) -> None:
    random = Random(0)
    pictures = [
        draw_picture(tmp_path / f"{i}.jpg", f"#{i:06x}", (500, 400)) for i in range(4000, 4050)
    ]
    records = [record(random.choice(pictures), -20 * random.random(), caption=CAPTION, tags=[
        {"name": f"tag{random.randrange(300)}", "score": 0.5}]) for _ in range(5000)]  # fmt: skip
    write_report(str(tmp_path / "out.html"), records, len(records), 0)
    started = time.monotonic()
    browser.get((tmp_path / "out.html").as_uri())
    assert browser.find_element(By.ID, "count").text == "5000 of 5000"
    loaded = time.monotonic() - started
    took = browser.execute_script(
        "const took = (f) => { const t = performance.now(); f(); document.body.offsetHeight;"
        " return performance.now() - t; };"
        "const put = (id, v) => () => { const e = document.getElementById(id); e.value = v;"
        " e.dispatchEvent(new Event('input')); };"
        "return [took(put('text', 'dog')), took(put('tag', 'tag7')), took(put('tag', '')),"
        " took(put('order', 'sure'))]"
    )
    size = (tmp_path / "out.html").stat().st_size
    print(f"{size / 1e6:.0f} MB, loaded in {loaded:.1f} s; filters, order: {took} ms")
    assert loaded < 15.0
    assert max(took) < 1500.0


def test_the_command_line_writes_it(
    small: Checkpoint, photographs: Path, tmp_path: Path, browser: Browser,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:  # fmt: skip
    save_checkpoint(small, tmp_path / "small.safetensors")
    out = tmp_path / "out.html"
    arguments = ["--report", str(out), "--model", str(tmp_path / "small.safetensors")]
    assert main(["caption", str(photographs), *arguments]) == 1
    assert capsysbinary.readouterr().out == b""
    assert is_report(str(out))
    browser.get(out.as_uri())
    assert len(names(browser)) == 7
    assert browser.find_elements(By.CSS_SELECTOR, ".word")
    lines = Path(f"{out}.journal").read_bytes().splitlines()
    first = json.loads(lines[2])
    assert len(first["attention"]["words"]) == len(first["attention"]["weights"])
    # Another output takes the same records, without what only the report shows.
    both = ["--output", str(tmp_path / "x.jsonl"), *arguments]
    assert main(["caption", str(photographs), *both]) == 1
    assert b"attention" not in (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "diary.html").mkdir()
    other = ["caption", str(photographs), "--report", str(tmp_path / "diary.html"), "--overwrite"]
    assert main(other) == 2
    assert "diary.html is not a plain file" in capsysbinary.readouterr().err.decode()
    (tmp_path / "diary.html").rmdir()
    (tmp_path / "diary.html").write_text("dear diary")
    other = ["caption", str(photographs), "--report", str(tmp_path / "diary.html")]
    assert main(other) == 2
    assert "is something else" in capsysbinary.readouterr().err.decode()
    assert main(["tag", str(photographs), *arguments, "--overwrite"]) == 1


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.html"),
    OSError(errno.EROFS, os.strerror(errno.EROFS), "out.html"),
    DecodingError("No space left on device"),
])  # fmt: skip
def test_a_report_that_cannot_be_written_costs_nothing_else(
    small: Checkpoint, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes], error: Exception,
) -> None:  # fmt: skip
    save_checkpoint(small, tmp_path / "small.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = ["caption", str(photographs), "--model", "small.safetensors", "--precision",
                 "float32", "--report", "out.html", "--output", "out.jsonl"]  # fmt: skip

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(report, "write_page", refuse)
    assert main(arguments) == 1
    why = getattr(error, "strerror", None) or str(error)
    assert capsysbinary.readouterr().err.decode() == (
        f"captioner: cannot write out.html: {why}; the records are safe, and the same run writes "
        "it again\n"
        "captioner: 3 of 7 could not be read\n"
        "captioner: 4 described, in out.jsonl\n"
    )
    before = Path("out.jsonl").read_bytes()
    assert len(before.splitlines()) == 7
    assert not Path("out.html").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("captioner.inference.Captioner.encode", None)
    assert main(arguments) == 1
    assert Path("out.jsonl").read_bytes() == before
    assert is_report("out.html")


def test_a_sidecar_error_is_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    write_report(str(path), [record("x.png", sidecar_error="cannot write <x>.txt")], 1, 0)
    text = path.read_text()
    assert '<p class="why">cannot write &lt;x&gt;.txt</p>' in text
    assert '<p class="caption">' in text
    assert '<article tabindex="-1" data-place="0" class="error"' not in text
