"""The published DGIQA's crop, whole and factored, in FP32 and INT8: bytes and time in ONNX Runtime.

Weights are random and so are the pictures that calibrate: neither bytes nor time depend on them,
and no score is compared. The published topology with Swin-T has 102.88 million parameters.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _bench as bench
import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.models.teacher import CROP_PX, Dgiqa, TeacherSpec
from quant.low_rank.config import load_low_rank_recipe
from quant.low_rank.layers import shape_like_
from quant.low_rank.plan import planned_ranks
from quant.low_rank.positions import read_positions_only_

Crops = Mapping[str, NDArray[np.float32]]
LIGHT = bench.HERE.parent / "configs" / "quant" / "dgiqa-light.toml"
INPUTS = ("picture", "depth")
QUANTISED = ["Conv", "Gemm", "MatMul"]


def crops(seed: int = 1) -> Crops:
    """One crop of noise, and one of its depth."""
    rng = np.random.default_rng(seed)
    shape = (1, 3, CROP_PX, CROP_PX)
    return {name: rng.standard_normal(shape).astype(np.float32) for name in INPUTS}


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left: Iterator[Crops] = iter([crops(1), crops(2)])

    def get_next(self) -> Crops | None:
        return next(self._left, None)


def make_teachers(spec: TeacherSpec | None = None) -> tuple[Dgiqa, Dgiqa]:
    """The whole teacher, and the one of ``dgiqa-light.toml``'s shape that computes what is read."""
    torch.manual_seed(1)
    whole, light = Dgiqa(spec).eval(), Dgiqa(spec)
    shape_like_(light, planned_ranks(light, load_low_rank_recipe(LIGHT).low_rank))
    read_positions_only_(light)
    for parameter in light.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
    return whole, light.eval()


def export(model: Dgiqa, path: Path) -> None:
    """One crop and its depth to one score, as ONNX."""
    example = tuple(torch.from_numpy(crops()[name]) for name in INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        made = torch.onnx.export(
            model,
            example,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=["quality"],
            opset_version=20,
            verbose=False,
        )
    assert made is not None
    onnx.save(made.model_proto, path)


def quantise(source: Path, target: Path) -> None:
    """uint8 activations, int8 weights per channel; products of two activations stay in float."""
    ready = source.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(target),
        _Noise(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=QUANTISED,
        nodes_to_exclude=products_of_activations(onnx.load(ready)),
    )
    ready.unlink()


def products_of_activations(model: onnx.ModelProto) -> list[str]:
    """Names of the products that read no stored weight."""
    stored = {t.name for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    return [n.name for n in products if stored.isdisjoint(n.input)]


def opened(path: Path, threads: int) -> ort.InferenceSession:
    """A session of so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(paths: Mapping[str, Path], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a crop and how many times faster than the first, models run in turn."""
    sessions = {name: opened(path, threads) for name, path in paths.items()}
    seen, first = crops(), next(iter(paths))
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(-1, rounds):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, seen)
            if number >= 0:
                found[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {
            "median_ms": round(statistics.median(ms), 1),
            "best_ms": round(min(ms), 1),
            "times_faster": round(
                statistics.median(a / b for a, b in zip(found[first], ms, strict=True)), 2
            ),
        }
        for name, ms in found.items()
    }


def measure_crop(rounds: int, threads: tuple[int, ...]) -> dict[str, Any]:
    """The whole teacher in FP32, the factored one, and that in INT8."""
    whole, light = make_teachers()
    parameters = {
        "whole_fp32": sum(p.numel() for p in whole.parameters()),
        "light_fp32": sum(p.numel() for p in light.parameters()),
    }
    with tempfile.TemporaryDirectory() as folder:
        names = ("whole_fp32", "light_fp32", "light_int8")
        paths = {name: Path(folder) / f"{name}.onnx" for name in names}
        for name, model in zip(names, (whole, light), strict=False):
            bench.say(f"exporting {name}")
            export(model, paths[name])
        bench.say("quantising")
        quantise(paths["light_fp32"], paths["light_int8"])
        times = {str(n): timed(paths, rounds, n) for n in threads}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    return {
        "weights": "random",
        "parameters": parameters,
        "size_bytes": sizes,
        "by_threads": times,
    }
