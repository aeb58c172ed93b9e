"""The command line: records, exit status, and what a person reads when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import captioner, forked

from captioner.cli import main
from captioner.data.example import coco_image_id
from captioner.data.tags import TagSet
from captioner.folder import find_photographs
from captioner.folder.outputs import TerminalStream
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.version import __version__
from conftest import BACKBONE, draw_picture, median_ratio_within

Capture = pytest.CaptureFixture[bytes]


@pytest.fixture
def model(tiny: Checkpoint, tmp_path: Path) -> list[str]:
    """Return the arguments that name a tiny model."""
    save_checkpoint(tiny, tmp_path / "tiny.safetensors")
    return ["--model", str(tmp_path / "tiny.safetensors"), "--precision", "float32"]


def records(capture: Capture) -> tuple[list[dict[str, Any]], str]:
    out, err = capture.readouterr()
    return [json.loads(line) for line in out.splitlines()], err.decode()


def test_a_folder_with_broken_files(
    model: list[str], photographs: Path, capsysbinary: Capture
) -> None:
    assert main(["caption", str(photographs), *model]) == 1
    found, err = records(capsysbinary)
    names = [os.path.relpath(record["image"], photographs) for record in found]
    assert names == ["a.PNG", "b.jpg", "cut.jpg", "deep/c.webp", "empty.jpg", "one.png", "text.jpg"]
    errors = {name for name, record in zip(names, found, strict=True) if "error" in record}
    assert errors == {"cut.jpg", "empty.jpg", "text.jpg"}
    assert "captioner: 3 of 7 could not be read" in err
    assert "Traceback" not in err
    good = found[0]
    assert list(good) == ["image", "caption", "log_prob", "captions", "tags"]
    assert good["captions"] == [{"text": good["caption"], "log_prob": good["log_prob"]}]
    assert all(set(tag) == {"name", "score"} for tag in good["tags"])
    broken = next(record for record in found if "error" in record)
    assert list(broken) == ["image", "error"]


def test_tags_alone_and_captions_alone(
    model: list[str], photographs: Path, capsysbinary: Capture
) -> None:
    path = str(photographs / "b.jpg")
    assert main(["tag", path, *model]) == 0
    assert [list(record) for record in records(capsysbinary)[0]] == [["image", "tags"]]
    assert (
        main(["caption", path, "--no-tags", "--beam-size", "4", "--num-captions", "2", *model]) == 0
    )
    (record,) = records(capsysbinary)[0]
    assert "tags" not in record
    assert len(record["captions"]) == 2


def test_some_paths_missing(model: list[str], photographs: Path, capsysbinary: Capture) -> None:
    assert main(["caption", "nowhere.jpg", str(photographs / "b.jpg"), *model]) == 1
    found, err = records(capsysbinary)
    assert found[0] == {"image": "nowhere.jpg", "error": "no such file or folder"}
    assert "caption" in found[1]
    assert "1 of 2 could not be read" in err


def usage_error(arguments: list[str], capture: Capture) -> str:
    """Run a command that must end with status 2 and one clear line; return it."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capture.readouterr()
    assert status == 2
    assert out == b""
    assert b"Traceback" not in err
    return err.decode().strip().splitlines()[-1]


def test_wrong_usage(model: list[str], photographs: Path, capsysbinary: Capture) -> None:
    photo = str(photographs / "b.jpg")
    for arguments, message in [
        (["caption", "no.jpg", "nor.jpg", *model], "no such file or folder: 'no.jpg', 'nor.jpg'"),
        (["caption", photo, "--nonsense"], "unrecognized arguments: --nonsense"),
        (["caption", photo, "--beam", "3"], "unrecognized arguments: --beam"),
        (["tag", photo, "--beam-size", "3"], "unrecognized arguments: --beam-size"),
        (["caption", photo, "--beam-size", "0", *model], "beam_size is 0; it takes 1 to 100"),
        (["caption", photo, "--batch-size", "0"], "from 1 to 4096, not '0'"),
        (["caption", photo, "--device", "abacus"], "invalid choice: 'abacus'"),
        (["caption", photo, "--output", "x.txt", *model], "must end in .jsonl, .csv, .json"),
        (["caption", photo, "--retry-errors"], "--retry-errors needs --output FILE"),
        (["caption", photo, "--decode-timeout", "0"], "seconds from 0.1 to 86400, not '0'"),
        (["caption", photo, "--sidecar", "yaml"], "invalid choice: 'yaml'"),
        (["caption", photo, "--output", "no/x.jsonl", *model], "there is no folder no"),
        (["caption", photo, "--output", "x.json", *model], "ends in no number"),
        (["tag", photo, "--output", "x.json", *model], "COCO results hold captions"),
        (["caption", photo, "--model", "no.safetensors"], "no.safetensors: no such file"),
        (["caption", photo, "--model", photo], "not a safetensors file"),
        (["caption"], "the following arguments are required: PATH"),
        ([], "the following arguments are required: COMMAND"),
        (
            ["captoin", photo],
            "'captoin' is no command (caption, tag, find, info, serve), and no such",
        ),
        (["caption", photo, "-o", "a.csv", "--output", "b.csv"], "a run has only one"),
        (["caption", photo, "--report", "a.html", "--report", "b.html"], "a run has only one"),
        (["caption", "https://example.org/a.jpg"], "nothing is downloaded: save what a URL leads"),
    ]:
        assert message in usage_error(arguments, capsysbinary)


def test_an_unknown_word_is_refused_before_any_work(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["caption", str(photographs), *model, "--output", str(output)]
    line = usage_error([*command, "--required", "dog", "--required", "zebra"], capsysbinary)
    assert "required has 'zebra': the model does not know such a word" in line
    assert not output.exists()


def test_every_search_option_is_a_flag(
    model: list[str], photographs: Path, capsysbinary: Capture
) -> None:
    photo = str(photographs / "b.jpg")
    command = ["caption", photo, *model, "--beam-size", "4", "--num-captions", "2", "--no-tags"]
    command += ["--length-penalty", "1", "--max-words", "6", "--min-words", "3", "--no-repeat", "1"]
    command += ["--length-norm", "gnmt", "--forbidden", "runs", "--forbidden", "man"]
    command += ["--no-ending", "a", "--required", "red", "--groups", "2", "--diversity", "0.4"]
    command += ["--unknown"]
    assert main(command) == 0
    ((record,), _) = records(capsysbinary)
    for words in (caption["text"].split() for caption in record["captions"]):
        assert 3 <= len(words) == len(set(words)) <= 6
        assert "red" in words
        assert not {"runs", "man"} & set(words)
        assert words[-1] != "a"
    command = ["caption", photo, *model, "--sample", "--num-captions", "5", "--temperature", "2"]
    said = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--top-k", "7", "--top-p", "0.9", "--seed", seed]) == 0
        said.append(records(capsysbinary)[0])
    assert said[0] == said[1] != said[2]
    assert len(said[0][0]["captions"]) == 5


def test_which_tags_are_given_can_be_said(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    picture = draw_picture(tmp_path / "a.png", "red")

    def names(*options: str) -> list[str]:
        assert main(["tag", str(picture), *model, *options]) == 0
        (record,), _ = records(capsysbinary)
        return [tag["name"] for tag in record["tags"]]

    everything = names()
    assert len(everything) > 2
    first, second, *_ = everything
    listed = tmp_path / "names.txt"
    listed.write_text(f"# two of them\n{second}\t17\tform\n\n{first}\n")
    assert names("--only-tags", first, "--only-tags", second) == [first, second]
    assert names("--only-tags", str(listed)) == [first, second]
    assert names("--exclude-tags", str(listed)) == everything[2:]
    assert len(names("--max-tags", "1")) == 1
    assert names("--threshold", "1.1") == []


def test_an_unknown_tag_or_precision_is_refused_before_any_work(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    picture = str(draw_picture(tmp_path / "a.png", "red"))
    for options, message in (
        (["--only-tags", "gras"], "only has 'gras', which is no tag of the model; the nearest are"),
        (["--min-precision", "0.9"], "no thresholds for min_precision"),
        (["--min-precision", "1.9"], "min_precision is 1.9; it takes 0 to 1"),
    ):
        assert main(["tag", picture, *model, *options]) == 2
        out, err = capsysbinary.readouterr()
        assert out == b""
        assert message in err.decode()


def test_models_make_an_ensemble(
    model: list[str], tiny: Checkpoint, photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    photo = str(photographs / "b.jpg")
    assert main(["caption", photo, *model]) == 0
    alone = records(capsysbinary)[0]
    assert main(["caption", photo, *model, *model[:2]]) == 0
    ((together,), _) = records(capsysbinary)
    assert together["caption"] == alone[0]["caption"]
    assert main(["info", *model, *model[:2]]) == 0
    assert capsysbinary.readouterr()[0].count(b"tiny.safetensors") == 2
    other = str(tmp_path / "other.safetensors")
    save_checkpoint(replace(tiny, tags=TagSet(["x", *tiny.tags.vocabulary.words[5:]])), Path(other))
    line = usage_error(["caption", photo, *model, "--model", other], capsysbinary)
    assert line == "captioner: checkpoint 2 of the ensemble has other tags"


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, capsysbinary: Capture) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Bomb()}, tmp_path / "model.pt")
    picture = draw_picture(tmp_path / "x.png", "red")
    line = usage_error(
        ["caption", str(picture), "--model", str(tmp_path / "model.pt")], capsysbinary
    )
    assert "not a safetensors file" in line
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_photographs(tmp_path: Path, capsysbinary: Capture) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["caption", str(tmp_path / "empty")]) == 0
    out, err = capsysbinary.readouterr()
    assert out == b""
    assert err.decode() == f"captioner: no photographs in {tmp_path / 'empty'}\n"


def test_paths_on_stdin(
    model: list[str], photographs: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "\n".join(str(photographs / name) for name in ("b.jpg", "a.PNG"))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(listed.encode() + b"\n")))
    assert main(["caption", "-", *model]) == 0
    assert [Path(r["image"]).name for r in records(capsysbinary)[0]] == ["b.jpg", "a.PNG"]
    windows = listed.replace("\n", "\r\n") + "\r\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(windows.encode("utf-16"))))
    assert main(["caption", "-", *model]) == 0
    assert [Path(r["image"]).name for r in records(capsysbinary)[0]] == ["b.jpg", "a.PNG"]
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(windows.encode("utf-16-le"))))
    assert "UTF-16 without a byte order mark" in usage_error(["caption", "-"], capsysbinary)


def test_output_files(model: list[str], tmp_path: Path, capsysbinary: Capture) -> None:
    folder = tmp_path / "coco"
    folder.mkdir()
    for number in (7, 139):
        draw_picture(folder / f"COCO_val_{number:012}.jpg", "red")
    (folder / "000000000555.jpg").write_bytes(b"")
    lines, coco = tmp_path / "out.jsonl", tmp_path / "out.json"
    assert main(["caption", str(folder), "--output", str(lines), *model]) == 1
    assert main(["caption", str(folder), "--output", str(coco), *model]) == 1
    assert capsysbinary.readouterr().out == b""
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    results = json.loads(coco.read_text())
    assert [entry["image_id"] for entry in results] == [7, 139]
    assert [e["caption"] for e in results] == [r["caption"] for r in written if "caption" in r]
    (folder / "again_139.jpg").write_bytes(b"")
    twice = ["caption", str(folder), "--output", str(coco), "--overwrite", *model]
    assert "have the same COCO image id" in usage_error(twice, capsysbinary)
    (folder / "again_139.jpg").unlink()
    before = lines.read_bytes()
    arguments = ["caption", str(folder), "--output", str(lines), *model]
    Path(f"{lines}.journal").unlink()
    assert "; --overwrite replaces it" in usage_error(arguments, capsysbinary)
    assert lines.read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 1
    assert lines.read_bytes() == before


def test_names_that_are_not_utf8(model: list[str], tmp_path: Path, capsysbinary: Capture) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    hostile = [b"caf\xe9.png", "\u00fc\n.png".encode(), b"<b>.png"]
    draw_picture(tmp_path / "x.png", "red")
    for name in hostile:
        (folder / os.fsdecode(name)).write_bytes((tmp_path / "x.png").read_bytes())
    assert main(["caption", str(folder), *model]) == 0
    found = {os.fsencode(os.path.basename(r["image"])) for r in records(capsysbinary)[0]}
    assert found == set(hostile)


def test_a_line_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with path.open("w") as stream:
        writer = TerminalStream(stream)
        tags = [{"name": "dog", "score": 0.9}, {"name": "run", "score": 0.5}]
        writer.write({"image": "dog.jpg", "caption": "a dog runs", "tags": tags})
        writer.write({"image": "a\x1b[2J\n.jpg", "error": "an empty file (0 bytes)"})
    assert path.read_text().splitlines() == [
        "dog.jpg  a dog runs  [dog, run]",
        "a\\x1b[2J\\n.jpg  error: an empty file (0 bytes)",
    ]


def test_no_name_acts_on_the_terminal(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    folder = tmp_path / "\x1b[2J\x9b"
    folder.mkdir()
    for arguments in (
        [str(folder)],
        [str(folder / "no")],
        ["--\x1b[2J"],
        [str(folder), "--output", str(folder / "\x1b.txt")],
        [str(folder), "--output", str(folder / "no" / "x.jsonl")],
        [str(draw_picture(folder / "\x07.png", "red")), "--output", str(folder / "x.json")],
        [str(folder / "\x07.png"), "--model", str(folder)],
        [str(folder), "--report", str(folder), "--batch-size", "\x1b"],
    ):
        with suppress(SystemExit):
            main(["caption", *arguments])
        out, err = capsysbinary.readouterr()
        assert all(line.isprintable() for line in (out + err).decode().split("\n"))
        assert b"\\x1b" in err or b"\\u001b" in out


def test_what_changed_and_what_is_gone_is_said(
    model: list[str], tmp_path: Path, capsysbinary: Capture
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out.jsonl"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        draw_picture(folder / name, "red")
    arguments = ["caption", str(folder), *model, "--output", str(output)]
    assert main(arguments) == 0
    draw_picture(folder / "a.png", "blue", (90, 90))
    (folder / "b.png").unlink()
    capsysbinary.readouterr()
    assert main(arguments) == 0
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: 1 photographs changed since they were described; --retry-changed describes "
        "them again",
        "captioner: 1 records are of photographs that are gone; --prune drops them",
        f"captioner: 2 done before, 0 described, in {output}",
    ]
    journal = Path(f"{output}.journal")
    journal.write_bytes(journal.read_bytes()[:-1])
    assert main([*arguments, "--retry-changed", "--prune"]) == 0
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: the last line of the journal was cut off; what it held was done again",
        "captioner: 1 records of photographs that are gone were dropped",
        f"captioner: 2 described, in {output}",
    ]
    found = [Path(json.loads(line)["image"]).name for line in output.read_text().splitlines()]
    assert found == ["a.png", "c.png"]
    assert main([*arguments, "--quiet"]) == 0
    assert capsysbinary.readouterr().err == b""


def test_photographs_without_a_command_are_captioned(
    model: list[str], photographs: Path, capsysbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = str(photographs / "b.jpg")
    assert main(["caption", photo, *model]) == 0
    expected = capsysbinary.readouterr().out
    for arguments in ([photo, *model], [*model, photo], [*model, "--", photo]):
        assert main(arguments) == 0
        assert capsysbinary.readouterr().out == expected
    assert main(["caption", photo, *model, str(photographs / "a.PNG")]) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(sys, "argv", ["captioner", photo, *model])
    assert main() == 0
    assert capsysbinary.readouterr().out == expected
    # A folder that is called as a command is named by its path.
    monkeypatch.chdir(photographs.parent)
    os.rename("photos", "info")
    assert main(["./info", *model, "--exclude", "deep"]) == 1
    assert b"./info/a.PNG" in capsysbinary.readouterr().out


def test_two_kinds_of_sidecars_are_both_written(
    model: list[str], photographs: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    photo, output, page = photographs / "b.jpg", tmp_path / "out.jsonl", tmp_path / "out.html"
    command = ["caption", str(photo), *model, "--sidecar", "txt", "--sidecar", "xmp"]
    assert main([*command, "-o", str(output), "--report", str(page)]) == 0
    ((record,), _) = [json.loads(line) for line in output.read_text().splitlines()], None
    assert photo.with_suffix(".txt").read_text() == record["caption"] + "\n"
    assert record["caption"] in photo.with_name("b.jpg.xmp").read_text()
    assert capsysbinary.readouterr().err.decode() == (
        f"captioner: 1 described, in {output}, {page}, .txt and .xmp beside the photographs\n"
    )
    # Without another output a photograph is done once it has both.
    photo.with_name("b.jpg.xmp").unlink()
    assert main(command) == 0
    assert photo.with_name("b.jpg.xmp").exists()
    assert capsysbinary.readouterr().err.decode().splitlines() == [
        "captioner: 1 described, in .txt and .xmp beside the photographs",
    ]
    assert main(command) == 0
    assert "1 done before, 0 described" in capsysbinary.readouterr().err.decode()


def test_a_sidecar_that_fails_costs_the_other_kind_nothing(
    model: list[str], photographs: Path, capsysbinary: Capture
) -> None:
    photo = photographs / "b.jpg"
    photo.with_suffix(".txt").mkdir()
    command = ["caption", str(photo), *model, "--sidecar", "txt", "--sidecar", "xmp"]
    assert main([*command, "--output", "-"]) == 1
    ((record,), _) = records(capsysbinary)
    assert record["sidecar_error"] == "cannot write b.txt: Is a directory"
    assert record["caption"] in photo.with_name("b.jpg.xmp").read_text()


def test_links_in_a_circle_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    draw_picture(tmp_path / "deep" / "x.png", "red")
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = [Path(path).name for path, _ in find_photographs([str(tmp_path)])]
    assert found == ["x.png", "gone.png"]


def test_coco_image_id() -> None:
    assert coco_image_id("a/COCO_val2014_000000000139.jpg") == 139
    assert coco_image_id("000000000790.jpg") == 790
    assert coco_image_id("dog.jpg") is None


def test_info(model: list[str], capsysbinary: Capture) -> None:
    assert main(["info", *model[:2]]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert BACKBONE in out
    assert "words         9\ntags          5\n" in out
    assert f"captioner {__version__}, torch {version('torch')}" in out


def test_info_says_what_trained_a_model_and_its_scores_times_100(
    tiny: Checkpoint, tmp_path: Path, capsysbinary: Capture
) -> None:
    figures = {"step": 12, "loss": 2.5, "bleu_4": 0.20893, "cider_d": 0.6248, "tag_precision": 0.5}
    tiny.provenance = {"versions": "captioner 0.1.0, torch 2.0", "figures": figures}
    path = str(tmp_path / "with.safetensors")
    save_checkpoint(tiny, Path(path))
    assert main(["info", "--model", path]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[-2:] == [
        "trained with  captioner 0.1.0, torch 2.0",
        "figures       step 12, loss 2.5000, bleu_4 20.9, cider_d 62.5, tag_precision 50.0",
    ]


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(model: list[str], photographs: Path) -> None:
    command = [sys.executable, "-m", "captioner", "caption", str(photographs), *model]
    with subprocess.Popen(
        [*command, "--batch-size", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_full_disk_is_one_line(model: list[str], photographs: Path) -> None:
    ended = forked(captioner, ["caption", str(photographs), *model], "/dev/full")
    assert ended == (1, "captioner: cannot write any further: [Errno 28] No space left on device\n")


@pytest.mark.timing
def test_help_is_quick() -> None:
    ours, theirs = ["-m", "captioner", "--help"], ["-c", "import argparse"]
    assert median_ratio_within(4.0, ours, theirs, 9)
