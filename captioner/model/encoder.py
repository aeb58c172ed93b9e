"""The image encoder: a backbone up to its last spatial grid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import EncoderConfig, Preprocessing
from captioner.model.efficientnet_lite import (
    EFFICIENTNET_LITE,
    EFFICIENTNET_LITE_WIDTH,
    build_efficientnet_lite,
    rename_published_state,
)
from captioner.model.folding import fold_batchnorm
from captioner.model.packing import copy_for_inference
from captioner.model.quantization import Int8Backbone, Ranges, observe
from captioner.settings import ConfigError

__all__ = ["Encoder", "load_backbone_weights"]

# Where a torchvision classifier stops being a spatial grid.
_HEADS = frozenset({"avgpool", "flatten", "classifier", "fc", "head", "heads"})


def _torchvision_backbone(name: str) -> nn.Sequential:
    from torchvision import models  # takes as long to import as torch

    if name not in models.list_models(module=models):
        lite = ", ".join(EFFICIENTNET_LITE)
        raise ConfigError(f"torchvision has no classification model {name!r}, nor is it {lite}")
    # These two would otherwise carry auxiliary classifiers between the grid and the pooling.
    auxiliary = name in {"googlenet", "inception_v3"}
    whole = models.get_model(name, **({"aux_logits": False} if auxiliary else {}))
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for child_name, child in whole.named_children():
        if child_name in _HEADS:
            break
        children[child_name] = child
    if isinstance(whole, models.DenseNet):
        children["relu"] = nn.ReLU()  # torchvision applies it in forward, outside of any module
    return nn.Sequential(children)


def _grid_width(name: str, backbone: nn.Module) -> int:
    """Return how many channels the grid has; ``ConfigError`` if there is no spatial grid."""
    try:
        with torch.no_grad():
            grid = backbone(torch.zeros(1, 3, 96, 96))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{name!r} yields no spatial grid: {error}") from error
    if grid.ndim != 4:
        raise ConfigError(f"{name!r} yields no spatial grid, but {tuple(grid.shape)}")
    return int(grid.shape[1])


class Encoder(nn.Module):
    """Pixels to a grid: ``(B, 3, h, w)`` uint8 to ``(B, N, width)``.

    The backbone is an EfficientNet-Lite, or any torchvision classification model that is a chain
    of modules up to its pooling. BatchNorm statistics never change; in frozen blocks nothing does,
    also after ``.train()``.
    """

    def __init__(self, name: str, preprocessing: Preprocessing) -> None:
        """Build the backbone at random weights; ``ConfigError`` if it yields no spatial grid."""
        super().__init__()
        self.name, self.preprocessing, self._frozen = name, preprocessing, 0
        if name in EFFICIENTNET_LITE:
            self.backbone: nn.Module = build_efficientnet_lite(name)
            self.width = EFFICIENTNET_LITE_WIDTH
        else:
            self.backbone = _torchvision_backbone(name).eval()
            self.width = _grid_width(name, self.backbone)
        self.backbone.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise the pixels and return the grid, cells in reading order."""
        grid = self.backbone(self._normalised(pixels))
        return torch.as_tensor(grid).flatten(2).transpose(1, 2)

    def _normalised(self, pixels: Tensor) -> Tensor:
        dtype = next(self.backbone.parameters()).dtype
        mean = torch.tensor(self.preprocessing.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.preprocessing.std, device=pixels.device)[:, None, None]
        normalised = ((pixels.float() / 255.0 - mean) / std).to(dtype)
        # More than five times the speed of the planar layout on CPUs, for depthwise convolutions.
        return normalised.contiguous(memory_format=torch.channels_last)

    def folded(self) -> Encoder:
        """Return a copy for inference, in which convolutions do what BatchNorm does here.

        The copy shares all other tensors with this encoder. Its grids are the same within rounding.
        """
        encoder = copy_for_inference(self)
        fold_batchnorm(encoder.backbone)
        return encoder

    def observed(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Return the ranges of its convolutions' outputs, which :meth:`in_int8` takes.

        ``batches`` are pixels ``(B, 3, h, w)``, uint8, of a few hundred photographs. Raises
        ``ConfigError`` for another backbone than an EfficientNet-Lite.
        """
        self._need_lite()
        return observe(self.folded().backbone, map(self._normalised, batches))

    def in_int8(self, ranges: Ranges) -> Encoder:
        """Return a copy for inference whose convolutions compute in 8 bits, on a CPU.

        Raises ``ConfigError`` for another backbone than an EfficientNet-Lite, and for ranges that
        :meth:`observed` of this encoder did not return.
        """
        self._need_lite()
        encoder, (mean, std) = self.folded(), (self.preprocessing.mean, self.preprocessing.std)
        ends = [(end - m) / s for m, s in zip(mean, std, strict=True) for end in (0.0, 1.0)]
        pixels, side = (min(0.0, *ends), max(ends)), self.preprocessing.size
        encoder.backbone = Int8Backbone(encoder.backbone, ranges, pixels, side)
        return encoder

    def _need_lite(self) -> None:
        if self.name not in EFFICIENTNET_LITE:
            raise ConfigError(f"int8 takes an EfficientNet-Lite as encoder, not {self.name!r}")

    @property
    def blocks(self) -> list[nn.Module]:
        """The backbone's modules in the order that pixels pass them."""
        children = list(self.backbone.children())
        return list(children[0].children()) if len(children) == 1 else children

    def freeze(self, blocks: int | None = None) -> None:
        """Freeze the first ``blocks`` blocks, all by default, and unfreeze the rest.

        The first blocks detect edges and colours, which are much the same in all photographs, and
        they cost most of a step: Yosinski et al., "How transferable are features in deep neural
        networks?" (2014). Raises ``ConfigError`` when there are fewer blocks.
        """
        chain = self.blocks
        self._frozen = len(chain) if blocks is None else blocks
        if self._frozen > len(chain):
            raise ConfigError(f"frozen_blocks is {blocks}; {self.name} takes 0 to {len(chain)}")
        for index, block in enumerate(chain):
            block.requires_grad_(index >= self._frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; BatchNorm stays in eval mode, and so do frozen blocks."""
        chain = self.blocks
        super().train(mode)
        self.backbone.train(mode and self._frozen < len(chain))
        for block in chain[: self._frozen]:
            block.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def load_backbone_weights(encoder: Encoder, config: EncoderConfig) -> None:
    """Load weights as ``config.weights`` says: "random", "imagenet" or a file.

    Keys that the grid does not need (the classifier's) are passed over; a missing key or another
    shape is a ``ConfigError``. A ``.pth`` file is read without unpickling code.
    """
    if config.weights == "random":
        return
    state = _imagenet(config) if config.weights == "imagenet" else _from_file(encoder, config)
    needed = encoder.backbone.state_dict()
    missing = sorted(needed.keys() - state.keys())
    if missing:
        raise ConfigError(f"{config.weights}: no weights for {missing[0]!r} of {config.name}")
    for key, tensor in needed.items():
        if state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(tensor.shape)}"
            raise ConfigError(f"{config.weights}: {key!r} of {config.name} has shape {shapes}")
    encoder.backbone.load_state_dict({key: state[key] for key in needed})


def _imagenet(config: EncoderConfig) -> Mapping[str, Any]:
    from torchvision import models

    if config.name in EFFICIENTNET_LITE:
        raise ConfigError(
            f"encoder.weights is 'imagenet', but torchvision has none of {config.name}; name a file"
        )
    state: Mapping[str, Any] = models.get_model_weights(config.name).DEFAULT.get_state_dict()
    return state


def _from_file(encoder: Encoder, config: EncoderConfig) -> Mapping[str, Any]:
    state = _read_state(Path(config.weights))
    if config.name not in EFFICIENTNET_LITE:
        return state
    try:
        return rename_published_state(state, encoder.backbone)
    except ValueError as error:
        reason = f"no weights of {config.name}: {error}"
        raise ConfigError(f"{config.weights}: {reason}") from error


def _read_state(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as encoder weights: {error}") from error
    except Exception as error:  # torch.load raises pickle's errors, and EOFError, and more
        raise ConfigError(f"{path}: refused as encoder weights: {error}") from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: holds no state dict, but a {type(state).__name__}")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
