"""A small float model in ONNX, laid out as students are: two views, shared weights, a shortcut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dgiqa_stream.manifest import ModelManifest
from dgiqa_stream.preprocess import ViewSpec

SIDE, WIDTH = 32, 8
MEAN, STD = 116.0, 57.63
VIEWS = [
    ViewSpec("whole", "whole", SIDE, SIDE),
    ViewSpec("fragments", "fragments", SIDE, SIDE, rows=2, columns=2),
]


def tiny_graph(seed: int = 0) -> onnx.ModelProto:
    """uint8 views to ``quality``: stem, a block with a shortcut, pooling, two layers of head.

    Convolutions are ``stem``, ``expand``, ``depthwise`` and ``project``, with ``_1`` for the second
    view; none has a ``kernel_shape``, as the dynamo exporter may leave it out.
    """
    rng = np.random.default_rng(seed)
    constants = {
        "mean": np.array(MEAN, np.float32),
        "std": np.array(STD, np.float32),
        **_conv_weights(rng),
        "hidden.weight": rng.normal(0, 0.4, (6, 2 * WIDTH)).astype(np.float32),
        "hidden.bias": rng.normal(0, 0.1, 6).astype(np.float32),
        "quality.weight": rng.normal(0, 0.7, (1, 6)).astype(np.float32),
        "quality.bias": np.zeros(1, np.float32),
    }
    nodes = [node for number, view in enumerate(VIEWS) for node in _trunk(view.name, number)]
    nodes += [
        helper.make_node("Concat", ["pooled", "pooled_1"], ["features"], name="concat", axis=1),
        helper.make_node(
            "Gemm", ["features", "hidden.weight", "hidden.bias"], ["h"], name="hidden", transB=1
        ),
        helper.make_node("Relu", ["h"], ["hr"], name="hidden_relu"),
        helper.make_node(
            "Gemm", ["hr", "quality.weight", "quality.bias"], ["logit"], name="last", transB=1
        ),
        helper.make_node("Sigmoid", ["logit"], ["quality"], name="sigmoid"),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(v.name, TensorProto.UINT8, ["batch", *v.shape])
            for v in VIEWS
        ],
        [helper.make_tensor_value_info("quality", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _conv_weights(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shapes = {
        "stem": (WIDTH, 3, 3, 3),
        "expand": (2 * WIDTH, WIDTH, 1, 1),
        "depthwise": (2 * WIDTH, 1, 3, 3),
        "project": (WIDTH, 2 * WIDTH, 1, 1),
    }
    found = {}
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:]))
        found[f"{name}.weight"] = rng.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    return found


def _trunk(view: str, number: int) -> list[onnx.NodeProto]:
    end = f"_{number}" if number else ""

    def node(kind: str, inputs: list[str], output: str, name: str, **more: object):
        return helper.make_node(kind, inputs, [output + end], name=name + end, **more)

    def conv(source: str, name: str, output: str, **more: object):
        inputs = [source + end, f"{name}.weight", f"{name}.bias"]
        return node("Conv", inputs, output, name, **more)

    same = {"pads": [1, 1, 1, 1]}
    return [
        node("Transpose", [view], "nchw", "transpose", perm=[0, 3, 1, 2]),
        node("Cast", ["nchw" + end], "float", "cast", to=TensorProto.FLOAT),
        node("Sub", ["float" + end, "mean"], "centred", "sub"),
        node("Div", ["centred" + end, "std"], "normal", "div"),
        conv("normal", "stem", "s", strides=[2, 2], **same),
        node("Relu", ["s" + end], "sr", "stem_relu"),
        conv("sr", "expand", "e"),
        node("Relu", ["e" + end], "er", "expand_relu"),
        conv("er", "depthwise", "d", group=2 * WIDTH, **same),
        node("Relu", ["d" + end], "dr", "depthwise_relu"),
        conv("dr", "project", "p"),
        node("Add", ["sr" + end, "p" + end], "sum", "add"),
        node("GlobalAveragePool", ["sum" + end], "mean4", "pool"),
        node("Flatten", ["mean4" + end], "pooled", "flatten", axis=1),
    ]


def pictures(count: int, seed: int = 1) -> list[dict[str, NDArray[np.uint8]]]:
    """Batches of one: blocks of colour, of other sizes and contrasts each."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        views = {}
        for view in VIEWS:
            cell = int(rng.choice([2, 4, 8, 16]))
            grid = rng.normal(rng.uniform(60, 190), rng.uniform(10, 70), (SIDE // cell,) * 2 + (3,))
            big = np.kron(grid, np.ones((cell, cell, 1)))
            views[view.name] = np.clip(big, 0, 255).astype(np.uint8)[None]
        found.append(views)
    return found


def joined(parts: list[dict[str, NDArray[np.uint8]]]) -> dict[str, NDArray[np.uint8]]:
    """Batches of one to one batch."""
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def write_tiny(path: Path, **more: object) -> ModelManifest:
    """The tiny model as files, ``path`` and its manifest."""
    from quant.export_onnx import write_model

    settings: dict[str, object] = {
        "name": "tiny",
        "version": "1.0.0",
        "precision": "fp32",
        "views": VIEWS,
        "normalisation": (MEAN, STD),
        "num_parameters": 1000,
        "made_by": "a test",
        "history": [{"step": "train"}],
    }
    return write_model(tiny_graph(), path, **(settings | more))
