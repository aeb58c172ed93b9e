"""ONNX files: the search in the graph finds what the package's own search finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from processes import forked, run_script

from captioner import Captioner
from captioner.data.calibration import TagScoring
from captioner.data.tags import TagSet
from captioner.export.onnx_file import write_onnx
from captioner.generation.options import SearchOptions
from captioner.model.checkpoint import Checkpoint, build_model, default_path, load_checkpoint
from captioner.settings import ConfigError
from conftest import WORDS

Outputs = dict[str, np.ndarray[Any, Any]]


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def run(found: onnxruntime.InferenceSession, pixels: np.ndarray[Any, Any]) -> Outputs:
    names = [output.name for output in found.get_outputs()]
    return dict(zip(names, found.run(names, {"pixels": pixels}), strict=True))


def noise(images: int, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (images, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3)


def arrays(pixels: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    return list(torch.from_numpy(pixels))


def of_kind(small: Checkpoint, cell: Any, attention: bool, tied: bool) -> Checkpoint:
    """Return an untrained captioner with other decoders."""
    torch.manual_seed(1)
    config = small.config
    kind = {"cell": cell, "attention": attention, "tied": tied}
    model = replace(
        config.model,
        caption=replace(config.model.caption, **kind),
        tags=replace(config.model.tags, **kind),
    )
    config = replace(config, model=model)
    network = build_model(config, small.vocabulary, small.tags).eval()
    with torch.no_grad():
        for decoder in (network.caption_decoder, network.tag_decoder):
            decoder.initial.weight *= 3000.0
    return Checkpoint(network, config, small.vocabulary, small.tags)


def assert_same(
    checkpoint: Checkpoint, options: SearchOptions, path: Path, images: int = 5
) -> None:
    """Compare all outputs of a file with what the package's own search and decoders give."""
    write_onnx(checkpoint, path, options, "float32")
    pixels = noise(images)
    out = run(session(path), pixels)
    captioner = Captioner(checkpoint)
    grids = captioner.encode(list(pixels))
    vocabulary = checkpoint.vocabulary.words
    for image, captions in enumerate(captioner.captions_of(grids, options, attention=True)):
        count = int((out["log_probs"][image] > -np.inf).sum())
        assert count == len(captions)
        for place, caption in enumerate(captions):
            at = (image, place)
            length = int(out["lengths"][at])
            assert tuple(vocabulary[t] for t in out["tokens"][at][:length]) == caption.words
            assert out["log_probs"][at] == pytest.approx(caption.log_prob, abs=1e-4)
            assert out["finished"][at] == caption.finished
            terms = out["word_log_probs"][at][:length]
            assert terms == pytest.approx(np.array(caption.word_log_probs), abs=1e-4)
            if caption.attention is not None:
                assert out["attention"][at][:length] == pytest.approx(caption.attention, abs=1e-5)
            else:
                assert "attention" not in out
    assert out["tag_scores"] == pytest.approx(captioner.tag_scores(arrays(pixels)), abs=1e-5)


@pytest.mark.parametrize(
    ("cell", "attention", "tied"),
    [("lstm", True, True), ("gru", True, False), ("rnn", False, True), ("lstm", False, False)],
)
def test_every_decoder_gives_what_torch_gives(
    small: Checkpoint, tmp_path: Path, cell: str, attention: bool, tied: bool
) -> None:
    checkpoint = of_kind(small, cell, attention, tied)
    assert_same(checkpoint, SearchOptions(max_words=7), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(beam_size=1, max_words=3, length_penalty=0.0),
        SearchOptions(beam_size=5, num_captions=4, max_words=6, length_norm="gnmt"),
        SearchOptions(beam_size=4, num_captions=4, no_repeat=1, min_words=4, max_words=8),
        SearchOptions(no_repeat=2, max_words=12, min_words=12, length_penalty=1.5),
        SearchOptions(no_repeat=3, max_words=12, min_words=10, unknown=True),
        SearchOptions(no_repeat=9, max_words=5),
        SearchOptions(forbidden=("dog", "a"), no_ending=("on", "red"), max_words=5, min_words=2),
        SearchOptions(beam_size=20, num_captions=20, max_words=4),
        # No caption can be finished: the furthest one is given.
        SearchOptions(no_repeat=1, min_words=15, max_words=20),
        SearchOptions(no_ending=tuple(WORDS), max_words=4, min_words=1, num_captions=2),
    ],
    ids=str,
)
def test_every_option_finds_what_the_search_finds(
    small: Checkpoint, tmp_path: Path, options: SearchOptions
) -> None:
    assert_same(of_kind(small, "lstm", True, True), options, tmp_path / "a.onnx")


@pytest.mark.parametrize("head", ["none", "mean", "cells"])
def test_a_model_that_scores_all_tags_scores_them_alike(
    small: Checkpoint, tmp_path: Path, head: Any
) -> None:
    config = replace(small.config, model=replace(small.config.model, tag_head=head))
    scored = of_kind(replace(small, config=config), "gru", True, True)
    scored.scoring = TagScoring((0.7, 0.4, 0.2, 0.5), 0.1, ((0.5, 0.2),))
    scored.tags = TagSet(small.tags.names, [0.5, 0.1, 0.9, 0.02, 0.3])
    assert_same(scored, SearchOptions(max_words=3), tmp_path / "a.onnx")


def test_an_image_gives_the_same_whatever_is_beside_it(small: Checkpoint, tmp_path: Path) -> None:
    write_onnx(small, tmp_path / "a.onnx", SearchOptions(max_words=6), "float32")
    found, pixels = session(tmp_path / "a.onnx"), noise(7)
    together = run(found, pixels)
    for image in range(len(pixels)):
        alone = run(found, pixels[image : image + 1])
        length = alone["lengths"][0, 0]
        assert length == together["lengths"][image, 0]
        assert (alone["tokens"][0, 0, :length] == together["tokens"][image, 0, :length]).all()
        assert alone["log_probs"][0] == pytest.approx(together["log_probs"][image], abs=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("groups", 3), ("required", ("dog",)), ("sample", True), ("temperature", 0.5), ("seed", 1)],
)
def test_what_a_graph_cannot_have_is_refused_by_name(
    small: Checkpoint, tmp_path: Path, option: str, value: object
) -> None:
    options = replace(SearchOptions(), **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{option} is"):
        write_onnx(small, tmp_path / "a.onnx", options)
    assert not any(tmp_path.iterdir())


def test_the_file_says_what_it_takes_and_gives(small: Checkpoint, tmp_path: Path) -> None:
    options = SearchOptions(beam_size=2, max_words=5)
    for name in "ab":
        write_onnx(small, tmp_path / f"{name}.onnx", options)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    model = onnx.load(tmp_path / "a.onnx")
    stored = {entry.key: entry.value for entry in model.metadata_props}
    about = json.loads(stored["captioner"])
    assert stored["format"] == "captioner onnx 1"
    assert about["vocabulary"][4:] == WORDS
    assert about["options"]["beam_size"] == 2
    assert about["preprocessing"]["size"] == 64
    assert set(about["contract"]) == {"pixels", *(output.name for output in model.graph.output)}
    large = [t for t in model.graph.initializer if len(t.dims) > 1 and len(t.raw_data) > 1000]
    assert large
    assert {t.data_type for t in large} == {onnx.TensorProto.INT8}


@pytest.mark.slow
def test_the_default_is_exported_from_the_command_line(tmp_path: Path) -> None:
    target = tmp_path / "default.onnx"
    ended = forked(run_script, "export", ["default", str(target), "--set", "beam_size=2"], {})
    assert ended.status == 0, ended.said
    assert target.stat().st_size <= 1.3 * default_path().stat().st_size
    # Sides of 240, 120, 60 and 30 pixels are halved, with more padding after than before.
    assert sum(node.op_type == "Pad" for node in onnx.load(target).graph.node) == 4
    for arguments, said in (
        (["default", str(target), "--set", "groups=3"], "groups is 3, which an ONNX file"),
        (["default", str(target), "--set", "beams=3"], "unknown key 'beams'"),
        (["default", str(tmp_path / "a.safetensors"), "--set", "beam_size=2"], "FILE.onnx"),
        ([str(target), str(tmp_path / "b.onnx")], "not a safetensors file"),
    ):
        ended = forked(run_script, "export", arguments, {})
        assert ended.status == 2
        assert said in ended.said
        assert "Traceback" not in ended.said


@pytest.mark.data
@pytest.mark.slow
def test_real_photographs_get_the_captions_of_torch(data: Path, tmp_path: Path) -> None:
    options = SearchOptions(num_captions=2)
    write_onnx(load_checkpoint(default_path()), tmp_path / "a.onnx", options)
    found, captioner = session(tmp_path / "a.onnx"), Captioner.load(precision="float32")
    words, photographs = captioner.checkpoint.vocabulary.words, sorted(data.rglob("*.jpg"))
    chosen = photographs[:: len(photographs) // 200][:200]
    assert len(chosen) == 200
    for start in range(0, 200, 20):
        pixels = [captioner.pixels(path) for path in chosen[start : start + 20]]
        out = run(found, np.stack(pixels))

        for image, captions in enumerate(captioner.captions_of(captioner.encode(pixels), options)):
            ours = [words[t] for t in out["tokens"][image, 0][: out["lengths"][image, 0]]]
            ranks = [c.log_prob / (len(c.words) + 1) ** options.length_penalty for c in captions]
            if len(ranks) < 2 or ranks[0] - ranks[1] > 1e-4:
                assert tuple(ours) == captions[0].words, chosen[start + image]
                assert out["log_probs"][image, 0] == pytest.approx(captions[0].log_prob, abs=1e-3)
