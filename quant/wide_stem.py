"""After INT8: the first convolution of a view computes several columns at a time.

ONNX Runtime gathers what a convolution reads by copies of one kernel row each: nine bytes of a
picture, which costs more than the arithmetic. Several neighbouring columns, taken as the channels
of one, are read by copies of many bytes and multiplied by a wider weight, which is zero where a
column does not reach. The integers, their sums and the scales are the same, and so is every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_MARK = ".wide"
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
_DEFAULTS = {"group": 1, "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
_KNOWN = {"group": 1, "strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [1, 1]}

Array = NDArray[Any]


def widen_stem_(graph: onnx.ModelProto, columns: int) -> None:
    """Let each view's first convolution, 3 by 3 and of stride 2, make so many columns at once.

    ``graph`` has Q/DQ nodes and takes the pictures' bytes, (N, H, W, C). A view whose first
    convolution is left in float, or is another, stays as it is. Raises ``ValueError`` where every
    view's is another, and for a view whose width is no multiple of twice the columns.
    """
    stem = _Stem(graph, columns)
    for view in graph.graph.input:
        stem.widen(view)
    stem.put()


class _Stem:
    """A graph whose first layers are being rewritten."""

    def __init__(self, graph: onnx.ModelProto, columns: int) -> None:
        self._graph, self._columns = graph, columns
        self._makers = {name: node for node in graph.graph.node for name in node.output}
        self._stored = {t.name: t for t in graph.graph.initializer}
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}
        self._wide: set[str] = set()
        self._others: list[str] = []

    def widen(self, view: onnx.ValueInfoProto) -> None:
        """Rewrite what leads from a view to its first quantised layer."""
        transpose = self._reader(view.name)
        dequantise = self._reader(transpose.output[0])
        if transpose.op_type != "Transpose" or dequantise.op_type != "DequantizeLinear":
            return  # in float
        conv = self._reader(dequantise.output[0])
        quantise = self._reader(conv.output[0])
        height, width, depth = (d.dim_value for d in view.type.tensor_type.shape.dim[1:])
        if not _is_known(conv, self._weight_of(conv).dims[2:] if conv.op_type == "Conv" else []):
            self._others.append(f"{conv.name} of {view.name!r}")
            return
        self._check(view.name, width)
        grouped = self._reshape(
            view.name, [-1, height, width // (2 * self._columns), 2 * self._columns * depth]
        )
        transpose.input[0] = grouped.output[0]
        self._before[transpose.name] = [grouped]
        num_channels = self._widen_conv(conv)
        back = [-1, height // 2, width // 2, num_channels]
        self._after[quantise.name] = self._thin(quantise, back)
        conv.output[0] = quantise.input[0] = conv.output[0] + _MARK

    def put(self) -> None:
        """Write the nodes in their new order, without those that are not read any more."""
        if self._others and not self._wide:
            raise ValueError(
                f"stem_columns is for a first convolution of 3 by 3 and stride 2, and "
                f"{self._others[0]} is another: leave stem_columns at 1"
            )
        inner, nodes = self._graph.graph, []
        for node in inner.node:
            around = self._before.get(node.name, []), self._after.get(node.name, [])
            nodes += [*around[0], node, *around[1]]
        read = {name for n in nodes for name in n.input} | {o.name for o in inner.output}
        kept = [n for n in nodes if read & set(n.output)]
        read = {name for n in kept for name in n.input}
        stored = [t for t in inner.initializer if t.name in read]
        copies = [type(t).FromString(t.SerializeToString()) for t in (*kept, *stored)]
        for field in (inner.node, inner.initializer, inner.value_info):
            del field[:]
        inner.node.extend(copies[: len(kept)])
        inner.initializer.extend(copies[len(kept) :])
        onnx.checker.check_model(self._graph, full_check=True)

    def _reader(self, name: str) -> onnx.NodeProto:
        return next(n for n in self._graph.graph.node if name in n.input)

    def _check(self, view: str, width: int) -> None:
        if width % (2 * self._columns):
            raise ValueError(
                f"stem_columns = {self._columns} needs a width in multiples of "
                f"{2 * self._columns}, and {view!r} has {width}: choose another or 1"
            )

    def _weight_of(self, conv: onnx.NodeProto) -> onnx.TensorProto:
        """The integers."""
        return self._stored[self._makers[conv.input[1]].input[0]]

    def _reshape(self, name: str, shape: list[int]) -> onnx.NodeProto:
        constant = f"{name}{_MARK}_shape"
        stored = numpy_helper.from_array(np.array(shape, np.int64), constant)
        self._graph.graph.initializer.append(stored)
        made = f"{name}{_MARK}"
        return helper.make_node("Reshape", [name, constant], [made], f"{made}_reshape")

    def _thin(self, quantise: onnx.NodeProto, shape: list[int]) -> list[onnx.NodeProto]:
        """From several columns as channels back to columns; ONNX Runtime moves nothing here."""
        result = quantise.output[0]
        wide, rows = result + _MARK, f"{result}{_MARK}_rows"
        quantise.output[0] = wide
        split = self._reshape(rows, shape)
        return [
            helper.make_node("Transpose", [wide], [rows], f"{rows}_transpose", perm=_TO_NHWC),
            split,
            helper.make_node(
                "Transpose", split.output, [result], f"{result}_transpose", perm=_TO_NCHW
            ),
        ]

    def _widen_conv(self, conv: onnx.NodeProto) -> int:
        """Give the convolution its wider weight and bias; returns the channels that it had."""
        weight, bias = (self._makers[name] for name in conv.input[1:3])
        num_channels = self._weight_of(conv).dims[0]
        changes: list[tuple[onnx.NodeProto, list[Callable[[Array], Array]]]] = [
            (weight, [self._wide_weight, self._repeated, self._repeated]),
            (bias, [self._repeated] * 3),
        ]
        for i, (node, change) in enumerate(changes, start=1):
            conv.input[i] = node.output[0] + _MARK
            if node.name not in self._wide:
                self._wide.add(node.name)
                self._before[node.name] = [self._changed(node, change)]
        kept = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 1, 0]}
        del conv.attribute[:]
        conv.attribute.extend(helper.make_attribute(name, value) for name, value in kept.items())
        return int(num_channels)

    def _changed(
        self, node: onnx.NodeProto, changes: list[Callable[[Array], Array]]
    ) -> onnx.NodeProto:
        """A DequantizeLinear of changed constants."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name, made.output[0] = node.name + _MARK, node.output[0] + _MARK
        for i, change in enumerate(changes):
            name = node.input[i] + _MARK
            made.input[i] = name
            if name not in self._stored:
                values = change(numpy_helper.to_array(self._stored[node.input[i]]))
                self._stored[name] = numpy_helper.from_array(values, name)
                self._graph.graph.initializer.append(self._stored[name])
        return made

    def _repeated(self, values: Array) -> Array:
        """Those of each channel, for each column."""
        return np.tile(values, self._columns)

    def _wide_weight(self, weight: Array) -> Array:
        """Weights (M, C, 3, 3) to (columns * M, 2 * columns * C, 3, 2).

        Of the two groups of 2 * columns pixels that are read, the first is the one to the left.
        """
        num, depth, rows, taps = weight.shape
        pixels = 2 * self._columns
        wide = np.zeros((self._columns, num, 2, pixels, depth, rows), weight.dtype)
        for column in range(self._columns):
            for tap in range(taps):
                group, pixel = divmod(pixels + 2 * column + tap - 1, pixels)
                wide[column, :, group, pixel] = weight[..., tap]
        flat = wide.reshape(self._columns * num, 2, pixels * depth, rows)
        return np.ascontiguousarray(flat.transpose(0, 2, 3, 1))


def _is_known(conv: onnx.NodeProto, kernel: Sequence[int]) -> bool:
    """Whether it is 3 by 3 of stride 2, which is the one that is widened."""
    given = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    found = {name: given.get(name, value) for name, value in _DEFAULTS.items()}
    return found == _KNOWN and list(kernel) == [3, 3]
