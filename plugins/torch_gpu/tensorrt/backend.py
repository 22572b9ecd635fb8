"""``--backend torch-tensorrt``: the torch backend with an engine for a network, or without one.

Where TensorRT is absent or builds no engine, the torch backend runs in its place: the status says
so, the runtime warns with the reason, and ``--strict`` refuses.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from dgiqa_stream.backends import BackendStatus, engine_folder
from dgiqa_stream.errors import BackendUnavailable, ModelError
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu.backend import TorchBackend, gathering, on_each
from plugins.torch_gpu.devices import devices_of
from plugins.torch_gpu.engine import Engine, buckets_up_to
from plugins.torch_gpu.network import OnnxNetwork
from plugins.torch_gpu.spread import SpreadBackend
from plugins.torch_gpu.tensorrt.engine_cache import EngineCache, EngineKey
from plugins.torch_gpu.tensorrt.network import (
    TensorRtNetwork,
    build_from_file,
    build_from_network,
    on_device,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgiqa_stream.manifest import LoadedModel

NAME = "torch-tensorrt"
_logger = logging.getLogger("dgiqa_stream.backends")


def open_model(
    model: LoadedModel,
    *,
    device: str,
    num_threads: int,
    max_batch: int | None = None,
    budget_seconds: float | None = None,
    gpu_profile: str = "latency",
    max_gpu_mb: int = 0,
    is_strict: bool = False,
    cache: EngineCache | None = None,
) -> TorchBackend | SpreadBackend:
    """Open a model with an engine of its own, or by torch alone where there can be none.

    Arguments and errors are those of :func:`plugins.torch_gpu.backend.open_model`.
    """
    places, reason = devices_of(device)
    reason = reason or _why_torch(places, max_gpu_mb)
    if not reason:
        wait, most = gathering(gpu_profile, max_batch, budget_seconds)
        kept = cache or EngineCache(engine_folder())
        try:
            return _with_engines(model, device, places, most, wait, kept, is_strict=is_strict)
        except Exception as exc:  # noqa: BLE001 - whatever it is, torch runs the model without it
            reason = " ".join(str(exc).split())[:300] or type(exc).__name__
    return torch_backend.open_model(
        model,
        device=device,
        num_threads=num_threads,
        max_batch=max_batch,
        budget_seconds=budget_seconds,
        gpu_profile=gpu_profile,
        max_gpu_mb=max_gpu_mb,
        is_strict=is_strict,
        requested=NAME,
        instead=reason,
    )


def _why_torch(places: Sequence[torch.device], max_gpu_mb: int) -> str:
    """Why an engine is not so much as tried; empty where it is."""
    if any(where.type != "cuda" for where in places):
        return "TensorRT needs a CUDA device"
    if max_gpu_mb:
        return "max_gpu_mb binds torch's memory alone, and TensorRT has its own"
    return ""


def _with_engines(
    model: LoadedModel,
    device: str,
    places: Sequence[torch.device],
    max_batch: int,
    budget_seconds: float,
    cache: EngineCache,
    *,
    is_strict: bool = False,
) -> TorchBackend | SpreadBackend:
    """One engine on each device; GPUs of one kind share what is built and kept."""
    shapes = {view.name: view.shape for view in model.manifest.preprocess.views}

    def on_one(where: torch.device) -> TorchBackend:
        key = key_of(model, where, max_batch)
        active = f"{NAME}:{where} {key.precision} (TensorRT {key.tensorrt})"
        network = open_network(model, key, where, cache)
        engine = Engine(network, shapes, where, max_batch=max_batch)
        status = BackendStatus(f"{NAME}:{device}", active)
        return TorchBackend(engine, model, status, max_batch, budget_seconds)

    return on_each(places, on_one, is_strict=is_strict)


def key_of(model: LoadedModel, where: torch.device, max_batch: int) -> EngineKey:
    """What an engine of the model would be of, here and now.

    Raises :class:`BackendUnavailable` where a package is missing, :class:`ModelError` for a file
    that TensorRT has no use for.
    """
    manifest = model.manifest
    is_int8 = (manifest.precision, manifest.target) == ("int8", "tensorrt")
    if model.path.suffix != ".onnx" or not (is_int8 or manifest.precision == "fp32"):
        raise ModelError(
            f"{model.path.name} is {manifest.precision} for {manifest.target}: an engine is made "
            "of an .onnx of fp32, such as --model student-fp32, or of `dgiqa-quant int8 --target "
            "tensorrt`"
        )
    major, minor = torch.cuda.get_device_capability(where)
    return EngineKey(
        model_sha256=manifest.sha256,
        precision="int8" if is_int8 else "fp16",
        buckets=buckets_up_to(max_batch),
        gpu=torch.cuda.get_device_name(where),
        capability=f"{major}.{minor}",
        tensorrt=_version("tensorrt"),
        torch_tensorrt="" if is_int8 else _version("torch-tensorrt"),
    )


def _version(package: str) -> str:
    """As installed, without loading it: an engine that is kept opens without torch-tensorrt."""
    names = (package, f"{package}-cu13", f"{package}-cu12")
    for name in names if package == "tensorrt" else names[:1]:
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    raise BackendUnavailable(
        f"{package} is not installed: pip install 'dgiqa-stream[gpu-tensorrt]' with an NVIDIA GPU"
    )


def open_network(
    model: LoadedModel, key: EngineKey, where: torch.device, cache: EngineCache
) -> TensorRtNetwork:
    """The engine that is kept; else one that is built, once, and kept."""
    kept = cache.find(key)
    reason = kept.reason
    if kept.plan is not None:
        try:
            return _opened(model, kept.plan, where)
        except BackendUnavailable:
            raise
        except (ModelError, RuntimeError) as exc:  # of another driver, say: versions are the key's
            reason = f"{key.file_name}: {exc}"
    told = f" anew, because {reason}" if reason else ""
    _logger.warning(
        "building a TensorRT engine of %s for %s%s: it takes minutes, once, and is kept in %s",
        model.path.name, key.gpu, told, cache.folder,
    )  # fmt: skip
    plan = _built(model, key, where)
    network = _opened(model, plan, where)
    try:
        cache.write(key, plan)
    except OSError as exc:
        _logger.warning("the engine is not kept (%s): the next start builds it again", exc)
    return network


def _built(model: LoadedModel, key: EngineKey, where: torch.device) -> bytes:
    views, max_batch = model.manifest.preprocess.views, key.buckets[-1]
    if key.precision == "int8":
        return build_from_file(model.path, views, where, max_batch=max_batch)
    network = OnnxNetwork(model.path, dtype=torch.float16)
    return build_from_network(network, views, where, max_batch=max_batch)


def _opened(model: LoadedModel, plan: bytes, where: torch.device) -> TensorRtNetwork:
    with on_device(where):
        return TensorRtNetwork(plan, model.manifest.preprocess.views, where)
