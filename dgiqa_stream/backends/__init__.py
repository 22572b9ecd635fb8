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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError

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
    one inference may use; ``options`` are more arguments of the engine's opener. Raises
    :class:`BackendUnavailable` where the engine or device is absent and, where it is ``strict``,
    where something else would run than what ``auto`` is to find; :class:`ConfigError` where the
    engine has no such option. Another engine in its place is told in one warning.
    """
    opened = _opened(model, backend, device, num_threads, options)
    status = opened.status
    if strict and status.reason:
        opened.close()
        raise BackendUnavailable(
            f"{status.requested} would run as {status.active} ({status.reason}), which --strict "
            "refuses: mend that, name the device, or leave --strict out"
        )
    if status.reason and not status.active.startswith(f"{backend}:"):
        _logger.warning("%s runs as %s: %s", backend, status.active, status.reason)
    return opened


def lasting(opened: Backend, model: LoadedModel, *, num_threads: int = 1) -> Backend:
    """The backend, followed by ONNX Runtime on the CPU should its device be lost while running."""
    from dgiqa_stream.backends._fallback import FallbackBackend

    if ":cpu" in opened.status.active:
        return opened
    return FallbackBackend(
        opened, lambda: open_backend(model, device="cpu", num_threads=num_threads)
    )


def _opened(
    model: LoadedModel, backend: str, device: str, num_threads: int, options: Mapping[str, object]
) -> Backend:
    module, extra = BACKENDS.get(backend, ("", ""))
    opener: Any  # an Opener, which may take options
    try:
        if module:
            opener = importlib.import_module(module).open_model
        elif entries := list(entry_points(group=ENTRY_POINT_GROUP, name=backend)):
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
    found: Backend = opener(model, device=device, num_threads=num_threads, **options)
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
