"""Every annotation form, and what is wrong with a file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from captioner.data.example import DataError, Example, drop_junk, is_junk
from captioner.data.readers import load, read
from captioner.data.readers.coco import pair_results
from captioner.folder.outputs import csv_line, output_file

COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 7, "caption": "a dog runs on grass"},
        {"image_id": 8, "caption": "a man with a hat"},
        {"image_id": 7, "caption": "the dog is running"},
    ],
}
INSTANCES = {
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "sports ball"}],
    "annotations": [
        {"image_id": 7, "category_id": 2, "area": 10.0},
        {"image_id": 7, "category_id": 1, "area": 50.5},
        {"image_id": 7, "category_id": 2, "area": 10.0},
    ],
}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", COCO)
    instances = write(tmp_path / "instances.json", INSTANCES)
    texts = ("a dog runs on grass", "the dog is running")
    assert read(captions, tmp_path)[0] == Example(tmp_path / "a.jpg", texts, None, 7)
    with_tags = read(captions, tmp_path, instances=instances)
    assert [example.tags for example in with_tags] == [("dog", "sports ball"), ()]


def test_flickr8k(tmp_path: Path) -> None:
    lines = "a.jpg#0\tA dog runs .\na.jpg#1\tThe dog .\nb.jpg#0\tA man .\n"
    captions = write(tmp_path / "captions.token.txt", lines)
    split = write(tmp_path / "dev.txt", "b.jpg\na.jpg\n")
    assert [e.image.name for e in read(captions, tmp_path)] == ["a.jpg", "b.jpg"]
    assert read(captions, tmp_path, str(split))[1].captions == ("A dog runs .", "The dog .")
    write(split, "c.jpg\n")
    with pytest.raises(DataError, match=r"dev.txt:1: 'c.jpg' has no caption"):
        read(captions, tmp_path, str(split))
    write(split, "\n")
    with pytest.raises(DataError, match=r"no photograph of the split '.*dev.txt' has a caption"):
        read(captions, tmp_path, str(split))


def test_karpathy(tmp_path: Path) -> None:
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "split": split, "cocoid": n, "sentences": [
            {"raw": "a dog runs"}]} for n, split in enumerate(("train", "restval", "test"), 3)
    ]  # fmt: skip
    captions = write(tmp_path / "dataset.json", {"images": images})
    found = read(captions, tmp_path, "train+restval")
    assert len(found) == 2
    assert found[0] == Example(tmp_path / "val2014/a.jpg", ("a dog runs",), None, 3)
    with pytest.raises(DataError, match="no photograph is in the split 'val'"):
        read(captions, tmp_path, "val")


def test_jsonl(tmp_path: Path) -> None:
    lines = [{"image": "a.jpg", "captions": ["a dog"], "tags": ["dog"]}, {"image": "b.jpg"}]
    captions = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"data.jsonl:2: 'captions': expected a list of strings"):
        read(captions, tmp_path)
    write(captions, json.dumps(lines[0]))
    assert read(captions, tmp_path) == [Example(tmp_path / "a.jpg", ("a dog",), ("dog",), 1)]


def test_csv(tmp_path: Path) -> None:
    rows = (
        "tags,image,note,caption\n"
        '"dog, sports ball",a.jpg,,"a dog, running"\n'
        "\n"
        "man,b.jpg,x,a man\n"
        'dog,a.jpg,,"the ""dog""\nruns"\n'
    )
    found = read(write(tmp_path / "data.csv", rows), tmp_path)
    texts = ("a dog, running", 'the "dog"\nruns')
    assert found == [
        Example(tmp_path / "a.jpg", texts, ("dog", "sports ball"), 1),
        Example(tmp_path / "b.jpg", ("a man",), ("man",), 2),
    ]
    found = read(write(tmp_path / "data.csv", "\ufeffimage,caption\r\na.jpg,a dog\r\n"), tmp_path)
    assert found == [Example(tmp_path / "a.jpg", ("a dog",), None, 1)]


def test_what_captioner_writes_as_csv_is_read_back(tmp_path: Path) -> None:
    tags = [{"name": "dog", "score": 0.9}, {"name": "=sum", "score": 0.8}]
    output = output_file(str(tmp_path / "out.csv"))
    output.start([])
    output.write({"image": "a, b.jpg", "caption": "a dog", "log_prob": -1.5, "tags": tags})
    output.write({"image": "=c.jpg", "caption": "-a 'dog'", "log_prob": -2.5, "tags": tags[1:]})
    output.write({"image": "d.jpg", "error": "an empty file"})
    output.finish([], False)
    assert read(tmp_path / "out.csv", tmp_path) == [
        Example(tmp_path / "a, b.jpg", ("a dog",), ("dog", "=sum"), 1),
        Example(tmp_path / "=c.jpg", ("-a 'dog'",), ("=sum",), 2),
        Example(tmp_path / "d.jpg", (), (), 3),
    ]
    untagged = csv_line({"image": "a.jpg", "caption": "a dog", "log_prob": -1.5}).decode()
    rows = write(tmp_path / "untagged.csv", f"image,caption,log_prob,tags,error\r\n{untagged}")
    assert read(rows, tmp_path)[0].tags is None


@pytest.mark.parametrize(
    "caption", ["A", "two dogs .", "broken image", "Sorry , no image found here", "dog's bowl"]
)
def test_junk(caption: str) -> None:
    assert is_junk(caption)


@pytest.mark.parametrize("caption", ["a dog runs", "there is no image of a dog on the wall"])
def test_no_junk(caption: str) -> None:
    assert not is_junk(caption)


def test_junk_is_dropped_and_counted() -> None:
    good, bad = "a dog runs on grass", "dog"
    kept, dropped = drop_junk([Example(Path("a"), (good, bad)), Example(Path("b"), (bad,))])
    assert kept == [Example(Path("a"), (good,))]
    assert dropped == 2


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", COCO)
    with pytest.raises(DataError, match=r"none of its captioned .* the first would be .*a.jpg"):
        load(captions, tmp_path)
    (tmp_path / "b.jpg").touch()
    examples, left_out = load(captions, tmp_path)
    assert [example.image.name for example in examples] == ["b.jpg"]
    assert left_out == {str(tmp_path / "a.jpg"): "it is missing"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"images": [', "x.json: cannot be read as JSON"),
        ("x.json", [], "expected an object with a list 'images'"),
        ("x.json", {**COCO, "annotations": [{"image_id": 9, "caption": "x"}]}, "has the id 9"),
        ("x.json", {**COCO, "annotations": [{"image_id": 7}]}, "'caption' is None"),
        ("x.json", {**COCO, "images": [{"id": 1, "file_name": "../a.jpg"}]}, "leaves the image"),
        ("x.json", {**COCO, "images": [{"id": 1, "file_name": "/a.jpg"}]}, "leaves the image"),
        ("x.json", {**COCO, "images": COCO["images"] * 2}, "id 7 stands twice"),
        ("x.json", {**COCO, "annotations": []}, "no photograph has a caption"),
        ("x.json", {"images": {}}, "expected an object with a list 'images'"),
        ("x.txt", "a.jpg A dog", "x.txt:1: expected NAME#N<TAB>caption"),
        ("x.jsonl", "{", "x.jsonl:1: not JSON"),
        ("x.jsonl", "[]", "x.jsonl:1: expected an object"),
        ("x.jsonl", "[" * 200_000, "x.jsonl:1: not JSON"),
        ("x.jsonl", {"image": "../a.jpg", "captions": ["x"]}, "x.jsonl:1: '../a.jpg' leaves"),
        ("x.txt", "a/../../b.jpg#0\tA dog", "'a/../../b.jpg' leaves the image"),
        ("x.txt", "#0\tA dog", "expected the name of a photograph, found ''"),
        ("x.json", {"images": [{"sentences": []}]}, "x.json: is of Karpathy's form; say which"),
        ("x.csv", "", r"x.csv:1: expected the columns image and caption, found \[\]"),
        ("x.csv", "image;caption\n", r"image and caption, found \['image;caption'\]"),
        ("x.csv", "image,caption,caption\n", "expected the columns image and caption, found"),
        ("x.csv", "image,caption\na.jpg,x\na.jpg,a dog, running\n", "x.csv:3: 3 cells where the"),
        ("x.csv", "image,caption\na.jpg\n", "x.csv:2: 1 cells where the head has 2"),
        ("x.csv", 'image,caption\na.jpg,"x\ny"\nb.jpg,"a dog\n', "x.csv:4: not CSV"),
        ("x.csv", "image,caption\n../a.jpg,a dog\n", "x.csv:2: '../a.jpg' leaves the image"),
        ("x.csv", "image,caption\n,a dog\n", "x.csv:2: expected the name of a photograph"),
        ("x.csv", "image,caption\na.jpg,\n", "x.csv: no photograph has a caption"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content), tmp_path)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    instances = write(tmp_path / "i.json", {**INSTANCES, "annotations": [
        {"image_id": 7, "category_id": 1, "area": None}]})  # fmt: skip
    coco, lines = write(tmp_path / "c.json", COCO), write(tmp_path / "c.jsonl", "")
    with pytest.raises(DataError, match=r"annotations\[0\]: 'area' is None"):
        read(coco, tmp_path, instances=instances)
    with pytest.raises(DataError, match="instances go with COCO captions"):
        read(lines, tmp_path, instances=instances)
    with pytest.raises(DataError, match="JSONL has no splits"):
        read(lines, tmp_path, "train")
    with pytest.raises(DataError, match="CSV has no splits"):
        read(tmp_path / "c.csv", tmp_path, "train")


def test_instances_are_of_the_same_photographs(tmp_path: Path) -> None:
    captions = write(tmp_path / "c.json", COCO)
    instances = write(tmp_path / "i.json", {**INSTANCES, "images": [{"id": 8}]})
    with pytest.raises(DataError, match=r"i.json: annotations\[0\]: no image has the id 7"):
        read(captions, tmp_path, instances=instances)
    strange = [{"image_id": 9, "category_id": 1}]
    write(instances, {**INSTANCES, "images": [{"id": 9}], "annotations": strange})
    with pytest.raises(DataError, match=r"i.json: no annotation is of an image of .*c.json"):
        read(captions, tmp_path, instances=instances)


@pytest.mark.parametrize("place", [("", "../a.jpg"), ("../x", "a.jpg"), ("x/../..", "a.jpg")])
def test_names_that_leave_the_folder_in_karpathys_form(
    place: tuple[str, str], tmp_path: Path
) -> None:
    entry = dict(zip(("filepath", "filename"), place, strict=True), split="train", sentences=[])
    captions = write(tmp_path / "dataset.json", {"images": [entry]})
    with pytest.raises(DataError, match=r"images\[0\]: .* leaves the image folder"):
        read(captions, tmp_path, "train")


def test_a_cut_off_file_is_named_whatever_its_form(tmp_path: Path) -> None:
    forms: list[tuple[str, str, str]] = [
        ("c.json", json.dumps(COCO), ""),
        ("k.json", json.dumps({"images": [
            {"filename": "a", "split": "train", "sentences": [{"raw": "x"}]}]}), "train"),
        ("l.jsonl", json.dumps({"image": "a.jpg", "captions": ["a dog runs"]}), ""),
        ("r.csv", 'image,caption\na.jpg,"a dog"', ""),
    ]  # fmt: skip
    for name, content, split in forms:
        read(write(tmp_path / name, content), tmp_path, split)
        with pytest.raises(DataError, match=name):
            read(write(tmp_path / name, content[:-1]), tmp_path, split)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read"):
        read(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(DataError, match="photos: the image folder is not there"):
        read(tmp_path / "nowhere.json", tmp_path / "photos")


@pytest.mark.data
def test_real_data(data: Path) -> None:
    flickr, coco = data / "flickr8k", data / "coco-mini"
    examples = read(flickr / "captions.token.txt", flickr / "images", str(flickr / "train.txt"))
    assert len(examples) == 6000
    kept, dropped = drop_junk(examples)
    assert len(kept) == 6000
    assert dropped == 15
    found = read(coco / "captions.json", coco / "images", "", coco / "instances.json")
    assert len(found) == 80
    assert sum(len(example.captions) for example in found) == 400
    assert all(example.image.is_file() for example in found)
    assert any("sports ball" in (example.tags or ()) for example in found)


def coco_files(
    folder: Path, results: object, captioned: tuple[int, ...] = (1, 2)
) -> tuple[Path, Path]:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    annotations = [{"image_id": i, "caption": f"a dog {i}"} for i in captioned]
    captions = folder / "captions.json"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json", captions


def entries(*image_ids: object) -> list[dict[str, object]]:
    return [{"image_id": image_id, "caption": f"a cat {image_id}"} for image_id in image_ids]


def test_results_are_paired_by_id(tmp_path: Path) -> None:
    examples, captions = pair_results(*coco_files(tmp_path, entries(2, 1)))
    assert [example.captions for example in examples] == [("a dog 1",), ("a dog 2",)]
    assert captions == ["a cat 1", "a cat 2"]
    examples, captions = pair_results(*coco_files(tmp_path, entries(2)), subset=True)
    assert captions == ["a cat 2"]


@pytest.mark.parametrize(
    ("results", "captioned", "message"),
    [
        (entries(1), (1, 2), r"captions.json: .*results.json has no caption for the image id 2"),
        (entries(1, 2, 7), (1, 2), r"results.json: .*captions.json has no caption of the .* 7$"),
        (entries(1, 2), (1,), r"results.json: .*captions.json has no caption of the .* 2$"),
        (entries(1, 2, 1), (1, 2), r"results.json: \[2\]: the image id 1 stands twice"),
        (entries("x"), (1, 2), r"results.json: \[0\]: 'image_id' is 'x'"),
        ([{"image_id": 1, "caption": None}], (1, 2), r"results.json: \[0\]: 'caption' is None"),
        ({"image_id": 1}, (1, 2), r"results.json: expected a list of objects"),
        ([], (1, 2), r"no caption for the image id 1 and 1 more; with --subset"),
    ],
)
def test_results_that_cannot_be_paired(
    results: object, captioned: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        pair_results(*coco_files(tmp_path, results, captioned))


def test_an_empty_subset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results.json: holds no caption of an image of"):
        pair_results(*coco_files(tmp_path, []), subset=True)


def test_a_photograph_without_captions_is_named(tmp_path: Path) -> None:
    _, captions = coco_files(tmp_path, [], captioned=(2,))
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).touch()
    examples, left_out = load(captions, tmp_path)
    assert [example.image_id for example in examples] == [2]
    assert left_out == {str(tmp_path / "1.jpg"): f"{captions} has no caption of it"}


def test_karpathys_ids(tmp_path: Path) -> None:
    def karpathy(*ids: object) -> Path:
        images = [
            {"filename": f"{n}.jpg", "split": "test", "cocoid": i, "sentences": [{"raw": "a dog"}]}
            for n, i in enumerate(ids)
        ]
        return write(tmp_path / "dataset.json", {"images": images})

    assert [e.image_id for e in read(karpathy(42, 7), tmp_path, "test")] == [42, 7]
    with pytest.raises(DataError, match=r"images\[1\]: the image id 42 stands twice"):
        read(karpathy(42, 42), tmp_path, "test")
    with pytest.raises(DataError, match=r"images\[0\]: 'cocoid' is '42'"):
        read(karpathy("42"), tmp_path, "test")
