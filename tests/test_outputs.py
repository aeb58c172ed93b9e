"""What records look like where they go, and what is never overwritten."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from processes import ROOT, captioner, end, forked, start

from captioner.cli import main
from captioner.data.csv_cells import csv_text
from captioner.files import printable
from captioner.folder.outputs import csv_line, json_line
from conftest import draw_picture

Capture = pytest.CaptureFixture[bytes]
TAGS = [{"name": "dog", "score": 0.9}, {"name": "run & <hide>", "score": 0.5}]


STARTS = "=+-@\t\r\n＝＋－＠"


def cells(line: bytes, separator: str = ",") -> list[str]:
    (row,) = csv.reader(StringIO(line.decode(), newline=""), delimiter=separator)
    return row


@pytest.mark.parametrize("start", list(STARTS))
def test_no_cell_is_a_formula(start: str) -> None:
    record = {
        "image": f"{start}HYPERLINK(1).jpg", "caption": f'{start}cmd|" /C calc"!A0',
        "log_prob": -6.81, "tags": [{"name": f"{start}1", "score": 1.0}],
    }  # fmt: skip
    image, caption, log_prob, _, tags, error = cells(csv_line(record))
    assert [image, caption, tags] == [
        f"'{start}HYPERLINK(1).jpg", f"'{start}cmd|\" /C calc\"!A0", f"'{start}1",
    ]  # fmt: skip
    assert (float(log_prob), error) == (-6.81, "")


hostile = st.text("=+-@\t\r\n＝,;\"' a", max_size=12)


@settings(max_examples=500, deadline=None)
@given(hostile, hostile, st.lists(hostile, max_size=3), hostile)
@example("a;=cmd|calc!A0;.jpg", 'x;"=1+1', [";-1", "\t@x"], "'=1")
def test_no_cell_is_a_formula_wherever_a_spreadsheet_cuts(
    image: str, caption: str, names: list[str], error: str
) -> None:
    tags = [{"name": name, "score": 1.0} for name in names]
    record = {"image": image, "caption": caption, "log_prob": -1.5, "tags": tags, "error": error}
    line = csv_line(record)
    # What was written is read back to the letter.
    found = cells(line)
    assert [csv_text(cell) for cell in found] == [
        image, caption, "-1.5", "", ", ".join(names), error
    ]  # fmt: skip
    for separator in ";\t":
        # A spreadsheet that minds the quotes, and one that does not; either may trim blanks.
        rows = csv.reader(StringIO(line.decode(), newline=""), delimiter=separator)
        naive = re.split(f"[{separator}\r\n]", line.decode())
        for cell in [*(cell for row in rows for cell in row), *naive]:
            assert not cell.lstrip('" \t\r\n').startswith(tuple(STARTS)), cell


def test_csv_lines() -> None:
    record: dict[str, Any] = {"image": 'a,"b"\n.jpg', "error": "gone"}
    assert csv_line(record) == b'"a,""b""\n.jpg","","","","","gone"\r\n'
    record = {"image": "caf\udce9.jpg", "caption": "é", "log_prob": -1.0, "tags": TAGS}
    assert csv_line(record).decode() == '"caf\\udce9.jpg","é",-1.0,"","dog, run & <hide>",""\r\n'


def test_csv_file(model: list[str], photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    assert main(["caption", str(photographs), "--output", str(output), *model]) == 1
    assert output.read_bytes().startswith(b"\xef\xbb\xbfimage,")
    rows = list(csv.DictReader(output.read_text("utf-8-sig").splitlines()))
    assert list(rows[0]) == ["image", "caption", "log_prob", "confidence", "tags", "error"]
    assert [os.path.relpath(row["image"], photographs) for row in rows] == [
        "a.PNG", "b.jpg", "cut.jpg", "deep/c.webp", "empty.jpg", "one.png", "text.jpg",
    ]  # fmt: skip
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, True, False, True]
    assert all(bool(row["caption"]) != bool(row["error"]) for row in rows)


def test_json_lines_keep_names_that_are_not_utf8() -> None:
    line = json_line({"image": "caf\udce9.jpg", "caption": "é", "attention": {}})
    assert os.fsencode(json.loads(line)["image"]) == b"caf\xe9.jpg"
    assert json.loads(line) == {"image": "caf\udce9.jpg", "caption": "é"}


SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "record.schema.json").read_text()))


def test_records_are_as_their_schema_says(
    model: list[str], photographs: Path, capsysbinary: Capture
) -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    whole = (photographs / "b.jpg").read_bytes()
    large = draw_picture(photographs / "off.jpg", "red", (400, 400)).read_bytes()
    (photographs / "off.jpg").write_bytes(large[:-20])
    (photographs / "b.txt").mkdir()
    (photographs / os.fsdecode(b"caf\xe9.jpg")).write_bytes(whole)
    options = ["--beam-size", "4", "--num-captions", "3", "--sidecar", "txt", "--output", "-"]
    more = ["--min-words", "10", "--max-words", "10", "--no-repeat", "1"]
    kinds: set[str] = set()
    for command in (["caption", *options], ["caption", *more], ["tag"], ["caption", "--no-tags"]):
        assert main([*command, str(photographs), *model]) == 1
        for line in capsysbinary.readouterr().out.splitlines():
            record = json.loads(line)
            SCHEMA.validate(record)
            kinds |= record.keys()
    # This model gives no confidence; test_confidence checks records with one.
    assert kinds == SCHEMA.schema["properties"].keys() - {"confidence"}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.jpg"},
        {"caption": "a", "log_prob": -1.0, "captions": [{"text": "a", "log_prob": -1.0}]},
        {"image": "a.jpg", "error": "empty", "tags": []},
        {"image": "a.jpg", "tags": [{"name": "dog", "score": 97}]},
        {"image": "a.jpg", "caption": "a", "log_prob": -1.0},
        {"image": "a.jpg", "tags": [], "surprise": 1},
    ],
)
def test_the_schema_refuses_what_is_no_record(record: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(record)


def test_output_dash_is_json_lines(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    arguments = ["caption", str(photographs), "--output", "-", *model]
    assert main([*arguments, "--sidecar", "txt"]) == 1
    found = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert len(found) == 7
    texts = {
        path.stem: path.read_text() for path in photographs.glob("*.txt") if path.stem != "notes"
    }
    assert texts == {
        Path(r["image"]).stem: r["caption"] + "\n" for r in found
        if "caption" in r and "deep" not in r["image"]
    }  # fmt: skip


def test_null_separated_paths(
    model: list[str], tmp_path: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["new\nline.png", "plain.png"]
    for name in names:
        draw_picture(tmp_path / name, "red")
    listed = b"\0".join(os.fsencode(tmp_path / name) for name in names) + b"\0"
    for arguments in (["-0"], ["-0", "-"], ["--null", str(tmp_path / names[1])]):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(listed)))
        assert main(["caption", *arguments, *model]) == 0
        records = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
        found = [Path(record["image"]).name for record in records]
        assert sorted(found) == names
        assert (found == names) == (len(arguments[0]) == 2)


def test_a_path_given_twice_is_done_once(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    path = str(draw_picture(tmp_path / "x.png", "red"))
    assert main(["caption", path, path, *model]) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 1


def without_power(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command as one who may not read or write everything."""
    if os.geteuid() == 0:
        powers = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--inh-caps={powers}", f"--bounding-set={powers}", *command]
    return subprocess.run(command, capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv for this"
)
def test_permissions(model: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "p"
    (folder / "closed").mkdir(parents=True)
    for name in ("a.png", "closed/b.png", "c.png"):
        draw_picture(folder / name, "red")
    (folder / "c.png").chmod(0)
    (folder / "closed").chmod(0)
    command = [sys.executable, "-m", "captioner", "caption", str(folder), *model]
    try:
        done = without_power(command)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert {r["image"].removeprefix(f"{folder}/"): r.get("error") for r in records} == {
            "a.png": None,
            "c.png": "Permission denied",
            "closed": "cannot be searched: Permission denied",
        }
        assert done.returncode == 1
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        done = without_power([*command, "--output", str(folder / "out.jsonl")])
        assert done.returncode == 2
        assert done.stderr.decode() == (
            f"captioner: cannot write {folder}/out.jsonl.journal: Permission denied\n"
        )
        done = without_power([*command, "--sidecar", "txt"])
        closed = f"--sidecar txt: no file can be made in {folder} (Permission denied)"
        assert (done.returncode, done.stderr.decode()) == (
            2, f"captioner: {closed}; --output FILE keeps records elsewhere\n"
        )  # fmt: skip
        output = tmp_path / "out.jsonl"
        done = without_power([*command, "--sidecar", "txt", "--output", str(output)])
        first, *rest = done.stderr.decode().splitlines()
        assert (done.returncode, first) == (1, f"captioner: {closed}")
        assert rest[-3:] == [
            "captioner: 1 sidecars could not be written",
            "captioner: 2 of 3 could not be read",
            f"captioner: 1 described, in {output}",
        ]
        record = json.loads(output.read_text().splitlines()[0])
        assert record["sidecar_error"] == "cannot write a.txt: Permission denied"
        assert record["caption"]
    finally:
        for place in (folder, folder / "closed"):
            place.chmod(stat.S_IRWXU)


def with_little_room(command: list[str]) -> None:
    """Be the command line, and write no file larger than 4 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    captioner(command)


def test_a_disk_that_fills_up(model: list[str], photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = ["caption", str(photographs), *model, "--batch-size", "2", "--output", str(output)]
    said = f"captioner: cannot write any further: [Errno 27] File too large: '{output}.journal'\n"
    assert forked(with_little_room, command) == (1, said)
    kept = output.read_bytes()
    assert kept.endswith(b"}\n")
    assert main(command) == 1
    assert output.read_bytes().startswith(kept)
    assert len(output.read_bytes().splitlines()) == 7


def test_an_output_that_is_gone(model: list[str], photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for index in range(200):
        draw_picture(photographs / f"more{index}.png", "red")
    command = ["caption", str(photographs), *model]
    command += ["--batch-size", "1", "--output", str(folder / "x.jsonl")]
    process = start(tmp_path / "said", captioner, command)
    while not ((folder / "x.jsonl").exists() and (folder / "x.jsonl").stat().st_size > 500):
        time.sleep(0.005)
    folder.rename(tmp_path / "elsewhere")
    ended = end(process, tmp_path / "said")
    assert ended.status == 1
    assert ended.said.startswith("captioner: cannot write any further: ")
    assert ended.said.count("\n") == 1
    assert (tmp_path / "elsewhere" / "x.jsonl.journal").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("seed", range(6))
def test_any_paths_and_options(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture, seed: int
) -> None:
    """Whatever is asked, the end is a status and lines, no traceback, and nothing is lost."""
    random = Random(seed)
    os.mkfifo(photographs / "pipe.jpg")
    (photographs / "loop.jpg").symlink_to("loop.jpg")
    (photographs / "gone.jpg").symlink_to("nowhere")
    (photographs / "folder.jpg").mkdir()
    (photographs / os.fsdecode(b"\xff\xfe =1+1.png")).write_bytes(b"x")
    paths = [str(photographs), str(photographs / "loop.jpg"), "nowhere", "/dev/null", "", "a" * 300,
             str(photographs / "folder.jpg"), str(photographs / "b.jpg"), "-x.jpg"]  # fmt: skip
    options = [["--output", str(tmp_path / f"o{e}")] for e in (".jsonl", ".csv", ".json", ".txt")]
    options += [["--output", "-"], ["--output", "/proc/x.jsonl"], ["--sidecar", "xmp"],
                ["--sidecar", "txt"], ["--overwrite"], ["--retry-errors"], ["--quiet"],
                ["--batch-size", "1"], ["--workers", "3"], ["--decode-timeout", "5"],
                ["--report", str(tmp_path / "o.html")], ["--report", "/proc/o.html"]]  # fmt: skip
    for _ in range(3):
        command = [random.choice(["caption", "tag"])]
        for option in random.sample(options, random.randrange(4)):
            command += option
        command += [*model, "--", *random.sample(paths, random.randrange(1, 4))]
        try:
            status = main(command)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsysbinary.readouterr()
        assert status in {0, 1, 2}, err
        assert b"Traceback" not in err
        assert status != 2 or out == b""
        assert all("image" in json.loads(line) for line in out.splitlines())
        for journal in tmp_path.glob("*.journal"):
            images = [json.loads(line).get("image") for line in journal.read_bytes().splitlines()]
            kept = [image for image in images if image is not None]
            assert len(kept) - len(set(kept)) <= kept.count("") + 20 * ("--retry-errors" in command)


def test_nothing_acts_on_a_terminal() -> None:
    assert printable("a\x1b\u202eé") == "a\\x1b\\u202eé"
