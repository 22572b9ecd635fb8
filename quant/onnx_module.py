"""A float ONNX graph as a torch module, node by node.

The steps after training (one head for both precisions, intervals) write ONNX, so that the file, not
the checkpoint, is the model. What exports from torch starts from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Tensor], Attributes], Tensor]

_TYPES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.BFLOAT16: torch.bfloat16,
    }
)


def _conv(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    x, weight, *bias = inputs
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ModelError("a convolution with auto_pad is not known here: write its pads")
    if weight.ndim != 4:
        raise ModelError(f"a convolution over {weight.ndim - 2} axes is not known here: 2 are")
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(
        x,
        weight,
        bias[0] if bias else None,
        stride=tuple(attributes.get("strides", (1, 1))),
        padding=(top, left),
        dilation=tuple(attributes.get("dilations", (1, 1))),
        groups=attributes.get("group", 1),
    )


def _gemm(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    a, b, *c = inputs
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product + attributes.get("beta", 1.0) * c[0] if c else product


def _cast(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    wanted = attributes["to"]
    if wanted not in _TYPES:
        raise ModelError(f"a Cast to {TensorProto.DataType.Name(wanted)} is not known here")
    return inputs[0].to(_TYPES[wanted])


def _clip(inputs: Sequence[Tensor], _attributes: Attributes) -> Tensor:
    x, *bounds = inputs
    low, high = (*bounds, None, None)[:2]
    return torch.clamp(x, low, high)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {  # kind of node: what it does; shapes are those of the ONNX standard
        "Add": lambda x, _: x[0] + x[1],
        "Cast": _cast,
        "Clip": _clip,
        "Concat": lambda x, a: torch.cat(list(x), a["axis"]),
        "Conv": _conv,
        "Div": lambda x, _: x[0] / x[1],
        "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
        "Gemm": _gemm,
        "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
        "HardSigmoid": lambda x, a: (x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
        "HardSwish": lambda x, _: F.hardswish(x[0]),
        "Identity": lambda x, _: x[0],
        "Mul": lambda x, _: x[0] * x[1],
        "Relu": lambda x, _: F.relu(x[0]),
        "Sigmoid": lambda x, _: torch.sigmoid(x[0]),
        "Sub": lambda x, _: x[0] - x[1],
        "Transpose": lambda x, a: x[0].permute(*a["perm"]),
    }
)
"""The kinds of node that are known; what students are made of."""


class OnnxModule(nn.Module):
    """Runs a float graph: inputs in the graph's order, its outputs as a tuple.

    Raises :class:`ModelError` naming the first node of a kind that is not in :data:`OPERATORS`, a
    quantised graph's ones among them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Read the nodes; stored tensors become buffers."""
        super().__init__()
        self.input_names = [i.name for i in model.graph.input]
        self.output_names = [o.name for o in model.graph.output]
        self._steps: list[tuple[NodeProto, Attributes]] = []
        self._slots: dict[str, str] = {}
        for number, stored in enumerate(model.graph.initializer):
            slot = f"c{number}"
            self.register_buffer(slot, _tensor(stored))
            self._slots[stored.name] = slot
        for node in model.graph.node:
            if node.domain or node.op_type not in OPERATORS:
                raise ModelError(
                    f"node {node.name!r} is a {node.op_type}, which is not known here "
                    f"({', '.join(OPERATORS)} are): start from the float model"
                )
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            self._steps.append((node, attributes))

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views (N, H, W, 3) uint8, as the graph has them, to its outputs, (N, 1) each."""
        values = dict(zip(self.input_names, views, strict=True))
        values |= {name: self.stored(name) for name in self._slots}
        for node, attributes in self._steps:
            inputs = [values[name] for name in node.input if name]
            made = OPERATORS[node.op_type](inputs, attributes)
            values[node.output[0]] = self.passed_on(node.output[0], made)
        return tuple(values[name] for name in self.output_names)

    def stored(self, name: str) -> Tensor:
        """A stored tensor as the nodes read it."""
        found: Tensor = getattr(self, self._slots[name])
        return found

    def passed_on(self, _name: str, made: Tensor) -> Tensor:
        """A tensor that a node made, as the nodes after it read it."""
        return made


def _tensor(stored: TensorProto) -> Tensor:
    """A stored tensor; bfloat16, which NumPy lacks, by its bits."""
    if stored.data_type == TensorProto.BFLOAT16:
        bits = np.array(numpy_helper.to_array(stored)).view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.array(numpy_helper.to_array(stored)))
