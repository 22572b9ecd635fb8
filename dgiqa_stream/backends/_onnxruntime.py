"""ONNX Runtime, on CPU or CUDA. The only file that imports onnxruntime."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.backends import BackendStatus, Outputs, not_loaded
from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel, ModelManifest
    from dgiqa_stream.types import FrameBatch

_FATAL_ONLY = 4  # onnxruntime's log severity


def open_model(model: LoadedModel, *, device: str, num_threads: int) -> OnnxRuntimeBackend:
    """Open the model; the manifest has been checked against the file already."""
    # Since 1.29 it tells its maker of each session, the file's name included, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise not_loaded("onnxruntime", exc) from exc
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"unknown device {device!r}; known here: auto, cpu, cuda, cuda:N")
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device.startswith("cuda") and not has_cuda:
        raise BackendUnavailable(
            f"device {device!r} needs ONNX Runtime with CUDA, and this one has "
            f"{', '.join(ort.get_available_providers())}: pip install onnxruntime-gpu in place of "
            "onnxruntime, or use --device cpu"
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(model.path), options, providers=providers)
    except Exception as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(
            f"{model.path.name} cannot be opened by ONNX Runtime {ort.__version__}: {reason}. "
            "Export it again with `dgiqa-quant export`, or choose another --model"
        ) from exc
    active = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if device.startswith("cuda") and active == "cpu":
        raise BackendUnavailable(
            f"device {device!r}: ONNX Runtime could not start CUDA and would run on the CPU; "
            "see `dgiqa-stream doctor`, or use --device cpu"
        )
    reason = "" if device != "auto" or active == "cuda" else "no CUDA provider in this ONNX Runtime"
    status = BackendStatus(f"onnxruntime:{device}", f"onnxruntime:{active}", reason)
    _check_inputs(session, model)
    _check_outputs(session, model)
    return OnnxRuntimeBackend(session, model, status)


def _check_inputs(session: Any, model: LoadedModel) -> None:
    """The graph takes exactly the views that the manifest describes."""
    found = {i.name: (i.type, tuple(i.shape[1:])) for i in session.get_inputs()}
    wanted = {v.name: ("tensor(uint8)", v.shape) for v in model.manifest.preprocess.views}
    if found != wanted:
        raise ModelError(
            f"{model.path.name} takes {found}, its manifest says {wanted}: "
            "they belong to different models; export both again with `dgiqa-quant export`"
        )


def _check_outputs(session: Any, model: LoadedModel) -> None:
    """The graph has the outputs that the manifest names, with one number for each frame."""
    found = {o.name: tuple(o.shape) for o in session.get_outputs()}
    for name in _output_names(model.manifest).values():
        shape = found.get(name)
        if shape is None or any(isinstance(n, int) and n != 1 for n in shape[1:]):
            raise ModelError(
                f"{model.path.name} gives {found}, its manifest says {name!r} with one number a "
                "frame: they belong to different models; export both again with "
                "`dgiqa-quant export`"
            )


def _output_names(manifest: ModelManifest) -> dict[str, str]:
    """Field of :class:`Outputs` to the graph's name for it, as far as the model has them."""
    specs = {"spread": manifest.interval, "unfamiliar": manifest.domain}
    more = {field: spec.output for field, spec in specs.items() if spec is not None}
    return {"quality": manifest.output.name, **more}


class OnnxRuntimeBackend:
    """One inference session; its ``run`` is thread-safe."""

    def __init__(self, session: Any, model: LoadedModel, status: BackendStatus) -> None:
        self._session = session
        names = _output_names(model.manifest)
        self._fields, self._names = tuple(names), list(names.values())
        self._status = status

    @property
    def status(self) -> BackendStatus:
        """What is really running."""
        return self._status

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`~dgiqa_stream.backends.Backend`."""
        if self._session is None:
            raise ModelError("the model is closed: open it again")
        try:
            found = self._session.run(self._names, dict(batch.views))
        except Exception as exc:  # out of memory, or a device that went away
            raise ModelError(f"inference failed: {' '.join(str(exc).split())}") from exc
        numbers = (
            _numbers(n, output, len(batch)) for n, output in zip(self._names, found, strict=True)
        )
        return Outputs(**dict(zip(self._fields, numbers, strict=True)))

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _numbers(name: str, output: Any, num_frames: int) -> NDArray[np.float32]:
    """One output as float32 (N,); raises :class:`ModelError` for NaN and infinities."""
    result: NDArray[np.float32] = np.asarray(output, np.float32).reshape(num_frames)
    if not np.isfinite(result).all():
        raise ModelError(
            f"the model gave {result.tolist()} as {name!r}: not a number for every frame"
        )
    return result
