"""Sidecars: what they hold, what is never overwritten, and what a failing one costs: nothing."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from captioner.cli import main
from captioner.folder import sidecars as room
from captioner.folder.sidecars import Sidecars, closed_folders, sidecar_path
from conftest import draw_picture

Capture = pytest.CaptureFixture[bytes]
DC = "http://purl.org/dc/elements/1.1/"
TAGS = [{"name": "dog", "score": 0.9}, {"name": "run & <hide>", "score": 0.5}]


def test_sidecar_texts(tmp_path: Path) -> None:
    image = str(tmp_path / "a dog.tar.jpg")
    caption = {"image": image, "caption": "a dog & <cat>", "tags": TAGS}
    for kind in ("txt", "caption", "xmp"):
        assert Sidecars([kind], False).write(caption) == caption
    assert (tmp_path / "a dog.tar.txt").read_text() == "a dog & <cat>\n"
    assert (tmp_path / "a dog.tar.caption").read_text() == "a dog & <cat>\n"
    tree = ElementTree.parse(tmp_path / "a dog.tar.jpg.xmp")
    names = {"dc": "http://purl.org/dc/elements/1.1/", "x": "adobe:ns:meta/",
             "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#"}  # fmt: skip
    about = "./rdf:RDF/rdf:Description"
    assert tree.getroot().tag == "{adobe:ns:meta/}xmpmeta"
    (text,) = tree.findall(f"{about}/dc:description/rdf:Alt/rdf:li", names)
    assert text.text == "a dog & <cat>"
    assert text.attrib == {"{http://www.w3.org/XML/1998/namespace}lang": "x-default"}
    subjects = tree.findall(f"{about}/dc:subject/rdf:Bag/rdf:li", names)
    assert [subject.text for subject in subjects] == ["dog", "run & <hide>"]
    tags = {"image": str(tmp_path / "t.jpg"), "tags": TAGS}
    Sidecars(["txt"], False).write(tags)
    assert (tmp_path / "t.txt").read_text() == "dog, run & <hide>\n"


def test_what_others_wrote_is_never_overwritten(tmp_path: Path) -> None:
    image, text = str(tmp_path / "x.jpg"), tmp_path / "x.txt"
    text.write_text("mine\n")
    (tmp_path / "x.caption").symlink_to(text)
    record = {"image": image, "caption": "a dog"}
    for kind, overwrite in (("txt", False), ("txt", True), ("caption", False), ("caption", True)):
        sidecars = Sidecars([kind], overwrite)
        assert sidecars.write(record, again=True) is record
        assert sidecars.left_alone == 1
        assert text.read_text() == "mine\n"
    assert sorted(os.listdir(tmp_path)) == ["x.caption", "x.txt"]


def test_what_captioner_wrote_is_known_again(tmp_path: Path) -> None:
    image, text = str(tmp_path / "x.jpg"), tmp_path / "x.txt"
    Sidecars(["txt"]).write({"image": image, "caption": "a dog"})
    assert sorted(os.listdir(tmp_path)) == [".captioner-sidecars", "x.txt"]
    # Not without being told, and then also in another folder.
    sidecars = Sidecars(["txt"])
    sidecars.write({"image": image, "caption": "a cat"})
    assert (sidecars.left_alone, sidecars.earlier) == (0, 1)
    assert text.read_text() == "a dog\n"
    tmp_path = tmp_path.rename(tmp_path.with_name("moved"))
    image, text = str(tmp_path / "x.jpg"), tmp_path / "x.txt"
    Sidecars(["txt"], overwrite=True).write({"image": image, "caption": "a cat"})
    Sidecars(["txt"]).write({"image": image, "caption": "a hat"}, again=True)
    assert text.read_text() == "a hat\n"
    # A person's correction is a person's.
    text.write_text("a top hat\n")
    sidecars = Sidecars(["txt"], overwrite=True)
    sidecars.write({"image": image, "caption": "a dog"})
    assert (sidecars.left_alone, text.read_text()) == (1, "a top hat\n")


@pytest.mark.parametrize("index", [b"", b"[" * 100_000, b'{"name": 1}\n[]\n7\n"', b"\xff\n", None])
def test_without_its_index_a_sidecar_is_left_alone(tmp_path: Path, index: bytes | None) -> None:
    image = str(tmp_path / "x.jpg")
    Sidecars(["txt"]).write({"image": image, "caption": "a dog"})
    place, elsewhere = tmp_path / ".captioner-sidecars", tmp_path / "elsewhere"
    if index is None:
        place.rename(elsewhere)
        place.symlink_to(elsewhere)
    else:
        place.write_bytes(index)
    sidecars = Sidecars(["txt"], overwrite=True)
    record = {"image": image, "caption": "a cat"}
    assert sidecars.write(record) is record
    assert sidecars.left_alone == 1
    assert (tmp_path / "x.txt").read_text() == "a dog\n"


def test_sidecars_alone_are_what_is_done(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for name in "abc":
        draw_picture(folder / f"{name}.png", "red")
    (folder / "d.png").write_bytes(b"")
    (folder / "b.txt").write_text("mine\n")
    (folder / "c.txt").write_bytes(b"")  # what a power failure may leave
    arguments = ["caption", str(folder), "--sidecar", "txt", *model]
    assert main(arguments) == 1
    out, err = capsysbinary.readouterr()
    assert out == b""
    left_alone = "captioner: 1 sidecars hold something else and were left alone\n"
    assert err.decode() == (
        f"{folder}/d.png  error: an empty file (0 bytes)\n"
        f"{left_alone}"
        "captioner: 1 of 4 could not be read\n"
        "captioner: 1 done before, 2 described, in .txt beside the photographs\n"
    )  # fmt: skip
    assert (folder / "b.txt").read_text() == "mine\n"
    assert (folder / "c.txt").read_text() == (folder / "a.txt").read_text() != ""
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    (folder / "d.png").unlink()
    assert main(arguments) == 0
    assert capsysbinary.readouterr().err.decode() == (
        f"{left_alone}captioner: 2 sidecars are of an earlier run and were left alone; "
        "--overwrite replaces them\n"
        "captioner: 3 done before, 0 described, in .txt beside the photographs\n"
    )
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")} == times
    assert main([*arguments, "--no-tags", "--overwrite"]) == 0
    assert capsysbinary.readouterr().err.decode() == (
        f"{left_alone}captioner: 1 done before, 2 described, in .txt beside the photographs\n"
    )
    assert (folder / "b.txt").read_text() == "mine\n"
    # Tags alone are another text.
    assert main(["tag", *arguments[1:], "--overwrite"]) == 0
    new = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    assert {path.name for path in new if new[path] != times[path]} == {"a.txt", "c.txt"}


def test_sidecars_of_a_run_that_is_done(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["caption", str(photographs), "--output", str(output), *model]
    assert main(arguments) == 1
    before = output.read_bytes()
    assert main([*arguments, "--sidecar", "xmp"]) == 1
    assert sorted(path.name for path in photographs.rglob("*.xmp")) == [
        "a.PNG.xmp", "b.jpg.xmp", "c.webp.xmp", "one.png.xmp",
    ]  # fmt: skip
    assert output.read_bytes() == before
    (photographs / "b.txt").write_text("mine")
    capsysbinary.readouterr()
    assert main([*arguments, "--sidecar", "txt"]) == 1
    assert b"1 sidecars hold something else and were left alone" in capsysbinary.readouterr().err


XMP = f"""<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
 <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"
  xmlns:dc="{DC}">
  <dc:subject><rdf:Bag><rdf:li>Oma</rdf:li></rdf:Bag></dc:subject>
 </rdf:Description>
</rdf:RDF>"""


def keywords(path: Path) -> list[str | None]:
    items = ElementTree.parse(path).iterfind(f".//{{{DC}}}subject/*/*")
    return [item.text for item in items]


def test_xmp_of_other_programs(model: list[str], tmp_path: Path, capsysbinary: Capture) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for name in "abc":
        draw_picture(folder / f"{name}.jpg", "red")
    ours, described, broken = (folder / f"{name}.jpg.xmp" for name in "abc")
    ours.write_text(XMP)
    ours.chmod(0o640)
    text = "Oma wird 80</rdf:li></rdf:Alt></dc:description><dc:subject>"
    by_another = f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}'
    described.write_text(XMP.replace("<dc:subject>", by_another))
    broken.write_text(XMP[:-9])
    arguments = ["caption", str(folder), "--sidecar", "xmp", *model]
    assert main(arguments) == 1
    assert capsysbinary.readouterr().err.decode() == (
        f"{broken.with_suffix('')}  error: cannot merge into c.jpg.xmp: not XML: unclosed token: "
        "line 6, column 0\n"
        "captioner: 1 descriptions by others were kept; captioner:caption is beside them\n"
        "captioner: 1 sidecars could not be written\n"
        "captioner: 3 described, in .xmp beside the photographs\n"
    )
    assert broken.read_text() == XMP[:-9]
    first = keywords(ours)
    assert first[0] == "Oma"
    assert len(first) > 1
    assert 'xmp:Rating="5"' in ours.read_text()
    assert ours.stat().st_mode & 0o777 == 0o640
    assert "Oma wird 80" in described.read_text()
    # Begun anew with other options: what captioner wrote goes, what others wrote stays.
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--overwrite", "--no-tags"]
    assert main(arguments) == 1
    assert 'xmp:Rating="5"' in ours.read_text()
    assert "Oma wird 80" in described.read_text()
    assert keywords(ours) == first
    broken.write_text(XMP)
    assert main([a for a in arguments if a != "--overwrite"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(record) for record in records] == [
        ["image", "caption", "log_prob", "captions"]
    ] * 3  # fmt: skip
    assert records[2]["caption"] in broken.read_text()


def refuse(number: int) -> Any:
    """Return what makes no file in place of what makes one."""

    def temporary(folder: str) -> tuple[str, int]:
        raise OSError(number, os.strerror(number), folder)

    return temporary


LONG = "a" * 250 + "6"
WHY = {
    "txt": {
        "1.jpg": "cannot write 1.txt: Read-only file system",
        "2.jpg": "cannot write 2.txt: Permission denied",
        "3.jpg": "cannot write 3.txt: No space left on device",
        "4.jpg": "cannot write 4.txt: Is a directory",
        "5.jpg": "",
    },
    "xmp": {
        "4.jpg": "cannot merge into 4.jpg.xmp: not XML: syntax error: line 1, column 0",
        "5.jpg": "",
        f"{LONG}.jpg": f"cannot write {LONG}.jpg.xmp: File name too long",
    },
}


def captions(output: Path) -> tuple[list[str], list[str]]:
    """Return the captions and the sidecar errors in an output, where its form has them."""
    if output.suffix == ".csv":
        rows = list(csv.DictReader(output.read_text("utf-8-sig").splitlines()))
        assert {row["error"] for row in rows} == {""}
        return [row["caption"] for row in rows], [row["sidecar_error"] for row in rows]
    if output.suffix == ".json":
        return [entry["caption"] for entry in json.loads(output.read_text())], []
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record["caption"] and record["tags"] is not None for record in records)
    return [r["caption"] for r in records], [r.get("sidecar_error", "") for r in records]


@pytest.mark.parametrize("kind", WHY)
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
def test_a_sidecar_that_cannot_be_written_costs_nothing_else(
    model: list[str], tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch,
    ending: str, kind: str,
) -> None:  # fmt: skip
    folder, output = tmp_path / "p", tmp_path / f"out{ending}"
    folder.mkdir()
    for name in WHY[kind]:
        draw_picture(folder / name, "red")
    (folder / "4.txt").mkdir()
    (folder / "4.jpg.xmp").write_text("mine")
    numbers = {"1.txt": errno.EROFS, "2.txt": errno.EACCES, "3.txt": errno.ENOSPC}
    replace = room._replace

    def replace_or_refuse(path: str, content: bytes, careful: bool) -> None:
        if number := numbers.get(os.path.basename(path)):
            raise OSError(number, os.strerror(number), path)
        replace(path, content, careful)

    monkeypatch.setattr(room, "_replace", replace_or_refuse)
    arguments = ["caption", str(folder), "--output", str(output), "--sidecar", kind, *model]
    assert main(arguments) == 1
    expected = [WHY[kind][name] for name in sorted(WHY[kind])]
    failed = len([why for why in expected if why])
    note = f"captioner: {failed} sidecars could not be written\ncaptioner: "
    where, count = f"in {output}, .{kind} beside the photographs\n", len(expected)
    assert capsysbinary.readouterr().err.decode() == f"{note}{count} described, {where}"
    texts, errors = captions(output)
    assert all(texts)
    assert len(texts) == len(expected)
    assert errors == ([] if ending == ".json" else expected)
    # The same command tries again and describes nothing anew, also when the cause is gone.
    monkeypatch.setattr("captioner.inference.Captioner.encode", None)
    assert main(arguments) == 1
    said = capsysbinary.readouterr().err.decode()
    assert said == f"{note}{count} done before, 0 described, {where}"
    numbers.clear()
    (folder / "4.txt").rmdir()
    (folder / "4.jpg.xmp").unlink()
    assert main(arguments) == (1 if kind == "xmp" else 0)  # the long name stays too long
    left = [why if LONG in why else "" for why in expected]
    assert captions(output) == (texts, [] if ending == ".json" else left)
    for name, text, why in zip(sorted(WHY[kind]), texts, left, strict=True):
        assert why or text in Path(sidecar_path(str(folder / name), kind)).read_text()


def test_a_folder_that_takes_no_file_is_said_before_any_work(
    model: list[str], tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("open", *(f"closed{number}" for number in range(7))):
        (tmp_path / "p" / folder).mkdir(parents=True)
        draw_picture(tmp_path / "p" / folder / "x.png", "red")
    make, refused = room._temporary, refuse(errno.EROFS)
    monkeypatch.setattr(
        room, "_temporary", lambda folder: (refused if "closed" in folder else make)(folder)
    )
    monkeypatch.chdir(tmp_path)
    closed = [f"p/closed{number} (Read-only file system)" for number in range(7)]
    arguments = ["caption", "p", "--sidecar", "txt", "--model"]
    # Before the model is even looked for.
    assert main([*arguments, "nowhere"]) == 2
    said, _ = capsysbinary.readouterr().err.decode().splitlines()
    first = f"--sidecar txt: no file can be made in {'; '.join(closed[:5])}; and 2 more"
    assert said == f"captioner: {first}"
    assert main([*arguments, model[1]]) == 1
    assert (tmp_path / "p" / "open" / "x.txt").read_text()
    capsysbinary.readouterr()
    # Nothing at all could come of it.
    assert main([*arguments, "nowhere", "--exclude", "open"]) == 2
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: files and folders passed over by --exclude: 1",
        f"captioner: {first}; --output FILE keeps records elsewhere",
    ]


def test_a_full_disk_ends_a_run_that_has_only_sidecars(
    model: list[str], tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        draw_picture(tmp_path / f"{name}.png", "red")
    monkeypatch.setattr(room, "_replace", lambda path, *_, **__: refuse(errno.ENOSPC)(path))
    assert main(["caption", str(tmp_path), "--sidecar", "txt", *model]) == 1
    said = capsysbinary.readouterr().err.decode()
    assert "No space left on device" in said
    assert said.count("\n") == 1


def test_photographs_of_one_stem(
    model: list[str], tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for name in [f"{number}.{ending}" for number in range(7) for ending in ("jpg", "png")]:
        draw_picture(tmp_path / "p" / name, "red")
    draw_picture(tmp_path / "p" / "8.png", "red")
    arguments = ["caption", "p", "--sidecar", "txt", *model]
    assert main(arguments) == 2
    pairs = [f"p/{n}.jpg and p/{n}.png have the same sidecar, p/{n}.txt" for n in range(5)]
    assert capsysbinary.readouterr().err.decode() == (
        f"captioner: {'; '.join(pairs)}; and 2 more; --full-names writes a.jpg.txt in place of "
        "a.txt, --exclude GLOB passes some over\n"
    )
    assert list(Path("p").glob("*.txt")) == []
    assert main([*arguments, "--exclude", "[0-7].png"]) == 0
    assert sorted(path.name for path in Path("p").glob("*.txt")) == [
        "0.txt", "1.txt", "2.txt", "3.txt", "4.txt", "5.txt", "6.txt", "8.txt",
    ]  # fmt: skip
    assert main([*arguments, "--full-names"]) == 0
    names = {f"{path.name}.txt" for path in Path("p").iterdir() if path.suffix in {".jpg", ".png"}}
    assert len(names & {path.name for path in Path("p").iterdir()}) == 15


def test_folders_that_take_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    images = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "file/c.jpg", "gone/d.jpg")]
    assert closed_folders(images) == {
        str(tmp_path / "file"): "Not a directory",
        str(tmp_path / "gone"): "No such file or directory",
    }
    assert os.listdir(tmp_path) == ["file"]
    # What a killed run left is taken away, but not what another one may be writing now.
    old, new = (tmp_path / f".captioner-{digit * 16}.tmp" for digit in "0f")
    for path in (old, new):
        path.touch()
    os.utime(old, (1e9, 1e9))
    assert closed_folders(images[:1]) == {}
    assert sorted(os.listdir(tmp_path)) == [new.name, "file"]


def test_sidecar_places() -> None:
    assert sidecar_path("a.b/dog.jpg", "txt") == "a.b/dog.txt"
    assert sidecar_path("a.b/dog", "caption") == "a.b/dog.caption"
    assert sidecar_path("a.b/dog.jpg", "xmp") == "a.b/dog.jpg.xmp"
    assert sidecar_path("a.b/dog.jpg", "txt", full_name=True) == "a.b/dog.jpg.txt"
