"""A graph with its edges at hand: who makes a tensor, who reads it, which are constant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CONVOLUTIONS = ("Conv", "ConvTranspose")


class GraphView:
    """Look-ups in a graph that is not changed meanwhile."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Index the nodes and constants of ``model``."""
        self.model = model
        self.nodes = list(model.graph.node)
        self.outputs = {o.name for o in model.graph.output}
        self.inputs = {i.name: i for i in model.graph.input}
        self._constants: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self._constants |= {
            n.output[0]: a.t
            for n in self.nodes
            for a in n.attribute
            if n.op_type == "Constant" and a.name == "value"
        }

    @cached_property
    def _makers(self) -> dict[str, NodeProto]:
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def _readers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def maker(self, tensor: str) -> NodeProto | None:
        """The node that a tensor comes from; None for a graph's input and a constant."""
        return self._makers.get(tensor)

    def made_by(self, tensor: str, *kinds: str) -> NodeProto | None:
        """The node that a tensor comes from, where it is of one of these kinds."""
        node = self.maker(tensor)
        return node if node is not None and node.op_type in kinds else None

    def readers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read a tensor, one entry for each input."""
        return self._readers.get(tensor, [])

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file."""
        return tensor in self._constants

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """A stored tensor's values; None for one that is computed."""
        stored = self._constants.get(tensor)
        return None if stored is None else np.asarray(numpy_helper.to_array(stored))

    def dims(self, tensor: str) -> tuple[int, ...] | None:
        """A stored tensor's shape; None for one that is computed."""
        stored = self._constants.get(tensor)
        return None if stored is None else tuple(stored.dims)

    def of_kind(self, *kinds: str) -> Iterator[NodeProto]:
        """The nodes of some kinds, in the graph's order."""
        return (n for n in self.nodes if n.op_type in kinds)

    def weight_shape(self, node: NodeProto) -> tuple[int, ...] | None:
        """The shape of a convolution's weights, also where they are dequantised."""
        dequantize = self.made_by(node.input[1], DEQUANTIZE)
        return self.dims(dequantize.input[0] if dequantize is not None else node.input[1])


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """A node's attribute, or the default where it is not written."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def label(node: NodeProto) -> str:
    """What a node is called in messages: its name, else its kind and first output."""
    return node.name or f"{node.op_type} of {node.output[0]!r}"
