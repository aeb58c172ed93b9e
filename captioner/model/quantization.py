"""The encoder's convolutions in 8 bits, by the dot products of int8 that some processors have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioner.model.efficientnet_lite import Link, chain
from captioner.settings import ConfigError

__all__ = ["Int8Backbone", "Ranges", "has_int8_products", "int8_rows", "observe"]

Ranges = Mapping[str, tuple[float, float]]
"""The lowest and the highest output that each link of a backbone tells apart, by its name."""

_LEVELS = 255

# How many outputs of a link are looked at in a batch, and the ranges that are tried on them: the
# shares of the whole range. Beyond the range outputs are clipped, within it rounded.
_LOOKED_AT = 20_000
_SHARES = torch.linspace(0.4, 1.0, 25).tolist()


def has_int8_products() -> bool:
    """Whether the processor has dot products of int8 that cannot overflow (x86's VNNI).

    Older x86 processors add pairs of products in 16 bits. That is exact for weights of 7 bits
    only, with which the default's CIDEr-D on COCO falls by 1.4.
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cpu._is_vnni_supported() or bool(known.get("avx_vnni"))


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight ``(D, ...)`` as int8, and the scale ``(D,)`` of each output row."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127.0
    return (rows / scale[:, None]).round().to(torch.int8).view(weight.shape), scale


class _Codes(NamedTuple):
    """How real numbers x are stored in 8 bits: as round(x / scale) + zero, 0…255."""

    scale: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> _Codes:
        """Return the codes of a range; ``low`` <= 0 < ``high``."""
        scale = (high - low) / _LEVELS
        return cls(scale, round(-low / scale))

    def of_real(self, x: Tensor) -> Tensor:
        """Return the codes of real numbers, uint8."""
        return (x / self.scale).round_().add_(self.zero).clamp_(0, _LEVELS).to(torch.uint8)


@torch.inference_mode()
def observe(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """Return the ranges with which outputs in 8 bits differ least from those of photographs.

    Least in the mean of squares. ``backbone`` is a folded EfficientNet-Lite; ``batches`` are
    normalised pixels ``(B, 3, h, w)``.
    """
    seen: dict[str, list[Tensor]] = {link.name: [] for link in chain(backbone)}

    def look(name: str, module: nn.Module, given: object, output: Tensor) -> None:
        values = output.flatten()
        # An odd step meets all columns of the grid.
        seen[name].append(values[:: len(values) // _LOOKED_AT | 1].clone())

    hooks = [
        backbone.get_submodule(name).register_forward_hook(partial(look, name)) for name in seen
    ]
    for batch in batches:
        backbone(batch)
    for hook in hooks:
        hook.remove()
    return {name: _best_range(torch.cat(values)) for name, values in seen.items()}


def _best_range(values: Tensor) -> tuple[float, float]:
    low, high = (float(extreme) for extreme in values.aminmax())
    # Zero, which padding is, must have a code; a link that says nothing has a range all the same.
    low, high = min(low, 0.0), max(high, 1e-6)
    ranges = [(share * low, share * high) for share in _SHARES]
    return min(ranges, key=lambda tried: _error(values, *tried))


def _error(values: Tensor, low: float, high: float) -> float:
    scale, zero = _Codes.of(low, high)
    stored = torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _LEVELS)
    return float((stored - values).square().mean())


class Int8Backbone(nn.Module):
    """A folded EfficientNet-Lite that computes in 8 bits: float32 pixels in, a float32 grid out.

    A weight has a scale for each output channel, as in a checkpoint; the outputs of a link have one
    for all photographs, from :func:`observe`. So a photograph's grid does not depend on its batch,
    not even by rounding: sums of integers are exact.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), sections 2.1 to 2.4.
    """

    def __init__(
        self, backbone: nn.Module, ranges: Ranges, pixels: tuple[float, float], side: int
    ) -> None:
        """Take the weights of a folded backbone.

        Args:
            backbone: From ``build_efficientnet_lite``, folded.
            ranges: From :func:`observe`.
            pixels: The lowest and the highest normalised pixel.
            side: How wide and high photographs are, in pixels.

        Raises:
            ConfigError: The ranges are those of another backbone.
        """
        super().__init__()
        links = list(chain(backbone))
        if {link.name for link in links} != ranges.keys():
            raise ConfigError("the ranges of activations are those of another encoder")
        self._side, self._pixels = side, _Codes.of(*pixels)
        source = opened = self._pixels
        self._opens = [link.opens for link in links]
        self.convolutions = nn.ModuleList()
        for link in links:
            opened = source if link.opens else opened
            # The last output becomes float32 again.
            target = None if link is links[-1] else _Codes.of(*ranges[link.name])
            added = opened if link.adds else None
            self.convolutions.append(_Int8Conv(link, source, target, added, side))
            source, side = target or source, -(-side // link.conv.stride[0])

    def forward(self, normalised: Tensor) -> Tensor:
        """Return the grid ``(B, D, h, w)`` of normalised pixels ``(B, 3, side, side)``."""
        if normalised.shape[2:] != (self._side, self._side):
            shape = tuple(normalised.shape[2:])
            raise ValueError(f"int8 takes pixels of {self._side} x {self._side}, not of {shape}")
        x = kept = self._pixels.of_real(normalised)
        for convolution, opens in zip(self.convolutions, self._opens, strict=True):
            kept = x if opens else kept
            x = convolution(x, kept)
        return x


class _Int8Conv(nn.Module):
    """A convolution of uint8 codes with int8 weights, and what follows it in its link."""

    def __init__(
        self,
        link: Link,
        source: _Codes,
        target: _Codes | None,
        added: _Codes | None,
        side: int,
    ) -> None:
        """Take the weights of a link.

        Args:
            link: The link, folded.
            source: The codes of its input.
            target: The codes of its output; ``None`` for an output in float32.
            added: The codes of what is added to its output, if anything is.
            side: How wide and high its input is.
        """
        super().__init__()
        conv, self._source, self._target, self._added = link.conv, source, target, added
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        weight, padding = conv.widened(side, side)
        weight = weight.detach()
        self._codes, self._scale = int8_rows(weight)
        self._zero = torch.zeros(1, dtype=torch.int8)
        self._geometry = list(conv.stride), list(padding), [1, 1], conv.groups
        self._shape = [1, conv.in_channels, side, side]
        self._packed = self._pack()

    def _pack(self) -> Tensor:
        """Return the weights laid out as the processor reads them for photographs of this shape."""
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self._codes, self._scale, *self._source, *self._geometry, self._shape
        )
        return packed

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: packed weights cannot be, so they are made anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what :meth:`__getstate__` returned."""
        self.__dict__.update(state)
        self._packed = self._pack()

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return the outputs of codes ``(B, c, h, w)``; a sum with ``kept`` overwrites it."""
        given = x, *self._source, self._packed, self._scale, self._zero
        convolve = torch.ops.onednn.qconv2d_pointwise
        output: Tensor
        if self._target is None:
            stored = 1.0, 0, torch.float32
            output = convolve(
                *given, self.bias, *self._geometry, *stored, "hardtanh", [0.0, 6.0], ""
            )
            return output
        # Codes end where ReLU6 does, at 0 and 6 or before, so that it takes no step of its own.
        stored = *self._target, torch.uint8
        if self._added is None:
            output = convolve(*given, self.bias, *self._geometry, *stored, "none", [], "")
            return output
        summed: tuple[Any, ...] = *self._added, "sum", 1.0, "none", [], ""
        output = convolve.binary(*given, kept, self.bias, *self._geometry, *stored, *summed)
        return output
