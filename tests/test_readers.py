"""Every annotation form, and what is wrong with a file is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from captioner.data.example import DataError, Example, drop_junk, is_junk
from captioner.data.readers import load, read
from captioner.data.readers.results import pair_results
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


def examples(captions: Path, split: str = "", instances: Path | None = None) -> list[Example]:
    return read(captions, split, instances).examples


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", COCO)
    instances = write(tmp_path / "instances.json", INSTANCES)
    texts = ("a dog runs on grass", "the dog is running")
    assert examples(captions)[0] == Example(Path("a.jpg"), texts, None, 7)
    with_tags = examples(captions, instances=instances)
    assert [example.tags for example in with_tags] == [("dog", "sports ball"), ()]


def test_flickr8k(tmp_path: Path) -> None:
    lines = "a.jpg#0\tA dog runs .\na.jpg#1\tThe dog .\nb.jpg#0\tA man .\n"
    captions = write(tmp_path / "captions.token.txt", lines)
    split = write(tmp_path / "dev.txt", "b.jpg\na.jpg\n")
    assert [e.image.name for e in examples(captions)] == ["a.jpg", "b.jpg"]
    assert examples(captions, str(split))[1].captions == ("A dog runs .", "The dog .")
    write(split, "c.jpg\n")
    with pytest.raises(DataError, match=r"dev.txt:1: 'c.jpg' has no caption"):
        examples(captions, str(split))
    write(split, "\n")
    with pytest.raises(DataError, match=r"no photograph of the split '.*dev.txt' has a caption"):
        examples(captions, str(split))


def test_karpathy(tmp_path: Path) -> None:
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "split": split, "cocoid": n, "sentences": [
            {"raw": "a dog runs"}]} for n, split in enumerate(("train", "restval", "test"), 3)
    ]  # fmt: skip
    captions = write(tmp_path / "dataset.json", {"images": images})
    found = examples(captions, "train+restval")
    assert len(found) == 2
    assert found[0] == Example(Path("val2014/a.jpg"), ("a dog runs",), None, 3)
    with pytest.raises(DataError, match="no photograph is in the split 'val'"):
        examples(captions, "val")


def test_jsonl(tmp_path: Path) -> None:
    lines = [{"image": "a.jpg", "captions": ["a dog"], "tags": ["dog"]}, {"image": "b.jpg"}]
    captions = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(
        DataError, match=r"data.jsonl:2: 'captions' is missing; expected a list of texts"
    ):
        examples(captions)
    write(captions, json.dumps(lines[0]))
    assert examples(captions) == [Example(Path("a.jpg"), ("a dog",), ("dog",))]


def test_csv(tmp_path: Path) -> None:
    rows = (
        "tags,image,note,caption\n"
        '"dog, sports ball",a.jpg,,"a dog, running"\n'
        "\n"
        "man,b.jpg,x,a man\n"
        'dog,a.jpg,,"the ""dog""\nruns"\n'
    )
    found = examples(write(tmp_path / "data.csv", rows))
    texts = ("a dog, running", 'the "dog"\nruns')
    assert found == [
        Example(Path("a.jpg"), texts, ("dog", "sports ball")),
        Example(Path("b.jpg"), ("a man",), ("man",)),
    ]
    found = examples(write(tmp_path / "data.csv", "\ufeffimage,caption\r\na.jpg,a dog\r\n"))
    assert found == [Example(Path("a.jpg"), ("a dog",))]


def test_what_captioner_writes_as_csv_is_read_back(tmp_path: Path) -> None:
    tags = [{"name": "dog", "score": 0.9}, {"name": "=sum", "score": 0.8}]
    output = output_file(str(tmp_path / "out.csv"))
    output.start([])
    output.write({"image": "a, b.jpg", "caption": "a dog", "log_prob": -1.5, "tags": tags})
    output.write({"image": "=c.jpg", "caption": "-a 'dog'", "log_prob": -2.5, "tags": tags[1:]})
    output.write({"image": "d.jpg", "error": "an empty file"})
    output.finish([], False)
    assert examples(tmp_path / "out.csv") == [
        Example(Path("a, b.jpg"), ("a dog",), ("dog", "=sum")),
        Example(Path("=c.jpg"), ("-a 'dog'",), ("=sum",)),
        Example(Path("d.jpg"), (), ()),
    ]
    untagged = csv_line({"image": "a.jpg", "caption": "a dog", "log_prob": -1.5}).decode()
    rows = write(
        tmp_path / "untagged.csv", f"image,caption,log_prob,confidence,tags,error\r\n{untagged}"
    )
    assert examples(rows)[0].tags is None


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
    useful, dropped = drop_junk([Example(Path("a"), (good, bad)), Example(Path("b"), (bad,))])
    assert useful == [Example(Path("a"), (good,))]
    assert dropped == 2


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", COCO)
    with pytest.raises(DataError, match=r"none of its captioned .* the first would be .*a.jpg: it"):
        load(captions, tmp_path)
    (tmp_path / "b.jpg").touch()
    loaded = load(captions, tmp_path)
    assert loaded.examples == [Example(tmp_path / "b.jpg", ("a man with a hat",), None, 8)]
    assert loaded.left_out == loaded.missing == {str(tmp_path / "a.jpg"): "it is missing"}


def test_a_name_that_no_file_can_have_is_missing(tmp_path: Path) -> None:
    names = ["b.jpg", "a" * 5_000, "a\0.jpg", "\ud800.jpg"]
    lines = "\n".join(json.dumps({"image": n, "captions": ["a dog runs"]}) for n in names)
    (tmp_path / "b.jpg").touch()
    loaded = load(write(tmp_path / "x.jsonl", lines), tmp_path)
    assert [example.image.name for example in loaded.examples] == ["b.jpg"]
    assert list(loaded.missing.values()) == ["it is missing"] * 3


def test_a_photograph_without_captions_is_named(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
    annotations = [
        {"image_id": 2, "caption": "a dog 2"},
        {"image_id": 3, "caption": "Quality issues are too severe.", "is_precanned": True},
    ]
    captions = write(tmp_path / "c.json", {"images": images, "annotations": annotations})
    (tmp_path / "2.jpg").touch()
    loaded = load(captions, tmp_path)
    assert [example.image_id for example in loaded.examples] == [2]
    assert loaded.left_out == {
        str(tmp_path / "1.jpg"): f"{captions} has no caption of it",
        str(tmp_path / "3.jpg"): f"{captions} marks all its captions as junk",
    }


def many(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry] * 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"images": [', "x.json: cannot be read as JSON"),
        ("x.json", "{" * 200_000, "x.json: cannot be read as JSON"),
        (
            "x.json",
            '{"a":' * 200_000,
            "x.json: cannot be read as JSON: its brackets are nested too",
        ),
        ("x.json", [], r"expected an object with a list 'images', found \[\]"),
        (
            "x.json",
            {**COCO, "annotations": [{"image_id": 7}]},
            "'caption' is missing; expected a t",
        ),
        ("x.json", {**COCO, "images": [{"id": 1, "file_name": "../a.jpg"}]}, "leaves the image"),
        ("x.json", {**COCO, "images": [{"id": 1, "file_name": "..\\a.jpg"}]}, "leaves the image"),
        ("x.json", {**COCO, "images": COCO["images"] * 2}, "id 7 stands twice"),
        ("x.json", {**COCO, "images": [3]}, r"images\[0\]: expected an object, found 3"),
        ("x.json", {**COCO, "annotations": []}, "no photograph has a caption"),
        ("x.json", {"images": {}}, "expected an object with a list 'images'"),
        ("x.txt", "a.jpg A dog", "x.txt:1: expected NAME#N<TAB>caption, a head .*'a.jpg A dog'"),
        ("x.txt", "a#0\tx\nb A dog", "x.txt:2: expected NAME#N<TAB>caption, found 'b A dog'"),
        ("x.txt", "", "x.txt:1: expected NAME#N<TAB>caption, .* found ''"),
        ("x.jsonl", "{", "x.jsonl:1: not JSON"),
        ("x.jsonl", "[]", "x.jsonl:1: expected an object"),
        ("x.jsonl", "[" * 200_000, "x.jsonl:1: not JSON"),
        ("x.jsonl", '{"image": "a", "captions": [[]]}', r"x.jsonl:1: 'captions' is \[\[\]\]; exp"),
        ("x.jsonl", {"image": "../a.jpg", "captions": ["x"]}, "x.jsonl:1: '../a.jpg' leaves"),
        ("x.txt", "a/../../b.jpg#0\tA dog", "'a/../../b.jpg' leaves the image"),
        ("x.txt", "#0\tA dog", "expected the name of a photograph, found ''"),
        ("x.json", {"images": [{"sentences": []}]}, "x.json: is of Karpathy's form; say which"),
        ("x.csv", "", r"x.csv:1: expected the columns image and caption .* found \[\]"),
        ("x.csv", "image:caption\n", r"image and caption .* found \['image:caption'\]"),
        ("x.csv", "image,caption,caption\n", "expected the columns image and caption .* found"),
        ("x.csv", "image,caption\na.jpg,x\na.jpg,a dog, running\n", "x.csv:3: 3 cells where the"),
        ("x.csv", "image,caption\na.jpg\n", "x.csv:2: 1 cells where the head has 2"),
        ("x.csv", "image;caption\na.jpg\n", r"x.csv:2: 1 cells .* a text with ';' in it stands"),
        ("x.csv", 'image,caption\na.jpg,"x\ny"\nb.jpg,"a dog\n', "x.csv:4: not CSV"),
        ("x.csv", "image,caption\n../a.jpg,a dog\n", "x.csv:2: '../a.jpg' leaves the image"),
        ("x.csv", "image,caption\n,a dog\n", "x.csv:2: expected the name of a photograph"),
        ("x.csv", "image,caption\na.jpg,\n", "x.csv: no photograph has a caption"),
        ("x.csv", "image|n|caption\na|1|b|c\n", r"x.csv:2: 4 cells .* no text may have a \| in"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"annotations": many({"image_id": None, "caption": "a dog"})}, "'image_id' is None; exp"),
        ({"annotations": many({"image_id": True, "caption": "a dog"})}, "'image_id' is True; exp"),
        ({"annotations": many({"image_id": 7.5, "caption": "a dog"})}, r"'image_id' is 7\.5; exp"),
        ({"annotations": many({"image_id": 7, "caption": 5})}, "'caption' is 5; expected a text"),
        ({"images": many({"id": 1, "file_name": 5})}, "expected the name of a photograph, found 5"),
    ],
)
def test_all_mistakes_of_a_file_are_told_at_once(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    captions = write(tmp_path / "x.json", {**COCO, **change})
    key = next(iter(change))
    with pytest.raises(DataError) as error:
        read(captions)
    message = str(error.value)
    assert re.match(rf"{re.escape(str(captions))}: {key}\[0\]: {told}", message)
    assert f"; {key}[4]: " in message
    assert f"{key}[5]" not in message
    assert message.count("\n") == 0
    assert re.search(r"; and \d+ more$", message)


def test_mistaken_lines_are_told_by_number(tmp_path: Path) -> None:
    lines = ["image,caption", "a.jpg,a dog"] + ["b.jpg"] * 7
    with pytest.raises(DataError, match=r"x.csv:3: 1 cells .*; line 4: .*; line 7: .*and 2 more$"):
        read(write(tmp_path / "x.csv", "\n".join(lines)))


def test_ids_of_any_kind_are_taken(tmp_path: Path) -> None:
    images = [
        {"id": "7", "file_name": "a.jpg"},
        {"id": "x-8", "file_name": "b.jpg"},
        {"id": 9.0, "file_name": "c.jpg"},
    ]
    annotations = [
        {"image_id": 7, "caption": "a dog"},
        {"image_id": "x-8", "caption": "a man"},
        {"image_id": "000009", "caption": "a hat"},
    ]
    captions = write(tmp_path / "c.json", {"images": images, "annotations": annotations})
    categories = [{"id": "1", "name": "dog"}, {"id": "man", "name": "man"}]
    objects = [
        {"image_id": "7", "category_id": 1, "area": None},
        {"image_id": "x-8", "category_id": "man", "area": "12.5"},
        {"image_id": "x-8", "category_id": 1, "area": 13},
    ]
    instances = write(tmp_path / "i.json", {"categories": categories, "annotations": objects})
    assert examples(captions, instances=instances) == [
        Example(Path("a.jpg"), ("a dog",), ("dog",), 7),
        Example(Path("b.jpg"), ("a man",), ("dog", "man"), "x-8"),
        Example(Path("c.jpg"), ("a hat",), (), 9),
    ]


def test_what_changes_nothing_is_passed_over_and_counted(tmp_path: Path) -> None:
    more = [
        {"image_id": 9, "caption": "of no image"},
        {"image_id": 7, "caption": None},
        {"image_id": 10, "caption": None},
    ]
    captions = write(tmp_path / "c.json", {**COCO, "annotations": [*COCO["annotations"], *more]})
    found = read(captions)
    assert found.examples == examples(write(tmp_path / "plain.json", COCO))
    assert found.notes == [
        f"{captions}: 2 annotations of images that are not listed, passed over; "
        "the first: annotations[3]",
        f"{captions}: 1 captions that are null, passed over; the first: annotations[4]",
    ]
    lines = write(tmp_path / "x.jsonl", {"image": "a.jpg", "captions": ["a dog", None]})
    assert examples(lines)[0].captions == ("a dog",)


def test_annotations_of_other_images_are_named(tmp_path: Path) -> None:
    others = [{"image_id": "img_7", "caption": "a dog"}]
    captions = write(tmp_path / "x.json", {**COCO, "annotations": others})
    expected = r"none is of a listed image: annotations\[0\] is of 'img_7', images\[0\] is 7"
    with pytest.raises(DataError, match=expected):
        read(captions)


def test_captions_that_the_data_marks_as_junk(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 7, "caption": "a dog runs on grass", "is_rejected": False},
        {"image_id": 7, "caption": "a photo that reviewers refused", "is_rejected": True},
        {"image_id": 8, "caption": "Quality issues are too severe.", "is_precanned": 1},
    ]
    found = examples(write(tmp_path / "c.json", {**COCO, "annotations": annotations}))
    assert found == [
        Example(
            Path("a.jpg"), ("a dog runs on grass",), None, 7, ("a photo that reviewers refused",)
        ),
        Example(Path("b.jpg"), (), None, 8, ("Quality issues are too severe.",)),
    ]
    assert drop_junk(found) == (found[:1], 2)


@pytest.mark.parametrize("area", [10**400, float("inf"), float("nan"), "large", [], True])
def test_areas_that_are_no_numbers_are_named(tmp_path: Path, area: object) -> None:
    annotations = [{"image_id": 7, "category_id": 1, "area": area}]
    instances = write(tmp_path / "i.json", {**INSTANCES, "annotations": annotations})
    with pytest.raises(DataError, match=r"i.json: annotations\[0\]: 'area' is .*; expected a fin"):
        examples(write(tmp_path / "c.json", COCO), instances=instances)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    instances = write(tmp_path / "i.json", INSTANCES)
    lines = write(tmp_path / "c.jsonl", {"image": "a.jpg", "captions": ["a dog"]})
    with pytest.raises(DataError, match="instances go with COCO captions"):
        read(lines, "", instances)
    with pytest.raises(DataError, match=r"train: no such list of names; .*c.jsonl is JSONL, with"):
        read(lines, "train")
    with pytest.raises(DataError, match=r"train: no such list of names; .*c.csv is CSV, without"):
        read(write(tmp_path / "c.csv", "image,caption\na.jpg,a dog\n"), "train")


def test_instances_are_of_the_same_photographs(tmp_path: Path) -> None:
    captions = write(tmp_path / "c.json", COCO)
    instances = write(tmp_path / "i.json", INSTANCES)
    strange = [{"image_id": 9, "category_id": 1}]
    write(instances, {**INSTANCES, "annotations": strange})
    with pytest.raises(DataError, match=r"i.json: no annotation is of an image of .*c.json"):
        examples(captions, instances=instances)
    write(instances, {**INSTANCES, "annotations": [{"image_id": 7, "category_id": 3}]})
    with pytest.raises(DataError, match=r"i.json: annotations\[0\]: no category has the id 3"):
        examples(captions, instances=instances)


@pytest.mark.parametrize("place", [("", "../a.jpg"), ("../x", "a.jpg"), ("x/../..", "a.jpg")])
def test_names_that_leave_the_folder_in_karpathys_form(
    place: tuple[str, str], tmp_path: Path
) -> None:
    entry = dict(zip(("filepath", "filename"), place, strict=True), split="train", sentences=[])
    captions = write(tmp_path / "dataset.json", {"images": [entry]})
    with pytest.raises(DataError, match=r"images\[0\]: .* leaves the image folder"):
        read(captions, "train")


def test_a_cut_off_file_is_named_whatever_its_form(tmp_path: Path) -> None:
    forms: list[tuple[str, str, str]] = [
        ("c.json", json.dumps(COCO), ""),
        ("k.json", json.dumps({"images": [
            {"filename": "a", "split": "train", "sentences": [{"raw": "x"}]}]}), "train"),
        ("l.jsonl", json.dumps({"image": "a.jpg", "captions": ["a dog runs"]}), ""),
        ("r.csv", 'image,caption\na.jpg,"a dog"', ""),
    ]  # fmt: skip
    for name, content, split in forms:
        read(write(tmp_path / name, content), split)
        with pytest.raises(DataError, match=name):
            read(write(tmp_path / name, content[:-1]), split)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read: No such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="photos: the image folder is not there"):
        load(tmp_path / "nowhere.json", tmp_path / "photos")


def test_kaggles_flickr8k(tmp_path: Path) -> None:
    text = 'image,caption\na.jpg,A dog runs .\na.jpg,"A dog , ""Rex"" , runs ."\nb.jpg,A man .\n'
    captions = write(tmp_path / "captions.txt", text)
    assert examples(captions) == [
        Example(Path("a.jpg"), ("A dog runs .", 'A dog , "Rex" , runs .')),
        Example(Path("b.jpg"), ("A man .",)),
    ]
    split = write(tmp_path / "Flickr_8k.testImages.txt", "b.jpg\r\n")
    assert [e.image.name for e in examples(captions, str(split))] == ["b.jpg"]


def test_kaggles_flickr30k(tmp_path: Path) -> None:
    text = (
        "image_name| comment_number| comment\n"
        'a.jpg| 0| Two men , "friends" , wait .\n'
        "a.jpg| 1|  A dog runs .\n"
        "b.jpg| 4   A dog runs across the grass .\n"  # as in line 20,000 of Kaggle's file
    )
    captions = write(tmp_path / "results.csv", text)
    found = read(captions)
    assert found.examples == [
        Example(Path("a.jpg"), ('Two men , "friends" , wait .', "A dog runs .")),
        Example(Path("b.jpg"), ("A dog runs across the grass .",)),
    ]
    assert found.notes == [
        f"{captions}: 1 rows without a bar between comment_number and comment; the first: line 4"
    ]


def test_flickr30ks_token_file(tmp_path: Path) -> None:
    captions = write(tmp_path / "results_20130124.token", "1.jpg#0\tA dog .\n1.jpg#1\tThe dog .\n")
    assert examples(captions) == [Example(Path("1.jpg"), ("A dog .", "The dog ."))]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_of_csv(tmp_path: Path, separator: str) -> None:
    rows = [("Image", "Caption"), ("a.jpg", "a dog"), ("b.jpg", "a man")]
    text = "\r\n".join(separator.join(row) for row in rows)
    found = examples(write(tmp_path / "data.csv", text))
    assert found == [Example(Path("a.jpg"), ("a dog",)), Example(Path("b.jpg"), ("a man",))]


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    line = {"image": "a.jpg", "captions": ["a dog"]}
    expected = [Example(Path("a.jpg"), ("a dog",))]
    for name, content in (
        ("tokens.json", "a.jpg#0\ta dog\n"),
        ("lines.json", json.dumps(line)),
        ("lines.txt", json.dumps(line) + "\n\n"),
        ("table.jsonl", "image,caption\na.jpg,a dog\n"),
    ):
        assert examples(write(tmp_path / name, content)) == expected, name
    coco = write(tmp_path / "coco.txt", json.dumps(COCO, indent=1))
    assert examples(coco) == examples(write(tmp_path / "coco.json", COCO))


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    text = "a.jpg#0\ta caf\u00e9 table\r\na.jpg#1\tthe table\r\n"
    captions = [Example(Path("a.jpg"), ("a caf\u00e9 table", "the table"))]
    for encoding, notes in (
        ("utf-8", []),
        ("utf-8-sig", []),
        ("utf-16", [f"{path}: read as UTF-16"]),
        ("cp1252", [f"{path}:1: not UTF-8, so the file was read as Windows-1252: "]),
    ):
        path.write_bytes(text.encode(encoding))
        found = read(path)
        assert found.examples == captions, encoding
        assert [note[: len(start)] for note, start in zip(found.notes, notes, strict=True)] == notes
    assert r"a caf\xe9 table" in found.notes[0]
    for content, message in (
        (text.encode("utf-16-le"), "x.txt: cannot be read as text: .*UTF-16 without a byte order"),
        (b"\xff\xfea", "x.txt: cannot be read as text: .*utf-16"),
        (b"a.jpg#0\ta dog\nb.jpg#0\t\x81\n", r"x.txt:2: .*neither UTF-8 nor Windows-1252: b'b.jpg"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path)


def test_a_list_of_names_may_be_spelled_otherwise(tmp_path: Path) -> None:
    captions = write(tmp_path / "x.txt", "d/a.jpg#0\tA dog\nd/b.jpg#0\tA man\nd/B.jpg#0\tA hat\n")
    split = tmp_path / "list.txt"
    split.write_bytes("C:\\data\\d\\a.jpg\r\nd/b.jpg\r\n".encode("utf-16"))
    found = read(captions, str(split))
    assert [e.captions for e in found.examples] == [("A dog",), ("A man",)]
    assert found.notes == [
        f"{split}: read as UTF-16",
        f"{split}: 1 photograph found under a name that differs by the folders before it: "
        r"'C:\\data\\d\\a.jpg' is 'd/a.jpg'",
    ]
    write(split, "d/a.jpg\nc.jpg\nD/b.JPG\n")
    message = r"list.txt:2: 'c.jpg' has no caption in .*x.txt; line 3: 'D/b.JPG' is unclear: 'd/b"
    with pytest.raises(DataError, match=message):
        read(captions, str(split))


def test_karpathys_ids(tmp_path: Path) -> None:
    def karpathy(*ids: object) -> Path:
        images = [
            {"filename": f"{n}.jpg", "split": "test", "cocoid": i, "sentences": [{"raw": "a dog"}]}
            for n, i in enumerate(ids)
        ]
        return write(tmp_path / "dataset.json", {"images": images})

    assert [e.image_id for e in examples(karpathy(42, "7", None), "test")] == [42, 7, None]
    with pytest.raises(DataError, match=r"images\[1\]: the image id 42 stands twice"):
        read(karpathy(42, "42"), "test")
    with pytest.raises(DataError, match=r"images\[0\]: 'cocoid' is \[\]; expected a whole number"):
        read(karpathy([]), "test")


@pytest.mark.data
def test_real_data(data: Path) -> None:
    flickr, coco = data / "flickr8k", data / "coco-mini"
    found = examples(flickr / "captions.token.txt", str(flickr / "train.txt"))
    assert len(found) == 6000
    useful, dropped = drop_junk(found)
    assert len(useful) == 6000
    assert dropped == 15
    found, missing, uncaptioned, notes = load(
        coco / "captions.json", coco / "images", "", coco / "instances.json"
    )
    assert missing == uncaptioned == {}
    assert notes == []
    assert len(found) == 80
    assert sum(len(example.captions) for example in found) == 400
    assert all(example.image.is_file() for example in found)
    assert any("sports ball" in (example.tags or ()) for example in found)


STRANGE: list[Any] = [None, True, -1, 2.5, 10**400, "", "\0", "x" * 9_000, [], [[]], {}, {"a": []}]


def strange_copies(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value, each with one value in it taken out or replaced."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in STRANGE)
            yield from ({**value, key: other} for other in strange_copies(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield value[:index] + value[index + 1 :]
            for other in (*STRANGE, *strange_copies(inner)):
                yield [*value[:index], other, *value[index + 1 :]]


def test_no_strange_value_ends_in_another_error(tmp_path: Path) -> None:
    karpathy = {"images": [
        {"filepath": "v", "filename": "a.jpg", "split": "test", "cocoid": 7,
         "sentences": [{"raw": "a dog"}]}]}  # fmt: skip
    line = {"image": "a.jpg", "captions": ["a dog"], "tags": ["dog"]}
    coco = write(tmp_path / "c.json", COCO)
    results = [{"image_id": 7, "caption": "a dog"}, {"image_id": 8, "caption": "a man"}]
    cases: list[tuple[Any, Callable[[Path], object]]] = [
        (COCO, read),
        (INSTANCES, lambda path: read(coco, "", path)),
        (karpathy, lambda path: read(path, "test")),
        (line, read),
        (results, lambda path: pair_results(path, read(coco), coco, True)),
    ]
    for value, reading in cases:
        for strange in strange_copies(value):
            with suppress(DataError):
                reading(write(tmp_path / "strange.json", strange))
