"""A small network with a student's inputs, convolutions and head, its files, and small packs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import helper, numpy_helper

from dgiqa_stream.preprocess import ViewSpec
from dgiqa_stream.scorer import planes_of_rgb
from distill.data.packed import Record, as_planes_420, write_pack
from quant.calibration import CalibrationConfig, Views, synthetic, views_batch
from quant.export_onnx import write_model
from quant.proof.pictures import generated_pictures, texture

SIDE, MEAN, STD = 64, 116.0, 57.63
WIDTH, HIDDEN = 8, 6
SPECS = [
    ViewSpec("whole", "whole", SIDE, SIDE),
    ViewSpec("fragments", "fragments", SIDE, SIDE, rows=2, columns=2),
]
NUM_PARAMETERS = (
    (WIDTH * 3 * 9 + WIDTH)
    + 2 * (WIDTH * WIDTH + WIDTH)
    + (HIDDEN * 2 * WIDTH + HIDDEN)
    + (HIDDEN + 1)
)
MACS = (
    2 * (WIDTH * 3 * 9 * 32 * 32)  # the stem, stride 2, on both views
    + 2 * (2 * WIDTH * WIDTH * 32 * 32)  # two 1x1 convolutions on each
    + HIDDEN * 2 * WIDTH
    + HIDDEN
)


def small_graph(seed: int = 0) -> onnx.ModelProto:
    """Stem, two 1x1 convolutions around a shortcut, pooled; both views share the weights."""
    rng = np.random.default_rng(seed)
    constants = {
        "mean": np.array(MEAN),
        "std": np.array(STD),
        "stem.weight": rng.standard_normal((WIDTH, 3, 3, 3)) / 5,
        "stem.bias": rng.standard_normal(WIDTH) / 10,
        "expand.weight": rng.standard_normal((WIDTH, WIDTH, 1, 1)) / 2,
        "expand.bias": rng.standard_normal(WIDTH) / 10,
        "project.weight": rng.standard_normal((WIDTH, WIDTH, 1, 1)) / 2,
        "project.bias": rng.standard_normal(WIDTH) / 10,
        "hidden.weight": rng.standard_normal((HIDDEN, 2 * WIDTH)),
        "hidden.bias": rng.standard_normal(HIDDEN) / 10,
        "quality.weight": rng.standard_normal((1, HIDDEN)) / 3,
        "quality.bias": np.zeros(1),
    }
    nodes, pooled = [], []
    for view in SPECS:
        nodes += _branch(view.name)
        pooled.append(f"{view.name}.flat")
    nodes += [
        helper.make_node("Concat", pooled, ["features"], axis=1),
        helper.make_node("Gemm", ["features", "hidden.weight", "hidden.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["shown"]),
        helper.make_node("Gemm", ["shown", "quality.weight", "quality.bias"], ["logit"], transB=1),
        helper.make_node("Sigmoid", ["logit"], ["quality"]),
    ]
    for number, node in enumerate(nodes):
        node.name = f"{node.op_type.lower()}_{number}"
    inputs = [
        helper.make_tensor_value_info(v.name, onnx.TensorProto.UINT8, ["batch", *v.shape])
        for v in SPECS
    ]
    quality = helper.make_tensor_value_info("quality", onnx.TensorProto.FLOAT, ["batch", 1])
    stored = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()]
    inner = helper.make_graph(nodes, "small", inputs, [quality], stored)
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _branch(view: str) -> list[onnx.NodeProto]:
    def name(part: str) -> str:
        return f"{view}.{part}"

    def conv(source: str, layer: str, target: str, **attributes: object) -> onnx.NodeProto:
        inputs = [name(source), f"{layer}.weight", f"{layer}.bias"]
        return helper.make_node("Conv", inputs, [name(target)], **attributes)

    return [
        helper.make_node("Transpose", [view], [name("nchw")], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", [name("nchw")], [name("float")], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [name("float"), "mean"], [name("centred")]),
        helper.make_node("Div", [name("centred"), "std"], [name("normal")]),
        conv("normal", "stem", "a", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", [name("a")], [name("b")]),
        conv("b", "expand", "c", kernel_shape=[1, 1]),
        helper.make_node("Relu", [name("c")], [name("d")]),
        conv("d", "project", "e", kernel_shape=[1, 1]),
        helper.make_node("Add", [name("b"), name("e")], [name("f")]),
        helper.make_node("GlobalAveragePool", [name("f")], [name("pooled")]),
        helper.make_node("Flatten", [name("pooled")], [name("flat")], axis=1),
    ]


def calibration_batches(number: int = 16) -> list[Views]:
    """Textures, clean and damaged, with black, white and noise."""
    pictures = [planes for _, planes in generated_pictures(3)][:number]
    return [views_batch(p, SPECS) for p in pictures] + synthetic(CalibrationConfig(), SPECS)


def write_small(graph: onnx.ModelProto, path: Path, precision: str = "fp32", **history) -> Path:
    """The graph as a model file with its manifest."""
    write_model(
        graph,
        path,
        name="small",
        version="1",
        precision=precision,
        views=SPECS,
        normalisation=(MEAN, STD),
        num_parameters=NUM_PARAMETERS,
        made_by="test",
        history=[{"step": "train"}, *([{"step": "int8", **history}] if history else [])],
    )
    return path


def rgb_of(seed: int) -> np.ndarray:
    """A texture of its own sharpness, uint8 (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    made = texture(rng, (96, 128))
    return np.asarray(cv2.GaussianBlur(made, (0, 0), 0.3 + 2 * rng.uniform()), np.uint8)


def write_packs(folder: Path, score, *, num_validation: int = 24, level: int = 40) -> Path:
    """Rated pictures whose MOS is ``score(planes)`` with some noise, and ladders of darkening."""
    rng = np.random.default_rng(9)
    about = {"made_by": "test", "settings": {}}
    rated, ladders = [], []
    for i, split in enumerate(["train"] * 12 + ["validation"] * num_validation):
        planes = as_planes_420(rgb_of(i))
        mos = float(np.clip(score(planes) / 100 + rng.normal(0, 0.02), 0, 1))
        rated.append((Record(f"{i}.jpg", f"{i}.jpg", split, mos=mos), planes))
    for i, (content, split) in enumerate([("a", "train"), ("b", "validation"), ("c", "train")]):
        for step in range(4):
            kind = "darker" if step else "clean"
            record = Record(f"{content}/{step}", content, split, degradation=kind, level=step)
            darker = np.clip(rgb_of(100 + i).astype(int) - level * step, 0, 255)
            ladders.append((record, as_planes_420(darker.astype(np.uint8))))
    write_pack(folder / "rated", rated, **about)
    write_pack(folder / "ladders", ladders, **about)
    return folder


def planes(seed: int):
    """A texture as planes."""
    return planes_of_rgb(rgb_of(seed))
