"""The journal: whole lines or none, whatever happens, and no run continued as another."""

from __future__ import annotations

import os
import resource
from io import FileIO
from pathlib import Path
from random import Random

import pytest

from captioner.files import Record, append, replacing
from captioner.folder.journal import Journal, JournalError

SETTINGS = {"model": "m", "beam_size": 3}
IMAGES = ["b.jpg", "a\n.jpg", "caf\udce9.jpg", "\u00fc.jpg"]
RECORDS: list[Record] = [
    {"image": image, **({"error": "broken"} if index == 2 else {"caption": f"a {image}"})}
    for index, image in enumerate(IMAGES)
]


def write(path: Path, records: list[Record], images: list[str] = IMAGES) -> None:
    with Journal(str(path), SETTINGS) as journal:
        journal.add(images)
        for record in records:
            journal.write(record)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS[:3])
    with Journal(str(path), SETTINGS) as journal:
        assert journal.photographs == IMAGES
        assert list(journal.records()) == RECORDS[:3]
        assert journal.done == set(IMAGES[:3])
        assert journal.errors == {IMAGES[2]}
        assert not journal.reordered


def test_cut_off_anywhere_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(str(path), SETTINGS) as journal:
            kept = list(journal.records())
            assert kept == RECORDS[: max(sum(end <= cut for end in ends) - 2, 0)]
        write(path, RECORDS[len(kept) :])
        assert path.read_bytes() == whole


def test_rubbish_after_a_power_failure_is_cut_off(tmp_path: Path) -> None:
    path, random = tmp_path / "j", Random(0)
    write(path, RECORDS[:2])
    whole = path.read_bytes()
    for length in range(1, 60):
        path.write_bytes(whole + (bytes(length) if length % 2 else random.randbytes(length)))
        write(path, [])
        assert path.read_bytes() == whole


def test_a_later_record_takes_the_place_of_an_earlier(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    again = {"image": IMAGES[2], "caption": "now"}
    with Journal(str(path), SETTINGS) as journal:
        journal.write(again)
        assert journal.reordered
        assert journal.errors == set()
    with Journal(str(path), SETTINGS) as journal:
        assert list(journal.records()) == [*RECORDS[:2], again, RECORDS[3]]
        journal.add(["new.jpg", *IMAGES])
        assert journal.photographs == [*IMAGES, "new.jpg"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="beam_size was 3, is 4; continue it as it was, or"):
        Journal(str(path), {**SETTINGS, "beam_size": 4})
    with pytest.raises(JournalError, match="tags was None, is True"):
        Journal(str(path), {**SETTINGS, "tags": True})
    with Journal(str(path), SETTINGS), pytest.raises(JournalError, match="another run is writing"):
        Journal(str(path), SETTINGS, overwrite=True)
    assert path.read_bytes() == before
    with Journal(str(path), {}, overwrite=True) as journal:
        assert journal.photographs == []


@pytest.mark.parametrize("content", [b"my diary", b"my\ndiary\n", b"{}\n", b"\0\0"])
def test_a_file_of_someone_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="not a journal of captioner's"):
        Journal(str(path), SETTINGS)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(str(path), SETTINGS) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 70, hard))
        try:
            with pytest.raises(OSError, match="too large"):  # as if the disk were full
                list(map(journal.write, RECORDS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes().endswith(b"}\n")
    with Journal(str(path), SETTINGS) as journal:
        kept = list(journal.records())
        assert 0 < len(kept) < len(RECORDS)
        assert kept == RECORDS[: len(kept)]


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before")
    (tmp_path / "link").symlink_to(path)

    def fail() -> None:
        with replacing(str(path)) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"before"
    with replacing(str(tmp_path / "link")) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert sorted(os.listdir(tmp_path)) == ["f", "link"]


def test_append_says_where(tmp_path: Path) -> None:
    with FileIO(tmp_path / "f", "a+") as file:
        assert [append(file, b"one\n"), append(file, b"two\n")] == [0, 4]
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"
