"""Captions and tags from an ONNX file, by ONNX Runtime and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image
from processes import ROOT

from captioner import Captioner, ImageError, SearchOptions
from captioner.export.onnx_file import write_onnx
from captioner.generation.description import NotFiniteError
from captioner.model.checkpoint import Checkpoint
from captioner.onnx_runtime import OnnxError, load
from captioner.settings import ConfigError
from conftest import draw_picture

# What a person types, in a process where torch cannot be imported.
WITHOUT_TORCH = (
    "import sys\n"
    "sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'safetensors', 'nltk']))\n"
    "from captioner.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def file(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    write_onnx(small, path, SearchOptions(num_captions=2, max_words=7), "float32")
    return path


def command(arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line where there is no torch."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip


def test_it_gives_what_torch_gives(small: Checkpoint, file: Path, photographs: Path) -> None:
    images: list[Any] = [photographs / "b.jpg", Image.new("CMYK", (40, 70), "red")]
    ours, theirs = load(file), Captioner(small)
    options = SearchOptions(num_captions=2, max_words=7)
    found = ours.describe(images, attention=True)
    wanted = theirs.describe(images, options, attention=True)
    for one, other in zip(found, wanted, strict=True):
        assert [c.words for c in one.captions] == [c.words for c in other.captions]
        assert [c.text for c in one.captions] == [c.text for c in other.captions]
        logs = [[c.log_prob, *c.word_log_probs] for c in one.captions]
        for mine, caption in zip(logs, other.captions, strict=True):
            assert mine == pytest.approx([caption.log_prob, *caption.word_log_probs], abs=1e-4)
        assert one.caption.attention == pytest.approx(other.caption.attention, abs=1e-5)
        assert [tag.name for tag in one.tags] == [tag.name for tag in other.tags]
        assert [t.score for t in one.tags] == pytest.approx([t.score for t in other.tags], abs=1e-5)
    assert [c.text for c in ours.caption(images)] == [d.caption.text for d in found]
    first = found[0].tags[0]
    assert ours.tags(images[:1], threshold=first.score) == [[first]]
    assert ours.tags(images[:1], max_tags=1) == [[first]]
    assert ours.tags(images[:1], only=[first.name]) == [[first]]
    assert ours.tags(images[:1], exclude=[first.name]) == [found[0].tags[1:]]
    assert ours.tag_scores(images) == pytest.approx(theirs.tag_scores(images), abs=1e-5)
    with pytest.raises(ConfigError, match="which is no tag of the model"):
        ours.tags(images, only=["unicorn"])
    assert ours.caption([]) == []
    pixels = ours.pixels(images[0])
    assert (pixels == theirs.pixels(images[0])).all()
    upright = pixels.transpose(1, 2, 0)
    assert ours.caption([upright])[0].text == found[0].caption.text
    assert ours.caption(upright[None])[0].text == found[0].caption.text
    assert ours.caption([images[0].read_bytes()]) == ours.caption(images[:1])


def test_options_are_those_of_the_file(file: Path, photographs: Path) -> None:
    captioner, images = load(file), [photographs / "b.jpg"]
    for options in (SearchOptions(), SearchOptions(num_captions=2), captioner.options):
        assert captioner.caption(images, options) == captioner.caption(images)
    for name, value in (("beam_size", 4), ("forbidden", ("dog",)), ("sample", True)):
        with pytest.raises(ConfigError, match=f"^{name} is"):
            captioner.caption(images, SearchOptions(**{name: value}))  # type: ignore[arg-type]


def test_images_that_are_none(file: Path, photographs: Path) -> None:
    captioner = load(file)
    with pytest.raises(ImageError, match="not a picture") as raised:
        captioner.caption([photographs / "b.jpg", photographs / "text.jpg"])
    assert (raised.value.index, raised.value.path) == (1, str(photographs / "text.jpg"))
    with pytest.raises(TypeError, match=r"write \['a.jpg'\]"):
        captioner.caption("a.jpg")
    with pytest.raises(TypeError, match=r"write \[ndarray\]"):
        captioner.tags(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected an array \(h, w, 3\)"):
        captioner.caption([np.zeros((8, 8, 3), np.float32)])


def test_a_model_of_numbers_that_are_not_finite_is_refused(
    small: Checkpoint, tmp_path: Path
) -> None:
    write_onnx(small, tmp_path / "a.onnx", SearchOptions(max_words=3), "float32")
    model = onnx.load(tmp_path / "a.onnx")
    bias = next(t for t in model.graph.initializer if t.name == "caption_decoder.fuse.bias")
    bias.raw_data = np.full(bias.dims, np.nan, np.float32).tobytes()
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(NotFiniteError):
        load(tmp_path / "a.onnx").caption([Image.new("RGB", (9, 9))])


def changed(file: Path, path: Path, **metadata: Any) -> Path:
    """Write a file with other metadata."""
    model = onnx.load(file)
    stored = {entry.key: entry.value for entry in model.metadata_props}
    about = json.loads(stored["captioner"]) | metadata
    helper.set_model_props(model, stored | {"captioner": json.dumps(about)})
    onnx.save(model, path)
    return path


def bad_files(file: Path, folder: Path) -> dict[str, Path]:
    """Return files that are no such model, by what is to be said of each."""
    (folder / "noise.onnx").write_bytes(bytes(range(256)) * 9)
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes(file.read_bytes()[:-5000])
    (folder / "folder.onnx").mkdir()
    model = onnx.load(file)
    model.opset_import[0].version = 999
    onnx.save(model, folder / "opset.onnx")
    value = helper.make_tensor_value_info("x", 1, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", 1, [1])])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(other, folder / "other.onnx")
    return {
        "No such file": folder / "absent.onnx",
        "Is a directory": folder / "folder.onnx",
        "cannot run it: [ONNXRuntimeError] : 7": folder / "noise.onnx",
        "cannot run it": folder / "empty.onnx",
        "cannot run it: ": folder / "cut.onnx",
        "999": folder / "opset.onnx",
        "not one of captioner's": folder / "other.onnx",
        "its inputs are": changed(
            file, folder / "size.onnx",
            preprocessing={"size": 99, "fit": "crop", "mean": [0.0] * 3, "std": [1.0] * 3},
        ),
        "tags, not 1": changed(file, folder / "tags.onnx", tags=["dog"], tag_frequencies=[1.0]),
        "make no sense": changed(file, folder / "words.onnx", vocabulary=7),
    }  # fmt: skip


def test_a_file_that_is_no_such_model_is_one_line(file: Path, tmp_path: Path) -> None:
    for said, path in bad_files(file, tmp_path).items():
        with pytest.raises(OnnxError) as raised:
            load(path)
        text = str(raised.value)
        assert text.startswith(f"{path}: ")
        assert said in text
        assert "\n" not in text


@pytest.mark.slow
def test_the_command_line_needs_no_torch(
    small: Checkpoint, file: Path, photographs: Path, tmp_path: Path
) -> None:
    strange = draw_picture(photographs / "<b>\x1b[31m.png", "green")
    ended = command(
        ["caption", photographs, "--model", file, "--output", tmp_path / "a.jsonl",
         "--report", tmp_path / "a.html", "--sidecar", "xmp", "--batch-size", "2"], tmp_path,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    found = {Path(record["image"]).name: record for record in records}
    assert found["text.jpg"]["error"] == "not a picture that Pillow can read"
    wanted = Captioner(small).describe([strange], SearchOptions(num_captions=2, max_words=7))[0]
    assert found[strange.name]["caption"] == wanted.caption.text
    assert len(found[strange.name]["captions"]) == 2
    assert [tag["name"] for tag in found[strange.name]["tags"]] == [t.name for t in wanted.tags]
    assert "<b>" not in (tmp_path / "a.html").read_text().partition("</style>")[2]
    again = command(
        ["caption", photographs, "--model", file, "--output", tmp_path / "a.jsonl"], tmp_path
    )
    assert again.returncode == 1
    assert (tmp_path / "a.jsonl").read_text().count("\n") == len(records)


@pytest.mark.slow
def test_what_a_file_cannot_do_is_said_in_a_line(file: Path, photographs: Path) -> None:
    image = photographs / "b.jpg"
    refused: list[tuple[list[str | Path], str]] = [
        (["caption", image, "--model", file, "--beam-size", "5"], "beam_size is 5, but"),
        (["caption", image, "--model", file, "--model", file], "goes alone"),
        (["caption", image, "--model", file, "--precision", "bfloat16"], "in float32"),
        (["tag", image, "--model", photographs / "absent.onnx"], "absent.onnx: No such file"),
    ]
    for arguments, said in refused:
        ended = command(arguments, photographs)
        assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
        assert said in ended.stderr
        assert ended.stderr.count("\n") == 1
    ended = command(["info", "--model", file], photographs)
    assert ended.returncode == 0, ended.stderr
    assert "squeezenet1_1" in ended.stdout
    assert "max_words 7" in ended.stdout
    assert command(["tag", image, "--model", file], photographs).returncode == 0


@pytest.mark.data
@pytest.mark.slow
def test_real_photographs_have_the_same_pixels(data: Path, file: Path) -> None:
    photographs = sorted(data.rglob("*.jpg"))
    captioner, torch = load(file), Captioner.load()
    assert (captioner.preprocessing.size, torch.preprocessing.size) == (64, 240)
    object.__setattr__(captioner._about, "preprocessing", torch.preprocessing)
    for path in photographs[:: len(photographs) // 20]:
        assert (captioner.pixels(path) == torch.pixels(path)).all()
