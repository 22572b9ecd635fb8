"""Pictures in, scores out: preprocess, backend and score mapping behind one door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgiqa_stream.backends import Backend, BackendStatus, Outputs, lasting, open_backend
from dgiqa_stream.config import ModelSettings
from dgiqa_stream.manifest import DEFAULT_MODEL, LoadedModel, ModelManifest, load_model
from dgiqa_stream.preprocess import make_batch
from dgiqa_stream.telemetry import DeviceStatus
from dgiqa_stream.types import Crop, FrameBatch, OutOfDomain, Planes

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLAT_STEPS = 2.0
"""A view of one colour: no channel deviates more (standard deviation, in steps of 255). Black as it
is coded stays below; a gradient from end to end over ten steps does not."""
_SURELY_NOT_FLAT_STEPS = 32  # between samples far apart
_MOST_AT_ONCE = 8  # larger batches gain nothing on a CPU and cost memory


class Prediction(NamedTuple):
    """What the model says of one picture."""

    score: float
    """0 (worst) to 100 (best)."""
    raw: float
    """The network's own output."""
    interval: tuple[float, float] | None = None
    """Low and high, 0..100; None where the model has no ``interval``. Its coverage is in the
    manifest.
    """
    out_of_domain: tuple[OutOfDomain, ...] = ()
    """``unfamiliar``, ``flat``, both or none; always none where the model has no ``domain``."""
    spread: float | None = None
    """The network's own output, before its mapping to half an interval."""
    unfamiliar: float | None = None
    """The network's own output, before its threshold."""

    @property
    def in_domain(self) -> bool:
        """Whether nothing is known against the score."""
        return not self.out_of_domain


class _Raw(NamedTuple):
    """The network's outputs for one frame."""

    quality: float
    spread: float | None
    unfamiliar: float | None
    flat: bool | None

    @classmethod
    def of(cls, outputs: Outputs, n: int) -> _Raw:
        """Those of the frame with that number."""
        spread, unfamiliar, flat = outputs.spread, outputs.unfamiliar, outputs.flat
        return cls(
            outputs.quality.item(n),
            None if spread is None else spread.item(n),
            None if unfamiliar is None else unfamiliar.item(n),
            None if flat is None else bool(flat.item(n)),
        )


class Scorer:
    """A model ready to score. Thread-safe; use as a context manager or call :meth:`close`."""

    def __init__(self, model: LoadedModel, backend: Backend) -> None:
        """Take an opened backend of a loaded model; :func:`load_scorer` does both."""
        self._model, self._backend = model, backend

    @property
    def manifest(self) -> ModelManifest:
        """What the model is."""
        return self._model.manifest

    @property
    def status(self) -> BackendStatus:
        """Which engine and device really run."""
        return self._backend.status

    def devices(self) -> Sequence[DeviceStatus]:
        """How the devices that score are doing; empty where the engine does not tell."""
        devices = getattr(self._backend, "devices", None)  # of a TellingBackend
        found: Sequence[DeviceStatus] = devices() if devices else ()
        return found

    def score(self, rgb: NDArray[np.uint8]) -> float:
        """The quality of one picture, 0 (worst) to 100 (best).

        ``rgb`` is uint8 (H, W, 3), full range; raises ``ValueError`` for anything else.
        """
        return self.score_batch([rgb])[0]

    def score_batch(self, pictures: Sequence[NDArray[np.uint8]]) -> list[float]:
        """The quality of each picture; sizes may differ. See :meth:`score`."""
        return [p.score for p in self.predict([planes_of_rgb(rgb) for rgb in pictures])]

    def predict(self, pictures: Sequence[Planes], *, crop: Crop | None = None) -> list[Prediction]:
        """Score decoded planes; ``crop`` in upright pixels leaves out what is outside it."""
        found: list[Prediction] = []
        for first in range(0, len(pictures), _MOST_AT_ONCE):
            found += self.infer(self.cut(pictures[first : first + _MOST_AT_ONCE], crop=crop))
        return found

    def cut(self, pictures: Sequence[Planes], *, crop: Crop | None = None) -> FrameBatch:
        """The model's views of each picture, as :meth:`infer` takes them."""
        views = self._model.manifest.preprocess.views
        cut = getattr(self._backend, "cut", None)  # of a CuttingBackend
        batch: FrameBatch = (cut or make_batch)(pictures, views, crop=crop)
        return batch

    def infer(self, batch: FrameBatch) -> list[Prediction]:
        """Score views that were cut before."""
        return self._predictions(self._backend.infer(batch), batch)

    @property
    def frames_in_flight(self) -> int:
        """How many frames of a stream are worth starting before the first one's score is there."""
        number: int = getattr(self._backend, "frames_in_flight", 1)  # of a StartingBackend
        return number

    def start(
        self, batch: FrameBatch, on_done: Callable[[], None]
    ) -> Callable[[], list[Prediction]]:
        """Begin what :meth:`infer` does, where ``frames_in_flight`` is more than 1.

        What comes back waits for it, and gives or raises the same; ``on_done`` is called, from any
        thread, once it would not wait.
        """
        answer: Callable[[], Outputs] = self._backend.start(batch, on_done)  # type: ignore[attr-defined]
        return lambda: self._predictions(answer(), batch)

    def _predictions(self, outputs: Outputs, batch: FrameBatch) -> list[Prediction]:
        return [self._prediction(_Raw.of(outputs, n), batch, n) for n in range(len(batch))]

    def _prediction(self, found: _Raw, batch: FrameBatch, n: int) -> Prediction:
        """What the outputs of frame ``n`` of a batch mean."""
        manifest = self._model.manifest
        score = manifest.output.mapping(found.quality)
        interval, reasons = None, list[OutOfDomain]()
        if manifest.interval is not None and found.spread is not None:
            interval = manifest.interval.around(score, found.spread)
        if manifest.domain is not None and found.unfamiliar is not None:
            reasons += ["unfamiliar"] if found.unfamiliar > manifest.domain.threshold else []
            if is_flat(v[n] for v in batch.views.values()) if found.flat is None else found.flat:
                reasons += ["flat"]
        return Prediction(
            score, found.quality, interval, tuple(reasons), found.spread, found.unfamiliar
        )

    def close(self) -> None:
        """Release the engine; calling twice is fine."""
        self._backend.close()

    def __enter__(self) -> Scorer:
        """The scorer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def load_scorer(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str = "auto",
    backend: str = "onnxruntime",
    num_threads: int = 1,
    strict: bool = False,
    fall_back: bool = False,
    options: Mapping[str, object] = MappingProxyType({}),
) -> Scorer:
    """Load a model and open it on an engine.

    ``model`` is a shipped model's name or the path of a ``.onnx`` file with its manifest beside it;
    ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises :class:`ModelError` (or its
    :class:`BackendUnavailable`) where that cannot be, or where ``strict`` finds another device
    than it should be. With ``fall_back``, scoring goes on by ONNX Runtime on the CPU where the
    device is lost while running; else :meth:`Scorer.infer` raises :class:`DeviceLost`. ``options``
    are the engine's own.
    """
    loaded = load_model(model)
    opened = open_backend(
        loaded,
        backend=backend,
        device=device,
        num_threads=num_threads,
        strict=strict,
        options=options,
    )
    return Scorer(loaded, lasting(opened, loaded, num_threads=num_threads) if fall_back else opened)


def scorer_of(settings: ModelSettings) -> Scorer:
    """The scorer that a configuration asks for."""
    defaults = ModelSettings()
    options = {
        name: getattr(settings, name)
        for name in ("gpu_profile", "max_gpu_mb")
        if getattr(settings, name) != getattr(defaults, name)
    }
    return load_scorer(
        settings.name,
        device=settings.device,
        backend=settings.backend,
        num_threads=settings.threads,
        strict=settings.strict,
        fall_back=settings.on_device_loss == "fallback" and not settings.strict,
        options=options,
    )


def is_flat(views: Iterable[NDArray[np.uint8]]) -> bool:
    """Whether every view, uint8 (height, width, 3), is of one colour: see ``FLAT_STEPS``."""
    return all(_is_plain(view) for view in views)


def _is_plain(view: NDArray[np.uint8]) -> bool:
    from dgiqa_stream.opencv import cv2

    for every in (64, 8):  # nearly every picture shows at once that it is not
        few = view[::every, ::every, 1].tobytes()
        if max(few) - min(few) > _SURELY_NOT_FLAT_STEPS:
            return False
    _, deviation = cv2.meanStdDev(view)
    return bool(np.max(deviation) <= FLAT_STEPS)


def planes_of_rgb(rgb: Any) -> Planes:
    """Planes of a uint8 (H, W, 3) array; raises ``ValueError`` for anything else."""
    array = np.asarray(rgb)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"a picture must be uint8 (H, W, 3) RGB, not {array.dtype} {array.shape}: "
            "drop alpha, repeat grey three times, scale floats to 0..255"
        )
    return Planes((array,), full_range=True)
