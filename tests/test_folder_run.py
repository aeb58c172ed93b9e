"""Folder runs from Python: which photographs are the same, and what goes wrong around them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from captioner.data.vocabulary import Vocabulary
from captioner.folder import (
    FolderRun,
    RunError,
    RunResult,
    WriteError,
    describe,
    find_photographs,
)
from captioner.folder.identity import distinct
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.photos.images import UnreadableError
from captioner.photos.workers import Found
from conftest import WORDS, draw_picture


@pytest.fixture
def captioner(small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    """Return a captioner whose runs read photographs here: starting processes takes long."""

    def read_here(read: Callable[[str], bytes], photographs: Any, *_: Any) -> Iterator[Any]:
        for path, error in photographs:
            try:
                yield path, read(path) if error is None else UnreadableError(error)
            except UnreadableError as why:
                yield path, why

    monkeypatch.setattr(describe, "read_ahead", read_here)
    return Captioner(small)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three photographs, below the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("1.png", "red"), ("2.png", "green"), ("3.png", "blue")):
        draw_picture(folder / name, colour)
    return folder


RUN = FolderRun(output="out.jsonl", batch_size=2, tags=False)


def images(path: str = "out.jsonl") -> list[str]:
    return [record["image"] for record in records(path)]


def records(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_one_photograph_spelled_several_ways_is_done_once(
    captioner: Captioner, photos: Path
) -> None:
    Path("link").symlink_to(photos)
    spellings = ["photos", "./photos/", str(photos), "link", "photos/../photos/1.png"]
    assert RUN.run(captioner, spellings) == RunResult(total=3, done=3, described=3)
    assert images() == ["photos/1.png", "photos/2.png", "photos/3.png"]
    for spelling in spellings[1:4]:
        result = RUN.run(captioner, [spelling])
        assert result == RunResult(total=3, done=3, skipped=3)
    assert images() == ["photos/1.png", "photos/2.png", "photos/3.png"]


def test_a_link_to_a_photograph_is_one_of_its_own(photos: Path) -> None:
    Path("best").mkdir()
    Path("best/1.png").symlink_to(photos / "1.png")
    photographs, inodes = distinct(find_photographs(["photos", "best"]))
    assert (len(photographs), len(inodes)) == (4, 3)
    nul = [Found("a\0b.png"), Found("a\0b.png"), Found("."), Found("..")]
    assert len(distinct(nul)[0]) == 3


def test_the_same_names_in_another_folder_are_other_photographs(
    captioner: Captioner, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    draw_picture(other / "1.png", "yellow", (30, 90))
    run = replace(RUN, output=tmp_path / "out.jsonl", report=tmp_path / "out.html", sidecar="txt")
    monkeypatch.chdir(photos)
    run.run(captioner, ["."])
    first = records(str(run.output))
    monkeypatch.chdir(other)
    assert run.run(captioner, ["."]).described == 1
    assert records(str(run.output))[:3] == first
    (last,) = records(str(run.output))[3:]
    assert last["image"] == str(other / "1.png")
    (alone,) = captioner.caption([other / "1.png"])
    assert last["caption"] == alone.text != first[0]["caption"]
    assert (other / "1.txt").read_text() == f"{alone.text}\n"
    page = (tmp_path / "out.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert 'href="./photos/1.png"' in page
    assert run.run(captioner, ["1.png"]) == RunResult(total=1, done=1, skipped=1)


def test_photographs_that_were_moved_with_their_folder_keep_their_records(
    captioner: Captioner, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(RUN, output="../out.jsonl")
    monkeypatch.chdir(photos)
    run.run(captioner, ["."])
    monkeypatch.chdir(tmp_path)
    photos.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("elsewhere")
    draw_picture(Path("2.png"), "black", (50, 50))
    assert run.run(captioner, ["."]) == RunResult(total=3, done=3, skipped=2, described=1)
    assert images("../out.jsonl") == ["./1.png", "./2.png", "./3.png", f"{Path.cwd()}/2.png"]


def test_a_photograph_that_changed_is_said_and_described_again_when_told(
    captioner: Captioner, photos: Path
) -> None:
    run = replace(RUN, sidecar="txt", overwrite=False)
    run.run(captioner, ["photos"])
    before = records()
    draw_picture(photos / "2.png", "white", (20, 90))
    same = RunResult(total=3, done=3, skipped=3, changed=1)
    assert run.run(captioner, ["photos"]) == same
    assert records() == before
    again = replace(run, retry_changed=True).run(captioner, ["photos"])
    assert again.described == 1
    assert again.changed == 0
    (new,) = captioner.caption([photos / "2.png"])
    assert [r["caption"] for r in records()] == [
        before[0]["caption"], new.text, before[2]["caption"],
    ]  # fmt: skip
    assert new.text != before[1]["caption"]
    assert run.run(captioner, ["photos"]).changed == 0


def test_a_change_while_it_is_read_shows_next_time(
    captioner: Captioner, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = describe.read_photograph

    def read_and_touch(preprocessing: Any, path: str) -> bytes:
        pixels = plain(preprocessing, path)
        os.utime(path, (1e9, 1e9))
        return pixels

    monkeypatch.setattr(describe, "read_photograph", read_and_touch)
    RUN.run(captioner, ["photos"])
    assert RUN.run(captioner, ["photos"]).changed == 3


def test_a_photograph_that_is_gone_is_said_and_dropped_when_told(
    captioner: Captioner, photos: Path
) -> None:
    run = replace(RUN, report="out.html")
    run.run(captioner, ["photos", "photos/nowhere.png"])
    (photos / "1.png").unlink()
    result = run.run(captioner, ["photos"])
    assert result == RunResult(total=2, done=2, skipped=2, gone=2)
    assert len(images()) == 4
    result = replace(run, prune=True).run(captioner, ["photos"])
    assert result == RunResult(total=2, done=2, skipped=2, pruned=2)
    assert images() == ["photos/2.png", "photos/3.png"]
    assert Path("out.html").read_text().count("<article") == 2
    assert run.run(captioner, ["photos"]) == RunResult(total=2, done=2, skipped=2)
    # One that is asked for by name is there no more, which is an error.
    asked = ["photos/2.png", "photos/3.png"]
    (photos / "3.png").unlink()
    assert run.run(captioner, asked).gone == 1
    result = replace(run, prune=True).run(captioner, asked)
    assert result == RunResult(total=2, done=2, skipped=1, errors=1, pruned=1)
    assert records()[1] == {"image": "photos/3.png", "error": "no such file or folder"}
    draw_picture(photos / "3.png", "blue")
    assert run.run(captioner, asked).changed == 1


def test_what_may_be_on_an_absent_disk_is_not_dropped(captioner: Captioner, photos: Path) -> None:
    disk = Path("disk")
    disk.mkdir()
    draw_picture(disk / "4.png", "black")
    RUN.run(captioner, ["photos", "disk"])
    prune = replace(RUN, prune=True)
    disk.rename("unplugged")
    assert prune.run(captioner, ["photos"]).pruned == 0
    assert prune.run(captioner, ["photos", "disk"]).pruned == 0
    disk.mkdir()  # as a mount point is
    assert prune.run(captioner, ["photos", "disk"]).pruned == 0
    assert images() == [*(f"photos/{i}.png" for i in (1, 2, 3)), "disk/4.png", "disk"]
    draw_picture(disk / "5.png", "black")
    # With it goes the error record of the folder that was not there.
    assert prune.run(captioner, ["disk"]).pruned == 2
    assert images()[3:] == ["disk/5.png"]


def test_what_needs_a_journal_says_so(captioner: Captioner, photos: Path) -> None:
    for name in ("retry_errors", "retry_changed", "prune"):
        option: dict[str, Any] = {name: True}
        with pytest.raises(RunError, match=f"--{name.replace('_', '-')} needs --output FILE"):
            FolderRun(sidecar="txt", **option).run(captioner, ["photos"])


def test_nothing_that_is_read_is_written(captioner: Captioner, photos: Path) -> None:
    photograph = draw_picture(photos / "pic.png", "red").rename(photos / "pic.txt")
    content = photograph.read_bytes()
    model = photos / "model.jsonl"
    model.write_text("weights")
    os.link(photograph, "hard.jsonl")
    Path("soft.html").symlink_to(photograph)
    os.link(photograph, "out.jsonl.journal")
    os.link(photograph, ".a.csv.journal.lock")
    before = sorted(os.listdir(".")), sorted(os.listdir(photos))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sidecar": "txt"}, "photos/pic.txt is a photograph to read"),
        ({"output": "hard.jsonl"}, "hard.jsonl is a photograph"),
        ({"report": "soft.html"}, "soft.html is a photograph"),
        ({"output": "out.jsonl"}, "out.jsonl.journal is a photograph"),
        ({"output": "a.csv"}, ".a.csv.journal.lock is a photograph"),
        ({"output": model, "protect": [model]}, "model.jsonl is a file of the model"),
    ]
    for settings, named in cases:
        run = FolderRun(overwrite=True, **settings)
        with pytest.raises(RunError, match=named):
            run.run(captioner, ["photos", "photos/pic.txt"])
        assert photograph.read_bytes() == content
        assert (sorted(os.listdir(".")), sorted(os.listdir(photos))) == before


def test_a_journal_whose_end_was_torn_is_said(captioner: Captioner, photos: Path) -> None:
    RUN.run(captioner, ["photos"])
    whole = Path("out.jsonl").read_bytes()
    journal = Path("out.jsonl.journal")
    journal.write_bytes(journal.read_bytes()[:-5])
    result = RUN.run(captioner, ["photos"])
    assert result == RunResult(total=3, done=3, skipped=2, described=1, torn=True)
    assert Path("out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.jsonl.journal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_taken_away_ends_the_run_and_costs_nothing(
    captioner: Captioner, photos: Path, name: str, replaced: bool
) -> None:
    def take_away(result: RunResult) -> None:
        if result.done == 2:
            Path(name).rename("taken")
            if replaced:
                Path(name).write_text("of another")

    run = replace(RUN, output=name.removesuffix(".journal"))
    with pytest.raises(WriteError, match=r"No such file|another file has taken its place") as why:
        replace(run, progress=take_away).run(captioner, ["photos"])
    assert why.value.filename == name
    Path("taken").replace(name)
    # The journal has a record before the output has it.
    described = 1 if name.endswith(".journal") else 0
    assert run.run(captioner, ["photos"]) == RunResult(
        total=3, done=3, skipped=3 - described, described=described
    )
    assert Path(str(run.output)).read_text().count("photos/") == 3


def test_an_output_that_was_deleted_is_written_again(captioner: Captioner, photos: Path) -> None:
    RUN.run(captioner, ["photos"])
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    RUN.run(captioner, ["photos"])
    assert Path("out.jsonl").read_bytes() == whole


def test_a_second_run_is_refused_before_it_does_anything(
    captioner: Captioner, photos: Path
) -> None:
    run = replace(RUN, report="out.html", overwrite=True)
    seen: list[dict[str, Any]] = []

    def look() -> dict[str, Any]:
        return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}

    def run_again(result: RunResult) -> None:
        Path(".captioner-of-the-first.tmp").touch()
        before = look()
        with pytest.raises(RunError, match=r"out\.jsonl\.journal: another run is writing it"):
            run.run(captioner, ["photos"])
        assert look() == before
        seen.append(before)

    assert replace(run, progress=run_again).run(captioner, ["photos"]).described == 3
    assert [len(files) for files in seen] == [4, 4, 4, 4]
    assert Path("out.html").read_text().count("<article") == 3


def test_two_runs_on_one_set_of_sidecars(captioner: Captioner, photos: Path) -> None:
    run = FolderRun(sidecar="txt", batch_size=1)
    results = []

    def run_again(result: RunResult) -> None:
        if result.done == 1:
            results.append(run.run(captioner, ["photos"]))

    results.append(replace(run, progress=run_again).run(captioner, ["photos"]))
    assert [result.done for result in results] == [3, 3]
    texts = {path.name: path.read_text() for path in photos.glob("*.txt")}
    captions = captioner.caption(sorted(photos.glob("*.png")))
    assert texts == {f"{i}.txt": f"{caption.text}\n" for i, caption in enumerate(captions, 1)}
    assert list(photos.glob("*.tmp")) == []


def test_a_model_is_known_by_its_weights_and_words(
    captioner: Captioner, small: Checkpoint, photos: Path
) -> None:
    RUN.run(captioner, ["photos"])
    assert RUN.run(Captioner([small]), ["photos"]).skipped == 3
    words = Vocabulary([*reversed(WORDS)])
    with pytest.raises(RunError, match=r"model was the one of SHA-256 .{16}, is the one of"):
        RUN.run(Captioner(replace(small, vocabulary=words)), ["photos"])
