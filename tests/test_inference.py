"""The library: lists in, lists out, the same whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captioner
from captioner.config import Preprocessing
from captioner.data.calibration import Calibration
from captioner.folder import describe_folder
from captioner.inference import Captioner, ImageLike
from captioner.model.checkpoint import Checkpoint, build_model, save_checkpoint
from conftest import draw_picture


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40 + 7 * i, 240 - 5 * i) for i in range(count)]
    return [
        Image.fromarray(generator.integers(0, 20 + 6 * i, (*size, 3), np.uint8))
        for i, size in enumerate(sizes)
    ]


def test_public_names() -> None:
    for name in captioner.__all__:
        assert getattr(captioner, name).__doc__
    assert set(captioner.__all__) <= set(dir(captioner))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = captioner.Nonsense


def test_every_kind_of_image_is_the_same(tiny: Checkpoint, tmp_path: Path) -> None:
    path = draw_picture(tmp_path / "x.png", "red")
    image = Image.open(path)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    array = np.asarray(image)
    kinds: list[ImageLike] = [path, str(path), image, tensor, array, path.read_bytes()]
    model = Captioner(tiny)
    alone = [model.describe([kind])[0] for kind in kinds]
    alone += model.describe([BytesIO(path.read_bytes())])
    with path.open("rb") as file:
        alone += model.describe([file])
    assert alone == [alone[0]] * 8
    # Where an image stands in its batch is seen in the last digits of its log-probability.
    assert [d.caption.text for d in model.describe(kinds)] == [alone[0].caption.text] * 6


def test_a_batch_is_a_list(tiny: Checkpoint) -> None:
    model, generator = Captioner(tiny), np.random.default_rng(1)
    pixels = generator.integers(0, 256, (3, 41, 67, 3), np.uint8)
    expected = model.describe([Image.fromarray(picture) for picture in pixels])
    assert model.describe(pixels) == expected
    assert model.describe(torch.from_numpy(pixels).permute(0, 3, 1, 2)) == expected
    # A view whose colours are in another order in memory is taken as it reads.
    assert model.caption([pixels[0, ::-1, ::2]]) == model.caption([pixels[0, ::-1, ::2].copy()])


def test_bytes_are_read_as_files_are(tiny: Checkpoint, photographs: Path) -> None:
    model = Captioner(tiny)

    def said(image: ImageLike) -> str:
        try:
            return str(model.caption([image])[0])
        except captioner.ImageError as error:
            return error.reason

    paths = [path for path in photographs.iterdir() if path.is_file()]
    assert len(paths) > 5
    assert [said(path.read_bytes()) for path in paths] == [said(path) for path in paths]


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "HTTP://x/y", "data:image/png,x"])
def test_a_url_is_refused_with_what_to_do(tiny: Checkpoint, url: str) -> None:
    with pytest.raises(captioner.ImageError, match=r"image 0 .*nothing is downloaded: save what"):
        Captioner(tiny).caption([url])


def test_single_options_are_keywords(tiny: Checkpoint) -> None:
    model, images = Captioner(tiny), pictures(3)
    options = captioner.SearchOptions(beam_size=4, max_words=2)
    assert model.caption(images, beam_size=4, max_words=2) == model.caption(images, options)
    wider = replace(options, num_captions=2)
    assert model.describe(images, options, num_captions=2) == model.describe(images, wider)
    with pytest.raises(TypeError, match="there is no option beam; there are beam_size, num_cap"):
        model.caption(images, beam=4)
    with pytest.raises(ValueError, match="beam_size is 0; it takes 1 to 100"):
        model.caption(images, beam_size=0)


def test_progress_is_told_after_each_image(tiny: Checkpoint) -> None:
    told: list[int] = []
    Captioner(tiny).describe(pictures(5) * 7, progress=told.append)
    assert told == list(range(1, 36))


def test_what_is_printed_is_of_use(tiny: Checkpoint) -> None:
    model = Captioner(tiny)
    caption = model.caption(pictures(1))[0]
    assert str(caption) == f"{caption}" == caption.text
    assert repr(model) == "<Captioner: mobilenet_v3_small, 9 words, 5 tags, float32 on cpu>"
    assert repr(Captioner([tiny, tiny])).startswith("<Captioner: 2 models, mobilenet_v3_small, ")


def test_a_description_is_a_record(tiny: Checkpoint, photographs: Path) -> None:
    model, options = Captioner(tiny), captioner.SearchOptions(num_captions=3)
    path = photographs / "b.jpg"
    (record,) = describe_folder(model, [path], options=options)
    assert {"image": str(path), **model.describe([path], options)[0].to_dict()} == record


def test_results_are_one_an_image_in_order(tiny: Checkpoint) -> None:
    model, images = Captioner(tiny), pictures(5)
    described = model.describe(images)
    assert [d.caption for d in described] == model.caption(images)
    assert [d.tags for d in described] == model.tags(images)
    assert [d.captions[0] for d in described] == [d.caption for d in described]
    assert [model.caption([]), model.tags([]), model.describe([])] == [[], [], []]
    for tags in model.tags(images):
        assert len({tag.name for tag in tags}) == len(tags)
        assert [t.score for t in tags] == sorted((t.score for t in tags), reverse=True)
        assert all(0.0 <= tag.score <= 1.0 for tag in tags)


def test_threshold_drops_tags(tiny: Checkpoint) -> None:
    model, images = Captioner(tiny), pictures(3)
    everything = model.tags(images)
    middle = sorted(tag.score for tags in everything for tag in tags)[len(everything)]
    assert model.tags(images, threshold=middle) == [
        [tag for tag in tags if tag.score >= middle] for tags in everything
    ]
    assert model.tags(images, threshold=1.1) == [[], [], []]


def test_neighbours_change_nothing(tiny: Checkpoint) -> None:
    model, images = Captioner(tiny), pictures(37)
    together = model.caption(images)
    # A misplaced row would show: hardly two of these are as probable as each other.
    assert len({round(caption.log_prob, 2) for caption in together}) > 20
    for again in (
        [model.caption([image])[0] for image in images],
        model.caption(images[::-1])[::-1],
    ):
        assert [caption.text for caption in again] == [caption.text for caption in together]
        for ours, theirs in zip(again, together, strict=True):
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-3)


def test_a_batch_is_encoded_in_parts(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner(tiny)
    pixels = [captioner.pixels(picture) for picture in pictures(7)]
    size, sizes = pixels[0][0].size, []
    (encoder,) = captioner.encoders
    encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = {}
    for kept, at_once in ((True, size), (False, 3 * size), (False, size - 1)):
        monkeypatch.setattr("captioner.inference.freed_memory_is_kept", lambda kept=kept: kept)
        monkeypatch.setattr("captioner.inference._PIXELS_AT_ONCE", at_once)
        sizes.clear()
        (grid,) = captioner.encode(pixels)
        found[tuple(sizes)] = grid
    assert list(found) == [(7,), (3, 3, 1), (1,) * 7]
    whole, *others = found.values()
    assert all(torch.allclose(whole, grid, atol=1e-5) for grid in others)


def test_options_reach_the_search(tiny: Checkpoint) -> None:
    options = captioner.SearchOptions(beam_size=4, num_captions=3, max_words=2)
    for description in Captioner(tiny).describe(pictures(2), options):
        assert len(description.captions) == 3
        assert all(len(caption.text.split()) <= 2 for caption in description.captions)
        values = [caption.log_prob for caption in description.captions]
        assert values == sorted(values, reverse=True)


def test_options_are_checked_for_unknown_words(tiny: Checkpoint) -> None:
    model = Captioner(tiny)
    model.check(captioner.SearchOptions(required=("dog",)))
    with pytest.raises(ValueError, match="forbidden has 'zebra'"):
        model.check(captioner.SearchOptions(forbidden=("dog", "zebra")))


def test_attention_when_asked(tiny: Checkpoint) -> None:
    images = pictures(3)
    for description in Captioner(tiny).describe(images, attention=True):
        assert description.caption.attention is not None
        assert description.caption.attention.shape == (len(description.caption.words), 4)
    assert Captioner(tiny).caption(images)[0].attention is None


def test_an_ensemble_is_loaded_from_a_list(tiny: Checkpoint, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_checkpoint(tiny, first)
    torch.manual_seed(5)
    model = build_model(tiny.config, tiny.vocabulary, tiny.tags)
    save_checkpoint(replace(tiny, model=model, calibration=Calibration(3.0, 1.0)), second)
    both = Captioner.load([first, second], device="cpu", precision="float32")
    images = pictures(2)
    described = both.describe(images, attention=True)
    assert [d.caption for d in described] == both.caption(images)
    assert [c.calibration.slope for c in both.checkpoints] == [1.0, 3.0]
    assert both.checkpoint is both.checkpoints[0]
    alone = Captioner.load(first, device="cpu", precision="float32").describe(images)
    assert [d.caption.log_prob for d in described] != [d.caption.log_prob for d in alone]
    assert Captioner.load([first], device="cpu", precision="float32").describe(images) == alone


def test_members_that_do_not_fit_are_refused(tiny: Checkpoint) -> None:
    other = replace(tiny, config=replace(tiny.config, preprocessing=Preprocessing(size=96)))
    with pytest.raises(ValueError, match="checkpoint 3 of the ensemble has other preprocessing"):
        Captioner([tiny, tiny, other])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        Captioner.load([])


@pytest.mark.parametrize(
    "bare",
    ["dog.jpg", Path("dog.jpg"), Image.new("RGB", (2, 2)), b"x", BytesIO(b"x"),
     torch.zeros(3, 4, 5).byte(), np.zeros((4, 5, 3), np.uint8)],
)  # fmt: skip
def test_a_bare_image_is_refused(tiny: Checkpoint, bare: object) -> None:
    for method in (Captioner(tiny).caption, Captioner(tiny).tags, Captioner(tiny).describe):
        with pytest.raises(TypeError, match=r"write \["):
            method(bare)  # type: ignore[arg-type]


def test_an_unreadable_image_is_named(tiny: Checkpoint, photographs: Path) -> None:
    images = [photographs / "b.jpg", photographs / "cut.jpg"]
    with pytest.raises(captioner.ImageError, match=r"image 1 \(.*cut.jpg\): ") as caught:
        Captioner(tiny).caption(images)
    assert caught.value.index == 1
    assert caught.value.path == str(photographs / "cut.jpg")
    with (
        Image.open(photographs / "cut.jpg") as cut,
        pytest.raises(captioner.ImageError, match="image 0: ") as caught,
    ):
        Captioner(tiny).caption([cut])
    assert caught.value.path is None


@pytest.mark.parametrize(
    "image",
    [3, None, torch.zeros(3, 4, 5), torch.zeros(5, 5).byte(), StringIO("text"),
     np.zeros((4, 5, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros((4, 5), np.uint8)],
)  # fmt: skip
def test_what_is_no_image_is_refused(tiny: Checkpoint, image: object) -> None:
    with pytest.raises((TypeError, ValueError), match="expected a"):
        Captioner(tiny).caption([image])  # type: ignore[list-item]


def test_load_chooses_device_and_precision(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, path)
    loaded = Captioner.load(path, device="cpu", precision="bfloat16")
    assert loaded.precision == torch.bfloat16
    assert loaded.caption(pictures(2))
    with pytest.raises(ValueError, match="it takes auto, cuda, mps, cpu"):
        Captioner.load(path, device="abacus")
    with pytest.raises(ValueError, match="it takes auto, float32, bfloat16, int8"):
        Captioner.load(path, precision="int3")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no cuda device"):
            Captioner.load(path, device="cuda")
