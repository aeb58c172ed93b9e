"""Photographs with a colour profile come out in the colours of sRGB; others as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from captioner.config import Preprocessing
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.photos import colour
from captioner.photos.images import open_photograph, open_rgb, read_pixels
from profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    Chromaticities,
    Curve,
    decode,
    encode_srgb,
    gamma,
    grey_profile,
    ink_profile,
    rgb_profile,
    srgb_curve,
)

WIDE = {
    "Display P3": (DISPLAY_P3, srgb_curve),
    "Adobe RGB": (ADOBE_RGB, gamma(2.19921875)),
    "ProPhoto": (PROPHOTO, gamma(1.8)),
}


def squares(colours: np.ndarray, side: int = 8) -> Image.Image:
    """Draw each colour ``(n, 3)`` as a square."""
    return Image.fromarray(colours[None].repeat(side, 0).repeat(side, 1).astype(np.uint8))


def drawn() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(40, 3))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_colours_of_a_profile_become_those_of_srgb(tmp_path: Path, name: str, ending: str) -> None:
    colours, curve = WIDE[name]
    encoded = drawn()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = tmp_path / f"x.{ending}"
    profile = rgb_profile(colours, curve)
    squares(encoded).save(path, icc_profile=profile, **options.get(ending, {}))  # type: ignore[arg-type]
    expected = encode_srgb(decode(encoded / 255, colours, curve))
    found = np.asarray(open_rgb(path))[4, 4::8].astype(int)
    differences = np.abs(found - expected)
    # JPEG changes some of the darkest values by one, which is much in ProPhoto.
    assert differences.mean() <= 1 if ending == "jpg" else differences.max() <= 3
    assert np.abs(encoded - expected).max() > 40
    assert "icc_profile" not in open_rgb(path).info


@pytest.mark.parametrize(
    ("colours", "curve"), [(SRGB, srgb_curve), (SRGB, lambda v: np.rint(srgb_curve(v) * 4e3) / 4e3)]
)
def test_srgb_by_another_name_changes_no_byte(
    tmp_path: Path, colours: Chromaticities, curve: Curve
) -> None:
    picture = squares(drawn())
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "tagged.png", icc_profile=rgb_profile(colours, curve))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "own.png", icc_profile=own)
    plain, *others = (
        read_pixels(tmp_path / f"{name}.png", Preprocessing(size=32))
        for name in ("plain", "tagged", "own")
    )
    assert all(np.array_equal(plain, other) for other in others)


@pytest.mark.parametrize(
    "profile",
    [
        b"rubbish",
        rgb_profile(DISPLAY_P3, srgb_curve)[:300],
        rgb_profile(DISPLAY_P3, srgb_curve)[:128] + bytes(500),
        grey_profile(gamma(1.0)),
        ink_profile((128, 128, 80)),
    ],
    ids=["rubbish", "cut off", "no tags", "of grey", "of ink"],
)
def test_a_profile_that_does_not_fit_is_passed_over(tmp_path: Path, profile: bytes) -> None:
    picture = squares(drawn())
    picture.save(tmp_path / "x.png", icc_profile=profile)
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "x.png")), np.asarray(picture))


def test_grey_has_profiles_too(tmp_path: Path) -> None:
    values = np.array([0, 60, 120, 200, 255], np.uint8)
    picture = Image.fromarray(values[None].repeat(8, 0).repeat(8, 1))
    picture.save(tmp_path / "x.jpg", quality=100, icc_profile=grey_profile(gamma(1.0)))
    light = np.repeat((values / 255)[:, None], 3, axis=1) @ to_grey()
    found = np.asarray(open_rgb(tmp_path / "x.jpg"))[4, 4::8].astype(int)
    assert np.abs(found - encode_srgb(light)).max() <= 3
    assert found[1].min() > 130  # a plain conversion would leave it at 60


def to_grey() -> np.ndarray:
    """Return the matrix from equal red, green and blue to XYZ under D50."""
    from profiles import to_pcs

    return to_pcs(SRGB).T


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_ink_is_what_its_profile_says(tmp_path: Path, ending: str) -> None:
    # Lab 50, 0, -20: of middle lightness, and bluish. Without a profile cyan is 0, 255, 255.
    path, profile = tmp_path / f"x.{ending}", ink_profile((128, 128, 108))
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 0): (94, 121, 153),
        (0, 0, 0, 255): (0, 0, 0),
    }
    for ink, expected in inks.items():
        Image.new("CMYK", (16, 16), ink).save(path, icc_profile=profile)
        found = np.asarray(open_rgb(path))[8, 8].astype(int)
        assert np.abs(found - expected).max() <= 12
        pixels = read_pixels(path, Preprocessing(size=32))
        assert np.abs(pixels[:, 16, 16].astype(int) - found).max() <= 1


def test_a_profile_of_a_palette_and_of_transparency(tmp_path: Path) -> None:
    profile = rgb_profile(DISPLAY_P3, srgb_curve)
    red = np.array([[200, 40, 40]])
    expected = encode_srgb(decode(red / 255, *WIDE["Display P3"]))[0]
    palette = squares(red).quantize(4)
    palette.save(tmp_path / "p.png", icc_profile=profile)
    clear = squares(red).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    clear.save(tmp_path / "a.png", icc_profile=profile)
    for name in ("p.png", "a.png"):
        found = np.asarray(open_rgb(tmp_path / name))
        assert np.abs(found[4, 6] - expected).max() <= 3
    assert found[4, 1].tolist() == [255, 255, 255]


def test_a_large_jpeg_is_still_scaled_by_its_decoder(tmp_path: Path) -> None:
    encoded = np.array([[30, 200, 60]])
    profile = rgb_profile(DISPLAY_P3, srgb_curve)
    squares(encoded, 1600).save(tmp_path / "x.jpg", quality=95, icc_profile=profile)
    opened = open_photograph(tmp_path / "x.jpg", 64).image
    assert opened.size == (400, 400)
    pixels = read_pixels(tmp_path / "x.jpg", Preprocessing(size=64))
    expected = encode_srgb(decode(encoded / 255, *WIDE["Display P3"]))[0]
    assert np.abs(pixels[:, 30, 30] - expected).max() <= 4


def test_only_the_small_picture_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    apply = ImageCms.ImageCmsTransform.apply

    def counted(
        self: ImageCms.ImageCmsTransform, image: Image.Image, out: Image.Image | None = None
    ) -> Image.Image:
        sizes.append(image.size)
        return apply(self, image, out)

    squares(drawn(), 30).save(tmp_path / "plain.png")
    squares(drawn(), 30).save(tmp_path / "p3.png", icc_profile=rgb_profile(DISPLAY_P3, srgb_curve))
    read_pixels(tmp_path / "p3.png", Preprocessing(size=32))  # builds the transform
    monkeypatch.setattr(ImageCms.ImageCmsTransform, "apply", counted)
    read_pixels(tmp_path / "p3.png", Preprocessing(size=32))
    assert sizes == [(32, 32)]
    monkeypatch.setattr(colour, "_transform", None)
    read_pixels(tmp_path / "plain.png", Preprocessing(size=32))
    assert sizes == [(32, 32)]


def test_a_path_and_an_opened_image_have_the_same_colours(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    squares(drawn(), 30).save(path, icc_profile=rgb_profile(PROPHOTO, gamma(1.8)))
    captioner = Captioner(tiny)
    with Image.open(path) as image:
        assert np.array_equal(captioner.pixels(image), captioner.pixels(path))
        assert "icc_profile" in image.info  # the caller's image is left as it is
