"""The encoder in 8 bits: exact integers, one grid in any batch, ranges, and when it is chosen."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from test_scripts import run
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import EncoderConfig, Preprocessing
from captioner.data.tags import TagSet
from captioner.data.vocabulary import Vocabulary
from captioner.inference import Captioner, calibrate
from captioner.model import device
from captioner.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from captioner.model.device import choose_precision
from captioner.model.efficientnet_lite import SameConv2d, chain
from captioner.model.encoder import Encoder
from captioner.model.quantization import (
    Int8Backbone,
    _best_range,
    _error,
    _Int8Conv,
    has_int8_products,
    observe,
)
from captioner.settings import ConfigError
from conftest import TAGS, WORDS, draw_picture, tiny_config

CPU = torch.device("cpu")

needs_products = pytest.mark.skipif(
    not has_int8_products(), reason="this processor has no exact products of int8 (VNNI)"
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Return an encoder whose BatchNorms have numbers of their own."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = Encoder("efficientnet_lite0", Preprocessing(size=70)).eval()
        encoder.backbone.train()
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of all that was seen
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
        for _ in range(2):
            encoder.backbone(encoder._normalised(photographs(8)))
        return encoder.eval()


@pytest.fixture(scope="module")
def ranges(encoder: Encoder) -> dict[str, tuple[float, float]]:
    return encoder.observed([photographs(8)])


@pytest.fixture(scope="module")
def checkpoint(encoder: Encoder) -> Checkpoint:
    config = replace(
        tiny_config(),
        preprocessing=encoder.preprocessing,
        encoder=EncoderConfig(encoder.name, "random"),
    )
    words, tags = Vocabulary(WORDS), TagSet(TAGS)
    torch.manual_seed(0)
    model = build_model(config, words, tags).eval()
    model.encoder.load_state_dict(encoder.state_dict())
    return Checkpoint(model, config, words, tags)


def photographs(count: int, side: int = 70) -> Tensor:
    """Return pixels with large and small things in them."""
    generator = torch.Generator().manual_seed(count)
    small = torch.rand((count, 3, 7, 7), generator=generator)
    noise = torch.rand((count, 3, side, side), generator=generator)
    smooth = F.interpolate(small, size=(side, side), mode="bilinear")
    return ((0.8 * smooth + 0.2 * noise) * 255.0).to(torch.uint8)


def as_real(codes: Tensor, scale: float, zero: int) -> Tensor:
    return (codes.double() - zero) * scale


@needs_products
def test_each_convolution_computes_what_its_codes_stand_for(
    encoder: Encoder, ranges: dict[str, tuple[float, float]]
) -> None:
    backbone = encoder.in_int8(ranges).backbone
    assert isinstance(backbone, Int8Backbone)
    folded = encoder.folded().backbone
    normalised = encoder._normalised(photographs(3))
    with torch.inference_mode():
        x = kept = backbone._pixels.of_real(normalised)
        for link, layer, opens in zip(
            chain(folded), backbone.convolutions, backbone._opens, strict=True
        ):
            assert isinstance(layer, _Int8Conv)
            kept = x.clone() if opens else kept
            scale = layer._scale[:, None, None, None]
            exact = deepcopy(link.conv).double()
            exact.weight.copy_((link.conv.weight / scale).round().double() * scale.double())
            wanted = exact(as_real(x, *layer._source))
            if layer._added is not None:
                wanted = wanted + as_real(kept, *layer._added)
            x = layer(x, kept.clone())
            if layer._target is None:
                torch.testing.assert_close(x.double(), wanted.clamp(0.0, 6.0), rtol=0, atol=1e-4)
                continue
            codes = layer._target.of_real(wanted)
            apart = (x.int() - codes.int()).abs()
            # At most one code apart, where the exact result lies between two.
            assert int(apart.max()) <= 1
            assert float((apart > 0).double().mean()) < 1e-3
            assert len(codes.flatten().bincount().nonzero()) > 20


@needs_products
def test_a_grid_is_the_same_in_any_batch(
    encoder: Encoder, ranges: dict[str, tuple[float, float]]
) -> None:
    int8, pixels = encoder.in_int8(ranges), photographs(9)
    with torch.inference_mode():
        together = int8(pixels)
        alone = torch.cat([int8(one[None]) for one in pixels])
        exact = encoder(pixels)
        copies = [copied(pixels) for copied in (deepcopy(int8), pickle.loads(pickle.dumps(int8)))]
    with pytest.raises(ValueError, match=r"takes pixels of 70 x 70, not of \(71, 71\)"):
        int8(photographs(1, side=71))
    assert torch.equal(together, alone)
    assert all(torch.equal(together, again) for again in copies)
    assert together.dtype == torch.float32
    # At random weights small errors grow from layer to layer; another grid would be at 2.
    assert 0.0 < float((together - exact).square().mean() / exact.square().mean()) < 0.5


@needs_products
def test_captions_in_int8_are_much_those_of_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pictures = list(photographs(6))
    calibrate(checkpoint, pictures)
    path = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, path, "int8")
    assert load_checkpoint(path).ranges == checkpoint.ranges
    plain = Captioner.load(path, device="cpu", precision="float32")
    quick = Captioner.load(path, device="cpu", precision="int8")
    assert quick.precision == torch.int8
    assert "int8 on cpu" in repr(quick)
    assert quick.digest() == plain.digest()
    assert [caption.finished for caption in quick.caption(pictures)] == [
        caption.finished for caption in plain.caption(pictures)
    ]


@needs_products
def test_the_grid_of_the_default_is_much_that_of_float32() -> None:
    pictures = [np.asarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea")]
    grids: list[Tensor] = []
    for precision in ("float32", "int8"):
        captioner = Captioner.load(device="cpu", precision=precision)
        grids += captioner.encode([captioner.pixels(picture) for picture in pictures])
    exact, found = grids
    assert 0.0 < float((found - exact).square().mean() / exact.square().mean()) < 0.02


def test_ranges_are_those_of_the_least_error() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(1_000_000, generator=generator) * 2.0 - 1.0
    assert _best_range(even) == pytest.approx((-1.0, 1.0), abs=0.01)
    # Two outputs far out would cost all others their precision: better to clip them.
    outliers = torch.cat([even, torch.tensor([-10.0, 10.0])])
    clipped = _best_range(outliers)
    assert clipped == pytest.approx((-4.0, 4.0))
    assert _error(outliers, *clipped) < 0.5 * _error(outliers, -10.0, 10.0)
    # Nothing but zeros still has a range, with a code for 0.
    assert _best_range(torch.zeros(5))[1] > 0.0
    assert _best_range(torch.full((5,), 2.0))[0] == 0.0


def test_every_link_is_observed(encoder: Encoder, ranges: dict[str, tuple[float, float]]) -> None:
    links = list(chain(encoder.backbone))
    assert list(ranges) == [link.name for link in links]
    convolutions = [m for m in encoder.backbone.modules() if isinstance(m, SameConv2d)]
    assert [link.conv for link in links] == convolutions
    for link in links:
        low, high = ranges[link.name]
        assert low <= 0.0 < high
        if link.is_clamped:
            assert low == 0.0
            assert high <= 6.0
    assert sum(link.opens for link in links) == sum(link.adds for link in links) == 9
    # Observing leaves no hook behind.
    folded = encoder.folded().backbone
    observe(folded, [encoder._normalised(photographs(1))])
    assert not any(module._forward_hooks for module in folded.modules())


@pytest.mark.parametrize(
    ("bfloat16", "products", "calibrated", "expected"),
    [
        (True, True, True, torch.bfloat16),
        (False, True, True, torch.int8),
        (False, True, False, torch.float32),
        (False, False, True, torch.float32),
    ],
)
def test_auto_takes_what_the_processor_gains_from(
    bfloat16: bool,
    products: bool,
    calibrated: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(device, "has_int8_products", lambda: products)
    assert choose_precision("auto", CPU, calibrated) == expected
    # Training has no int8.
    assert choose_precision("auto", CPU) in (torch.bfloat16, torch.float32)


def test_what_int8_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_int8_products", lambda: True)
    assert choose_precision("int8", CPU, calibrated=True) == torch.int8
    with pytest.raises(ConfigError, match=r"'int8', but the model has no ranges.*--calibration"):
        choose_precision("int8", CPU)
    with pytest.raises(ConfigError, match="'int8', but a cuda device computes in bfloat16"):
        choose_precision("int8", torch.device("cuda"), calibrated=True)
    monkeypatch.setattr(device, "has_int8_products", lambda: False)
    with pytest.raises(ConfigError, match=r"'int8', but this processor has no .* \(VNNI\)"):
        choose_precision("int8", CPU, calibrated=True)


def test_another_encoder_is_refused(tiny: Checkpoint, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="int8 takes an EfficientNet-Lite as encoder, not"):
        calibrate(tiny, list(photographs(1)))
    with pytest.raises(ConfigError, match="takes a photograph"):
        calibrate(checkpoint, [])
    with pytest.raises(ConfigError, match="was not calibrated for int8"):
        Captioner(replace(checkpoint, ranges=None), precision=torch.int8)
    with pytest.raises(ConfigError, match="ranges of activations are those of another encoder"):
        checkpoint.model.encoder.in_int8({"stem": (0.0, 6.0)})


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"stem": [0.0, 0.0]}, "'stem' range from 0 to 0"),
        ({"stem": [1.0, 2.0]}, "'stem' range from 1 to 2"),
        ({"stem": [0.0, 1e300]}, "'stem' range from 0 to 1e\\+300"),
        ({"stem": 3}, "not a checkpoint"),
        ([1, 2], "not a checkpoint"),
    ],
)
def test_damaged_ranges_are_refused(
    damaged: object, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["captioner"]) | {"activation_ranges": damaged}
    save_file(tensors, path, metadata | {"captioner": json.dumps(about)})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_bytes_do_not_depend_on_the_batch_they_were_observed_in(encoder: Encoder) -> None:
    pixels = photographs(4)
    assert encoder.observed([pixels]) == encoder.observed([pixels])


@needs_products
@pytest.mark.data
def test_the_default_is_as_good_in_int8(data: Path) -> None:
    """The first 300 development photographs, within the 0.3 CIDEr-D that ``auto`` asks for."""
    from captioner.data import readers
    from captioner.evaluation import evaluate_images
    from captioner.generation.options import SearchOptions

    flickr = data / "flickr8k"
    loaded = readers.load(flickr / "captions.token.txt", flickr / "images", str(flickr / "dev.txt"))
    scores = {}
    for precision in ("float32", "int8"):
        captioner = Captioner.load(device="cpu", precision=precision)
        checkpoint = captioner.checkpoint
        (checkpoint.model.encoder,) = captioner.encoders
        with torch.inference_mode():
            result, _ = evaluate_images(
                checkpoint, loaded.examples[:300], SearchOptions(), workers=0
            )
        scores[precision] = result.scores.cider_d
    assert scores["int8"] == pytest.approx(scores["float32"], abs=0.012)


def test_export_calibrates(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, target = tmp_path / "plain.safetensors", tmp_path / "calibrated.safetensors"
    save_checkpoint(replace(checkpoint, ranges=None), source)
    photos = tmp_path / "photos"
    photos.mkdir()
    calibration = "--calibration", str(photos)
    assert "takes a photograph" in run("export", str(source), str(target), *calibration, status=2)
    for number, colour in enumerate(("red", "green", "blue")):
        draw_picture(photos / f"{number}.png", colour)
    run("export", str(source), str(target), *calibration)
    found = load_checkpoint(target).ranges
    assert found is not None
    assert list(found) == [link.name for link in chain(checkpoint.model.encoder.backbone)]
    # A copy of a copy keeps them.
    run("export", str(target), str(source))
    assert load_checkpoint(source).ranges == found
    (photos / "broken.png").write_bytes(b"no picture")
    said = run("export", str(source), str(target), *calibration, status=2)
    assert "broken.png" in said
