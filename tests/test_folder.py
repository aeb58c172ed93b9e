"""Folder runs: killed at any moment, continued, refused, and never in each other's way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from processes import captioner, end, start

from captioner.cli import main
from captioner.folder import FolderRun, RunError, RunResult, describe_folder
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from conftest import draw_picture

# More of them for a long night.
KILLS = int(os.environ.get("CAPTIONER_KILLS", "18"))

# Runs go on side by side here: threads of one would wait for those of another.
pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[bytes]


class Forks:
    """Runs the command line, or a function, in a warm process that may be killed."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(
        self, arguments: list[str] | dict[str, Any], kill_after: float | None = None
    ) -> int | None:
        """Return the exit status, or the errors of a run from Python; -9 if it was killed."""
        self.log.unlink(missing_ok=True)
        run = captioner if isinstance(arguments, list) else library
        process = start(self.log, run, arguments)
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        return end(process, self.log).status


def library(settings: dict[str, Any]) -> None:
    """Be a program that describes a folder from Python; its status is the number of errors."""
    found = Captioner.load(settings.pop("model"), device="cpu", precision="float32")
    paths = settings.pop("paths")
    sys.exit(FolderRun(workers=2, batch_size=4, **settings).run(found, paths).errors)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    forks = Forks(tmp_path_factory.mktemp("forks") / "said")
    forks(["--version"])  # what comes first waits for torch, and these tests look at the clock
    return forks


@pytest.fixture(scope="module")
def model(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that name a model so small that the run is what takes time."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(small, path)
    return ["--model", str(path), "--precision", "float32"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 photographs, a few of them broken."""
    folder, random = tmp_path_factory.mktemp("many"), Random(1)
    for index in range(60):
        path = folder / f"{index:03}.jpg"
        colour = f"#{random.randrange(1 << 24):06x}"
        draw_picture(path, colour, (random.randrange(30, 300), random.randrange(30, 300)))
        if index % 11 == 5:
            path.write_bytes(path.read_bytes()[: 10 * index])
    return folder


@pytest.fixture
def very_many(many: Path, tmp_path: Path) -> Path:
    """Return a folder of 240: a run on it is not over before a test has seen it begin."""
    folder = tmp_path / "very-many"
    folder.mkdir()
    for copy in range(4):
        for path in many.iterdir():
            os.link(path, folder / f"{copy:02}{path.name}")
    return folder


def command(folder: Path, output: Path, model: list[str], *more: str) -> list[str]:
    return ["caption", str(folder), "--output", str(output), "--batch-size", "4", *more, *model]


def killed_at_random(
    forks: Forks,
    arguments: list[str] | dict[str, Any],
    seconds: float,
    random: Random,
    end: int = 1,
) -> int:
    """Run a command again and again until it is done; return how often it was killed."""
    kills = 0
    while True:
        # After some kills it is left in peace, or a slow machine would never be done.
        after = random.uniform(0.0, seconds) if kills < 8 else None
        status = forks(arguments, after)
        if status != -signal.SIGKILL:
            assert status == end, forks.log.read_text()
            return kills
        kills += 1


def written(output: Path) -> list[Any]:
    """Return what stands in an output: its lines, or the rows of its tables."""
    if output.suffix != ".sqlite":
        return output.read_bytes().splitlines(keepends=True)
    with closing(sqlite3.connect(output)) as connection:
        tables = ("photographs", "captions", "tags", "texts")
        rows = [connection.execute(f"SELECT * FROM {t} ORDER BY 1, 2").fetchall() for t in tables]
    return [row for table in rows for row in table]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json", ".sqlite"])
def test_killed_at_random_moments(
    forks: Forks, model: list[str], many: Path, tmp_path: Path, ending: str
) -> None:
    whole = tmp_path / f"whole{ending}"
    started = time.monotonic()
    assert forks(command(many, whole, model)) == 1, forks.log.read_text()
    seconds = time.monotonic() - started
    assert len(set(written(whole))) > 40
    random, kills, round_ = Random(ending), 0, 0
    while kills < KILLS / 3:
        output = tmp_path / f"{round_}{ending}"
        round_ += 1
        kills += killed_at_random(forks, command(many, output, model), seconds, random)
        assert written(output) == written(whole)
    assert list(tmp_path.glob("*.tmp")) == list(tmp_path.glob("*.sqlite-*")) == []


@pytest.mark.slow
def test_killed_with_sidecars(forks: Forks, model: list[str], many: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(many, folder)
    arguments = ["caption", str(folder), "--sidecar", "txt", "--batch-size", "4", *model]
    started = time.monotonic()
    assert forks(arguments) == 1
    seconds = time.monotonic() - started
    whole = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    for path in folder.glob("*.txt"):
        path.unlink()
    killed_at_random(forks, arguments, seconds, Random(2))
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == whole


@pytest.mark.slow
def test_a_run_from_python_is_killed_and_continued(
    forks: Forks, model: list[str], many: Path, tmp_path: Path
) -> None:
    def outputs(folder: Path) -> dict[str, Any]:
        places = {"output": str(folder / "out.jsonl"), "report": str(folder / "out.html")}
        return {"model": model[1], "paths": [str(many)], **places}

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    started = time.monotonic()
    assert forks(outputs(tmp_path / "whole")) == 5, forks.log.read_text()
    seconds = time.monotonic() - started
    assert killed_at_random(forks, outputs(tmp_path / "killed"), seconds, Random(3), 5) > 0
    for name in ("out.jsonl", "out.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    images = [record["image"] for record in lines(tmp_path / "killed" / "out.jsonl")]
    assert images == [str(path) for path in sorted(many.iterdir())]


def test_a_run_from_python_counts(model: list[str], many: Path, tmp_path: Path) -> None:
    captioner = Captioner.load(model[1], device="cpu", precision="float32")
    told: list[int] = []
    run = FolderRun(
        output=tmp_path / "out.jsonl", tags=False, batch_size=16,
        progress=lambda result: told.append(result.done),
    )  # fmt: skip
    first = run.run(captioner, [many / "000.jpg", many / "005.jpg"])
    assert first == RunResult(total=2, done=2, described=1, errors=1)
    assert run.run(captioner, [many]) == RunResult(
        total=60, done=60, skipped=2, described=54, errors=5
    )
    assert told == [0, 1, 2, *range(2, 61)]
    again = replace(run, retry_errors=True).run(captioner, [str(many)], SearchOptions())
    assert again == RunResult(total=60, done=60, skipped=55, errors=5)
    assert FolderRun(sidecar="txt").run(lambda: pytest.fail("it is not loaded"), []).total == 0
    with pytest.raises(RunError, match="beam_size was 3, is 2"):
        run.run(captioner, [many], SearchOptions(beam_size=2))
    with pytest.raises(RunError, match=r"must end in \.jsonl"):
        FolderRun(output="x.txt").run(captioner, [many])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(arguments: list[str], capture: Capture) -> tuple[int, str]:
    """Return the exit status and what was said."""
    status = main(arguments)
    return status, capture.readouterr().err.decode()


def test_a_complete_run_is_left_as_it_is(
    model: list[str], many: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = command(many, output, model)
    assert run(arguments, capsysbinary)[0] == 1
    before = output.read_bytes(), Path(f"{output}.journal").read_bytes()
    assert run(arguments, capsysbinary) == (
        1,
        "captioner: 5 of 60 could not be read\n"
        f"captioner: 60 done before, 0 described, in {output}\n",
    )
    assert (output.read_bytes(), Path(f"{output}.journal").read_bytes()) == before
    output.unlink()
    assert run([*arguments, "--quiet"], capsysbinary) == (1, "")
    assert output.read_bytes() == before[0]


def test_what_was_added_comes_at_the_end(
    model: list[str], many: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out.jsonl"
    shutil.copytree(many, folder)
    assert main(command(folder, output, model)) == 1
    first = output.read_bytes()
    shutil.copy(many / "007.jpg", folder / "000-new.jpg")
    shutil.copy(many / "009.jpg", folder / "zzz.jpg")
    assert main(command(folder, output, model)) == 1
    assert output.read_bytes().startswith(first)
    new = [Path(record["image"]).name for record in lines(output)[60:]]
    assert new == ["000-new.jpg", "zzz.jpg"]


def test_errors_are_tried_again_when_told(
    model: list[str], many: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out.jsonl"
    shutil.copytree(many, folder)
    arguments = command(folder, output, model)
    assert main(arguments) == 1
    broken = [index for index, record in enumerate(lines(output)) if "error" in record]
    assert broken == [5, 16, 27, 38, 49]
    for index in broken[1:]:
        shutil.copy(many / "001.jpg", folder / f"{index:03}.jpg")
    before = output.read_bytes()
    assert main(arguments) == 1
    assert output.read_bytes() == before
    assert main([*arguments, "--retry-errors"]) == 1
    after = lines(output)
    assert [index for index, record in enumerate(after) if "error" in record] == [5]
    assert [record["image"] for record in after] == [str(p) for p in sorted(folder.glob("*"))]
    shutil.copy(many / "001.jpg", folder / "005.jpg")
    assert main([*arguments, "--retry-errors"]) == 0


def test_another_model_or_other_options_are_refused(
    model: list[str], many: Path, tmp_path: Path, tiny: Checkpoint, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.csv"
    arguments = command(many, output, model)
    main(arguments)
    capsysbinary.readouterr()
    before = output.read_bytes()
    save_checkpoint(tiny, tmp_path / "other.safetensors")
    other = ["--model", str(tmp_path / "other.safetensors")]
    for changed, message in [
        ([*arguments, "--beam-size", "4"], "beam_size was 3, is 4"),
        ([*arguments, "--no-tags"], "tags was True, is False"),
        ([*arguments, "--precision", "bfloat16"], "precision was float32, is bfloat16"),
        ([*arguments, *other], "model was the one of SHA-256"),
        (["tag", *arguments[1:]], "captions was True, is False"),
    ]:
        status, said = run(changed, capsysbinary)
        assert status == 2
        assert message in said
        assert "--overwrite" in said
        assert output.read_bytes() == before
    assert run([*arguments, "--no-tags", "--overwrite"], capsysbinary)[0] == 1
    assert output.read_bytes() != before
    assert run([*arguments, "--no-tags", "--batch-size", "7"], capsysbinary)[0] == 1


def test_a_run_that_was_asked_for_in_pieces_ends_in_order(
    model: list[str], many: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    words = [*model, "--forbidden", "hat", "--forbidden", "dog"]
    assert main(command(many, output, words)) == 1
    whole = output.read_bytes()
    journal = Path(f"{output}.journal")
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    for name in ("041.jpg", "007.jpg"):
        assert main(command(many / name, output, words)) == 0
    assert [r["image"] for r in lines(output)] == [f"{many}/007.jpg", f"{many}/041.jpg"]
    assert main(command(many, output, words)) == 1
    assert [r["caption"] for r in lines(output) if "caption" in r] == [
        json.loads(line)["caption"] for line in whole.splitlines() if b"caption" in line
    ]
    assert [r["image"] for r in lines(output)] == [
        json.loads(line)["image"] for line in whole.splitlines()
    ]


@pytest.mark.slow
def test_two_runs_on_one_output(
    model: list[str], very_many: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    process = start(tmp_path / "said", captioner, command(very_many, output, model))
    while not output.exists() and process.exitcode is None:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        status, said = run(command(very_many, output, model, "--overwrite"), capsysbinary)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert (status, end(process, tmp_path / "said").status) == (2, 1)
    assert f"{output}.journal: another run is writing it" in said
    assert len(lines(output)) == 240


def test_ctrl_c_says_how_to_continue(model: list[str], very_many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    mark = {"CAPTIONER_TEST_MARK": str(tmp_path)}
    arguments = command(very_many, output, model)
    process = start(tmp_path / "said", captioner_with, mark, arguments)
    journal = Path(f"{output}.journal")
    while process.exitcode is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 5
    ):
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    ended = end(process, tmp_path / "said")
    assert ended.status == 130
    assert ended.said == "captioner: stopped; the same command continues where it was\n"
    assert 0 < len(json.loads(output.read_text())) < 200
    assert processes_with(mark) == []


def captioner_with(variables: dict[str, str], arguments: list[str]) -> None:
    """Be the command line, and give the processes that it starts these variables."""
    os.environ |= variables
    captioner(arguments)


def processes_with(variables: dict[str, str]) -> list[str]:
    """Return the processes that were started with variables in their environment."""
    ((name, value),) = variables.items()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{name}={value}".encode() in environment.read_bytes().split(b"\0"):
                found.append(environment.parent.name)
    return found


def test_the_library_runs_the_same_engine(model: list[str], many: Path) -> None:
    captioner = Captioner.load(model[1], device="cpu", precision="float32")
    told: list[int] = []
    records = describe_folder(
        captioner, [many], batch_size=8, tags=False, progress=told.append, decode_timeout=60.0
    )
    first = next(records)
    assert list(first) == ["image", "caption", "log_prob", "captions"]
    rest = list(records)
    assert told == [8] * 7 + [4]
    paths = [many / f"{index:03}.jpg" for index in (3, 4)]
    assert [r["caption"] for r in rest[2:4]] == [c.text for c in captioner.caption(paths)]
    done = {record["image"] for record in rest[:40]}
    again = list(describe_folder(captioner, [many], batch_size=8, tags=False, done=done))
    assert again == [first, *rest[40:]]
