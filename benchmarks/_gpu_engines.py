"""Part of ``gpu_check.py``: the network alone, by each engine that is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dgiqa_stream.backends import engine_folder, open_backend
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.manifest import LoadedModel, load_model
from dgiqa_stream.types import FrameBatch
from plugins.torch_gpu.engine import Engine, Network
from plugins.torch_gpu.network import OnnxNetwork, noise_views

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL = "student-fp32"
BACKENDS = ("torch", "onnxruntime", "torch-tensorrt", "onnxruntime-tensorrt")
_BUILD_SECONDS = 60.0  # that an engine of TensorRT may take; less is not begun with

Timed = Callable[[Callable[[], Any]], float]
Shapes = Mapping[str, tuple[int, int, int]]


def alone(check: Any, seconds_of: Timed) -> dict[str, Any]:
    """Views on the device already, by engine and batch size, with operations over rate as floor."""
    model = load_model(MODEL)
    shapes = {view.name: view.shape for view in model.manifest.preprocess.views}
    rate = check.found.get("floors", {}).get("matmul_operations_per_second")
    operations = operations_per_frame(model, shapes)
    largest = 2 if check.is_quick else 64
    found: dict[str, Any] = {
        "operations_per_frame": operations,
        "floor_microseconds_per_frame": 1e6 * operations / rate if rate else None,
        "engines": {},
    }
    for name, network_of in (("torch", _torch), ("torch-tensorrt", _tensorrt)):
        begin = time.monotonic()
        try:
            network = network_of(check, model, largest)
            engine = Engine(network, shapes, torch.device(check.device), max_batch=largest)
        except (DgiqaError, ImportError, RuntimeError) as exc:
            found["engines"][name] = {"left_out": " ".join(str(exc).split())[:300]}
            continue
        opened = time.monotonic() - begin
        sizes = (1, 2) if check.is_quick else (1, 2, 4, 8, 16, 32, 64)
        by_batch = {str(n): _timed(check, engine, shapes, n, seconds_of) for n in sizes}
        found["engines"][name] = {"open_and_capture_seconds": opened, "by_batch": by_batch}
        engine.close()
    return found


def operations_per_frame(model: LoadedModel, shapes: Shapes) -> int:
    """Two for each multiplication and addition of convolutions and matrices, of one frame."""
    network = OnnxNetwork(model.path)
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        network(noise_views(shapes, 1))
    return int(counted.get_total_flops())


def _torch(check: Any, model: LoadedModel, _largest: int) -> Network:
    dtype = torch.float16 if check.device == "cuda" else torch.float32
    return OnnxNetwork(model.path, dtype=dtype)


def _tensorrt(check: Any, model: LoadedModel, largest: int) -> Network:
    from plugins.torch_gpu.tensorrt.backend import key_of, open_network
    from plugins.torch_gpu.tensorrt.engine_cache import EngineCache

    if check.device != "cuda":
        raise RuntimeError("TensorRT needs a CUDA device")
    if check.part_left < _BUILD_SECONDS:
        raise RuntimeError("no time was left to build an engine")
    where = torch.device("cuda", 0)
    return open_network(model, key_of(model, where, largest), where, EngineCache(engine_folder()))


def _timed(
    check: Any, engine: Engine, shapes: Shapes, size: int, seconds_of: Timed
) -> dict[str, Any]:
    views = {k: v.to(check.device) for k, v in noise_views(shapes, size).items()}
    seconds = seconds_of(lambda: engine.run(views))
    return {
        "frames_per_second": size / seconds,
        "microseconds_per_frame": 1e6 * seconds / size,
    }


def compared(check: Any, seconds_of: Timed) -> dict[str, Any]:
    """Every backend as the runtime opens it, from views in the CPU's memory to scores there."""
    model = load_model(MODEL)
    shapes = {view.name: view.shape for view in model.manifest.preprocess.views}
    sizes = (1, 2) if check.is_quick else (1, 8, 32)
    batches = {
        n: FrameBatch({k: v.numpy() for k, v in noise_views(shapes, n).items()}) for n in sizes
    }
    with_cpu = open_backend(model, device="cpu", num_threads=os.cpu_count() or 1)
    wanted = with_cpu.infer(batches[sizes[-1]]).quality
    with_cpu.close()
    found: dict[str, Any] = {}
    for name in BACKENDS:
        if "tensorrt" in name and check.part_left < _BUILD_SECONDS and not check.is_quick:
            found[name] = {"left_out": "no time was left to build an engine"}
            continue
        found[name] = _one_backend(check, model, name, batches, wanted, seconds_of)
    return found


def _one_backend(
    check: Any,
    model: LoadedModel,
    name: str,
    batches: Mapping[int, FrameBatch],
    wanted: NDArray[np.float32],
    seconds_of: Timed,
) -> dict[str, Any]:
    """Rates of one backend and how far its scores are from those of the largest batch."""
    begin = time.monotonic()
    try:
        backend = open_backend(model, backend=name, device=check.place, num_threads=1)
    except DgiqaError as exc:
        return {"left_out": str(exc)}
    try:
        status = backend.status
        if status.reason:  # another one would be measured
            return {"left_out": status.reason, "would_run_as": status.active}
        opened = time.monotonic() - begin
        apart = abs(backend.infer(batches[max(batches)]).quality - wanted)
        return {
            "active": status.active,
            "open_seconds": opened,
            "frames_per_second_by_batch": {
                str(n): n / seconds_of(lambda batch=batch: backend.infer(batch))
                for n, batch in batches.items()
            },
            "mean_points_from_cpu_fp32": 100 * float(apart.mean()),
        }
    finally:
        backend.close()
