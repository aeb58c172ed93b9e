"""Any picture: as a plain reference makes it, and thousands that are broken."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random
from typing import Any
from warnings import catch_warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from captioner.config import Preprocessing
from captioner.folder import describe_folder
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.photos.images import (
    MAX_PIXELS,
    UnreadableError,
    image_endings,
    open_rgb,
    read_pixels,
)
from captioner.photos.workers import Found, read_ahead

Array = np.ndarray[Any, np.dtype[Any]]

# More of them for a long night.
FUZZ = int(os.environ.get("CAPTIONER_FUZZ", "1"))


def bicubic(pixels: Array, size: int, axis: int, side: float) -> Array:
    """Scale the middle ``side`` pixels of an axis: Keys's cubic, a = -1/2, antialiased."""
    length = pixels.shape[axis]
    scale = side / size
    centres = (length - side) / 2 + (np.arange(size) + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0))
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    scaled: Array = np.moveaxis(np.tensordot(weights, pixels, axes=(1, axis)), 0, axis)
    # Between the two axes as well: pixels are bytes.
    rounded: Array = np.rint(scaled).clip(0, 255)
    return rounded


def reference(rgb: Array, preprocessing: Preprocessing) -> Array:
    """Return pixels ``(3, h, w)`` of an RGB picture ``(height, width, 3)``, plainly."""
    height, width, _ = rgb.shape
    if preprocessing.fit == "crop":
        height = width = min(height, width)
    scaled = bicubic(rgb.astype(np.float32), preprocessing.size, 1, width)
    pixels: Array = bicubic(scaled, preprocessing.size, 0, height).transpose(2, 0, 1)
    return pixels


def scene(width: int, height: int, seed: int = 0) -> Array:
    """Draw something with the spectrum of a photograph, edges and grain: ``(height, width, 3)``."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    spectrum = generator.normal(size=(3, *frequency.shape)) / frequency**1.3
    waves = np.fft.irfft2(spectrum * np.exp(2j * np.pi * generator.random(spectrum.shape)),
                          s=(height, width))  # fmt: skip
    waves = 128 + 55 * waves / waves.std()
    for _ in range(12):
        left, top = generator.integers(0, width), generator.integers(0, height)
        waves[:, top : top + height // 6, left : left + width // 9] += generator.integers(-120, 120)
    waves += generator.normal(0, 4, size=waves.shape)
    drawn: Array = waves.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return drawn


def difference(path: Path, rgb: Array, preprocessing: Preprocessing) -> Array:
    found: Array = np.abs(read_pixels(path, preprocessing) - reference(rgb, preprocessing))
    return found


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (333, 499), (41, 37), (1601, 1), (3, 900), (64, 64)])
def test_pixels_are_those_of_a_plain_reference(
    tmp_path: Path, size: tuple[int, int], fit: str
) -> None:
    rgb = scene(*size)
    preprocessing = Preprocessing(size=64, fit=fit)  # type: ignore[arg-type]
    Image.fromarray(rgb).save(tmp_path / "x.png")
    assert difference(tmp_path / "x.png", rgb, preprocessing).max() <= 1
    Image.fromarray(rgb).save(tmp_path / "x.jpg", quality=90)
    with Image.open(tmp_path / "x.jpg") as image:
        decoded = np.asarray(image)
    if min(size) < 12 * 64:  # larger ones its decoder shrinks
        assert difference(tmp_path / "x.jpg", decoded, preprocessing).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(4000, 3000), (2688, 2688), (6000, 2700), (600, 904)])
def test_a_shrunken_jpeg_is_almost_the_same(
    tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    path, preprocessing = tmp_path / "x.jpg", Preprocessing(size=32 if max(size) < 1000 else 224)
    if mode != "RGB" and max(size) > 1000:
        pytest.skip("one size is enough for the other modes")
    quarter = scene(size[0] // 2, size[1] // 2)
    half = np.concatenate([quarter, quarter[::-1]])
    rgb = np.concatenate([half, half[:, ::-1]], axis=1)
    Image.fromarray(rgb).convert(mode).save(path, quality=90)
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB"))
    assert open_rgb(path, preprocessing.size).width < size[0]
    found = difference(path, whole, preprocessing)
    assert found.mean() <= 0.3
    assert found.max() <= 8


@pytest.mark.data
def test_shrunken_photographs_are_almost_the_same(tmp_path: Path, data: Path) -> None:
    for source in sorted((data / "coco-mini" / "images").glob("*.jpg"))[:4]:
        with Image.open(source) as image:
            large = image.convert("RGB").resize((4000, 3000), Image.Resampling.LANCZOS)
        grain = np.random.default_rng(0).normal(0, 5, size=(3000, 4000, 1))
        large = Image.fromarray((np.asarray(large) + grain).clip(0, 255).astype(np.uint8))
        large.save(tmp_path / "x.jpg", quality=92)
        with Image.open(tmp_path / "x.jpg") as image:
            whole = np.asarray(image)
        assert open_rgb(tmp_path / "x.jpg", 224).size == (2000, 1500)
        found = difference(tmp_path / "x.jpg", whole, Preprocessing())
        assert found.mean() <= 0.3
        assert found.max() <= 8


def test_lab_comes_out_in_its_colours(tmp_path: Path) -> None:
    colours = np.array([[[200, 30, 40], [20, 160, 60], [250, 250, 250]]], np.uint8)
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(Image.fromarray(colours.repeat(4, 0).repeat(4, 1)), to_lab)
    assert lab is not None
    lab.save(tmp_path / "x.tif")
    found = np.asarray(open_rgb(tmp_path / "x.tif"))[1, 1::4].astype(int)
    assert np.abs(found - colours[0]).max() <= 8  # LAB is stored coarsely


def test_adobe_cmyk_is_not_a_negative(tmp_path: Path) -> None:
    """Photoshop stores ink inverted and says so in an APP14 segment."""
    ink = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    ink.save(tmp_path / "x.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()[:200]
    red, green, blue = np.asarray(open_rgb(tmp_path / "x.jpg"))[9, 9].tolist()
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((30, 50, 3), np.uint8)
    upright[:15, :25] = (255, 0, 0)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.png", "x.jpg", "x.webp", "x.tif"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif)
        found = open_rgb(tmp_path / name)
        assert found.size == (50, 30)
        assert np.abs(np.asarray(found).astype(int) - upright)[::7, ::7].mean() < 6


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_damaged_notes_do_not_damage_a_picture(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / "x.jpg", exif=exif)
        assert open_rgb(tmp_path / "x.jpg").size == (20, 10)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif", "avif"])
def test_the_first_of_several_frames(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(open_rgb(path))[8, 8].tolist()
    assert red > 230
    assert blue < 20


def test_endings_say_little(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.png")
    for name in ("x.JPG", "x.gif", "x"):
        (tmp_path / name).write_bytes((tmp_path / "x.png").read_bytes())
        assert open_rgb(tmp_path / name).size == (9, 9)
    assert {".jpg", ".jpeg", ".png", ".webp", ".avif", ".jp2", ".tif"} <= image_endings()
    assert not {".mpg", ".eps", ".wmf", ".txt"} & image_endings()


def test_heic_where_the_plugin_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="the extra 'heif' is not installed")
    image_endings()  # registers the plugin
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.heic")
    assert np.asarray(open_rgb(tmp_path / "x.heic"))[9, 9, 0] > 200


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header promises a size, and nothing else."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + packed + chunk(b"IEND", b"")


def read_small(path: str) -> bytes:
    return read_pixels(path, Preprocessing(size=32)).tobytes()


@pytest.mark.slow
def test_bombs_are_refused_by_the_stated_limit(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(250_000, 1_001))
    (tmp_path / "large.png").write_bytes(png_of(20_000, 12_000))
    Image.new("L", (12_000, 8_000)).save(tmp_path / "huge.png")
    names = ["bomb.png", "large.png", "huge.png"]
    found = read_ahead(read_small, [Found(str(tmp_path / n)) for n in names], 1, 3, 60.0)
    bomb, large, huge = (result for _, result in found)
    assert "too large to open safely" in str(bomb)
    assert f"{MAX_PIXELS:,}".replace(",", "") == "250000000"
    assert isinstance(large, UnreadableError)  # within the limit, but its data is missing
    assert "too large" not in str(large)
    assert huge == bytes(3 * 32 * 32)


# Pillow converts to these only from another mode.
_BETWEEN = {"La": "LA", "RGBa": "RGBA", "PA": "LA", "I;16": "I", "I;16B": "I"}


def whole_pictures() -> Iterator[tuple[str, bytes]]:
    """Yield a file of every mode in every format that Pillow writes."""
    image_endings()
    rgb = Image.fromarray(scene(24, 18))
    modes = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
             "LAB", "HSV", "I", "I;16", "I;16B", "F"]  # fmt: skip
    for mode, name in product(modes, sorted(Image.SAVE)):
        if name in {"PDF", "EPS", "BUFR", "GRIB", "HDF5", "WMF"}:
            continue  # no photographs, or they need other programs
        if name not in Image.OPEN:
            continue
        stream = io.BytesIO()
        try:
            with catch_warnings(action="ignore"):
                rgb.convert(_BETWEEN.get(mode, "RGB")).convert(mode).save(stream, name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a mode that the format does not know
        yield f"{name}-{mode}", stream.getvalue()


def damaged(content: bytes, others: list[bytes], random: Random) -> Iterator[bytes]:
    """Yield a file cut off, with bytes changed, and with another's beginning."""
    for _ in range(4 * FUZZ):
        yield content[: random.randrange(len(content))]
    for count in (1, 1, 4, 16) * FUZZ:
        flipped = bytearray(content)
        for _ in range(count):
            flipped[random.randrange(len(flipped))] = random.randrange(256)
        yield bytes(flipped)
    for length in (4, 12, 40) * FUZZ:
        yield random.choice(others)[:length] + content[length:]
    yield content + random.randbytes(9)
    yield content[: len(content) // 2] + random.randbytes(len(content) // 2)


def write_corpus(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the whole pictures and the damaged ones."""
    random, whole = Random(0), dict(whole_pictures())
    assert len({name.partition("-")[0] for name in whole}) >= 15
    good, bad = [], []
    for name, content in whole.items():
        path = folder / f"{name.replace(';', '_')}.jpg"  # an ending says little
        path.write_bytes(content)
        good.append(path)
        for index, broken in enumerate(damaged(content, list(whole.values()), random)):
            bad.append(folder / f"{path.stem}-{index:03}.jpg")
            bad[-1].write_bytes(broken)
    return good, bad


def read_and_weigh(path: str) -> bytes:
    """Return how much memory reading a picture leaves in use, in pages."""
    with suppress(UnreadableError):
        read_small(path)
    return Path("/proc/self/statm").read_bytes().split()[1]


@pytest.mark.slow
def test_a_corpus_of_broken_pictures(small: Checkpoint, tmp_path: Path) -> None:
    good, bad = write_corpus(tmp_path)
    assert len(bad) > 2000
    paths = [*map(str, good), *map(str, bad)]
    captioner = Captioner(small)
    records = list(describe_folder(captioner, paths, decode_timeout=20.0, tags=False))
    assert [record["image"] for record in records] == paths
    errors = {r["image"]: r["error"] for r in records if "error" in r}
    assert all(errors.values())
    assert {path: errors[path] for path in map(str, good) if path in errors} == {}
    assert 0.3 < len(errors) / len(bad) < 0.95
    slow = [e for e in errors.values() if "took more than" in e]
    assert slow == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_broken_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    _, bad = write_corpus(tmp_path)
    paths = [Found(str(path)) for path in Random(0).sample(bad, len(bad) // 2)]
    pages = [int(r) for _, r in read_ahead(read_and_weigh, paths, 1, 8, 20.0)
             if not isinstance(r, UnreadableError)]  # fmt: skip
    early, late = pages[len(pages) // 3], max(pages[-100:])
    assert (late - early) * os.sysconf("SC_PAGESIZE") < 30e6
