"""Hashes of files: never those of an earlier content, and none read more often than needed."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from captioner.training import digests
from captioner.training.digests import Digests


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by each file that is hashed."""
    names: list[str] = []

    def noting(file: object, algorithm: str) -> object:
        names.append(Path(getattr(file, "name", "")).name)
        return hashed(file, algorithm)  # type: ignore[arg-type]

    hashed = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", noting)
    return names


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock to ten seconds from now, so that the files of a test are long written."""
    monkeypatch.setattr(digests, "time_ns", lambda: time.time_ns() + 10_000_000_000)


def draw_files(folder: Path) -> list[str]:
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 5)
    return [str(folder / name) for name in "abc"]


@pytest.mark.usefixtures("later")
def test_unchanged_files_are_not_read_again(tmp_path: Path, read: list[str]) -> None:
    files, kept = draw_files(tmp_path), tmp_path / "digests.json"
    expected = [sha256(name * 5) for name in (b"a", b"b", b"c")]
    first = Digests(kept)
    assert first.of(files) == first.of(files) == expected
    first.save()
    assert Digests(kept).of(files[::-1]) == expected[::-1]
    assert sorted(read) == ["a", "b", "c"]


@pytest.mark.usefixtures("later")
def test_what_keeps_its_size_and_time_is_seen_to_be_another(tmp_path: Path) -> None:
    files, kept = draw_files(tmp_path), tmp_path / "digests.json"
    first = Digests(kept)
    first.of(files)
    first.save()
    before = os.stat(files[0])
    Path(files[0]).write_bytes(b"other")
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    moved = tmp_path / "moved"
    moved.write_bytes(b"moved")
    os.utime(moved, ns=(before.st_atime_ns, os.stat(files[1]).st_mtime_ns))
    os.replace(moved, files[1])
    assert (os.stat(files[0]).st_size, os.stat(files[0]).st_mtime_ns) == (5, before.st_mtime_ns)
    assert Digests(kept).of(files) == [sha256(b"other"), sha256(b"moved"), sha256(b"ccccc")]


def test_a_file_written_just_before_is_read_again(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may have the same size, time and inode, on a clock with coarse ticks."""
    monkeypatch.setattr(digests, "_stamp", lambda status: f"{status.st_size}")
    file, kept = draw_files(tmp_path)[0], tmp_path / "digests.json"
    first = Digests(kept)
    assert first.of([file]) == [sha256(b"aaaaa")]
    first.save()
    Path(file).write_bytes(b"other")
    assert first.of([file]) == Digests(kept).of([file]) == [sha256(b"other")]
    assert read == ["a", "a", "a"]


def test_what_cannot_be_read_has_a_reason_instead(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / "gone"), str(tmp_path), str(tmp_path / "pipe")]
    expected = ["No such file or directory", "a folder or a device", "a folder or a device"]
    assert Digests(tmp_path / "digests.json").of(paths) == expected


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "damage",
    [b"", b'{"a": "1 2', b"[3]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a": [[]], "b": 1}'],
)
def test_a_damaged_file_counts_as_empty(tmp_path: Path, damage: bytes) -> None:
    files, kept = draw_files(tmp_path), tmp_path / "digests.json"
    kept.write_bytes(damage)
    again = Digests(kept)
    assert again.of(files[:1]) == [sha256(b"aaaaa")]
    again.save()
    assert len(digests._read(kept)) == 1


@pytest.mark.usefixtures("later")
def test_nothing_is_lost_when_several_save(tmp_path: Path, read: list[str]) -> None:
    kept = tmp_path / "digests.json"
    files = [tmp_path / f"{number}" for number in range(40)]
    for file in files:
        file.write_text(file.name)

    def save(file: Path) -> None:
        ours = Digests(kept)
        ours.of([str(file)])
        ours.save()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, files))
    read.clear()
    Digests(kept).of([str(file) for file in files])
    assert read == []


@pytest.mark.usefixtures("later")
def test_names_that_are_not_utf8(tmp_path: Path, read: list[str]) -> None:
    file = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.jpg")
    Path(file).write_bytes(b"x")
    for _ in range(2):
        ours = Digests(tmp_path / "digests.json")
        assert ours.of([file]) == [sha256(b"x")]
        ours.save()
    assert len(read) == 1
