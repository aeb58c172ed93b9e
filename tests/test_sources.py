"""What a run learns from: several sources, each as often as its weight says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioner.config import Config, DataConfig, DataSource
from captioner.data.dataset import CaptionDataset, batches
from captioner.data.example import DataError, Example
from captioner.data.sources import Data, Subset, read_data
from captioner.data.tags import TagSet
from captioner.data.vocabulary import Vocabulary
from captioner.settings import ConfigError
from captioner.training.fit import fit
from conftest import draw_picture, tiny_config

COLOURS = ("red", "green", "blue", "yellow", "black")


def draw_source(folder: Path, count: int, first_id: int = 1) -> Path:
    """Draw photographs with captions in COCO's form; return the captions file."""
    folder.mkdir()
    images, annotations = [], []
    for number, colour in enumerate(COLOURS[:count], first_id):
        draw_picture(folder / f"{colour}.png", colour)
        images.append({"id": number, "file_name": f"{colour}.png"})
        for text in (f"a {colour} disc of {folder.name}", "disc"):
            annotations.append({"image_id": number, "caption": text})
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "captions.json").write_text(content)
    return folder / "captions.json"


@pytest.fixture
def two(tmp_path: Path) -> DataConfig:
    """Return two sources whose names and image ids are the same, and one to validate on."""
    one, two, val = (
        str(draw_source(tmp_path / name, count)) for name, count in (("a", 2), ("b", 5), ("v", 1))
    )
    folder = str(tmp_path)
    sources = (
        DataSource(f"{folder}/a", one, weight=2.0),
        DataSource(f"{folder}/b", two, weight=0.5),
    )
    return DataConfig(
        sources=sources, val_images=f"{folder}/v", val_captions=val, min_count=1, tag_min_count=1
    )


def read(data: DataConfig) -> Data:
    return read_data(Config(data=data))


def test_sources_are_put_together(two: DataConfig) -> None:
    data = read(two)
    assert [(e.image.parent.name, e.image.stem, e.image_id) for e in data.train] == [
        *(("a", colour, n) for n, colour in enumerate(COLOURS[:2], 1)),
        *(("b", colour, n) for n, colour in enumerate(COLOURS, 1)),
    ]
    assert data.train[0].captions == ("a red disc of a",)
    assert data.subsets == (Subset(2, 2.0), Subset(5, 0.5))
    assert data.notes == [
        "train, data.sources.0: 2 photographs",
        "train, data.sources.1: 5 photographs",
        "val: 1 photographs",
        "train: 7 junk captions dropped",
        "train: 6 photographs an epoch",
    ]


def test_names_that_are_spelled_otherwise_are_told(two: DataConfig) -> None:
    captions = Path(two.sources[1].captions)
    captions.write_text(captions.read_text().replace("red.png", "RED.PNG"))
    data = read(two)
    assert str(data.train[2].image).endswith("b/red.png")
    assert data.notes[1:3] == [
        f"train, data.sources.1: {captions}: 1 photograph found under a name that differs by "
        "upper and lower case: 'RED.PNG' is 'red.png'",
        "train, data.sources.1: 5 photographs",
    ]


def test_the_plain_keys_are_one_source(two: DataConfig) -> None:
    source = two.sources[1]
    plain = replace(two, sources=(), images=source.images, captions=source.captions)
    alone = replace(two, sources=(replace(source, weight=1.0),))
    assert read(plain) == read(alone)
    assert read(plain).subsets == (Subset(5, 1.0),)


def test_what_is_not_said_is_named(two: DataConfig) -> None:
    first, second = two.sources
    with pytest.raises(ConfigError, match=r"data.sources.1.images is not set; .*--set data.sou"):
        read(replace(two, sources=(first, replace(second, images=""))))
    with pytest.raises(ConfigError, match=r"data.val_images is not set"):
        read(replace(two, val_images=""))
    with pytest.raises(ConfigError, match=r"data.val_captions is not set"):
        read(replace(two, val_captions="", val_split="val"))
    junk = {"images": [{"id": 1, "file_name": "red.png"}], "annotations": [
        {"image_id": 1, "caption": "disc"}]}  # fmt: skip
    Path(second.captions).write_text(json.dumps(junk))
    with pytest.raises(DataError, match=r"b/captions.json: all 1 captions are junk"):
        read(two)


def dataset(*subsets: Subset) -> CaptionDataset:
    count = sum(subset.size for subset in subsets)
    examples = [Example(Path(str(number)), ("a dog",)) for number in range(count)]
    words = Vocabulary(["a", "dog"])
    return CaptionDataset(examples, words, TagSet(["dog"]), Config().preprocessing, 5, subsets)


def order(items: CaptionDataset, seed: int) -> list[int]:
    return items.order(torch.Generator().manual_seed(seed))


def test_weights_say_how_often_photographs_are_seen() -> None:
    items = dataset(Subset(3, 2.0), Subset(7, 1.0), Subset(10, 0.5), Subset(4, 2.25))
    assert items.epoch_size == 6 + 7 + 5 + 9
    seen: Counter[int] = Counter()
    for seed in range(400):
        epoch = order(items, seed)
        assert len(epoch) == items.epoch_size
        assert len(set(epoch)) == len(epoch)
        counts = Counter(item % len(items) for item in epoch)
        assert [counts[i] for i in range(10)] == [2] * 3 + [1] * 7
        assert sum(counts[i] for i in range(10, 20)) == 5
        assert sorted(counts[i] for i in range(20, 24)) == [2, 2, 2, 3]
        seen += counts
    # 400 draws of a half: each photograph's count has a standard deviation of 10.
    assert all(150 < seen[i] < 250 for i in range(10, 20))
    assert all(850 < seen[i] < 950 for i in range(20, 24))


def test_an_epoch_is_a_function_of_its_seed() -> None:
    items = dataset(Subset(3, 2.0), Subset(10, 0.5))
    assert order(items, 1) == order(items, 1)
    assert order(items, 1) != order(items, 2)
    assert {i for i in order(items, 1) if 3 <= i < 13} != {
        i for i in order(items, 2) if 3 <= i < 13
    }


def test_one_source_is_shuffled_as_ever() -> None:
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(5)).tolist()
    assert order(dataset(Subset(9, 1.0)), 5) == drawn
    assert order(dataset(Subset(4, 1.0), Subset(5, 1.0)), 5) == drawn


def test_a_small_weight_shows_one_and_subsets_must_fit() -> None:
    assert dataset(Subset(3, 0.01)).epoch_size == 1
    with pytest.raises(ValueError, match="are not of 0 photographs"):
        CaptionDataset([], Vocabulary([]), TagSet([]), Config().preprocessing, 5, [Subset(1, 1.0)])


def test_a_photograph_is_cropped_anew_each_time_it_is_shown(two: DataConfig) -> None:
    data = read(two)
    words = Vocabulary(["a", "red", "disc", "of"])
    config = tiny_config()
    items = CaptionDataset(
        data.train, words, TagSet(["disc"]), config.preprocessing, 9, data.subsets
    )
    items.augmentation = "0/1"
    batch = next(batches(items, 6, 0, 0, 0, 0))
    assert len(batch.indices) == 6
    for place in (0, 1):
        first, again = (batch.images[row] for row, p in enumerate(batch.indices) if p == place)
        assert not torch.equal(first, again)


def test_a_run_learns_from_both(two: DataConfig, tmp_path: Path) -> None:
    config = replace(tiny_config(), data=two)
    settings = replace(config.training, epochs=2, frozen_epochs=1, batch_size=4)
    config = replace(config, training=replace(settings, precision="float32"))
    said: list[str] = []
    fit(config, tmp_path / "run", torch.device("cpu"), said.append)
    assert "train: 6 photographs an epoch" in said
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    other = replace(two, sources=(two.sources[0], replace(two.sources[1], weight=1.0)))
    with pytest.raises(ConfigError, match=r"data.sources was"):
        fit(replace(config, data=other), tmp_path / "run", torch.device("cpu"), said.append)
