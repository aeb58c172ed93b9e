"""What several test files share: tiny models, drawn pictures, and where real data lies."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn
from xdist.scheduler import LoadScopeScheduling

from captioner.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimizerConfig,
    Preprocessing,
    TrainingConfig,
)
from captioner.data.tags import TagSet
from captioner.data.vocabulary import EOS, Vocabulary
from captioner.memory import keep_freed_memory
from captioner.model.checkpoint import Checkpoint, build_model, save_checkpoint
from captioner.model.encoder import Encoder

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

keep_freed_memory()  # a part of the tests' time otherwise

WORDS = ["a", "dog", "runs", "on", "grass", "man", "'s", "hat", "red"]
TAGS = ["dog", "run", "grass", "man", "red"]
BACKBONE = "mobilenet_v3_small"  # a twelfth of resnet18's weights to draw, train and save
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]


# Each of these files has a fixture that takes long to make: all of its tests go to one worker.
TOGETHER = ("cluster", "default", "report", "runs", "scripts", "training")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives pytest-xdist's workers one test at a time, but those files whole, and first."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        together = Path(file).stem.removeprefix("test_") in TOGETHER
        return file if together else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    if "browser" in getattr(item, "fixturenames", []):
        item.add_marker("browser")


def tiny_config(attention: bool = True) -> Config:
    """Return a config whose sizes are all different, and small."""
    return Config(
        preprocessing=Preprocessing(size=64),
        encoder=EncoderConfig(BACKBONE, "random"),
        model=ModelConfig(
            grid_width=11,
            caption=DecoderConfig(13, 17, attention, attention_width=7, tied=True),
            tags=DecoderConfig(5, 19, attention, attention_width=3, tied=False),
        ),
    )


@functools.cache
def backbone_weights() -> dict[str, Tensor]:
    """Return weights drawn at random that tell photographs apart.

    BatchNorm has the statistics of noise. With those that it begins with, what is left of a
    photograph after all layers is 1e-8.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        backbone = Encoder(BACKBONE, Preprocessing()).backbone.train()
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of all that was seen
        backbone(2.0 * nn.functional.interpolate(torch.randn(32, 3, 8, 8), scale_factor=8))
    return dict(backbone.state_dict())


@pytest.fixture
def tiny() -> Checkpoint:
    """Return a whole, untrained captioner."""
    torch.manual_seed(0)
    config, vocabulary, tags = tiny_config(), Vocabulary(WORDS), TagSet(TAGS)
    model = build_model(config, vocabulary, tags).eval()
    model.encoder.backbone.load_state_dict(backbone_weights())
    with torch.no_grad():
        model.tag_decoder.output.bias[EOS] = -5.0  # or it would say no tags at all
        for decoder in (model.caption_decoder, model.tag_decoder):
            decoder.initial.weight *= 300.0  # or all photographs would look alike to it
    return Checkpoint(model, config, vocabulary, tags)


@pytest.fixture(scope="session")
def small() -> Checkpoint:
    """Return one whose encoder takes next to no time, and tells photographs apart."""
    torch.manual_seed(0)
    config = replace(tiny_config(), encoder=EncoderConfig("squeezenet1_1", "random"))
    words, tags = Vocabulary(WORDS), TagSet(TAGS)
    model = build_model(config, words, tags).eval()
    with torch.no_grad():
        for decoder in (model.caption_decoder, model.tag_decoder):
            decoder.initial.weight *= 3000.0
    return Checkpoint(model, config, words, tags)


def draw_picture(path: Path, colour: str, size: tuple[int, int] = (64, 48)) -> Path:
    """Draw a disc on grey."""
    picture = Image.new("RGB", size, "#ddd")
    ImageDraw.Draw(picture).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=colour)
    picture.save(path)
    return path


@pytest.fixture
def model(small: Checkpoint, tmp_path: Path) -> list[str]:
    """Return the options of a command that take the small captioner, in float32."""
    path = tmp_path / "small.safetensors"
    save_checkpoint(small, path)
    return ["--model", str(path), "--precision", "float32"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread in this module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn_run(folder: Path) -> Config:
    """Return the config of a run on eight pictures drawn there, each with its own caption."""
    lines = []
    for number, colour in enumerate(COLOURS):
        draw_picture(folder / f"{colour}.png", colour, (30 + 30 * number, 120))
        text = f"a {colour} disc on grey paper"
        lines.append(json.dumps({"image": f"{colour}.png", "captions": [text], "tags": [colour]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    weights = folder / "backbone.safetensors"
    save_file(backbone_weights(), weights)
    return replace(
        tiny_config(),
        encoder=EncoderConfig(BACKBONE, str(weights)),
        data=DataConfig(
            images=str(folder),
            captions=str(folder / "data.jsonl"),
            val_captions=str(folder / "data.jsonl"),
            min_count=1,
            tag_min_count=1,
        ),
        optimizer=OptimizerConfig(lr=0.02, warmup_steps=5, encoder_lr=1e-4),
        training=TrainingConfig(
            epochs=2, frozen_epochs=1, batch_size=4, precision="float32", label_smoothing=0.0
        ),
    )


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of good, broken and unrelated files."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    draw_picture(folder / "b.jpg", "red")
    draw_picture(folder / "a.PNG", "blue")
    draw_picture(folder / "deep" / "c.webp", "green")
    draw_picture(folder / ".hidden.jpg", "black")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "empty.jpg").write_bytes(b"")
    whole = draw_picture(folder / "cut.jpg", "yellow", (200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not a photograph")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """Return a browser without a window; tests are skipped where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver (Debian's packages: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_window_size(1200, 900)
    yield chrome
    chrome.quit()


@pytest.fixture
def phone(browser: Chrome) -> Iterator[Chrome]:
    """Return the browser with the screen of a phone."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real photographs; the test is skipped where there is none."""
    folder = os.environ.get("CAPTIONER_TEST_DATA")
    if not folder:
        pytest.skip("CAPTIONER_TEST_DATA names no folder of real photographs")
    return Path(folder)


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def median_ratio_within(limit: float, ours: list[str], theirs: list[str], runs: int) -> bool:
    """Return whether the median ratio of two commands' times, measured in turn, is in a limit.

    No more of an odd number of ``runs`` are taken than it needs for the answer.
    """
    seconds(*ours), seconds(*theirs)
    within: list[bool] = []
    while max(within.count(True), within.count(False)) <= runs // 2:
        within.append(seconds(*ours) / seconds(*theirs) <= limit)
    return within.count(True) > runs // 2
