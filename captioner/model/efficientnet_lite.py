"""EfficientNet-Lite: EfficientNet with ReLU6 and without squeeze-and-excitation.

Sources: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(2019), table 1; for the changes of the Lite sizes, tensorflow/tpu,
models/official/efficientnet/lite (2020). The published weights expect pixels normalised by a mean
of 0.498 (127 / 255) and a deviation of 0.502 (128 / 255).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "EFFICIENTNET_LITE",
    "EFFICIENTNET_LITE_WIDTH",
    "Link",
    "SameConv2d",
    "build_efficientnet_lite",
    "chain",
    "rename_published_state",
]

EFFICIENTNET_LITE = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
"""The factors of width and depth of each size, by its name."""

EFFICIENTNET_LITE_WIDTH = 1280
"""How many channels the grid has, in every size."""


class _Stage(NamedTuple):
    """A row of table 1: blocks of one kernel size; the first of them has the stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


_STAGES = (
    _Stage(1, 16, 1, 1, 3),
    _Stage(6, 24, 2, 2, 3),
    _Stage(6, 40, 2, 2, 5),
    _Stage(6, 80, 3, 2, 3),
    _Stage(6, 112, 3, 1, 5),
    _Stage(6, 192, 4, 2, 5),
    _Stage(6, 320, 1, 1, 3),
)
_STEM_CHANNELS = 32
_BATCHNORM_EPS = 1e-3  # TensorFlow's, which the published weights were trained with
_COUNTER = "num_batches_tracked"


def build_efficientnet_lite(name: str) -> nn.Sequential:
    """Return the backbone of a size at random weights: stem, seven stages, head.

    It maps normalised pixels ``(B, 3, h, w)`` to ``(B, 1280, h / 32, w / 32)``, rounded up.
    """
    width, depth = EFFICIENTNET_LITE[name]
    modules: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv(3, _STEM_CHANNELS, 3, stride=2))
    channels = _STEM_CHANNELS
    for number, stage in enumerate(_STAGES, start=1):
        outer = _round_channels(stage.channels * width)
        # The first and last stage keep their depth, as the stem and the head keep their width.
        is_end = number in (1, len(_STAGES))
        blocks = stage.blocks if is_end else math.ceil(stage.blocks * depth)
        first = _Block(channels, outer, stage, stage.stride)
        rest = [_Block(outer, outer, stage, stride=1) for _ in range(blocks - 1)]
        modules[f"stage{number}"] = nn.Sequential(first, *rest)
        channels = outer
    modules["head"] = _conv(channels, EFFICIENTNET_LITE_WIDTH, 1)
    return nn.Sequential(modules)


def _round_channels(channels: float) -> int:
    """Round to the nearest multiple of 8, or the next one if that loses more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME".

    The output has ceil(side / stride) cells a side. Where the padding of a side is odd, the
    larger half comes right and below; PyTorch's own ``padding`` would shift the grid by a pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve ``(B, c, h, w)``."""
        (top, below), (left, right) = self._paddings(*x.shape[2:])
        if (top, left) != (below, right) and torch.onnx.is_in_onnx_export():
            # The exporter takes no kernel that was padded.
            x, weight, padding = F.pad(x, (left, right, top, below)), self.weight, (0, 0)
        else:
            weight, padding = self.widened(*x.shape[2:])
        return F.conv2d(x, weight, self.bias, self.stride, padding, groups=self.groups)

    def widened(self, height: int, width: int) -> tuple[Tensor, tuple[int, int]]:
        """Return a weight and a padding, the same on both sides, that convolve as "SAME" does.

        Where "SAME" pads one pixel less before than after, the kernel begins with a row or column
        of zeros instead: a copy of the photograph with its padding would cost up to a tenth of the
        encoder's time.
        """
        (top, below), (left, right) = self._paddings(height, width)
        if (top, left) == (below, right):
            return self.weight, (top, left)
        return F.pad(self.weight, (right - left, 0, below - top, 0)), (below, right)

    def _paddings(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the padding before and after each side."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        return _same_padding(height, kernel, stride), _same_padding(width, kernel, stride)


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after a side of so many pixels."""
    outputs = math.ceil(side / stride)
    total = max((outputs - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _conv(
    inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    conv = SameConv2d(inner, outer, kernel, stride, bias=False, groups=groups)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outer, eps=_BATCHNORM_EPS)]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if relu else []))


class _Block(nn.Module):
    """MBConv without squeeze-and-excitation: widen, filter each channel, narrow, add the input."""

    def __init__(self, inner: int, outer: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        wide = inner * stage.expansion
        layers = [] if stage.expansion == 1 else [_conv(inner, wide, 1)]
        layers.append(_conv(wide, wide, stage.kernel, stride, groups=wide))
        layers.append(_conv(wide, outer, 1, relu=False))
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.is_residual else out


class Link(NamedTuple):
    """A convolution of a backbone, with its ReLU6 and, at the end of some blocks, a sum."""

    name: str
    """The name of the module whose output is the link's."""
    layers: nn.Sequential
    """The convolution, then its BatchNorm, then a ReLU6 or nothing."""
    opens: bool = False
    """Whether its input is what a later link adds."""
    adds: bool = False
    """Whether the input of the last link that opens is added to its output."""

    @property
    def conv(self) -> SameConv2d:
        """The convolution."""
        conv = self.layers[0]
        assert isinstance(conv, SameConv2d)
        return conv

    @property
    def is_clamped(self) -> bool:
        """Whether the link has a ReLU6."""
        return isinstance(self.layers[-1], nn.ReLU6)


def chain(backbone: nn.Module) -> Iterator[Link]:
    """Yield the links of a backbone of :func:`build_efficientnet_lite`, as pixels pass them."""
    for name, module in backbone.named_modules():
        if isinstance(module, _Block):
            last = len(module.layers) - 1
            for index, layers in enumerate(module.layers):
                assert isinstance(layers, nn.Sequential)
                adds = module.is_residual and index == last
                inner = name if adds else f"{name}.layers.{index}"
                yield Link(inner, layers, module.is_residual and index == 0, adds)
        elif name in ("stem", "head") and isinstance(module, nn.Sequential):
            yield Link(name, module)


def rename_published_state(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return a published state dict under the names of the backbone's tensors.

    The published files (efficientnet-lite-pytorch, timm) hold the same tensors in the same order
    under other names, and a classifier after them. So tensors are paired in order, and each pair
    must agree in shape and in the last part of the name. A state dict that already has the
    backbone's names comes back as it is. Raises ``ValueError`` for a state dict of another model.
    """
    own = backbone.state_dict()
    if own.keys() <= state.keys():
        return dict(state)
    counters = {name: tensor for name, tensor in own.items() if name.endswith(_COUNTER)}
    names = [name for name in own if name not in counters]
    keys = [key for key in state if not key.endswith(_COUNTER)]
    classifier = 2  # a weight and a bias
    if not len(names) <= len(keys) <= len(names) + classifier:
        raise ValueError(f"it has {len(keys)} tensors, not {len(names)} and a classifier's 2")
    for name, key in zip(names, keys, strict=False):
        ours, theirs = own[name], state[key]
        if ours.shape != theirs.shape or name.rpartition(".")[2] != key.rpartition(".")[2]:
            shapes = f"{tuple(theirs.shape)}, where {name!r} is {tuple(ours.shape)}"
            raise ValueError(f"{key!r} is {shapes}")
    # No counter is ever read: BatchNorm statistics are those of the file, and stay.
    return {name: state[key] for name, key in zip(names, keys, strict=False)} | counters
