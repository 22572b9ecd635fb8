"""ONNX Runtime's TensorRT provider: where it is absent, its CUDA provider, then the CPU.

It keeps its own engines, by model, versions and GPU, in the folder that torch-tensorrt's lie in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgiqa_stream.backends import _onnxruntime, engine_folder

if TYPE_CHECKING:
    from pathlib import Path

    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.preprocess import ViewSpec

PROVIDER = "TensorrtExecutionProvider"
MAX_BATCH = 64


def open_model(
    model: LoadedModel, *, device: str, num_threads: int
) -> _onnxruntime.OnnxRuntimeBackend:
    """Open the model in FP16, or in INT8 made for TensorRT; the first time takes minutes.

    INT8 that TensorRT does not take runs without it, and the status says so.
    """
    is_taken = model.manifest.precision != "int8" or model.manifest.target == "tensorrt"
    return _onnxruntime.open_model(
        model,
        device=device,
        num_threads=num_threads,
        name="onnxruntime-tensorrt",
        preferred=(PROVIDER, lambda: _options(model)) if is_taken else None,
        instead="" if is_taken else _why_without(model),
        max_batch=MAX_BATCH,
    )


def _why_without(model: LoadedModel) -> str:
    return (
        f"{model.path.name} is INT8 for {model.manifest.target}: TensorRT takes --model "
        "student-fp32 or student-tensorrt"
    )


def _options(model: LoadedModel) -> dict[str, str]:
    """Those of a machine whose folder for engines can be made; else without caches."""
    manifest, folder = model.manifest, engine_folder() / "onnxruntime"
    is_int8 = manifest.precision == "int8"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return provider_options(manifest.preprocess.views, None, is_int8=is_int8)
    return provider_options(manifest.preprocess.views, folder, is_int8=is_int8)


def provider_options(
    views: list[ViewSpec], folder: Path | None, *, is_int8: bool
) -> dict[str, str]:
    """Settings of the provider: caches, precision, one profile of batches from 1 to the largest.

    Without a profile it would build another engine for each new batch size.
    """
    profiles = {
        f"trt_profile_{kind}_shapes": ",".join(
            f"{view.name}:{'x'.join(str(n) for n in (size, *view.shape))}" for view in views
        )
        for kind, size in (("min", 1), ("opt", 1), ("max", MAX_BATCH))
    }
    caches = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
    return {
        "trt_fp16_enable": "True",
        "trt_int8_enable": str(is_int8),
        **(caches if folder else {}),
        **profiles,
    }
