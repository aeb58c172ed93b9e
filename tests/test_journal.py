"""The journal: whole lines or none, whatever happens, and no run continued as another."""

from __future__ import annotations

import os
import resource
from io import FileIO
from pathlib import Path
from random import Random

import pytest

from captioner.files import Record, append, replacing
from captioner.folder.journal import Journal, JournalError, Stamp, _line, _tail

SETTINGS = {"model": "m", "beam_size": 3}
IMAGES = ["b.jpg", "a\n.jpg", "caf\udce9.jpg", "\u00fc.jpg"]
PLACES = {image: f"/photos/{image}" for image in IMAGES}
STAMP = Stamp(1204, 1_700_000_000_123_456_789)
RECORDS: list[Record] = [
    {"image": image, **({"error": "broken"} if index == 2 else {"caption": f"a {image}"})}
    for index, image in enumerate(IMAGES)
]


def write(path: Path, records: list[Record]) -> None:
    with Journal(str(path), SETTINGS) as journal:
        journal.add(PLACES)
        for record in records:
            journal.write(record, STAMP)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS[:3])
    with Journal(str(path), SETTINGS) as journal:
        assert journal.photographs == PLACES
        assert list(journal.photographs) == IMAGES
        assert [journal.stamp(image) for image in IMAGES] == [STAMP, STAMP, STAMP, None]
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
            assert journal.torn == cut - max([0, *(end for end in ends if end <= cut)])
        write(path, RECORDS[len(kept) :])
        assert path.read_bytes() == whole


def test_a_torn_last_line_is_cut_off_and_other_rubbish_is_refused(tmp_path: Path) -> None:
    path, random = tmp_path / "j", Random(0)
    write(path, RECORDS[:2])
    whole = path.read_bytes()
    for length in range(1, 60):
        rubbish = bytes(length) if length % 2 else random.randbytes(length)
        path.write_bytes(whole + rubbish)
        if b"\n" in rubbish:
            with pytest.raises(JournalError, match="line 5 is damaged"):
                Journal(str(path), SETTINGS)
            assert path.read_bytes() == whole + rubbish
        else:
            with Journal(str(path), SETTINGS) as journal:
                assert journal.torn == length
            assert path.read_bytes() == whole


def test_no_flipped_bit_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    whole = path.read_bytes()
    last = 8 * len(whole) - 8
    for bit in {*range(0, last, 13), *range(last)[-40:]}:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(JournalError, match=r"j: (line . is damaged|not a journal|begun by an)"):
            Journal(str(path), SETTINGS)
        assert path.read_bytes() == flipped
    # Only a line without its end looks as if it had been cut off.
    for bit in range(8):
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1 << bit]))
        with Journal(str(path), SETTINGS) as journal:
            assert list(journal.records()) == RECORDS[:-1]
            assert journal.torn > 0


def test_what_no_run_wrote_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    record = {**RECORDS[0], "path": "/x", "stamp": None}
    for entry in (
        {"photographs": {"a": "/a"}}, {"photographs": [["a"]]}, {"photographs": ["ab"]},
        {"dropped": [3]}, {"image": 3, "path": "/a", "stamp": None}, {**record, "path": None},
        {**record, "stamp": "now"}, {**record, "stamp": [1]}, {**record, "caption": ["a"]},
        {**record, "log_prob": "0"}, {**record, "captions": ["a"]}, {**record, "captions": 3},
        {**record, "tags": [{"name": 3, "score": 1.0}]}, {**record, "tags": [{"name": "dog"}]},
        {**record, "error": None}, {**record, "attention": {"words": "a", "weights": []}}, {},
    ):  # fmt: skip
        write(path, RECORDS[:1])
        with path.open("ab") as file:
            file.write(_line(entry) if entry else b"[3]\n")
        with pytest.raises(JournalError, match="j: line 4 is damaged"):
            Journal(str(path), SETTINGS)
        path.unlink()
    write(path, [])
    nested = b'{"image": ' + b"[" * 200_000
    with path.open("ab") as file:
        file.write(nested + _tail(nested))
    with pytest.raises(JournalError, match=r"line 3 is damaged .*nested too deeply"):
        Journal(str(path), SETTINGS)
    path.write_bytes(_line({"format": "captioner journal 2", "settings": [3]}))
    with pytest.raises(JournalError, match=r"line 1 is damaged .*begin anew with --overwrite"):
        Journal(str(path), SETTINGS)
    path.write_bytes(b'{"format": "captioner journal 1", "settings": {}}\n')
    with pytest.raises(JournalError, match="another version of captioner"):
        Journal(str(path), SETTINGS)


def test_a_run_continues_without_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    lines = path.read_bytes().splitlines(keepends=True)
    for taken_out in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:taken_out] + lines[taken_out + 1 :]))
        with Journal(str(path), SETTINGS) as journal:
            kept = [r for i, r in enumerate(RECORDS) if i != taken_out - 2]
            assert list(journal.records()) == kept
            assert journal.photographs == PLACES


def test_what_is_dropped_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, RECORDS)
    with Journal(str(path), SETTINGS) as journal:
        journal.drop(IMAGES[1:3])
        assert journal.errors == set()
    with Journal(str(path), SETTINGS) as journal:
        assert list(journal.records()) == [RECORDS[0], RECORDS[3]]
        assert list(journal.photographs) == [IMAGES[0], IMAGES[3]]
        journal.add({IMAGES[0]: "/moved"})
    with Journal(str(path), SETTINGS) as journal:
        assert journal.photographs == {IMAGES[0]: "/moved", IMAGES[3]: PLACES[IMAGES[3]]}
        assert journal.done == {IMAGES[0], IMAGES[3]}


def test_a_journal_that_is_gone_is_said(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for replace in (False, True):
        with Journal(str(path), SETTINGS, overwrite=True) as journal:
            journal.add(PLACES)
            path.unlink()
            if replace:
                path.write_text("another")
            with pytest.raises(OSError, match=r"No such file|another file has taken its place"):
                journal.write(RECORDS[0])
        path.unlink(missing_ok=True)


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
        journal.add({"new.jpg": "/new.jpg", **PLACES})
        assert list(journal.photographs) == [*IMAGES, "new.jpg"]


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
        assert journal.photographs == {}


@pytest.mark.parametrize("content", [b"my diary", b"my\ndiary\n", b"{}\n", b"\0\0"])
def test_a_file_of_someone_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(JournalError, match="not a journal of captioner's"):
            Journal(str(path), SETTINGS, overwrite)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(str(path), SETTINGS) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, hard))
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
