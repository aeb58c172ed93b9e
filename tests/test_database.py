"""Records in SQLite: the same as in the journal after any kill, and found by what they say."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Moment, forked, strike

from captioner.cli import main
from captioner.folder.database import DatabaseError, DatabaseFile, find_images
from captioner.folder.outputs import json_line

Capture = pytest.CaptureFixture[bytes]


def record(image: str, caption: str, **tags: float) -> dict[str, Any]:
    captions = [{"text": caption, "log_prob": -5.5}, {"text": "some thing", "log_prob": -9.0}]
    named = [{"name": name, "score": score} for name, score in tags.items()]
    return {"image": image, "caption": caption, "log_prob": -5.5, "captions": captions,
            "tags": named}  # fmt: skip


RECORDS = [
    record("far.jpg", "a dog and a man and a child and a red ball on a long beach", dog=0.9),
    record("near.jpg", "a dog on a beach", beach=0.8, dog=0.7),
    record("snow.jpg", "two dogs run", snow=0.45),
    record("deep snow.jpg", "a white hill", snow=0.95, dog=0.2),
    record("caf\udce9\n.jpg", "a café table", table=0.6),
    {"image": "broken.jpg", "error": "an empty file (0 bytes)"},
]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    output = DatabaseFile(str(path), json_line)
    output.start([])
    for one in records:
        output.write(one)
    output.finish(records, reordered=False)
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return written(tmp_path / "all.sqlite", RECORDS)


def contents(path: Path) -> dict[str, list[Any]]:
    """Return the rows of all tables; an index that does not fit them is an error."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO texts (texts, rank) VALUES ('integrity-check', 1)")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in ("photographs", "captions", "tags", "texts")
        }


def test_any_sqlite_tool_reads_it(database: Path) -> None:
    rows = contents(database)
    assert [json.loads(row[-1]) for row in rows["photographs"]] == RECORDS
    assert rows["photographs"][1][:5] == (2, "near.jpg", "a dog on a beach", -5.5, None)
    assert rows["photographs"][4][1] == b"caf\xe9\n.jpg"
    assert rows["photographs"][5][1:5] == ("broken.jpg", None, None, None)
    assert rows["photographs"][5][5] == "an empty file (0 bytes)"
    assert rows["captions"][2:4] == [
        (2, 0, "a dog on a beach", -5.5), (2, 1, "some thing", -9.0)
    ]  # fmt: skip
    assert rows["tags"][1:3] == [(2, 0, "beach", 0.8), (2, 1, "dog", 0.7)]
    # The file is one file: nothing of a transaction is left beside it.
    assert list(database.parent.iterdir()) == [database]


def test_the_best_comes_first(database: Path) -> None:
    assert list(find_images(database, "dog beach")) == ["near.jpg", "far.jpg"]
    assert list(find_images(database, "BEACHES")) == ["near.jpg", "far.jpg"]
    assert list(find_images(database, "cafe")) == ["caf\udce9\n.jpg"]
    assert list(find_images(database, "dog", ["snow"])) == ["snow.jpg", "deep snow.jpg"]
    assert list(find_images(database, tags=["Snow"])) == ["deep snow.jpg", "snow.jpg"]
    assert list(find_images(database, tags=["snow"], min_score=0.5)) == ["deep snow.jpg"]
    assert list(find_images(database, tags=["snow", "dog"])) == ["deep snow.jpg"]
    assert list(find_images(database, tags=["snow", "dog"], min_score=0.5)) == []
    assert list(find_images(database, "zebra")) == []
    assert list(find_images(database)) == list(find_images(database, "...")) == []


@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.text(), max_size=3))
def test_no_query_is_sql_or_syntax(
    tmp_path_factory: pytest.TempPathFactory, text: str, tags: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "queries.sqlite"
    if not path.exists():
        written(path, RECORDS)
    list(find_images(path, text, tags))


@pytest.mark.parametrize(
    "text",
    ['dog" OR "man', "dog OR zebra", "NEAR(dog beach)", "tags : dog", "dog*", "^dog", "-dog", "(",
     "'; DROP TABLE photographs; --", "dog\0beach", "\ud800", "{tags} : dog", '""""', "dog + man"],
)  # fmt: skip
def test_what_means_something_to_fts5_or_sql_is_a_word(database: Path, text: str) -> None:
    before = database.read_bytes()
    found = list(find_images(database, text, [text]))
    assert found == []
    found = list(find_images(database, text))
    assert len(found) == {"dog*": 4, "^dog": 4, "-dog": 4, "dog + man": 1}.get(text, 0)
    assert database.read_bytes() == before


def test_an_earlier_record_is_replaced(database: Path) -> None:
    records = [*RECORDS]
    output = DatabaseFile(str(database), json_line)
    output.start(records)
    records[5] = record("broken.jpg", "a mended picture", mended=1.0)
    records[0] = record("far.jpg", "an empty road")
    for place in (5, 0):
        output.write(records[place])
    rows = contents(database)
    output.finish(records, reordered=True)
    assert [json.loads(row[-1]) for row in rows["photographs"]] == records
    assert contents(database) == rows
    assert list(find_images(database, "mended")) == ["broken.jpg"]
    assert list(find_images(database, "ball")) == []


def killed_while_it_writes(path: str, call: int) -> None:
    strike(Moment("captioner.folder.database._text", call), lambda: os.kill(os.getpid(), 9))
    output = DatabaseFile(path, json_line)
    output.start(RECORDS[:2])
    # Pages that do not fit are written before the transaction ends: there is something to undo.
    output._connection.execute("PRAGMA cache_size = 1")
    for one in RECORDS[2:]:
        output.write(one)


@pytest.mark.parametrize("call", [8, 22, 25, 27])
def test_a_kill_in_a_transaction_costs_nothing(tmp_path: Path, call: int) -> None:
    whole = contents(written(tmp_path / "whole.sqlite", RECORDS))
    path = tmp_path / "all.sqlite"
    assert forked(killed_while_it_writes, str(path), call).status == -signal.SIGKILL
    if call > 20:  # after the beginning it can be searched at once
        assert list(find_images(path, "dog beach")) == ["near.jpg", "far.jpg"]
        assert path.read_bytes()[:15] == b"SQLite format 3"
    # The journal has what the database may lack.
    output = DatabaseFile(str(path), json_line)
    output.start(RECORDS[:4])
    for one in RECORDS[4:]:
        output.write(one)
    output.finish(RECORDS, reordered=False)
    assert contents(path) == whole


def test_what_a_killed_run_left_is_not_undone_in_the_new_database(database: Path) -> None:
    old = database.with_name("all.sqlite-journal")
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE photographs SET record = record || zeroblob(9000)")
        begun = old.read_bytes()
        connection.execute("ROLLBACK")
    assert len(begun) > 1000
    old.write_bytes(begun)
    output = DatabaseFile(str(database), json_line)
    output.start(RECORDS[:1])
    output.finish(RECORDS[:1], reordered=False)
    assert not old.exists()
    assert [json.loads(row[-1]) for row in contents(database)["photographs"]] == RECORDS[:1]


def test_another_program_that_holds_it_does_not_end_the_run(database: Path) -> None:
    output = DatabaseFile(str(database), json_line)
    output.start(RECORDS[:2])
    output._connection.execute("PRAGMA busy_timeout = 10")
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM photographs").fetchone()
        for one in RECORDS[2:]:
            output.write(one)
        output.finish(RECORDS, reordered=False)
    assert [json.loads(row[-1]) for row in contents(database)["photographs"]] == RECORDS


def test_a_database_that_is_gone_or_another_ends_the_run(database: Path) -> None:
    output = DatabaseFile(str(database), json_line)
    output.start(RECORDS[:2])
    database.rename(database.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        output.write(RECORDS[2])
    database.write_bytes(b"")
    with pytest.raises(OSError, match="another file has taken its place") as caught:
        output.write(RECORDS[2])
    assert caught.value.errno == errno.ESTALE
    output._connection.close()


def others(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what is no database of captioner's, and what is said of it."""
    yield folder, "not a file"
    yield folder / "none.sqlite", "no such file"
    os.mkfifo(folder / "pipe")
    yield folder / "pipe", "not a file"
    (folder / "empty").write_bytes(b"")
    yield folder / "empty", "not a database that captioner wrote"
    (folder / "text").write_text("a dog on a beach\n" * 100)
    yield folder / "text", "file is not a database"
    with closing(sqlite3.connect(folder / "other")) as connection:
        connection.execute("CREATE TABLE photographs (image)")
    yield folder / "other", "not a database that captioner wrote"
    with closing(sqlite3.connect(written(folder / "new", []))) as connection:
        connection.execute("PRAGMA user_version = 7")
    yield folder / "new", "its tables are of version 7"
    with closing(sqlite3.connect(written(folder / "less", []))) as connection:
        connection.execute("DROP TABLE texts")
    yield folder / "less", "no such table: texts"
    whole = written(folder / "cut", RECORDS * 30).read_bytes()
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut", "malformed"


def test_what_is_no_such_database_is_one_line(tmp_path: Path, capsysbinary: Capture) -> None:
    for path, why in others(tmp_path):
        assert main(["find", str(path), "dog"]) == 2
        out, err = capsysbinary.readouterr()
        assert out == b""
        assert err.decode().startswith(f"captioner: {path}: ")
        assert why in err.decode()
        assert err.count(b"\n") == 1
        with pytest.raises(DatabaseError):
            list(find_images(path, "dog"))


def test_find_prints_paths(database: Path, capsysbinary: Capture) -> None:
    assert main(["find", str(database), "dog beach"]) == 0
    assert main(["find", str(database), "dog", "beach"]) == 0
    assert main(["find", str(database), "--tag", "dog", "dog", "beach"]) == 0
    assert capsysbinary.readouterr().out == b"near.jpg\nfar.jpg\n" * 3
    assert main(["find", str(database), "table", "-0"]) == 0
    assert capsysbinary.readouterr().out == b"caf\xe9\n.jpg\0"
    assert main(["find", str(database), "--tag", "snow", "--min-score", "0.5", "--null"]) == 0
    assert capsysbinary.readouterr().out == b"deep snow.jpg\0"
    assert main(["find", str(database), "zebra"]) == 1
    assert capsysbinary.readouterr() == (b"", b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to find: name words, or --tag NAME"),
        ([" "], "nothing to find"),
        (["dog", "--min-score", "0.5"], "--min-score is the lowest score of a tag"),
        (["--tag", "dog", "--min-score", "50"], "expected a number from 0 to 1, not '50'"),
        (["--tag", "dog", "--min-score", "nan"], "expected a number from 0 to 1, not 'nan'"),
    ],
)
def test_wrong_searches(
    database: Path, capsysbinary: Capture, arguments: list[str], message: str
) -> None:
    try:
        status = main(["find", str(database), *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert message in capsysbinary.readouterr().err.decode()


@pytest.mark.slow
def test_a_run_fills_it(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output, lines = tmp_path / "out.sqlite", tmp_path / "out.jsonl"
    command = ["caption", str(photographs), "--num-captions", "2", "--beam-size", "3", *model]
    assert main([*command, "-o", str(output)]) == 1
    assert main([*command, "-o", str(lines)]) == 1
    found = [json.loads(row[-1]) for row in contents(output)["photographs"]]
    assert found == [json.loads(line) for line in lines.read_text().splitlines()]
    (photographs / "empty.jpg").write_bytes((photographs / "b.jpg").read_bytes())
    assert main([*command, "-o", str(output), "--retry-errors"]) == 1
    again = [json.loads(row[-1]) for row in contents(output)["photographs"]]
    assert [r["image"] for r in again] == [r["image"] for r in found]
    assert sum("error" in r for r in again) == sum("error" in r for r in found) - 1
    capsysbinary.readouterr()
    assert main(["find", str(output), found[0]["caption"]]) == 0
    assert found[0]["image"].encode() in capsysbinary.readouterr().out.splitlines()
