"""BatchNorm folded into convolutions: the same numbers, and only where they are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captioner.config import Preprocessing
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model.encoder import Encoder
from captioner.model.folding import fold_batchnorm


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def draw_statistics(network: nn.Module) -> None:
    """Give each BatchNorm numbers of its own: fresh ones change nothing, and fold to nothing."""
    torch.manual_seed(0)
    for norm in norms(network):
        for name, tensor in norm.state_dict().items():
            if name in ("weight", "running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name in ("bias", "running_mean"):
                tensor.normal_(std=0.3)


# How many BatchNorms read no convolution, or none that is theirs alone.
@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("convnext_tiny", 0),
        ("densenet121", 62),
        ("efficientnet_b0", 0),
        ("efficientnet_lite0", 0),
        ("googlenet", 0),
        ("mobilenet_v3_small", 0),
        ("regnet_y_400mf", 0),
        ("resnet18", 0),
        ("shufflenet_v2_x0_5", 0),
    ],
)
def test_a_folded_encoder_computes_the_same(name: str, left: int) -> None:
    encoder = Encoder(name, Preprocessing()).eval()
    draw_statistics(encoder)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    folded = encoder.folded()
    assert len(norms(folded)) == left
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        expected, found = encoder(pixels), folded(pixels)
    scale = float(expected.abs().max())
    assert scale > 0.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


class _Net(nn.Module):
    """A convolution and a BatchNorm, one after the other or not quite."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.kind == "relu between":
            y = self.relu(y)
        if self.kind == "sum between":
            y = y + x
        normed: Tensor = self.norm(y)
        if self.kind == "read twice":
            return normed + y
        if self.kind == "convolution twice":
            again: Tensor = self.conv(normed)
            return normed + again
        if self.kind == "norm twice":
            normed = self.norm(normed)
        return normed


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("plain", 0),
        ("relu between", 1),
        ("sum between", 1),
        ("read twice", 1),
        ("convolution twice", 1),
        ("norm twice", 1),
    ],
)
def test_only_what_stays_the_same_is_folded(kind: str, left: int) -> None:
    network = _Net(kind).eval()
    draw_statistics(network)
    pixels = torch.randn(2, 3, 5, 7)
    expected = network(pixels)
    fold_batchnorm(network)
    assert len(norms(network)) == left
    torch.testing.assert_close(network(pixels), expected)


def test_captioning_folds_and_leaves_the_checkpoint_alone(tiny: Checkpoint, tmp_path: Path) -> None:
    draw_statistics(tiny.model.encoder)
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    save_checkpoint(tiny, before)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    captioner = Captioner(load_checkpoint(before))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(nn.modules.batchnorm._BatchNorm, "forward")
        (grid,) = captioner.encode(list(pixels))
    with torch.inference_mode():
        expected = tiny.model.encode(torch.from_numpy(pixels))
    torch.testing.assert_close(grid, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    save_checkpoint(captioner.checkpoint, after)
    assert after.read_bytes() == before.read_bytes()
