"""The encoder: every backbone yields a grid, and frozen means frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from captioner.config import EncoderConfig, Preprocessing
from captioner.model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from captioner.model.encoder import Encoder, load_backbone_weights
from captioner.settings import ConfigError

BACKBONES = {
    "mobilenet_v2": 1280,
    "mobilenet_v3_large": 960,
    "efficientnet_b0": 1280,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "densenet121": 1024,
    "densenet169": 1664,
    "convnext_tiny": 768,
    "regnet_y_400mf": 440,
    "shufflenet_v2_x1_0": 1024,
    "swin_t": 768,
    "vgg11": 512,
    "googlenet": 1024,
}


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_yields_a_grid(name: str) -> None:
    encoder = Encoder(name, Preprocessing()).eval()
    grid = encoder(torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8))
    assert encoder.width == BACKBONES[name]
    assert grid.shape[0] == 2
    assert grid.shape[1] >= 6
    assert grid.shape[2] == encoder.width


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121"])
def test_grid_is_what_torchvision_pools(name: str) -> None:
    torch.manual_seed(0)
    whole = models.get_model(name, weights=None).eval()
    encoder = Encoder(name, Preprocessing()).eval()
    encoder.backbone.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k in encoder.backbone.state_dict()}
    )
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = whole((pixels / 255 - mean) / std)
    head = whole.fc if name == "resnet18" else whole.classifier
    torch.testing.assert_close(head(encoder(pixels).mean(dim=1)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [("vit_b_16", "yields no spatial grid"), ("resnet9000", "no classification model")],
)
def test_what_yields_no_grid_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder(name, Preprocessing())


NO_GRID = {"maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"}


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_every_backbone_builds_without_weights_or_is_refused() -> None:
    """A checkpoint is loaded into such a model: each of its tensors must be in the file."""
    refused, computed = set(), set()
    for name in models.list_models(module=models):
        try:
            with torch.device("meta"):
                encoder = Encoder(name, Preprocessing())
        except ConfigError:
            refused.add(name)
        except NotImplementedError:
            computed.add(name)  # its sizes are computed with tensors; built on the CPU to be loaded
        else:
            tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
            assert {key for key, _ in tensors} == encoder.state_dict().keys(), name
            plain = [v for m in encoder.modules() for v in vars(m).values()]
            assert not any(isinstance(value, torch.Tensor) for value in plain), name
    assert refused == NO_GRID
    assert all(name.startswith("regnet_") for name in computed)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    "name", ["regnet_x_400mf", "regnet_y_400mf", "swin_v2_t", "googlenet", "shufflenet_v2_x0_5"]
)
def test_a_checkpoint_of_a_backbone_loads(tiny: Checkpoint, tmp_path: Path, name: str) -> None:
    config = replace(tiny.config, encoder=EncoderConfig(name, "random"))
    model = build_model(config, tiny.vocabulary, tiny.tags).eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(replace(tiny, config=config, model=model), path)
    chance = torch.get_rng_state()
    loaded = load_checkpoint(path).model
    assert torch.equal(torch.get_rng_state(), chance)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(loaded.encode(pixels), model.encode(pixels))


def _step(encoder: Encoder) -> dict[str, torch.Tensor]:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    scale = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([*encoder.parameters(), scale], lr=0.1)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    (encoder(pixels).pow(2).mean() * scale).backward()
    optimizer.step()
    return before


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_frozen_encoder_never_changes(name: str) -> None:
    encoder = Encoder(name, Preprocessing())
    encoder.freeze()
    encoder.train()
    before = _step(encoder)
    assert all(torch.equal(encoder.state_dict()[key], before[key]) for key in before)
    assert not any(module.training for module in encoder.backbone.modules())


def test_learning_encoder_keeps_its_statistics() -> None:
    encoder = Encoder("resnet18", Preprocessing())
    encoder.freeze()
    encoder.freeze(0)
    encoder.train()
    before = _step(encoder)
    after = encoder.state_dict()
    statistics = {key for key in before if "running" in key or "tracked" in key}
    assert all(torch.equal(after[key], before[key]) for key in statistics)
    assert not torch.equal(after["backbone.conv1.weight"], before["backbone.conv1.weight"])


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_first_blocks_alone_can_be_frozen(name: str) -> None:
    encoder = Encoder(name, Preprocessing())
    encoder.freeze(5)
    encoder.train()
    before = _step(encoder)
    first = {id(p) for block in encoder.blocks[:5] for p in block.parameters()}
    changed = {
        id(parameter)
        for key, parameter in encoder.named_parameters()
        if not torch.equal(parameter, before[key])
    }
    assert changed
    assert not changed & first
    with pytest.raises(ConfigError, match=r"frozen_blocks is 99; .* takes 0 to"):
        encoder.freeze(99)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_local_file(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    source, target = models.resnet18(), Encoder("resnet18", Preprocessing())
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    load_backbone_weights(target, EncoderConfig("resnet18", str(path)))
    loaded = target.backbone.state_dict()
    assert all(torch.equal(loaded[key], source.state_dict()[key]) for key in loaded)
    other = Encoder("resnet34", Preprocessing())
    with pytest.raises(ConfigError, match=r"no weights for 'layer1\.2"):
        load_backbone_weights(other, EncoderConfig("resnet34", str(path)))


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    encoder = Encoder("resnet18", Preprocessing())
    for name in ("missing.safetensors", "junk.safetensors", "junk.pth"):
        path = tmp_path / name
        if "junk" in name:
            path.write_bytes(b"no weights at all")
        with pytest.raises(ConfigError, match=name):
            load_backbone_weights(encoder, EncoderConfig("resnet18", str(path)))
