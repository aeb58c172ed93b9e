"""The scripts, run as a newcomer runs them: draw, train, evaluate, export, caption."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, captioner, forked, run_script
from skimage import data_dir  # type: ignore[attr-defined]

from captioner.inference import Captioner
from captioner.model.quantization import has_int8_products
from conftest import COLOURS, draw_picture

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, status: int = 0, **environment: str) -> str:
    """Run a script; return what it said."""
    ended = forked(run_script, script, list(arguments), environment)
    assert ended.status == status, ended.said
    assert "Traceback" not in ended.said
    return ended.said


def train(shapes: Path, run_folder: Path, *overrides: str, status: int = 0) -> str:
    places = [
        f"data.images={shapes / 'images'}",
        f"data.captions={shapes / 'train.json'}",
        f"data.instances={shapes / 'instances.json'}",
        f"data.val_captions={shapes / 'val.json'}",
    ]
    settings = [argument for place in (*places, *overrides) for argument in ("--set", place)]
    config = str(ROOT / "configs" / "shapes.toml")
    return run("train", config, "--run", str(run_folder), *settings, status=status)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    run("draw_shapes", str(folder), "--count", "150")
    return folder


@pytest.fixture(scope="module")
def best(shapes: Path) -> Path:
    said = train(shapes, shapes.parent / "run")
    assert "train: 135 photographs" in said
    return shapes.parent / "run" / "best.safetensors"


def test_training_learns_the_shapes(shapes: Path, best: Path) -> None:
    output = shapes.parent / "evaluated"
    run(
        "evaluate", str(best), "--images", str(shapes / "images"), "--captions",
        str(shapes / "val.json"), "--instances", str(shapes / "instances.json"),
        "--output", str(output),
    )  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert report["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert report["versions"].keys() >= {"python", "captioner", "torch"}
    assert report["captions"][0]["tags"]
    figures = report["figures"]
    assert figures["photographs"] == 15
    assert figures["bleu_1"] > 0.8
    assert figures["o_f1"] > 0.9


def test_captions_that_are_written_score_the_same_without_a_model(shapes: Path, best: Path) -> None:
    first, again = shapes.parent / "first", shapes.parent / "again"
    images, captions = str(shapes / "images"), str(shapes / "val.json")
    run("evaluate", str(best), "--images", images, "--captions", captions, "--output", str(first))
    for references in (captions, str(first / "references.json")):
        run(
            "evaluate", str(first / "results.json"), "--captions", references,
            "--output", str(again), "--training-captions", str(shapes / "train.json"),
        )  # fmt: skip
        figures = json.loads((first / "report.json").read_text())["figures"]
        scored = json.loads((again / "report.json").read_text())["figures"]
        assert {name: figures.get(name) for name in scored if name != "novel"} == {
            name: value for name, value in scored.items() if name != "novel"
        }
        assert 0.0 <= scored["novel"] <= 1.0
    ids = [entry["image_id"] for entry in json.loads((first / "results.json").read_text())]
    assert ids == [image["id"] for image in json.loads(Path(captions).read_text())["images"]]


def test_what_captioner_writes_is_scored(shapes: Path, best: Path, tmp_path: Path) -> None:
    # Without a model: the first reference of each photograph, as captioner's own JSONL.
    data = json.loads((shapes / "val.json").read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    texts = {a["image_id"]: a["caption"] for a in reversed(data["annotations"])}
    records = [{"image": f"./{names[i].upper()}", "caption": texts[i]} for i in names]
    records.append({"image": "other.jpg", "error": "an empty file"})
    (tmp_path / "out.jsonl").write_text("\n".join(map(json.dumps, records)))
    captions = ["--captions", str(shapes / "val.json")]
    said = run("evaluate", str(tmp_path / "out.jsonl"), *captions)
    assert "bleu_1           100.0" in said
    assert "15 photographs found under a name that differs by upper and lower case" in said
    assert "1 records of errors, which have no caption" in said
    (tmp_path / "split.txt").write_text("\r\n".join([*names.values()][:3]))
    split = ["--split", str(tmp_path / "split.txt")]
    said = run("evaluate", str(tmp_path / "out.jsonl"), *captions, *split, status=2)
    assert "has no caption of './" in said
    said = run("evaluate", str(tmp_path / "out.jsonl"), *captions, *split, "--subset")
    assert "photographs      3\n" in said
    assert "12 captions are of images without references, left out" in said


def test_what_would_spoil_an_evaluation_is_found_first(shapes: Path, best: Path) -> None:
    images, captions = str(shapes / "images"), str(shapes / "val.json")
    model = [str(best), "--images", images, "--captions", captions]
    said = run("evaluate", *model, "--output", captions, status=2)
    assert "val.json" in said
    said = run("evaluate", *model, "--output", str(shapes), status=2)
    assert "val.json would be overwritten; take another --output" in said
    said = run("evaluate", *model, "--meteor", status=2, PATH=str(shapes))
    assert "METEOR needs" in said
    assert "bleu" not in said


def test_photographs_that_are_left_out_are_told(shapes: Path, best: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(shapes / "images", images)
    names = [
        image["file_name"] for image in json.loads((shapes / "val.json").read_text())["images"]
    ]
    (images / names[0]).unlink()
    (images / names[1]).write_bytes(b"no picture")
    said = run(
        "evaluate", str(best), "--images", str(images), "--captions", str(shapes / "val.json"),
        "--output", str(tmp_path / "out"), status=1,
    )  # fmt: skip
    assert f"left out {images / names[0]}: it is missing" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["figures"]["left_out"] == 2
    assert set(report["left_out"]) == {str(images / name) for name in names[:2]}


def test_export_is_small_and_forgets_the_machine(shapes: Path, best: Path) -> None:
    small = shapes.parent / "small.safetensors"
    run("export", str(best), str(small), "--provenance", "data=drawn shapes")
    assert small.stat().st_size < 0.3 * best.stat().st_size
    assert str(shapes).encode() not in small.read_bytes()
    assert "drawn shapes" in forked(captioner, ["info", "--model", str(small)]).said


def test_benchmark_measures_the_search(tmp_path: Path) -> None:
    names = ["camera.png", "horse.png"]
    (tmp_path / "split.txt").write_text("\n".join(names))
    photographs = ["--images", data_dir, "--split", str(tmp_path / "split.txt")]
    settings = ["--rounds", "2", "--output", str(tmp_path / "figures.json")]

    def measured(*arguments: str) -> dict[str, Any]:
        run("benchmark", *settings, *arguments, *photographs)
        report = json.loads((tmp_path / "figures.json").read_text())
        return dict(report["figures"])

    sizes = ["--batch", "4", "--beam-size", "2", "--vocabulary", "20000", "--steps", "5"]
    figures = measured("search", *sizes, "--peer-beams")
    assert figures["float32, beam 2, vocabulary 20000"]["search / floor"]["median"] > 0.5
    memory = figures["float32, memory"]
    assert memory["largest_tensor_mb"] < memory["all_steps_mb"]
    assert figures["float32, early exit"]["computed / needed"] == 1.0
    figures = measured("steadiness", "--sizes", "1")
    assert figures["batches of 1"]["n-best differ"] == 0
    assert figures["smallest gap"]["between kept and cut"] > 0.0


def test_data_is_checked_before_training(tmp_path: Path) -> None:
    config, report = str(ROOT / "configs" / "shapes.toml"), tmp_path / "found.json"
    run("draw_shapes", str(tmp_path / "shapes"), "--count", "20")
    places = {
        "images": "images", "captions": "train.json", "instances": "instances.json",
        "val_captions": "val.json",
    }  # fmt: skip
    settings = [
        argument for key, name in places.items()
        for argument in ("--set", f"data.{key}={tmp_path / 'shapes' / name}")
    ]  # fmt: skip
    said = run("check_data", config, *settings)
    assert "train: 18 photographs, 36 captions\n" in said
    assert "(150,528 bytes each), 0.00226 GB of features (125,440 bytes each)" in said
    assert "problems found: 0\n" in said
    (tmp_path / "shapes" / "images" / "000000.jpg").unlink()
    said = run("check_data", config, *settings, "--json", str(report), status=1)
    assert "problems found: 1\n" in said
    found = json.loads(report.read_text())
    gone = str(tmp_path / "shapes" / "images" / "000000.jpg")
    assert found["train"]["missing"] == {gone: "it is missing"}
    (tmp_path / "shapes" / "train.json").write_text('{"images": [')
    said = run("check_data", config, *settings, status=2)
    assert said.startswith("check_data.py: ")
    assert "train.json: cannot be read as JSON" in said


def test_mistakes_end_with_one_line(shapes: Path, tmp_path: Path) -> None:
    said = train(shapes, tmp_path / "run", "optimizer.rate=1", status=2)
    assert said.startswith("train.py: unknown key 'optimizer.rate'; known here: lr")
    said = train(shapes, tmp_path / "run", "data.captions=nowhere.json", status=2)
    assert "nowhere.json: cannot be read" in said
    said = run("evaluate", "no.safetensors", "--images", ".", "--captions", "no.json", status=2)
    assert said.startswith("evaluate.py: no.json: cannot be read")
    assert "no such file" in run("export", "no.safetensors", "x.safetensors", status=2)


def test_benchmark_measures_the_encoder(tmp_path: Path) -> None:
    output = ["--rounds", "2", "--output", str(tmp_path / "figures.json")]
    run("benchmark", *output, "encoder", "--sizes", "1")
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    precisions = {"float32", "bfloat16", *(["int8"] if has_int8_products() else [])}
    assert figures.keys() == {f"{precision}, batches of 1" for precision in precisions}
    assert all(found["in use / as stored"]["median"] > 0.1 for found in figures.values())


def test_benchmark_measures_training(tmp_path: Path) -> None:
    small = ["--photographs", "8", "--batch", "4", "--vocabulary", "50", "--precisions", "float32"]
    output = ["--rounds", "2", "--output", str(tmp_path / "figures.json")]
    run("benchmark", *output, "training", *small)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["float32, step"]["step / floor"]["median"] > 1.0
    assert figures["float32, data"]["in memory / real"]["median"] > 0.0


def test_benchmark_measures_the_server(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for colour in COLOURS[:3]:
        draw_picture(tmp_path / "photos" / f"{colour}.png", colour)
    output = ["--rounds", "2", "--output", str(tmp_path / "figures.json")]
    photographs = ["--images", str(tmp_path / "photos"), "--precision", "float32"]
    run("benchmark", *output, "serve", *photographs, "--count", "3", "--clients", "2")
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["server / folder run"]["throughput"]["median"] > 0.0
    assert figures["an answer"]["p99 ms"] >= figures["an answer"]["p50 ms"] > 0.0
    done = {"lost": 0, "as in the folder run": 6, "refused at first": 0}
    assert figures["of 6 photographs"] == done


@pytest.mark.slow
def test_benchmark_measures_workers_of_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for colour in COLOURS:
        draw_picture(tmp_path / "photos" / f"{colour}.png", colour)
    output = ["--rounds", "2", "--threads", "1", "--output", str(tmp_path / "figures.json")]
    photographs = ["--images", str(tmp_path / "photos"), "--count", str(len(COLOURS))]
    workers = ["cluster", *photographs, "--concurrency", "1"]
    run("benchmark", *output, *workers, RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(ROOT))
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures.keys() == {"folder run", "1 workers", "1 workers / folder run"}
    assert figures["1 workers / folder run"]["throughput"]["median"] > 0.0


def test_tags_are_listed_learnt_alone_compared_and_timed(
    shapes: Path, best: Path, tmp_path: Path
) -> None:
    """A list is edited, a trained captioner gets its tags, and its captions stay as they are."""
    places = {
        "images": "images", "captions": "train.json", "instances": "instances.json",
        "val_captions": "val.json",
    }  # fmt: skip
    settings = [
        argument for key, name in places.items()
        for argument in ("--set", f"data.{key}={shapes / name}")
    ]  # fmt: skip
    listed, config = tmp_path / "tags.tsv", str(ROOT / "configs" / "tags.toml")
    assert "of 135 photographs" in run("build_tags", config, str(listed), *settings)
    assert "--overwrite replaces it" in run("build_tags", config, str(listed), *settings, status=2)
    head = [line for line in listed.read_text().splitlines() if line.startswith("#")]
    rows = [line for line in listed.read_text().splitlines() if not line.startswith("#")]
    listed.write_text("\n".join([*head, *rows[:-1]]))  # a person leaves one out

    new = tmp_path / "tags" / "best.safetensors"
    said = train(
        shapes, new.parent, f"model.init={best}", f"data.tags={listed}", "tags.epochs=2",
        "training.epochs=0", "training.frozen_epochs=0", "encoder.weights=imagenet",
    )  # fmt: skip
    assert "epoch 2, tags: loss " in said
    before, after = Captioner.load(best), Captioner.load(new)
    assert set(after.tag_names) == {row.split("\t")[0] for row in rows[:-1]}
    photographs = sorted((shapes / "images").iterdir())[:3]
    assert after.caption(photographs) == before.caption(photographs)

    data = ["--images", str(shapes / "images"), "--captions", str(shapes / "val.json")]
    compare = [str(best), *data, "--draws", "5", "--baseline"]
    said = run("compare_tags", *compare, "run head")
    assert [line.split("  ")[0] for line in said.splitlines()] == [
        f"run {kind}" for kind in ("frequencies", "decoder", "head", "both")
    ]
    assert said.count("map ahead ") == 3
    said = run("compare_tags", *compare, "head", status=2)
    assert said.startswith("compare_tags.py: --baseline is 'head'; it takes run frequencies, run")

    output = ["--rounds", "2", "--output", str(tmp_path / "figures.json")]
    timed = ["--images", str(shapes / "images"), "--model", str(new), "--count", "4"]
    run("benchmark", *output, "tags", *timed)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["tags / encoder"]["ratio"]["median"] > 0.5
    assert figures["both / captions"]["ratio"]["median"] > 0.5
