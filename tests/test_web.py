"""The page in a browser: it captions what Python captions, offline, and takes names as text."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from processes import ROOT

from captioner import SearchOptions
from captioner.export.onnx_file import write_onnx
from captioner.model.checkpoint import Checkpoint, default_path, load_checkpoint
from captioner.onnx_runtime import OnnxCaptioner, load
from conftest import draw_picture

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

WEB = ROOT / "web"
NPM = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("browser")]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Site(NamedTuple):
    """A page with its server, and the same model in Python."""

    url: str
    captioner: OnnxCaptioner


def site(model: Path, folder: Path) -> Iterator[Site]:
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    if not (WEB / "node_modules" / "onnxruntime-web").exists():
        got = subprocess.run(NPM, cwd=WEB, capture_output=True, text=True, timeout=600, check=False)
        if got.returncode:
            pytest.skip(f"npm cannot install onnxruntime-web: {got.stderr[:200]}")
    subprocess.run(["node", WEB / "build.mjs", model, folder], check=True, capture_output=True)
    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Site(f"http://localhost:{server.server_port}/", load(model))
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def page(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("web")
    write_onnx(small, folder / "small.onnx", SearchOptions(max_words=7))
    yield from site(folder / "small.onnx", folder / "dist")


def wait(browser: Chrome, script: str, seconds: float = 60.0) -> Any:
    """Return what a script returns, as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(script)):
        assert time.monotonic() < end, f"{script}: {log(browser)}"
        time.sleep(0.1)
    return found


def log(browser: Chrome) -> list[Any]:
    """Return what the browser has to say since it was last asked."""
    said: list[Any] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return said


def opened(browser: Chrome, url: str) -> None:
    browser.get(url)
    wait(browser, "return document.body.dataset.ready")


def cards(browser: Chrome, files: list[Path]) -> list[WebElement]:
    """Give the page files; return their cards, in order, once each is done."""
    from selenium.webdriver.common.by import By

    before = len(browser.find_elements(By.CSS_SELECTOR, "#results > li"))
    browser.find_element(By.ID, "files").send_keys("\n".join(map(str, files)))
    number = before + len(files)
    script = 'return document.querySelectorAll("#results > [data-state=done], [data-state=error]")'
    wait(browser, f"{script}.length === {number}", 30.0 + 5.0 * len(files))
    return browser.find_elements(By.CSS_SELECTOR, "#results > li")[: len(files)][::-1]


def part(card: WebElement, name: str) -> str:
    return str(card.find_element("css selector", f".{name}").get_property("textContent"))


def tags(card: WebElement) -> list[str]:
    return [tag.text for tag in card.find_elements("css selector", ".tags li")]


def assert_quiet(browser: Chrome) -> None:
    """Nothing went wrong, and nothing was asked of another host."""
    said = log(browser)
    assert not said, said
    script = "return performance.getEntriesByType('resource').map((e) => new URL(e.name).host)"
    own = browser.execute_script("return location.host")
    assert set(browser.execute_script(script)) <= {own, ""}


def test_it_says_what_python_says(browser: Chrome, page: Site, tmp_path: Path) -> None:
    files = [draw_picture(tmp_path / f"{c}.png", c, (90, 50)) for c in ("red", "blue", "green")]
    flat = Image.new("RGBA", (33, 70), (255, 0, 0, 0))
    flat.save(tmp_path / "clear.png")
    turned = Image.open(files[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.webp", lossless=True, exif=exif)
    files += [tmp_path / "clear.png", tmp_path / "turned.webp"]
    opened(browser, page.url)
    for card, found in zip(cards(browser, files), page.captioner.describe(files), strict=True):
        assert part(card, "caption") == found.caption.text
        assert tags(card) == [tag.name for tag in found.tags]
    assert_quiet(browser)


def test_its_resampling_is_pillows_to_the_bit(browser: Chrome, page: Site) -> None:
    random = np.random.default_rng(0)
    opened(browser, page.url)
    script = """
        const [bytes, width, height, how, done] = arguments;
        import("./pixels.js").then(({ resample }) =>
          done(Array.from(resample(Uint8Array.from(bytes), width, height, how))));
    """
    for width, height, size, fit in (
        (40, 31, 64, "squash"), (201, 67, 32, "squash"), (150, 203, 64, "crop"),
        (97, 64, 64, "crop"), (64, 64, 64, "squash"), (1, 1, 32, "squash"), (7, 300, 33, "crop"),
    ):  # fmt: skip
        picture = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        picture[..., 3] = 255
        how = {"size": size, "fit": fit}
        found = browser.execute_async_script(script, picture.flatten().tolist(), width, height, how)
        preprocessing = type(page.captioner.preprocessing)(size=size, fit=fit)  # type: ignore[arg-type]
        from captioner.photos.given import pixels_of

        wanted = pixels_of(Image.fromarray(picture[..., :3]), preprocessing)
        assert (np.array(found).reshape(wanted.shape) == wanted).all(), (width, height, size, fit)


def test_names_are_text_and_what_is_no_picture_is_said(
    browser: Chrome, page: Site, tmp_path: Path
) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    files = [draw_picture(tmp_path / name, "red"), tmp_path / "text.jpg", tmp_path / "good.png"]
    files[1].write_text("this is no picture")
    draw_picture(files[2], "blue")
    opened(browser, page.url)
    first, second, third = cards(browser, files)
    assert part(first, "name") == name
    assert first.get_attribute("data-state") == "done"
    assert part(second, "caption") == "not a picture that this browser can read"
    assert part(third, "caption") == page.captioner.caption([files[2]])[0].text
    assert not browser.execute_script("return document.querySelector('img[onerror]')")


def test_where_it_looked_shows_at_each_word(browser: Chrome, page: Site, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened(browser, page.url)
    (card,) = cards(browser, [draw_picture(tmp_path / "a.png", "red")])
    words = card.find_elements("css selector", ".caption span")
    canvas = card.find_element("css selector", "canvas")
    assert words
    assert not canvas.is_displayed()
    ActionChains(browser).move_to_element(words[0]).perform()
    assert canvas.is_displayed()
    image = card.find_element("css selector", "img")
    assert canvas.size == image.size
    ActionChains(browser).move_to_element(card.find_element("css selector", ".name")).perform()
    assert not canvas.is_displayed()


def test_it_works_without_a_network_once_loaded(
    browser: Chrome, page: Site, tmp_path: Path
) -> None:
    file = draw_picture(tmp_path / "a.png", "red")
    opened(browser, page.url)
    wait(browser, "return document.body.dataset.offline")
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        opened(browser, page.url)
        (card,) = cards(browser, [file])
        assert part(card, "caption") == page.captioner.caption([file])[0].text
    finally:
        offline["offline"] = False
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)


def test_a_file_that_is_no_model_is_said(browser: Chrome, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x0a\x03abc")
    folder = tmp_path / "dist"
    subprocess.run(["node", WEB / "build.mjs", tmp_path / "bad.onnx", folder], check=True)
    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    browser.get(f"http://localhost:{server.server_port}/")
    wait(browser, "return document.querySelector('#loading.error')")
    said = browser.find_element("id", "status").text
    assert said == "The model cannot be loaded: it is not a model of captioner's"
    server.shutdown()
    server.server_close()


def test_it_fits_a_phone(phone: Chrome, page: Site, tmp_path: Path) -> None:
    opened(phone, page.url)
    cards(phone, [draw_picture(tmp_path / f"{'long name ' * 9}.png", "red", (900, 200))])
    width = phone.execute_script("return document.documentElement.scrollWidth")
    assert width <= 360


@pytest.mark.data
def test_real_photographs_are_captioned_as_in_python(
    browser: Chrome, data: Path, tmp_path: Path
) -> None:
    write_onnx(load_checkpoint(default_path()), tmp_path / "a.onnx", SearchOptions())
    photographs = sorted(data.rglob("*.jpg"))
    files = photographs[:: len(photographs) // 50][:50]
    assert len(files) == 50
    for page in site(tmp_path / "a.onnx", tmp_path / "dist"):
        opened(browser, page.url)
        found = [part(card, "caption") for card in cards(browser, files)]
        wanted = [caption.text for caption in page.captioner.caption(files)]
        same = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        assert same >= 48, [pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1]]
