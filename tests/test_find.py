"""Photographs in folders: what is found, and what is passed over and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from captioner.cli import main
from captioner.folder import find_photographs
from captioner.folder.find import PassedOver
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.photos import images
from captioner.photos.images import UnreadableError, image_endings, open_rgb
from conftest import draw_picture

Capture = pytest.CaptureFixture[bytes]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100


def made(folder: Path, *names: str) -> Path:
    """Make empty files below a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found(folder: Path, *exclude: str) -> tuple[list[str], PassedOver]:
    """Return the photographs below a folder, and what was passed over."""
    passed_over = PassedOver()
    photographs = find_photographs([str(folder)], exclude, passed_over)
    return [os.path.relpath(path, folder) for path, _ in photographs], passed_over


def test_what_systems_put_into_folders(tmp_path: Path) -> None:
    good = ["2019/a.jpg", "2019/b.jpg", "Fotos.photoslibrary/originals/A/1.jpg",
            "iPhoto.photolibrary/Masters/2.jpg", "originals/3.jpg", "resources/4.jpg"]  # fmt: skip
    made(
        tmp_path, *good, "2019/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/x.jpg",
        "#snapshot/x.jpg", "$RECYCLE.BIN/S-1/x.jpg", "$Recycle.Bin/x.jpg",
        "System Volume Information/x.jpg", "2019/__MACOSX/2019/x.jpg", ".thumbnails/x.jpg",
        "2019/.a.jpg", "lost+found/x.jpg", "Cat Previews.lrdata/x.jpg", "@Recycle/x.jpg",
        "Fotos.photoslibrary/resources/derivatives/A/1.jpg", "iPhoto.photolibrary/Previews/2.jpg",
    )  # fmt: skip
    names, passed_over = found(tmp_path)
    assert names == good
    assert passed_over.system == {
        "@eaDir": 1, "#recycle": 1, "#snapshot": 1, "$RECYCLE.BIN": 1, "$Recycle.Bin": 1,
        "System Volume Information": 1, "__MACOSX": 1, "lost+found": 1, "*.lrdata": 1,
        "@Recycle": 1, "resources of a photo library": 1, "Previews of a photo library": 1,
    }  # fmt: skip
    # What is named outright is searched.
    assert found(tmp_path / "2019" / "@eaDir")[0] == ["a.jpg/SYNOPHOTO_THUMB_M.jpg"]
    library = tmp_path / "Fotos.photoslibrary"
    assert found(library)[0] == ["originals/A/1.jpg"]
    assert found(library / "resources")[0] == ["derivatives/A/1.jpg"]


@pytest.mark.parametrize(
    ("globs", "left", "count"),
    [
        (["*.png"], ["A.PNG", "a.jpg", "b/a.jpg", "b/c/raw/4.jpg"], 2),
        (["*.png", "*.PNG"], ["a.jpg", "b/a.jpg", "b/c/raw/4.jpg"], 3),
        (["b"], ["A.PNG", "a.jpg", "raw/3.png"], 1),
        (["raw/"], ["A.PNG", "a.jpg", "b/2.png", "b/a.jpg"], 2),
        (["b/a.jpg"], ["A.PNG", "a.jpg", "b/2.png", "b/c/raw/4.jpg", "raw/3.png"], 1),
        (["raw/*"], ["A.PNG", "a.jpg", "b/2.png", "b/a.jpg", "b/c/raw/4.jpg"], 1),
        (["**/raw/*"], ["A.PNG", "a.jpg", "b/2.png", "b/a.jpg"], 2),
        (["[!a]*", ".jpg"], ["a.jpg"], 3),
        (["x", "", "/"], ["A.PNG", "a.jpg", "b/2.png", "b/a.jpg", "b/c/raw/4.jpg", "raw/3.png"], 0),
    ],
)
def test_globs(tmp_path: Path, globs: list[str], left: list[str], count: int) -> None:
    made(tmp_path, "A.PNG", "a.jpg", "b/2.png", "b/a.jpg", "b/c/raw/4.jpg", "raw/3.png")
    names, passed_over = found(tmp_path, *globs)
    assert names == left
    assert passed_over.excluded == count


def test_globs_of_what_is_named_outright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made(tmp_path, "a.jpg", "b.png", "c/d.jpg", os.fsdecode(b"\xff.png")))
    paths = [*sorted(os.listdir(".")), "c/", "nowhere.png", "./a.jpg"]
    names = [path for path, _ in find_photographs(paths, ["*.png", "./a.jpg"])]
    assert names == ["a.jpg", "c/d.jpg", "c/d.jpg"]


def test_what_no_reader_opens_is_said(
    tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made(tmp_path, "1.HEIC", "2.heic", "3.cr2", "4.DNG", "5.jxl", "notes.txt"))
    assert main(["caption", "."]) == 0
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: photographs that no reader opens: 5 (2 .heic, 1 .cr2, 1 .dng, 1 .jxl)",
        'captioner: HEIC is read after: pip install "captioner[heif]"',
        "captioner: no photographs in .",
    ]
    assert main(["caption", ".", "--quiet"]) == 0
    assert capsysbinary.readouterr().err == b""
    made(tmp_path, "@eaDir/1.jpg")
    (tmp_path / "1.HEIC").unlink()
    (tmp_path / "2.heic").unlink()
    assert main(["caption", ".", "--exclude", "3.*"]) == 0
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: photographs that no reader opens: 2 (1 .dng, 1 .jxl)",
        "captioner: folders of the system, passed over: 1 (1 @eaDir)",
        "captioner: files and folders passed over by --exclude: 1",
        "captioner: no photographs in .",
    ]


def test_the_error_of_a_heic_says_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.heic", "really-heic.jpg"):
        (tmp_path / name).write_bytes(HEIC)
        with pytest.raises(UnreadableError, match=r'Pillow can read; .*"captioner\[heif\]"'):
            open_rgb(tmp_path / name)
    # With the extra it is a photograph like any other.
    monkeypatch.setattr(images, "image_endings", lambda: image_endings() | {".heic"})
    with pytest.raises(UnreadableError, match=r"not a picture that Pillow can read$"):
        open_rgb(tmp_path / "a.heic")


def test_mpo_is_a_photograph(tmp_path: Path, small: Checkpoint, capsysbinary: Capture) -> None:
    draw_picture(tmp_path / "b.png", "red")
    with Image.open(tmp_path / "b.png") as picture:
        picture.save(tmp_path / "a.MPO", "MPO", save_all=True, append_images=[picture.copy()])
    save_checkpoint(small, tmp_path / "small.safetensors")
    arguments = ["--model", str(tmp_path / "small.safetensors"), "--precision", "float32"]
    assert main(["caption", str(tmp_path), *arguments]) == 0
    records = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [os.path.basename(record["image"]) for record in records] == ["a.MPO", "b.png"]
    assert all(record["caption"] for record in records)


@contextmanager
def nested(folder: Path, name: str, depth: int) -> Iterator[Path]:
    """Make folders in folders, with a file in the last; neither rmtree nor pytest removes them."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        Path("x.jpg").touch()
        os.chdir(here)
        yield folder
        os.chdir(folder)
        for _ in range(depth):
            os.chdir(name)
        os.unlink("x.jpg")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir(name)
    finally:
        os.chdir(here)


def test_folders_may_be_nested_deeply(tmp_path: Path) -> None:
    with nested(tmp_path, "d", 1500):
        assert [name.count("/") for name in found(tmp_path)[0]] == [1500]
    # Where the system itself knows no path any more, that is the record.
    with nested(tmp_path, "d" * 100, 45):
        ((path, error),) = find_photographs([str(tmp_path)])
        assert path.endswith("d")
        assert error == "cannot be searched: File name too long"
