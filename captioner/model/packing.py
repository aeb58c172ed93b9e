"""Copies of modules for inference, and linear layers whose weights lie as oneDNN reads them."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["PackedCell", "PackedLinear", "can_pack", "copy_for_inference"]

M = TypeVar("M", bound=nn.Module)


def copy_for_inference(module: M) -> M:
    """Return a copy in eval mode, to change: its tensors are those of the module itself."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return deepcopy(module, shared).eval()


def can_pack(weight: Tensor) -> bool:
    """Return whether products with such a weight gain: in float32 on a CPU for which oneDNN is."""
    on_cpu = weight.device.type == "cpu" and torch._C._has_mkldnn
    return on_cpu and weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """A linear layer for a few rows at a time.

    A search multiplies 3 to 160 rows by the same weights at each step. The plain product reorders
    the weights each time, which takes longer than the product itself: of 3 rows and 512 x 10,000
    weights 4.3 ms, without it 0.8.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the weight ``(out, in)`` and the bias ``(out,)``; the weight is copied."""
        super().__init__()
        self._given = weight, bias  # in a tuple, so that they are no parameters of this module
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def __reduce__(self) -> tuple[type[PackedLinear], tuple[Tensor, Tensor | None]]:
        """Return how it is copied and pickled: packed weights cannot be, so they are made anew."""
        return PackedLinear, self._given

    def forward(self, x: Tensor) -> Tensor:
        """Return x, ``(R, in)``, times the weight, plus bias: ``(R, out)``."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product


class PackedCell(nn.Module):
    """The two products of the cell of an RNN."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        """Take the cell whose weights they have."""
        super().__init__()
        self.inner = PackedLinear(cell.weight_ih, cell.bias_ih)
        self.outer = PackedLinear(cell.weight_hh, cell.bias_hh)
