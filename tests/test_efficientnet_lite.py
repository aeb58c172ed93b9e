"""EfficientNet-Lite: sizes as published, TensorFlow's padding, weights under foreign names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captioner.config import EncoderConfig, Preprocessing
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from captioner.model.efficientnet_lite import (
    EFFICIENTNET_LITE,
    SameConv2d,
    build_efficientnet_lite,
)
from captioner.model.encoder import Encoder, load_backbone_weights
from captioner.settings import ConfigError

CLASSIFIER = 1280 * 1000 + 1000

# Parameters with the classifier: those of the published state dicts of sizes 0 and 1, and the 6.09
# million of size 2 in TensorFlow's table. Grid cells at 224 pixels: 7 x 7.
PARAMETERS = {
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
}
# Published shapes, the first output channels of each stage (table 1, scaled to multiples of 8).
CHANNELS = {
    "efficientnet_lite0": [16, 24, 40, 80, 112, 192, 320],
    "efficientnet_lite1": [16, 24, 40, 80, 112, 192, 320],
    "efficientnet_lite2": [16, 24, 48, 88, 120, 208, 352],
}
BLOCKS = {
    "efficientnet_lite0": [1, 2, 2, 3, 3, 4, 1],
    "efficientnet_lite1": [1, 3, 3, 4, 4, 5, 1],
    "efficientnet_lite2": [1, 3, 3, 4, 4, 5, 1],
}


@pytest.mark.parametrize("name", EFFICIENTNET_LITE)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        backbone = build_efficientnet_lite(name)
    assert sum(p.numel() for p in backbone.parameters()) + CLASSIFIER == PARAMETERS[name]
    stages = [backbone.get_submodule(f"stage{number}") for number in range(1, 8)]
    assert [len(list(stage.children())) for stage in stages] == BLOCKS[name]
    grid, channels = torch.zeros(1, 3, 224, 224, device="meta"), []
    for child, module in backbone.named_children():
        grid = module(grid)
        channels += [grid.shape[1]] if child.startswith("stage") else []
    assert channels == CHANNELS[name]
    assert grid.shape == (1, 1280, 7, 7)


@pytest.mark.parametrize(("side", "cells"), [(224, 7), (240, 8), (225, 8), (33, 2)])
def test_the_grid_covers_the_last_pixels(side: int, cells: int) -> None:
    encoder = Encoder("efficientnet_lite0", Preprocessing()).eval()
    grid = encoder(torch.randint(0, 256, (2, 3, side, 64), dtype=torch.uint8))
    assert grid.shape == (2, cells * 2, 1280)
    assert encoder.width == 1280
    assert len(encoder.blocks) == 9


def _tensorflow_conv(image: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve one channel as TensorFlow's documentation of "SAME" says, cell by cell."""
    kernel = weight.shape[-1]
    sides = image.shape
    outputs = [(side + stride - 1) // stride for side in sides]
    befores = []
    for side, count in zip(sides, outputs, strict=True):
        rest = side % stride
        along = max(kernel - (stride if rest == 0 else rest), 0)
        befores.append(along // 2)
        assert count == -(-side // stride)
    grid = torch.zeros(outputs[0], outputs[1])
    for row in range(outputs[0]):
        for column in range(outputs[1]):
            for y in range(kernel):
                for x in range(kernel):
                    i, j = row * stride + y - befores[0], column * stride + x - befores[1]
                    if 0 <= i < sides[0] and 0 <= j < sides[1]:
                        grid[row, column] += image[i, j] * weight[y, x]
    return grid


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("sides", [(8, 8), (7, 7), (8, 7), (7, 10), (2, 1)])
def test_padding_is_tensorflows(sides: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(1, 1, kernel, stride, bias=False)
    image = torch.randn(1, 1, *sides)
    expected = _tensorflow_conv(image[0, 0], conv.weight[0, 0].detach(), stride)
    torch.testing.assert_close(conv(image)[0, 0], expected, rtol=1e-4, atol=1e-5)


def _published(seed: int = 3) -> dict[str, Tensor]:
    """Return a state dict of size 0 at random weights as the published files name and order it."""
    torch.manual_seed(seed)
    backbone = build_efficientnet_lite("efficientnet_lite0")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    state = {f"_{i}.{k.rpartition('.')[2]}": t for i, (k, t) in enumerate(_items(backbone))}
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def _items(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    return list(backbone.state_dict().items())


def _loaded(state: dict[str, Tensor], path: Path) -> Encoder:
    torch.save(state, path)
    encoder = Encoder("efficientnet_lite0", Preprocessing())
    load_backbone_weights(encoder, EncoderConfig("efficientnet_lite0", str(path)))
    return encoder


def test_published_weights_are_loaded_in_their_order(tmp_path: Path) -> None:
    state = _published()
    encoder = _loaded(state, tmp_path / "lite0.pth")
    for (name, tensor), expected in zip(_items(encoder.backbone), state.values(), strict=False):
        assert torch.equal(tensor, expected), name


def test_own_names_are_loaded_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = build_efficientnet_lite("efficientnet_lite0").state_dict()
    encoder = _loaded(dict(reversed(source.items())), tmp_path / "own.pth")
    assert all(torch.equal(tensor, source[name]) for name, tensor in _items(encoder.backbone))


def test_a_file_without_counters_is_loaded(tmp_path: Path) -> None:
    state = {k: t for k, t in _published().items() if not k.endswith("num_batches_tracked")}
    encoder = _loaded(state, tmp_path / "timm.pth")
    assert torch.equal(encoder.backbone.state_dict()["head.0.weight"], list(state.values())[-7])


def _swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = list(state)
    keys[1], keys[2] = keys[2], keys[1]  # a BatchNorm's weight and bias, of one shape
    return {key: state[key] for key in keys}


def _other(_: dict[str, Tensor]) -> dict[str, Tensor]:
    state = build_efficientnet_lite("efficientnet_lite1").state_dict()
    return {f"x{i}.{key.rpartition('.')[2]}": t for i, (key, t) in enumerate(state.items())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: dict(sorted(state.items())), "no weights of efficientnet_lite0"),
        (_swapped, r"'_2\.bias' is \(32,\), where 'stem\.1\.weight' is"),
        (_other, r"it has \d+ tensors, not 245 and"),
        (lambda state: dict(list(state.items())[:100]), "it has 84 tensors, not 245 and"),
        (lambda state: {"model": state}, "it has 0 tensors"),
        (lambda state: {k: t[:-1] if t.ndim else t for k, t in state.items()}, r"\(31, 3, 3, 3\)"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(ConfigError, match=message) as caught:
        _loaded(change(_published()), tmp_path / "other.pth")
    assert "other.pth" in str(caught.value)


def test_torchvision_has_no_download_of_it() -> None:
    encoder = Encoder("efficientnet_lite2", Preprocessing())
    with pytest.raises(ConfigError, match=r"'imagenet'.*efficientnet_lite2; name a file"):
        load_backbone_weights(encoder, EncoderConfig("efficientnet_lite2", "imagenet"))


def test_a_checkpoint_of_it_loads(tiny: Checkpoint, tmp_path: Path) -> None:
    config = replace(tiny.config, encoder=EncoderConfig("efficientnet_lite0", "random"))
    model = build_model(config, tiny.vocabulary, tiny.tags).eval()
    saved = replace(tiny, config=config, model=model)
    path = tmp_path / "model.safetensors"
    save_checkpoint(saved, path)
    loaded = load_checkpoint(path)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in _items(loaded.model))
    picture = Image.new("RGB", (90, 50), "red")
    assert Captioner(loaded).describe([picture]) == Captioner(saved).describe([picture])
