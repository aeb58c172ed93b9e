"""Files written whole or not at all, locks where there are some, messages that are only text."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from captioner import console, files
from captioner.files import Notice, as_json, check_replaceable, locked, remove_leftovers, replacing
from captioner.folder.journal import Journal
from conftest import draw_picture


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a notice that is made once in a process be made again."""
    monkeypatch.setattr(files, "_told", set())


def test_of_two_runs_one_waits(tmp_path: Path) -> None:
    code = (
        "import sys, time; from captioner.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(0.5); print('freed')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    waited: list[bool] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with locked(str(tmp_path / "lock"), lambda: waited.append(True)) as held:
            assert held
            assert process.stdout.read() == b"freed\n"
    assert waited == [True]


def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from captioner.files import locked\n"
        "with locked(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    with locked(str(tmp_path / "lock"), lambda: pytest.fail("it is free")) as held:
        assert held


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_without_locks_it_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in ("a", "a", "b"):
            with locked(str(tmp_path / name)) as held:
                assert not held
        with Journal(str(tmp_path / "j"), {}) as journal:
            assert not journal.alone
    assert len(said) == 1
    assert said[0].category is Notice
    assert str(said[0].message).startswith(f"{tmp_path}: no locks here (")


def test_a_lock_that_cannot_be_made_names_itself(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "lock")
    with pytest.raises(FileExistsError) as caught, locked(place):
        pytest.fail("there is no folder for it")
    assert caught.value.filename == place


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    target = tmp_path / "x"
    code = (
        "import os, signal, sys; from captioner.files import replacing\n"
        "with replacing(sys.argv[1]) as file: os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    old, young = (path for path in tmp_path.iterdir())
    hours_ago = time.time() - 7200.0
    os.utime(old, (hours_ago, hours_ago))
    (tmp_path / ".captioner-of-another.tmp").touch()
    with replacing(str(target)) as file:
        file.write(b"whole")
    assert set(tmp_path.iterdir()) == {target, young, tmp_path / ".captioner-of-another.tmp"}
    remove_leftovers(str(target))
    assert set(tmp_path.iterdir()) == {target, tmp_path / ".captioner-of-another.tmp"}


def test_two_that_replace_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250)
    with replacing(str(target)) as first:
        first.write(b"first")
        check_replaceable(str(target))
        with replacing(str(target)) as second:
            second.write(b"second")
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    monkeypatch.setattr(files, "token_hex", lambda _: "0")
    with replacing(str(tmp_path / "x")):
        (planted,) = (path for path in tmp_path.iterdir() if path != diary)
    planted.symlink_to(diary)
    with pytest.raises(FileExistsError), replacing(str(tmp_path / "x")) as file:
        file.write(b"rubbish")
    assert diary.read_text() == "dear diary"
    assert planted.is_symlink()


# What there is on POSIX alone, of the modules of Python's own library.
HIDDEN = """
import sys
class Hidden:
    names = {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog", "readline"}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
for name in Hidden.names:
    sys.modules.pop(name, None)
"""


def test_no_module_needs_posix_to_be_imported() -> None:
    """All locks are those of ``files.locked``, and what limits a process is asked for in it."""
    hidden = "|".join(re.findall(r'"(\w+)"', HIDDEN))
    pattern = re.compile(rf"^(?:import|from) (?:{hidden})\b", re.MULTILINE)
    modules = Path(files.__file__).parent.rglob("*.py")
    assert [path.name for path in modules if pattern.search(path.read_text())] == []


def test_a_photograph_is_captioned_without_posix(tmp_path: Path) -> None:
    photograph = draw_picture(tmp_path / "x.jpg", "red")
    code = HIDDEN + (
        "import captioner\n"
        "from captioner.folder import FolderRun\n"
        "model = captioner.Captioner.load(device='cpu')\n"
        "(caption,), (tags,) = model.caption(sys.argv[1:]), model.tags(sys.argv[1:])\n"
        "assert caption.text and isinstance(tags, list)\n"
        "result = FolderRun(output=sys.argv[1] + '.jsonl').run(model, sys.argv[1:])\n"
        "assert result.described == 1, result\n"
        "assert not Hidden.names & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(photograph)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no locks here (not on this platform)") == 1


def test_json_is_only_text() -> None:
    value = {"a\x1b\x9b\u202e\udce9\U000e0001é": "\n"}
    line = as_json(value)
    assert line.decode().isprintable()
    assert json.loads(line) == value
    assert line == b'{"a\\u001b\\u009b\\u202e\\udce9\\udb40\\udc01\xc3\xa9": "\\n"}'


def test_messages_are_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("captioner", "a\x1b[2J\n\x9b.jpg is \u202e gone")
    with pytest.raises(SystemExit):
        console.Parser(prog="captioner").parse_args(["--\x1b[2J"])
    with console.shown_notices("captioner"):
        warnings.warn("b\x07", Notice, stacklevel=1)
    with console.shown_notices("captioner", quiet=True):
        warnings.warn("not shown", Notice, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == [
        "captioner: a\\x1b[2J\\n\\x9b.jpg is \\u202e gone",
        "usage: captioner [-h]",
        "captioner: error: unrecognized arguments: --\\x1b[2J",
        "captioner: b\\x07",
    ]
