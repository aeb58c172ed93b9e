"""BatchNorm as a part of the convolution before it: the same grid from fewer passes over it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batchnorm"]


class _Tracer(fx.Tracer):
    """Follows the data from module to module; a convolution of any class is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether not to look inside a module."""
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(network: nn.Module) -> None:
    """Scale and shift in each convolution what its BatchNorm would, and remove the BatchNorm.

    The network, in eval mode, computes the same within rounding. A BatchNorm stays where it reads
    something else than a convolution, or something that other modules read too (in DenseNet).

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), equation 14.
    """
    nodes = [node for node in _Tracer().trace(network).nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in nodes)
    for node in nodes:
        read = node.args[0]
        if not isinstance(read, fx.Node) or read.op != "call_module" or len(read.users) > 1:
            continue
        names = str(read.target), str(node.target)
        conv, norm = map(network.get_submodule, names)
        once = all(calls[name] == 1 for name in names)
        if once and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            network.set_submodule(names[0], fuse_conv_bn_eval(conv, norm))
            network.set_submodule(names[1], nn.Identity())
