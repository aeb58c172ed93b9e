"""Photographs of every kind come out upright, RGB and of one size."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from captioner.config import Preprocessing
from captioner.photos.augmentation import augment
from captioner.photos.images import UnreadableError, open_rgb, prepare, read_pixels


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("RGB", (200, 30, 40), "x.png", (200, 30, 40)),
        ("L", 77, "x.png", (77, 77, 77)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("RGBA", (200, 30, 40, 0), "x.png", (255, 255, 255)),
        ("RGBA", (200, 30, 40, 255), "x.webp", (200, 30, 40)),
        ("LA", (0, 0), "x.png", (255, 255, 255)),
        ("I;16", 0x8000, "x.png", (127, 127, 127)),
        ("I;16", 0x0080, "x.png", (0, 0, 0)),
        ("I", 40_000, "x.tif", (155, 155, 155)),
        ("F", 0.5, "x.tif", (127, 127, 127)),
        ("F", 51.0, "x.tif", (51, 51, 51)),
        ("CMYK", (0, 255, 255, 0), "x.jpg", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
        ("YCbCr", (76, 85, 255), "x.jpg", (254, 0, 0)),
        ("P", 0, "x.gif", (0, 0, 0)),
    ],
)
def test_every_mode_comes_out_as_rgb(
    tmp_path: Path, mode: str, colour: object, name: str, expected: tuple[int, ...]
) -> None:
    path = save(tmp_path / name, Image.new(mode, (9, 5), colour))  # type: ignore[arg-type]
    image = open_rgb(path)
    assert image.mode == "RGB"
    assert image.size == (9, 5)
    found = np.asarray(image)[2, 4].astype(int)
    assert np.abs(found - expected).max() <= (12 if name.endswith(("jpg", "webp")) else 0)


def test_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    path = save(tmp_path / "x.png", image, transparency=1)
    assert np.asarray(open_rgb(path)).min() == 255


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(save(tmp_path / "x.jpg", image, exif=exif)).size == (10, 20)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(open_rgb(path))[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 999), (640, 480), (32, 32)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_pixels_have_one_size(tmp_path: Path, size: tuple[int, int], fit: str) -> None:
    path = save(tmp_path / "x.png", Image.new("RGB", size, (10, 20, 30)))
    pixels = read_pixels(path, Preprocessing(size=32, fit=fit))  # type: ignore[arg-type]
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert [int(channel[3, 3]) for channel in pixels] == [10, 20, 30]


def test_squash_keeps_all_and_crop_the_middle() -> None:
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    squashed = prepare(image, Preprocessing(size=32))
    assert squashed[0, 16, 2] == 255
    assert prepare(image, Preprocessing(size=32, fit="crop")).max() == 0


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    pixels = prepare(image, Preprocessing(size=32))
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"this is text", "not a picture"),
        (None, "no such file"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableError, match=message):
        open_rgb(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncation_is_an_error_or_a_whole_picture(tmp_path: Path, ending: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    whole = save(tmp_path / f"x.{ending}", noise).read_bytes()
    path = tmp_path / f"cut.{ending}"
    for cut in range(0, len(whole), max(len(whole) // 37, 1)):
        path.write_bytes(whole[:cut])
        try:
            assert open_rgb(path).size == (40, 40)
        except UnreadableError:
            continue
        # What a picture does not need may be missing, but none of its pixels.
        assert cut > 0.9 * len(whole)


def test_folder_pipe_and_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableError, match="a folder"):
        open_rgb(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableError, match="a folder or a device"):
        open_rgb(tmp_path / "pipe.jpg")
    path = save(tmp_path / "x.png", Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableError, match="too large"):
        open_rgb(path)


def test_augmentation_repeats_and_mirrors() -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    views = [augment(image, Random(seed)) for seed in range(40)]
    for (view, mirrored), seed in zip(views, range(40), strict=True):
        left, right = np.asarray(view)[:, 4].mean(), np.asarray(view)[:, -5].mean()
        assert (left < right) == mirrored
        assert 51 <= min(view.size) <= max(view.size) <= 64
        assert augment(image, Random(seed))[0].tobytes() == view.tobytes()
    assert 8 < sum(mirrored for _, mirrored in views) < 32


def test_augmentation_changes_the_light_but_not_the_hue() -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 40))
    views = [np.asarray(augment(image, Random(seed))[0]).astype(int) for seed in range(40)]
    means = np.stack([view.mean(axis=(0, 1)) for view in views])
    assert means[:, 0].min() < 180 < 215 < means[:, 0].max()
    assert np.abs(means[:, 1] - means[:, 2]).max() < 3.0
    assert (means[:, 0] > means[:, 1] + 60).all()
