"""ONNX Runtime, on CPU, CUDA or its TensorRT provider. The only file that imports onnxruntime."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.backends import (
    BackendStatus,
    Outputs,
    finite_numbers,
    not_loaded,
    output_names,
)
from dgiqa_stream.errors import BackendUnavailable, ConfigError, DeviceLost, ModelError
from dgiqa_stream.heap import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.types import FrameBatch

    _Preferred = tuple[str, Callable[[], Mapping[str, Any]]]

_FAULT = re.compile(r"\b(CUDA|CUDNN|CUBLAS) failure (?!2:)\d+:")  # but 2, which is memory
_FATAL_ONLY = 4  # onnxruntime's log severity
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_model(
    model: LoadedModel,
    *,
    device: str,
    num_threads: int,
    name: str = "onnxruntime",
    preferred: _Preferred | None = None,
    instead: str = "",
    max_batch: int | None = None,
) -> OnnxRuntimeBackend:
    """Open the model; the manifest has been checked against the file already.

    ``preferred`` is an execution provider for CUDA devices, and what gives its options, that is to
    come before ONNX Runtime's own; the backend is then called ``name``. A backend that this one
    stands in for gives its name and, ``instead``, why. Batches beyond ``max_batch`` are run in
    parts.
    """
    # Since 1.29 it tells its maker of each session, the file's name included, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise not_loaded("onnxruntime", exc) from exc
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        several = "; several GPUs need --backend torch" if "," in device else ""
        raise ConfigError(
            f"unknown device {device!r}; known here: auto, cpu, cuda, cuda:N{several}"
        )
    known = ort.get_available_providers()
    if device.startswith("cuda") and _CUDA not in known:
        raise BackendUnavailable(
            f"device {device!r} needs ONNX Runtime with CUDA, and this one has "
            f"{', '.join(known)}: pip install onnxruntime-gpu in place of "
            "onnxruntime, or use --device cpu"
        )
    wanted = [] if device == "cpu" else _on_cuda(device, preferred, known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(model.path), options, providers=[*wanted, _CPU])
    except Exception as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(
            f"{model.path.name} cannot be opened by ONNX Runtime {ort.__version__}: {reason}. "
            "Export it again with `dgiqa-quant export`, or choose another --model"
        ) from exc
    status = _status_of(session, device, name, preferred and preferred[0], known)
    status = replace(status, reason=instead or status.reason)
    _check_inputs(session, model)
    _check_outputs(session, model)
    give_back()
    return OnnxRuntimeBackend(session, model, status, max_batch)


def _on_cuda(
    device: str, preferred: _Preferred | None, known: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """The providers of a CUDA device that this ONNX Runtime has, the preferred one first."""
    number = int(device.partition(":")[2] or 0)
    asked: list[_Preferred] = [*([preferred] if preferred else []), (_CUDA, dict)]
    return [(p, {"device_id": number, **options()}) for p, options in asked if p in known]


def _status_of(
    session: Any, device: str, name: str, preferred: str | None, known: Sequence[str]
) -> BackendStatus:
    """What runs, and why nothing better; raises where CUDA was asked for and does not start."""
    found = session.get_providers()[0]  # the others take what it cannot run
    if device.startswith("cuda") and found == _CPU:
        raise BackendUnavailable(
            f"device {device!r}: ONNX Runtime could not start CUDA and would run on the CPU; "
            "see `dgiqa-stream doctor`, or use --device cpu"
        )
    is_preferred = preferred is not None and found == preferred
    where = "cpu" if found == _CPU else "cuda"
    active = f"{name if is_preferred else 'onnxruntime'}:{where}"
    wanted = preferred or _CUDA
    if found == wanted or (device == "cpu" and preferred is None):
        reason = ""
    elif device == "cpu":
        reason = f"{wanted} needs a CUDA device"
    elif wanted in known:
        reason = f"ONNX Runtime could not start {wanted}"
    else:
        reason = f"no {'CUDA provider' if wanted == _CUDA else wanted} in this ONNX Runtime"
    return BackendStatus(f"{name}:{device}", active, reason)


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
    for name in output_names(model.manifest).values():
        shape = found.get(name)
        if shape is None or any(isinstance(n, int) and n != 1 for n in shape[1:]):
            raise ModelError(
                f"{model.path.name} gives {found}, its manifest says {name!r} with one number a "
                "frame: they belong to different models; export both again with "
                "`dgiqa-quant export`"
            )


class OnnxRuntimeBackend:
    """One inference session; its ``run`` is thread-safe."""

    def __init__(
        self,
        session: Any,
        model: LoadedModel,
        status: BackendStatus,
        max_batch: int | None = None,
    ) -> None:
        self._session, self._max_batch = session, max_batch
        self._fields = output_names(model.manifest)
        self._names = list(self._fields.values())
        self._status = status

    @property
    def status(self) -> BackendStatus:
        """What is really running."""
        return self._status

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`~dgiqa_stream.backends.Backend`; a device that fails twice is lost."""
        if self._session is None:
            raise ModelError("the model is closed: open it again")
        try:
            try:
                found = self._run(batch.views, len(batch))
            except Exception as exc:
                if not _FAULT.search(str(exc)):
                    raise
                found = self._run(batch.views, len(batch))
        except Exception as exc:  # out of memory, or a device that went away
            told = " ".join(str(exc).split())
            if _FAULT.search(told):
                raise DeviceLost(f"the device was lost while running: {told[:200]}") from exc
            raise ModelError(f"inference failed: {told}") from exc
        return Outputs(
            **{
                field: finite_numbers(name, np.asarray(output, np.float32).reshape(len(batch)))
                for (field, name), output in zip(self._fields.items(), found, strict=True)
            }
        )

    def _run(self, views: Mapping[str, NDArray[np.uint8]], num_frames: int) -> list[Any]:
        """Every output, in one run or, beyond the largest batch, in several."""
        if self._max_batch is None or num_frames <= self._max_batch:
            return list(self._session.run(self._names, dict(views)))
        parts = [
            self._session.run(
                self._names, {name: view[n : n + self._max_batch] for name, view in views.items()}
            )
            for n in range(0, num_frames, self._max_batch)
        ]
        return [np.concatenate(columns) for columns in zip(*parts, strict=True)]

    def close(self) -> None:
        """Drop the session."""
        self._session = None
