"""Nodes of an ONNX graph, made one by one, and the weights of a checkpoint as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from captioner.model.checkpoint import SCALE

__all__ = ["Graph", "Value"]

Value = str
"""What a node gives, or a constant: known by its name."""

_Constant = int | float | bool | Sequence[int] | np.ndarray[Any, Any]


@dataclass
class _Shared:
    """What a graph and the bodies of its loops have together."""

    stored: Mapping[str, Tensor]
    initializers: list[TensorProto] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    known: dict[Any, Value] = field(default_factory=dict)


class Graph:
    """A graph as it grows."""

    def __init__(self, stored: Mapping[str, Tensor], parent: Graph | None = None) -> None:
        """Begin a graph, or the body of a loop in ``parent``.

        ``stored`` has the tensors of a checkpoint by name, as a file of it would hold them.
        """
        self.nodes: list[NodeProto] = []
        self._root: Graph = self if parent is None else parent._root
        self._shared: _Shared = _Shared(stored) if parent is None else parent._shared

    @property
    def initializers(self) -> list[TensorProto]:
        """The constants and weights, also those of all bodies."""
        return self._shared.initializers

    def body(self) -> Graph:
        """Return the graph of a loop's body, which sees all values of this one."""
        return Graph(self._shared.stored, self)

    def name(self, wish: str) -> Value:
        """Return a name that no other value has."""
        names, name = self._shared.names, wish
        while name in names:
            name = f"{wish}_{len(names)}"
        names.add(name)
        return name

    def op(self, kind: str, *inputs: Value | _Constant, **attributes: Any) -> Value:
        """Add a node with one output, and return that."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: Value | _Constant, **attributes: Any
    ) -> list[Value]:
        """Add a node and return its outputs; numbers among the inputs become constants."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        given = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, given, **attributes))
        return given

    def constant(self, value: _Constant) -> Value:
        """Return a constant: int64, bool or float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared.known:
            self._shared.known[key] = self._initializer(self.name("constant"), array)
        return self._shared.known[key]

    def weight(self, name: str) -> Value:
        """Return a weight in float32, once for all uses: int8 times its scales, and so on."""
        if name not in self._shared.known:
            self._shared.known[name] = self._root._restored(name)
        return self._shared.known[name]

    def transposed(self, name: str) -> Value:
        """Return a weight ``(out, in)`` as ``(in, out)``; not computed anew in a loop."""
        key = (name, "transposed")
        if key not in self._shared.known:
            matrix = self.weight(name)
            self._shared.known[key] = self._root.op("Transpose", matrix, perm=[1, 0])
        return self._shared.known[key]

    def _restored(self, name: str) -> Value:
        tensor = self._shared.stored[name]
        if tensor.dtype == torch.int8:
            scales = self._shared.stored[name + SCALE].float().numpy()
            whole = self._initializer(self.name(f"{name}.int8"), tensor.numpy())
            scale = self._initializer(self.name(f"{name}{SCALE}"), scales)
            return self._renamed(name, "DequantizeLinear", whole, scale, axis=0)
        if tensor.dtype == torch.float16 and tensor.ndim > 1:
            half = self._initializer(self.name(f"{name}.float16"), tensor.numpy())
            return self._renamed(name, "Cast", half, to=TensorProto.FLOAT)
        exact = tensor.float() if tensor.is_floating_point() else tensor
        return self._initializer(self.name(name), exact.numpy())

    def _renamed(self, name: str, kind: str, *inputs: Value, **attributes: Any) -> Value:
        value = self.name(name)
        self.nodes.append(helper.make_node(kind, inputs, [value], **attributes))
        return value

    def _initializer(self, name: Value, array: np.ndarray[Any, Any]) -> Value:
        self._shared.initializers.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def loop(self, body: Graph, most: int, carried: Mapping[str, tuple[Value, Value, Value]],
             position: Value, goes_on: Value) -> dict[str, Value]:  # fmt: skip
        """Add a loop, and return the last values that it carried.

        Args:
            body: The graph of one step.
            most: The number of steps, at most.
            carried: By name the first value, and in the body the value before a step and after it.
            position: The number of the step in the body, from 0.
            goes_on: Whether there is to be another step, in the body.
        """
        inputs = [
            helper.make_tensor_value_info(position, TensorProto.INT64, []),
            helper.make_tensor_value_info(self.name("goes_on"), TensorProto.BOOL, []),
            *(_untyped(before) for _, before, _ in carried.values()),
        ]
        outputs = [_untyped(goes_on), *(_untyped(after) for _, _, after in carried.values())]
        step = helper.make_graph(body.nodes, "step", inputs, outputs)
        firsts = [first for first, _, _ in carried.values()]
        ended = self.ops("Loop", len(carried), most, True, *firsts, body=step)
        return dict(zip(carried, ended, strict=True))

    def proto(
        self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
    ) -> GraphProto:
        """Return the whole graph."""
        return helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)


def _untyped(name: Value) -> ValueInfoProto:
    return ValueInfoProto(name=name)
