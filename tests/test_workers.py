"""Photographs are read in processes that may crash, hang or never start."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from captioner.files import Notice
from captioner.photos import workers
from captioner.photos.images import UnreadableError
from captioner.photos.workers import DecodingError, Found, read_ahead


def read(path: str) -> bytes:
    """Read what a name says, or end as it says."""
    if "crash" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in path:
        os._exit(3)
    if "hang" in path:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        time.sleep(1000)
    if "bad" in path:
        raise UnreadableError(f"cannot read {path}")
    return f"{os.getpid()} {path}".encode("utf-8", "surrogateescape")


def results(paths: Iterable[str], workers: int = 2, timeout: float = 20.0) -> list[str]:
    found = read_ahead(read, map(Found, paths), workers, 8, timeout)
    return [
        str(r) if isinstance(r, UnreadableError) else os.fsdecode(r).split(maxsplit=1)[1]
        for _, r in found
    ]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_order() -> None:
    paths = [f"{i}\n\udce9.jpg" for i in range(100)]
    assert results(paths) == paths


def test_what_crashes_or_hangs_costs_itself() -> None:
    paths = [f"{i}{word}" for i in range(6) for word in ("", "crash", "bad", "exit", "hang")]
    started = time.monotonic()
    found = dict(zip(paths, results(paths, workers=3, timeout=0.5), strict=True))
    assert time.monotonic() - started < 20.0
    for path, result in found.items():
        word = path[1:]
        assert (
            result
            == {
                "": path,
                "crash": "the decoder crashed (SIGSEGV)",
                "bad": f"cannot read {path}",
                "exit": "the decoder crashed (status 3)",
                "hang": "the decoder took more than 0.5 seconds",
            }[word]
        )


def test_what_is_known_is_not_read() -> None:
    ((path, result),) = read_ahead(read, [Found("crash", "not there")], 1, 1, 1.0)
    assert (path, str(result)) == ("crash", "not there")


def test_no_process_is_left_behind() -> None:
    reading = read_ahead(read, map(Found, ["a", "b", "hang", "hang", "c"]), 2, 5, 500.0)
    pids = {int(r.split()[0]) for _, r in islice(reading, 2) if isinstance(r, bytes)}
    started = time.monotonic()
    reading.close()
    assert time.monotonic() - started < 5.0
    assert pids
    assert not any(alive(pid) for pid in pids)


def test_a_process_that_hangs_ends_without_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_workers import *\n"
        "reading = read_ahead(read, [Found('a'), Found('hang')], 1, 1, 1.0)\n"
        "print(next(reading)[1].split()[0].decode(), flush=True); next(reading)"
    )
    tests = Path(__file__).parent
    command = [sys.executable, "-c", code, str(tests), str(tests.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.3)
        process.kill()
    ended = time.monotonic() + 10.0
    while alive(pid) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_photograph_is_not_blamed_for_a_process_that_was_killed_before_it() -> None:
    reading = read_ahead(read, map(Found, ["a", "b", "c", "crash", "d"]), 1, 1, 20.0)
    pids = []
    for path in ("a", "b", "c"):
        result = next(reading)[1]
        assert isinstance(result, bytes), str(result)
        assert result.split()[1] == path.encode()
        pids.append(int(result.split()[0]))
        os.kill(pids[-1], signal.SIGKILL)  # as the system does when memory is short
        while alive(pids[-1]) and not _is_zombie(pids[-1]):
            time.sleep(0.01)
    assert len(set(pids)) == 3
    assert str(next(reading)[1]) == "the decoder crashed (SIGSEGV)"
    assert next(reading)[1].split()[1] == b"d"  # type: ignore[union-attr]


def _is_zombie(pid: int) -> bool:
    """Return whether a process has ended and its parent has yet to ask how."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


# Names of Python's own library, of what captioner may import, and of what it does import.
HOSTILE = ("multiprocessing", "random", "socket", "tempfile", "pillow_heif", "olefile", "PIL",
           "numpy", "captioner", "usercustomize")  # fmt: skip


@pytest.mark.parametrize("path", ["", ".", "here", "variable"])
def test_nothing_is_imported_from_the_current_directory(tmp_path: Path, path: str) -> None:
    """A folder of photographs may hold a file multiprocessing.py."""
    hostile = "open('ran', 'a').write(__name__)\nraise SystemExit(9)"
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(hostile)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    root = Path(__file__).parent.parent
    entry = str(tmp_path) if path == "here" else "" if path == "variable" else path
    code = (
        # What the caller imports is theirs; the directory is on the path only afterwards.
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
        "from captioner.photos.workers import Found, read_ahead\n"
        "from readers import read_small\n"
        f"sys.path.insert(0, {entry!r})\n"
        "((_, result),) = read_ahead(read_small, [Found('x.png')], 1, 1, 60.0)\n"
        "assert isinstance(result, bytes), result\n"
    )
    # Two empty entries, each the current directory: the caller passes over the variable.
    environment = os.environ | ({"PYTHONPATH": os.pathsep} if path == "variable" else {})
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_package_in_the_current_directory_is_still_found(tmp_path: Path) -> None:
    """The package is loaded from its own file, also where that lies in the current directory."""
    root = Path(__file__).parent.parent
    (tmp_path / "captioner").symlink_to(root / "captioner")
    (tmp_path / "random.py").write_text("open('ran', 'w')")
    code = (
        "import random, multiprocessing, sys; sys.path.insert(0, '')\n"
        "from captioner.photos.workers import Found, read_ahead\n"
        "from captioner.pages import thumbnail\n"
        "((_, result),) = read_ahead(thumbnail, [Found('none.jpg')], 1, 1, 60.0)\n"
        "assert str(result) == 'no such file', result\n"
    )
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_no_process_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(DecodingError, match="/bin/false failed"):
        results(["a"])


def test_too_many_open_files_are_no_process() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.dup(0)  # the lowest number that is free
    os.close(taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, limits[1]))
    try:
        with pytest.raises(DecodingError, match="could be started: Too many open files"):
            results(["a"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_posix_photographs_are_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_POSIX", False)
    with pytest.warns(Notice, match="read one at a time"):
        assert results(["a", "bad"]) == ["a", "cannot read bad"]
    found = read_ahead(read, [Found("b")], 1, 1, 1.0)
    with pytest.warns(Notice):
        ((_, answer),) = found
    assert answer == f"{os.getpid()} b".encode()
