"""Engines: from ONNX by TensorRT itself, or from a torch program by torch-tensorrt.

TensorRT 10 and 11 alike: networks are strongly typed, so that an engine's precision is that of the
file it is made from. Both packages are imported here alone, and on demand.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from dgiqa_stream.errors import BackendUnavailable, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram

    from dgiqa_stream.preprocess import ViewSpec

_TIMING, _ENGINES = "timing.cache", "engines"
Count = Annotated[int, msgspec.Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine is built for. Saved in its manifest."""

    min_batch: Count = 1
    best_batch: Count = 16
    """The batch whose kernels are timed."""
    max_batch: Count = 64
    workspace_bytes: Count = 1 << 30
    effort: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    """TensorRT's builder optimisation level: how long it searches."""
    hardware_compatible: bool = False
    """Run on every GPU from Ampere on, slower, instead of on GPUs of one kind."""
    version_compatible: bool = False
    """Run on later versions of TensorRT, too."""
    version: int = 1

    def __post_init__(self) -> None:
        """Refuse batches out of order."""
        if not self.min_batch <= self.best_batch <= self.max_batch:
            raise ValueError(
                f"batches must rise: min {self.min_batch}, best {self.best_batch}, "
                f"max {self.max_batch}"
            )

    def shapes(self, view: ViewSpec) -> tuple[tuple[int, ...], ...]:
        """The profile of one view: smallest, best and largest shape, (N, H, W, 3)."""
        return tuple((n, *view.shape) for n in (self.min_batch, self.best_batch, self.max_batch))


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A serialised engine and what built it."""

    plan: bytes
    tensorrt: str
    """Version of TensorRT, which must be there again where it runs."""
    gpu: str
    """Name of the GPU it was built on."""
    is_reused: bool = False
    """Whether the engine cache had it."""


def build_from_onnx(
    content: bytes, views: Sequence[ViewSpec], config: EngineConfig, *, cache: Path | None = None
) -> Engine:
    """An engine of an ONNX file's bytes by TensorRT's parser and builder.

    In the folder ``cache`` kernels' timings are kept, and engines by what they were made of, for
    what versions and GPU: the same again is read, not built. Raises :class:`BackendUnavailable`
    without TensorRT or a GPU, :class:`ModelError` with the parser's reasons.
    """
    trt = import_tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    gpu = gpu_name()
    kept = None if cache is None else _engine_path(cache, content, config, trt.__version__, gpu)
    if kept is not None and kept.is_file():
        return Engine(kept.read_bytes(), trt.__version__, gpu, is_reused=True)
    try:
        builder = trt.Builder(logger)
    except TypeError as exc:  # how a null pointer comes out of the bindings
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} found no GPU that it can build for"
        ) from exc
    network = _parse(trt, builder, logger, content)
    settings = _settings(trt, builder, views, config)
    timings = _with_timings(settings, cache)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise ModelError(
            f"TensorRT {trt.__version__} built no engine; its own messages above say why. "
            "Check the file with `dgiqa-quant check-tensorrt`"
        )
    if timings is not None:
        _write(timings, bytes(memoryview(settings.get_timing_cache().serialize())))
    content_of_plan = bytes(memoryview(plan))
    if kept is not None:
        _write(kept, content_of_plan)
    return Engine(content_of_plan, trt.__version__, gpu)


def build_from_program(
    program: ExportedProgram,
    views: Sequence[ViewSpec],
    config: EngineConfig,
    *,
    output_names: Sequence[str],
    cache: Path | None = None,
) -> Engine:
    """An engine of a ``torch.export`` program by torch-tensorrt's dynamo path.

    ``views`` are in the program's order; ``output_names`` name the members of the tuple it gives.
    Errors and ``cache`` as in :func:`build_from_onnx`.
    """
    torch_tensorrt, trt = import_torch_tensorrt(), import_tensorrt()
    import torch

    inputs = [
        torch_tensorrt.Input(
            min_shape=smallest, opt_shape=best, max_shape=largest, dtype=torch.uint8
        )
        for smallest, best, largest in map(config.shapes, views)
    ]
    caching: dict[str, Any] = {}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        caching = {
            "timing_cache_path": str(cache / _TIMING),
            "cache_built_engines": True,
            "reuse_cached_engines": True,
            "engine_cache_dir": str(cache / _ENGINES),
        }
    try:
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=inputs,
            require_full_compilation=True,
            workspace_size=config.workspace_bytes,
            optimization_level=config.effort,
            hardware_compatible=config.hardware_compatible,
            version_compatible=config.version_compatible,
            arg_input_binding_names=tuple(view.name for view in views),
            output_binding_names=tuple(output_names),
            **caching,
        )
    except RuntimeError as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ModelError(
            f"torch-tensorrt {torch_tensorrt.__version__} built no engine: {reason}; try "
            "`dgiqa-quant engine` on the .onnx"
        ) from exc
    return Engine(bytes(plan), trt.__version__, gpu_name())


def import_tensorrt() -> Any:
    """TensorRT's Python package, or :class:`BackendUnavailable` that says where to get it."""
    return _imported("tensorrt", "on a Jetson it is a part of JetPack")


def import_torch_tensorrt() -> Any:
    """torch-tensorrt, or :class:`BackendUnavailable` that says where to get it."""
    return _imported("torch_tensorrt", "or build from the .onnx, with TensorRT alone")


def _imported(name: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as exc:  # OSError: the package is there, its CUDA libraries not
        why = "is not installed" if _is_absent(name) else f"cannot be loaded ({exc})"
        raise BackendUnavailable(
            f"{name} {why}: with an NVIDIA GPU, pip install 'dgiqa-stream[tensorrt]'; {otherwise}"
        ) from exc


def _is_absent(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def gpu_name() -> str:
    """The GPU that engines are built on, by torch; empty where torch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _engine_path(
    cache: Path, content: bytes, config: EngineConfig, version: str, gpu: str
) -> Path | None:
    """Where an engine is kept: by its source, settings, versions and GPU; None for an unknown GPU.

    An engine read back on another GPU would fail, or run slowly.
    """
    if not gpu:
        return None
    parts = [
        hashlib.sha256(content).hexdigest(),
        msgspec.json.encode(config).decode(),
        version,
        gpu,
    ]
    return cache / _ENGINES / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()}.engine"


def _parse(trt: Any, builder: Any, logger: Any, content: bytes) -> Any:
    """A strongly typed network of a file; TensorRT 11 knows no other."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ModelError(
            f"TensorRT {trt.__version__} cannot read the model: {'; '.join(reasons)}. "
            "Check it with `dgiqa-quant check-tensorrt`"
        )
    return network


def _settings(trt: Any, builder: Any, views: Sequence[ViewSpec], config: EngineConfig) -> Any:
    """The builder's settings, with one optimisation profile for all views."""
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    settings.builder_optimization_level = config.effort
    if config.hardware_compatible:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    profile = builder.create_optimization_profile()
    for view in views:
        profile.set_shape(view.name, *config.shapes(view))
    settings.add_optimization_profile(profile)
    return settings


def _with_timings(settings: Any, cache: Path | None) -> Path | None:
    """Give the builder the timings that are kept; where to write them afterwards."""
    if cache is None:
        return None
    path = cache / _TIMING
    known = path.read_bytes() if path.is_file() else b""
    if not settings.set_timing_cache(settings.create_timing_cache(known), ignore_mismatch=False):
        # of another version or GPU: begin anew
        settings.set_timing_cache(settings.create_timing_cache(b""), ignore_mismatch=False)
    return path


def _write(path: Path, content: bytes) -> None:
    """Beside, then rename: a kill leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
