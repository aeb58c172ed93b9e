"""Photographs that break off, are bombs or pretend to be photographs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from captioner.config import Preprocessing
from captioner.folder import describe_folder
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.photos import images
from captioner.photos.images import UnreadableError, open_photograph, open_rgb, read_pixels
from captioner.photos.workers import Found, read_ahead
from profiles import DISPLAY_P3, rgb_profile, srgb_curve
from readers import read_and_measure, read_much, read_small
from test_pictures import scene

KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 7},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
    "no subsampling": {"subsampling": 0},
}


def jpeg(height: int = 480, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene(640, height)).save(stream, "JPEG", quality=85, **options)
    return stream.getvalue()


def whole_rows(path: Path, content: bytes) -> int:
    """Return how many of the rows of a cut file are those of the whole one."""
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image)
    found = np.asarray(open_rgb(path))
    same = (found == expected).all(axis=(1, 2))
    return int(same.argmin()) if not same.all() else len(same)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_without_its_last_bytes_is_whole(tmp_path: Path, kind: str) -> None:
    content, path = jpeg(**KINDS[kind]), tmp_path / "x.jpg"
    for cut in (1, 2):
        path.write_bytes(content[:-cut])
        assert whole_rows(path, content) == 480
        assert open_photograph(path).truncated
    path.write_bytes(content)
    assert not open_photograph(path).truncated
    path.write_bytes(content + b"what some cameras write after it")
    assert not open_photograph(path).truncated


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_is_read_if_nine_tenths_are_there(tmp_path: Path, kind: str) -> None:
    content, path = jpeg(**KINDS[kind]), tmp_path / "x.jpg"
    read = 0
    for kept in np.linspace(0.02, 0.999, 40):
        path.write_bytes(content[: int(kept * len(content))])
        try:
            rows = whole_rows(path, content)
        except UnreadableError:
            assert kept < 0.98
        else:
            read += 1
            assert kept > 0.85
            if "progressive" not in kind:  # or a later scan may only be less exact
                assert rows >= 0.9 * 480
    assert read >= 2


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    content = jpeg()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableError, match=r"breaks off, and (4|5|6)\d% of the photograph"):
        open_rgb(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(content[:400])
    with pytest.raises(UnreadableError):
        open_rgb(tmp_path / "x.jpg")


def test_a_scan_that_never_began_is_missing(tmp_path: Path) -> None:
    """A progressive JPEG's first scans show the whole picture, but blurred."""
    content = jpeg(progressive=True)
    last = content.rindex(b"\xff\xda")
    (tmp_path / "x.jpg").write_bytes(content[:last])
    with pytest.raises(UnreadableError, match="truncated"):
        open_rgb(tmp_path / "x.jpg")


@pytest.mark.parametrize("lenient", [False, True])
def test_both_doors_agree_whatever_pillow_is_told(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    content = jpeg()
    stream = io.BytesIO()
    Image.fromarray(scene(64, 48)).save(stream, "PNG")
    files = {
        "whole.jpg": content,
        "end.jpg": content[:-2],
        "nearly.jpg": content[:-200],
        "half.jpg": content[: len(content) // 2],
        "half.png": stream.getvalue()[: len(stream.getvalue()) // 2],
    }
    for name, each in files.items():
        (tmp_path / name).write_bytes(each)
    captioner = Captioner(tiny)
    paths = [str(tmp_path / name) for name in files]
    records = dict(zip(files, describe_folder(captioner, paths), strict=True))
    assert ["error" in record for record in records.values()] == [False] * 3 + [True] * 2
    assert [name for name, r in records.items() if r.get("truncated")] == ["end.jpg", "nearly.jpg"]
    for name, record in records.items():
        if "error" in record:
            with pytest.raises(ValueError, match=f"{name}"):
                captioner.caption([tmp_path / name])
        else:
            assert captioner.caption([tmp_path / name])[0].text == record["caption"]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def pretenders() -> dict[str, bytes]:
    """Return files of formats that are no photographs, each at its smallest."""
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
        b"20 20 scale\nshowpage\n%%EOF\n"
    )
    iptc = bytes((0x1C, 3, 60, 0, 2, 3, 1)) + bytes((0x1C, 3, 65, 0, 1, 1))
    iptc += bytes((0x1C, 3, 20, 0, 1, 20, 0x1C, 3, 30, 0, 1, 20, 0x1C, 3, 120, 0, 1, 1))
    iptc += bytes((0x1C, 8, 10)) + struct.pack(">H", len(eps)) + eps
    return {
        "eps": eps,
        "iptc": iptc,
        "bufr": b"BUFR" + bytes(60),
        "grib": b"GRIB" + bytes(3) + b"\1" + bytes(60),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
        "mpeg": b"\0\0\1\xb3\x01\x40\x0f\x00" + bytes(60),
        "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 20, 20, 72) + bytes(60),
    }


@pytest.mark.parametrize("kind", pretenders())
def test_what_needs_another_program_is_no_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A stand-in for Ghostscript leaves a mark if it is ever started."""
    mark, programs = tmp_path / "mark", tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin32c", "djpeg", "netpbm"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> '{mark}'\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "x.jpg"
    path.write_bytes(pretenders()[kind])
    with pytest.raises(UnreadableError, match="not a picture that Pillow can read"):
        open_rgb(path)
    ((_, result),) = read_ahead(read_small, [Found(str(path))], 1, 1, 60.0)
    assert str(result) == "not a picture that Pillow can read"
    assert not mark.exists()


def test_an_image_that_was_opened_as_eps_is_not_loaded(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(pretenders()["eps"])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS"
        with pytest.raises(ValueError, match="image 0: not a photograph, but EPS"):
            Captioner(tiny).caption([image])


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunks(png: bytes, chunks: bytes, after: bool) -> bytes:
    """Put chunks after the header of a PNG, or before its end."""
    at = len(png) - 12 if after else 33
    return png[:at] + chunks + png[at:]


LONG = b"a" * 3_000_000
NOTES = {
    "zTXt": chunk(b"zTXt", b"key\0\0" + zlib.compress(LONG)),
    "iTXt": chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(LONG)),
    "iCCP": chunk(b"iCCP", b"name\0\0" + zlib.compress(LONG)),
    "tEXt": b"".join(chunk(b"tEXt", b"%d\0" % i + LONG[:900_000]) for i in range(80)),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", NOTES)
def test_a_png_with_long_notes_is_read(tmp_path: Path, kind: str, after: bool) -> None:
    rgb = scene(24, 18)
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    path = tmp_path / "x.png"
    content = with_chunks(stream.getvalue(), NOTES[kind], after)
    path.write_bytes(content)
    if kind != "iCCP" or not after:  # a profile after the pixels is not read at all
        with pytest.raises(ValueError, match=r"too large|memory|MAX_TEXT"), Image.open(path) as im:
            im.load()
    assert np.array_equal(np.asarray(open_rgb(path)), rgb)
    assert path.read_bytes() == content


def test_a_large_profile_of_a_png_still_counts(tmp_path: Path) -> None:
    profile = bytearray(rgb_profile(DISPLAY_P3, srgb_curve))
    profile += bytes(2_000_000)
    struct.pack_into(">I", profile, 0, len(profile))
    Image.new("RGB", (9, 9), (200, 40, 40)).save(
        tmp_path / "small.png", icc_profile=profile[:-2_000_000]
    )
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (200, 40, 40)).save(stream, "PNG")
    large = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(profile)))
    (tmp_path / "large.png").write_bytes(with_chunks(stream.getvalue(), large, after=False))
    small, found = (np.asarray(open_rgb(tmp_path / f"{n}.png")) for n in ("small", "large"))
    assert small[4, 4, 0] > 205
    assert np.array_equal(small, found)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("mode", "name", "bytes_each"),
    [("I;16", "x.png", 2), ("RGBA", "x.png", 4), ("F", "x.tif", 4)],
)
def test_a_picture_takes_little_more_memory_than_its_pixels(
    tmp_path: Path, mode: str, name: str, bytes_each: int
) -> None:
    """So 250 megapixels, the most that is accepted, take 1.25 GB at 4 bytes each."""
    side = 6_400
    options = {"x.png": {"compress_level": 1}, "x.tif": {"compression": "tiff_lzw"}}[name]
    Image.new(mode, (side, side)).save(tmp_path / name, **options)  # type: ignore[arg-type]
    ((_, peak),) = read_ahead(read_and_measure, [Found(str(tmp_path / name))], 1, 1, 300.0)
    assert not isinstance(peak, UnreadableError), str(peak)
    assert int(peak) < side * side * bytes_each + 250_000_000


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "F", "P", "CMYK"])
def test_large_pictures_are_reduced_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Tiles leave no seams, and the mean of 2 x 2 is what a bicubic filter sees anyway."""
    from captioner.photos import flatten

    rgb = Image.fromarray(scene(900, 700))
    if mode == "RGBA":
        rgb.putalpha(Image.linear_gradient("L").resize(rgb.size))
    picture = rgb.convert("I" if mode == "I;16" else mode).convert(mode)
    path = tmp_path / ("x.png" if mode in {"L", "RGB", "RGBA", "I;16", "P"} else "x.tif")
    picture.save(path)
    whole = read_pixels(path, Preprocessing(size=32)).astype(int)
    monkeypatch.setattr(flatten, "_TILE_PIXELS", 10_000)
    assert np.array_equal(read_pixels(path, Preprocessing(size=32)), whole)
    monkeypatch.setattr(flatten, "_MOST_PIXELS", 250_000)
    assert open_rgb(path).size == (450, 350)
    reduced = read_pixels(path, Preprocessing(size=32)).astype(int)
    assert np.abs(reduced - whole).mean() < 0.5
    assert np.abs(reduced - whole).max() <= 4


def test_a_process_that_reads_has_a_limit_of_memory() -> None:
    found = read_ahead(read_much, map(Found, ["400", "1600", "400"]), 1, 3, 60.0)
    first, large, last = (result for _, result in found)
    assert [first, last] == [b"400000000"] * 2
    assert str(large) == "reading it takes more than 1.5 GB of memory"


def test_what_is_not_a_photograph_is_listed_once() -> None:
    readable = images._formats()
    assert not {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "IPTC"} & set(readable)
    assert {"JPEG", "PNG", "TIFF", "WEBP", "GIF"} <= set(readable)
