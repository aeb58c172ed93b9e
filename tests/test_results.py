"""Results of any form are paired with references of any form, by id or by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captioner.data.example import DataError
from captioner.data.readers import read
from captioner.data.readers.results import Paired, pair_results, read_results
from captioner.folder.outputs import output_file

NAMES = ("COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg")


def coco_files(
    folder: Path, results: object, captioned: tuple[int, ...] = (1, 2)
) -> tuple[Path, Path]:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    annotations = [{"image_id": i, "caption": f"a dog {i}"} for i in captioned]
    captions = folder / "captions.json"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json", captions


def pair(results: Path, captions: Path, split: str = "", subset: bool = False) -> Paired:
    return pair_results(results, read(captions, split), captions, subset)


def entries(*image_ids: object) -> list[dict[str, object]]:
    return [{"image_id": image_id, "caption": f"a cat {image_id}"} for image_id in image_ids]


def test_results_are_paired_by_id(tmp_path: Path) -> None:
    examples, captions, notes = pair(*coco_files(tmp_path, entries(2, 1)))
    assert [example.captions for example in examples] == [("a dog 1",), ("a dog 2",)]
    assert captions == ["a cat 1", "a cat 2"]
    assert notes == []
    results, references = coco_files(tmp_path, entries(7, "2"))
    examples, captions, notes = pair(results, references, subset=True)
    assert captions == ["a cat 2"]
    assert notes == [
        f"{results}: 1 captions are of images without references, left out",
        f"{results}: 1 images with references have no caption, left out",
    ]


@pytest.mark.parametrize(
    ("results", "captioned", "message"),
    [
        (entries(1), (1, 2), r"captions.json: .*results.json has no caption for 2; with --subset"),
        (
            entries(1, 2, 7),
            (1, 2),
            r"results.json: .*captions.json has no caption of 7; with --sub",
        ),
        (entries(1, 2), (1,), r"results.json: .*captions.json has no caption of 2;"),
        (entries(1, 2, 1), (1, 2), r"results.json: \[2\]: the image id 1 stands twice"),
        (entries(1, 2, "01"), (1, 2), r"results.json: \[2\]: the image id 1 stands twice"),
        (entries([]), (1, 2), r"results.json: \[0\]: 'image_id' is \[\]; expected a whole number"),
        (entries(None, None), (1, 2), r"\[0\]: 'image_id' is None.*; \[1\]: 'image_id' is None"),
        ([{"image_id": 1, "caption": None}], (1, 2), r"results.json: \[0\]: 'caption' is None"),
        ([3], (1, 2), r"results.json: \[0\]: expected an object, found 3"),
        ({"image_id": 1}, (1, 2), r"results.json: expected a list of objects"),
        ([], (1, 2), r"no caption for 1 and 1 more; with --subset"),
        ([{"image": "1.jpg", "caption": "a"}, *entries(2)], (1, 2), "some have an 'image_id' and"),
        ([{"image": "1.jpg", "caption": "a"}] * 2, (1,), "the photograph '1.jpg' stands twice"),
    ],
)
def test_results_that_cannot_be_paired(
    results: object, captioned: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        pair(*coco_files(tmp_path, results, captioned))


def test_an_empty_subset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results.json: holds no caption of an image of"):
        pair(*coco_files(tmp_path, []), subset=True)


def references(folder: Path) -> dict[str, tuple[Path, str]]:
    """Write the same references in every form that has names; return each with its split."""
    karpathy = [
        {"filepath": "val2014", "filename": name, "split": "test", "cocoid": n, "sentences": [
            {"raw": f"a dog {n}"}]} for n, name in enumerate(NAMES, 1)
    ]  # fmt: skip
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES, 1)],
        "annotations": [{"image_id": n, "caption": f"a dog {n}"} for n in (1, 2)],
    }
    lines = [{"image": f"val2014/{n}", "captions": [f"a dog {i}"]} for i, n in enumerate(NAMES, 1)]
    contents = {
        "karpathy.json": json.dumps({"images": karpathy}),
        "coco.json": json.dumps(coco),
        "tokens.txt": "".join(f"{name}#0\ta dog {n}\n" for n, name in enumerate(NAMES, 1)),
        "lines.jsonl": "\n".join(map(json.dumps, lines)),
        "table.csv": "image,caption\n" + "".join(
            f"{name},a dog {n}\n" for n, name in enumerate(NAMES, 1)),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {name: (folder / name, "test" if name[0] == "k" else "") for name in contents}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("form", ["karpathy.json", "coco.json", "tokens.txt", "lines.jsonl",
                                  "table.csv"])  # fmt: skip
def test_what_captioner_writes_is_scored_against_every_form(
    tmp_path: Path, form: str, ending: str
) -> None:
    output = output_file(str(tmp_path / f"out{ending}"))
    output.start([])
    for number, name in reversed([*enumerate(NAMES, 1)]):
        output.write({"image": f"../photos/{name}", "caption": f"a cat {number}", "log_prob": -1.5})
    records = [
        {"image": f"../photos/{name}", "caption": f"a cat {number}", "log_prob": -1.5}
        for number, name in enumerate(NAMES, 1)
    ]
    output.finish(records, False)
    examples, captions, _ = pair(tmp_path / f"out{ending}", *references(tmp_path)[form])
    assert [example.captions for example in examples] == [("a dog 1",), ("a dog 2",)]
    assert captions == ["a cat 1", "a cat 2"]


def test_records_of_errors_are_counted(tmp_path: Path) -> None:
    output = output_file(str(tmp_path / "out.csv"))
    output.start([])
    output.write({"image": f"photos/{NAMES[0]}", "caption": "a cat", "log_prob": -1.5})
    output.write({"image": f"photos/{NAMES[1]}", "error": "an empty file"})
    output.finish([], False)
    results, tokens = tmp_path / "out.csv", references(tmp_path)["tokens.txt"][0]
    note = f"{results}: 1 records of errors, which have no caption; the first: line 3"
    assert read_results(results) == ({f"photos/{NAMES[0]}": "a cat"}, True, [note])
    with pytest.raises(DataError, match=rf"has no caption for '{NAMES[1]}'; with --subset"):
        pair(results, tokens)
    assert pair(results, tokens, subset=True).captions == ["a cat"]


def test_ids_that_are_names(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps(entries(*NAMES)))
    for form, (file, split) in references(tmp_path).items():
        assert pair(results, file, split).captions == [f"a cat {name}" for name in NAMES], form


def test_names_that_are_unclear_are_refused(tmp_path: Path) -> None:
    captions = tmp_path / "x.txt"
    captions.write_text("train/1.jpg#0\ta dog\nval/1.jpg#0\ta man\n")
    results = tmp_path / "out.jsonl"
    results.write_text('{"image": "1.jpg", "caption": "a cat"}\n')
    with pytest.raises(DataError, match=r"'1.jpg': 'train/1.jpg' and 'val/1.jpg' fit its name"):
        pair(results, captions, subset=True)
    results.write_text('{"image": "photos/VAL/1.jpg", "caption": "a cat"}\n')
    assert pair(results, captions, subset=True).examples[0].captions == ("a man",)
    (tmp_path / "results.json").write_text(json.dumps(entries(1)))
    with pytest.raises(DataError, match=r"results.json: has image ids, but .*x.txt has none, and"):
        pair(tmp_path / "results.json", captions)


def test_two_images_of_one_name_are_told_apart_by_id_alone(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": "a.jpg"} for i in (1, 2)]
    annotations = [{"image_id": i, "caption": f"a dog {i}"} for i in (1, 2)]
    captions, results = tmp_path / "c.json", tmp_path / "r.jsonl"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    results.write_text("\n".join(json.dumps(entry) for entry in entries(1, 2)))
    assert pair(results, captions).captions == ["a cat 1", "a cat 2"]
    results.write_text('{"image": "a.jpg", "caption": "a cat"}\n')
    with pytest.raises(DataError, match=r"'a.jpg': 2 images have this name"):
        pair(results, captions)


def test_references_need_no_names_to_be_paired_by_id(tmp_path: Path) -> None:
    captions = tmp_path / "c.json"
    captions.write_text(json.dumps(
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}))  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(entries(1)))
    assert pair(tmp_path / "r.json", captions).captions == ["a cat 1"]
