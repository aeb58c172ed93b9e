"""A data set looked over: each kind of mistake is found, and named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from captioner.config import Config, DataConfig, DataSource, Preprocessing
from captioner.data.audit import Audit, audit, summary
from conftest import draw_picture


def write_split(path: Path, captions: dict[str, list[str]]) -> str:
    lines = [{"image": name, "captions": texts} for name, texts in captions.items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return a data set of six good photographs."""
    for colour in ("red", "green", "blue", "black", "yellow", "white"):
        draw_picture(tmp_path / f"{colour}.png", colour)
    text = "a disc on grey paper"
    train = {
        f"{c}.png": [text, f"the {c} disc is round"] for c in ("red", "green", "blue", "black")
    }
    val = {f"{c}.png": [text, f"a {c} disc"] for c in ("yellow", "white")}
    data = DataConfig(
        images=str(tmp_path),
        captions=write_split(tmp_path / "train.jsonl", train),
        val_captions=write_split(tmp_path / "val.jsonl", val),
        min_count=2,
        max_words=4,
    )
    return Config(data=data, preprocessing=Preprocessing(size=32))


def look(config: Config) -> Audit:
    return audit(config, 1000, 2)


def change(config: Config, split: str, name: str, captions: list[str]) -> None:
    with Path(getattr(config.data, split)).open("a") as file:
        file.write("\n" + json.dumps({"image": name, "captions": captions}))


def test_a_good_data_set_has_no_problem(config: Config) -> None:
    found = look(config)
    assert found.problems == 0
    assert (found.train.photographs, found.train.captions) == (4, 8)
    assert found.train.lengths == {5: 8}
    assert found.val.lengths == {3: 2, 5: 2}
    assert (found.pixel_bytes, found.feature_bytes) == (3 * 32 * 32, 1000)
    # Known: a disc on grey paper the is round, and the four special words.
    assert found.coverage.words == 4 + 8
    assert found.coverage.share_of_words == pytest.approx(14 / 16)
    assert found.coverage.share_of_captions == pytest.approx(2 / 4)
    assert sorted(found.coverage.unknown) == [("white", 1), ("yellow", 1)]
    lines = list(summary(found, config.data))
    assert "  longer than data.max_words (4): 100.0 % of captions" in lines
    assert "  longer than data.max_words (4): 50.0 % of captions" in lines
    assert (
        "  it has 87.5 % of the words of val's captions, and all words of 50.0 % of them" in lines
    )
    pixels = "1.23e-05 GB of pixels (3,072 bytes each)"
    assert f"  memory: {pixels}, 4e-06 GB of features (1,000 bytes each)" in lines
    assert lines[-1] == "problems found: 0"


def test_what_is_wrong_is_found_and_named(config: Config, tmp_path: Path) -> None:
    good = ["a disc on grey paper"]
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:100])
    shutil.copy(tmp_path / "red.png", tmp_path / "again.png")
    with Image.open(tmp_path / "blue.png") as picture:
        picture.save(tmp_path / "other.bmp")  # other bytes, the same pixels
    for name in ("gone.png", "cut.png", "again.png", "green.png"):
        change(config, "captions", name, good)
    change(config, "captions", "unsaid.png", [])
    draw_picture(tmp_path / "unsaid.png", "pink")
    change(config, "val_captions", "other.bmp", [*good, "broken image"])
    found = look(config)
    folder = str(tmp_path)
    assert found.train.missing == {f"{folder}/gone.png": "it is missing"}
    assert found.train.uncaptioned == [f"{folder}/unsaid.png"]
    assert list(found.train.broken) == [f"{folder}/cut.png"]
    assert found.train.duplicates == [
        [f"{folder}/red.png", f"{folder}/again.png"],
        [f"{folder}/green.png", f"{folder}/green.png"],
    ]
    assert found.leaks == [([f"{folder}/blue.png"], [f"{folder}/other.bmp"])]
    assert found.val.junk == [(f"{folder}/other.bmp", "broken image")]
    assert found.problems == 7
    text = "\n".join(summary(found, config.data))
    assert f"missing photographs: 1\n      {folder}/gone.png\n" in text
    assert f"broken photographs: 1\n      {folder}/cut.png: " in text
    assert f"{folder}/red.png = {folder}/again.png\n      {folder}/green.png (2 times)" in text
    assert f"{folder}/blue.png (train) = {folder}/other.bmp (val)" in text
    assert f"{folder}/other.bmp: 'broken image'" in text
    assert text.endswith("\nproblems found: 7")


def test_long_lists_are_cut_and_control_characters_shown(config: Config, tmp_path: Path) -> None:
    for number in range(7):
        change(config, "captions", f"gone{number}\x1b.png", ["a disc on grey paper"])
    lines = list(summary(look(config), config.data))
    place = lines.index("  missing photographs: 7")
    assert lines[place + 1] == f"      {tmp_path}/gone0\\x1b.png"
    assert lines[place + 6] == "      and 2 more"


def test_captions_that_many_photographs_share_are_shown(config: Config, tmp_path: Path) -> None:
    for number in range(1, 13):
        draw_picture(tmp_path / f"{number}.png", "red", (64, 48 + number))
        texts = [
            "Quality issues are too severe.",
            "quality issues are too severe",
            f"disc {number}",
        ]
        change(config, "captions", f"{number}.png", [*texts, "a disc is round"][: 3 + number % 2])
    found = look(config)
    assert found.train.shared == [("quality issues are too severe", 12)]
    lines = list(summary(found, config.data))
    place = lines.index("  captions that 10 photographs or more share: 1")
    assert lines[place + 1] == "      'quality issues are too severe': 12 photographs"
    assert lines[-1] == f"problems found: {found.problems}"
    assert found.problems == len(found.train.junk) == 12


def test_what_is_odd_about_the_files_is_told(config: Config, tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "RED.png"}, {"id": 2, "file_name": "x" * 5_000}],
        "annotations": [
            {"image_id": 1, "caption": "a disc on grey paper"},
            {"image_id": 1, "caption": "a stock phrase of theirs", "is_precanned": True},
            {"image_id": 2, "caption": "a disc on grey paper"},
            {"image_id": 3, "caption": "a disc on grey paper"},
        ],
    }
    Path(config.data.captions).write_text(json.dumps(coco))
    found = look(config)
    assert found.train.photographs == 1
    assert found.train.missing == {str(tmp_path / ("x" * 5_000)): "it is missing"}
    assert found.train.junk == [(f"{tmp_path}/red.png", "a stock phrase of theirs")]
    text = "\n".join(summary(found, config.data))
    assert "1 annotations of images that are not listed, passed over" in text
    assert "1 photograph found under a name that differs by upper and lower case" in text


def test_sources_are_looked_over_together(config: Config, tmp_path: Path) -> None:
    data, folder = config.data, str(tmp_path)
    (tmp_path / "more.csv").write_text("image,caption\nred.png,a disc on grey paper\n")
    sources = (DataSource(folder, data.captions), DataSource(folder, f"{folder}/more.csv"))
    both = replace(data, images="", captions="", sources=sources, val_images=folder)
    found = look(replace(config, data=both))
    assert found.train.photographs == 5
    assert found.train.duplicates == [[f"{folder}/red.png", f"{folder}/red.png"]]
