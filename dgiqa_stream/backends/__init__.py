"""Inference engines: the :class:`Backend` protocol and the table they are found in."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from dgiqa_stream.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.types import FrameBatch

BACKENDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # name: (module with open(), extra that installs it)
        "onnxruntime": ("dgiqa_stream.backends._onnxruntime", ""),
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


class Backend(Protocol):
    """An opened model. ``infer`` may be called from several threads."""

    @property
    def status(self) -> BackendStatus:
        """What is really running."""

    def infer(self, batch: FrameBatch) -> Outputs:
        """All outputs that the manifest names, from one run of the network."""

    def close(self) -> None:
        """Release the engine; calling twice is fine."""


def open_backend(
    model: LoadedModel, *, backend: str = "onnxruntime", device: str = "auto", num_threads: int = 1
) -> Backend:
    """Open a model on an engine.

    ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``num_threads`` is how many CPU threads
    one inference may use. Raises :class:`BackendUnavailable` where the engine or device is absent.
    """
    try:
        module, extra = BACKENDS[backend]
    except KeyError:
        raise ConfigError(
            f"unknown backend {backend!r}; known here: {', '.join(sorted(BACKENDS))}"
        ) from None
    try:
        opened: Backend = importlib.import_module(module).open_model(
            model, device=device, num_threads=num_threads
        )
    except ImportError as exc:
        wanted = f"dgiqa-stream[{extra}]" if extra else "dgiqa-stream"
        raise BackendUnavailable(
            f"the {backend} backend needs {exc.name!r}: pip install '{wanted}'"
        ) from exc
    return opened
