"""Names of photographs that are spelled otherwise than their files are found, or refused aloud."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from captioner.data.names import resolve, resolve_in_folder, spelling_notes
from captioner.data.readers import load

CAFE = "caf\u00e9.jpg"
DECOMPOSED = unicodedata.normalize("NFD", CAFE)


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize(
    ("there", "wanted", "kind"),
    [
        ("train/a.jpg", r"train\a.jpg", "backslashes"),
        ("train/a.jpg", r".\train\a.jpg", "backslashes"),
        (CAFE, DECOMPOSED, "Unicode normal form"),
        (DECOMPOSED, CAFE, "Unicode normal form"),
        ("A.JPG", "a.jpg", "upper and lower case"),
        ("Train/a.jpg", "train/A.jpg", "upper and lower case"),
        ("stra\u00dfe.jpg", "STRASSE.jpg", "upper and lower case"),
        ("train/a.jpg", "/home/bob/coco/train/a.jpg", "the folders before it"),
        ("a.jpg", "/home/bob/coco/train/a.jpg", "the folders before it"),
        ("train/a.jpg", r"C:\Users\Bob\train\a.jpg", "the folders before it"),
        ("train/a.jpg", r"\\server\share\train\a.jpg", "the folders before it"),
        ("train/A.jpg", r"C:\Users\Bob\train\a.jpg", "upper and lower case"),
        (f"train/{CAFE}", rf"C:\train\{DECOMPOSED}", "Unicode normal form"),
    ],
)
def test_one_file_that_fits_is_found(tmp_path: Path, there: str, wanted: str, kind: str) -> None:
    folder_of(tmp_path, there, "other/b.jpg", "c.txt")
    found = resolve_in_folder([wanted], tmp_path)
    assert found.found == {wanted: there}
    assert found.spellings == {wanted: kind}
    assert list(spelling_notes(found)) == [
        f"1 photograph found under a name that differs by {kind}: {wanted!r} is {there!r}"
    ]


def test_names_as_they_are_need_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a.jpg", "d/b.jpg", r"back\slash.jpg")
    monkeypatch.setattr("captioner.data.names._files", lambda folder: pytest.fail("searched"))
    wanted = ["a.jpg", "d/b.jpg", "./a.jpg", r"back\slash.jpg", str(tmp_path / "d" / "b.jpg")]
    found = resolve_in_folder(wanted, tmp_path)
    assert found.found == dict(zip(wanted, [*wanted[:4], "d/b.jpg"], strict=True))
    assert not found.refused
    assert not found.spellings


@pytest.mark.parametrize(
    ("there", "wanted", "why"),
    [
        (["b.jpg"], "a.jpg", "it is missing"),
        (["d/a.jpg"], "a.jpg", "it is missing"),
        (["a.jpg"], "d/a.jpg", "it is missing"),
        (["A.jpg", "a.JPG"], "a.jpg", "'A.jpg' and 'a.JPG' fit its name"),
        (["a.jpg", "d/a.jpg"], "/x/d/a.jpg", "'d/a.jpg' and 'a.jpg' fit its name"),
        (["x/a.jpg"], "/etc/a.jpg", "it is missing"),
        (["a.jpg"], "a" * 5_000, "it is missing"),
        (["a.jpg"], "\0", "it is missing"),
    ],
)
def test_what_is_unclear_is_refused(
    tmp_path: Path, there: list[str], wanted: str, why: str
) -> None:
    found = resolve_in_folder([wanted], folder_of(tmp_path, *there))
    assert (found.found, found.refused) == ({}, {wanted: why})


def test_the_nearer_spelling_wins(tmp_path: Path) -> None:
    folder_of(tmp_path, "d/a.jpg", "d/A.jpg")
    assert resolve_in_folder([r"d\A.jpg"], tmp_path).found == {r"d\A.jpg": "d/A.jpg"}


def test_a_file_is_of_one_name_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.jpg", "2.jpg")
    wanted = ["/data/train/1.jpg", "/data/val/1.jpg", "/data/val/2.jpg", "2.jpg"]
    found = resolve_in_folder(wanted, tmp_path)
    assert found.found == {"2.jpg": "2.jpg"}
    assert found.refused == {
        "/data/train/1.jpg": "only '1.jpg' fits its name, and it is also that of '/data/val/1.jpg'",
        "/data/val/1.jpg": "only '1.jpg' fits its name, and it is also that of '/data/train/1.jpg'",
        "/data/val/2.jpg": "only '2.jpg' fits its name, and it is also that of '2.jpg'",
    }


def test_files_outside_the_folder_are_not_found(tmp_path: Path) -> None:
    folder_of(tmp_path, "in/b.jpg", "a.jpg")
    outside = str(tmp_path / "a.jpg")
    assert resolve_in_folder([outside], tmp_path / "in").refused == {outside: "it is missing"}


def test_deep_folders_and_circles_are_searched(tmp_path: Path) -> None:
    # Deeper than Python's stack; beyond 4,096 letters no path can be opened.
    deep = tmp_path
    for _ in range(1_200):
        deep = deep / "d"
        deep.mkdir()
    photograph, circle = deep / "A.jpg", tmp_path / "d" / "circle"
    photograph.touch()
    circle.symlink_to(tmp_path, target_is_directory=True)
    name = f"{deep.relative_to(tmp_path)}/a.jpg"
    try:
        assert resolve_in_folder([name], tmp_path).found == {name: name[:-5] + "A.jpg"}
    finally:
        # pytest itself cannot remove what is nested so deeply.
        photograph.unlink()
        circle.unlink()
        while deep != tmp_path:
            deep.rmdir()
            deep = deep.parent


def test_many_other_spellings_are_counted() -> None:
    known = [f"{number}.JPG" for number in range(1_000)]
    found = resolve([f"{n}.jpg" for n in range(1_000)], known.__contains__, lambda: known)
    assert list(spelling_notes(found)) == [
        "1,000 photographs found under a name that differs by upper and lower case: "
        "'0.jpg' is '0.JPG', '1.jpg' is '1.JPG', '2.jpg' is '2.JPG', and 997 more"
    ]


def test_a_data_set_from_another_machine_is_loaded(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", "a.jpg", "B.JPG", DECOMPOSED)
    names = [r"C:\flickr\images\a.jpg", r"C:\flickr\images\b.jpg", CAFE, r"C:\gone.jpg"]
    lines = [json.dumps({"image": name, "captions": ["a dog"]}) for name in names]
    (tmp_path / "x.jsonl").write_text("\r\n".join(lines))
    loaded = load(tmp_path / "x.jsonl", images)
    assert [e.image for e in loaded.examples] == [
        images / n for n in ("a.jpg", "B.JPG", DECOMPOSED)
    ]
    assert loaded.missing == {str(images / r"C:\gone.jpg"): "it is missing"}
    assert [note.split(": ")[1] for note in loaded.notes] == [
        "1 photograph found under a name that differs by the folders before it",
        "1 photograph found under a name that differs by upper and lower case",
        "1 photograph found under a name that differs by Unicode normal form",
    ]
