"""Inference engines: the :class:`Backend` protocol and the table they are found in.

Engines that need torch live in ``plugins``; the table only names them, so that nothing of theirs
is loaded before it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError
from dgiqa_stream.versions import entry_points_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel, ModelManifest
    from dgiqa_stream.preprocess import ViewSpec
    from dgiqa_stream.telemetry import DeviceStatus
    from dgiqa_stream.types import Crop, FrameBatch, Planes

_logger = logging.getLogger("dgiqa_stream.backends")
ENTRY_POINT_GROUP = "dgiqa_stream.backends"
"""Entry points of other packages: a name, and a callable like ``open_model`` of the table's."""

BACKENDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # name: (module with open_model(), extra that installs it)
        "onnxruntime": ("dgiqa_stream.backends._onnxruntime", ""),
        "onnxruntime-tensorrt": ("dgiqa_stream.backends._onnxruntime_tensorrt", ""),
        "torch": ("plugins.torch_gpu.backend", "gpu"),
        "torch-tensorrt": ("plugins.torch_gpu.tensorrt.backend", "gpu-tensorrt"),
        "fake": ("dgiqa_stream.backends.fake", ""),
    }
)

_DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*")
_DEVICES = "known here: auto, cpu, cuda, cuda:N, cuda:N,cuda:M"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What was asked for and what is really running."""

    requested: str
    """Backend and device asked for, such as ``onnxruntime:auto``."""
    active: str
    """Backend and device in use, such as ``onnxruntime:cpu``."""
    reason: str = ""
    """Why they differ, where they do."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What the network says of each frame of a batch: finite float32 (N,), in 0..1."""

    quality: NDArray[np.float32]
    """Before the score mapping."""
    spread: NDArray[np.float32] | None = None
    """How uncertain the quality is; None where the manifest names no ``interval``."""
    unfamiliar: NDArray[np.float32] | None = None
    """How unlike the training pictures; None where the manifest names no ``domain``."""
    flat: NDArray[Any] | None = None
    """Boolean (N,): whether all views of a frame are of one colour; None: the scorer looks."""


class Backend(Protocol):
    """An opened model. ``infer`` may be called from several threads."""

    @property
    def status(self) -> BackendStatus:
        """What is really running."""

    def infer(self, batch: FrameBatch) -> Outputs:
        """All outputs that the manifest names, from one run of the network."""

    def close(self) -> None:
        """Release the engine; calling twice is fine."""


class CuttingBackend(Backend, Protocol):
    """A backend that cuts the views itself, on its device, once ``infer`` is called."""

    def cut(
        self, pictures: Sequence[Planes], views: Sequence[ViewSpec], *, crop: Crop | None
    ) -> FrameBatch:
        """What :func:`~dgiqa_stream.preprocess.make_batch` is, as a batch for its own ``infer``."""


class StartingBackend(Backend, Protocol):
    """A backend that scores while its caller goes on."""

    @property
    def frames_in_flight(self) -> int:
        """How many frames of one stream are worth giving to it at once; others have 1."""

    def start(self, batch: FrameBatch, on_done: Callable[[], None]) -> Callable[[], Outputs]:
        """Begin what ``infer`` does; what comes back waits for it, and gives or raises the same.

        ``on_done`` is called once that would not wait any more, from any thread, maybe twice.
        """


class TellingBackend(Backend, Protocol):
    """A backend that knows how its devices are doing."""

    def devices(self) -> Sequence[DeviceStatus]:
        """Each device that it scores on; called for every status message, so it must be quick."""


class Opener(Protocol):
    """What a module of ``BACKENDS`` has as ``open_model``, and what an entry point names."""

    def __call__(self, model: LoadedModel, *, device: str, num_threads: int) -> Backend:
        """See :func:`open_backend`."""


def open_backend(
    model: LoadedModel,
    *,
    backend: str = "onnxruntime",
    device: str = "auto",
    num_threads: int = 1,
    strict: bool = False,
    options: Mapping[str, object] = MappingProxyType({}),
) -> Backend:
    """Open a model on an engine.

    ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``num_threads`` is how many CPU threads
    one inference may use; ``options`` are more arguments of the engine's opener, and an opener that
    takes ``is_strict`` is told it. Raises :class:`BackendUnavailable` where the engine or device is
    absent and, where it is ``strict``, where something else would run than what ``auto`` is to
    find; :class:`ConfigError` where the engine has no such option, or the device is none. Another
    engine or device in its place is told in one warning; ONNX Runtime on a CPU is not. INT8 for
    TensorRT that comes to a CPU without being asked for it is told of, too.
    """
    if backend in BACKENDS:  # before a package is loaded; others may know other devices
        refuse_unknown_device(device)
    opened = _opened(model, backend, device, num_threads, options, is_strict=strict)
    status = opened.status
    if strict and status.reason:
        opened.close()
        raise BackendUnavailable(
            f"{status.requested} would run as {status.active} ({status.reason}), which --strict "
            "refuses: mend that, name the device, or leave --strict out"
        )
    is_usual = backend == "onnxruntime" and status.active.startswith(f"{backend}:")  # on a CPU
    if status.reason and not is_usual:
        _logger.warning("%s runs as %s: %s", backend, status.active, status.reason)
    if model.manifest.target == "tensorrt" and device != "cpu" and ":cpu" in status.active:
        _logger.warning(
            "%s is INT8 for TensorRT and is slow on a CPU: --model student is made for one",
            model.path.name,
        )
    return opened


def lasting(opened: Backend, model: LoadedModel, *, num_threads: int = 1) -> Backend:
    """The backend, followed by ONNX Runtime on the CPU should its device be lost while running."""
    from dgiqa_stream.backends._fallback import FallbackBackend

    if ":cpu" in opened.status.active:
        return opened
    return FallbackBackend(
        opened, lambda: open_backend(model, device="cpu", num_threads=num_threads)
    )


def refuse_unknown_device(device: str) -> None:
    """Raise :class:`ConfigError` for what is no device's name."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"unknown device {device!r}; {_DEVICES}")


def _opened(
    model: LoadedModel,
    backend: str,
    device: str,
    num_threads: int,
    options: Mapping[str, object],
    *,
    is_strict: bool,
) -> Backend:
    module, extra = BACKENDS.get(backend, ("", ""))
    opener: Any  # an Opener, which may take options
    try:
        if module:
            opener = importlib.import_module(module).open_model
        elif entries := entry_points_for(ENTRY_POINT_GROUP, backend):
            opener = entries[0].load()
        else:
            raise ConfigError(
                f"unknown backend {backend!r}; known here: {', '.join(sorted(BACKENDS))}"
            )
    except ImportError as exc:
        raise not_loaded(backend, exc, extra=extra) from exc
    taken = inspect.signature(opener).parameters
    for name, value in options.items():
        if name not in taken:
            raise ConfigError(
                f"model.{name} = {value} is nothing that --backend {backend} has: leave it out, or "
                "use --backend torch"
            )
    told = {"is_strict": True} if is_strict and "is_strict" in taken else {}
    found: Backend = opener(model, device=device, num_threads=num_threads, **options, **told)
    return found


def not_loaded(backend: str, exc: ImportError, *, extra: str = "") -> BackendUnavailable:
    """What to raise where a package of a backend is absent, or does not load (it has no name)."""
    wanted = f"dgiqa-stream[{extra}]" if extra else "dgiqa-stream"
    reason = f"needs {exc.name!r}" if exc.name else f"cannot be loaded ({exc})"
    return BackendUnavailable(f"the {backend} backend {reason}: pip install '{wanted}'")


def output_names(manifest: ModelManifest) -> dict[str, str]:
    """Field of :class:`Outputs` to the graph's name for it, as far as the model has them."""
    specs = {"spread": manifest.interval, "unfamiliar": manifest.domain}
    more = {field: spec.output for field, spec in specs.items() if spec is not None}
    return {"quality": manifest.output.name, **more}


def finite_numbers(name: str, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the graph gave as ``name``, (N,); raises :class:`ModelError` for NaN and infinities."""
    told = numbers.tolist()
    if not all(map(math.isfinite, told)):  # a third of what NumPy takes for so few
        raise ModelError(f"the model gave {told} as {name!r}: not a number for every frame")
    return numbers


def engine_folder() -> Path:
    """Where built engines are kept: ``DGIQA_ENGINE_CACHE``, else a folder of the user's caches."""
    if given := os.environ.get("DGIQA_ENGINE_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dgiqa-stream" / "engines"
