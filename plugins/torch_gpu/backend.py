"""The torch backend: views cut and scored on one device, frames of all callers in shared batches.

The runtime's name for it is ``torch``; see :func:`open_model`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from dgiqa_stream.backends import BackendStatus, Outputs, finite_numbers, output_names
from dgiqa_stream.errors import ConfigError, ModelError
from dgiqa_stream.scorer import FLAT_STEPS
from dgiqa_stream.telemetry import DeviceStatus
from dgiqa_stream.types import FrameBatch
from plugins.torch_gpu.batching import Batcher
from plugins.torch_gpu.devices import (
    devices_of,
    is_fault,
    is_out_of_memory,
    note_loss,
    note_use,
    shares_memory,
    twice,
    uuid_of,
)
from plugins.torch_gpu.engine import Engine
from plugins.torch_gpu.memory import MEGABYTE, batch_within, limit_memory
from plugins.torch_gpu.network import OnnxNetwork
from plugins.torch_gpu.nvml import DeviceWatch, device_status
from plugins.torch_gpu.pictures import Pictures, Piece, pieces_of
from plugins.torch_gpu.planes import TorchPlanes, tensors_of
from plugins.torch_gpu.service import BatchService, ServiceStatistics
from plugins.torch_gpu.spread import SpreadBackend
from plugins.torch_gpu.views import cut_views

if TYPE_CHECKING:
    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.preprocess import ViewSpec
    from dgiqa_stream.types import Crop, Planes

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NUM_THREADS = 2  # that run batches: one cuts the next while the other waits for scores
MAX_BATCH = 64
BUDGET_SECONDS = 0.005
"""How long a frame waits for others to share its batch, at most."""
FRAMES_IN_FLIGHT = 4
"""Of one stream on a GPU: one is uploaded and cut, one is scored, others wait to share a batch."""
PROFILES = {"latency": (BUDGET_SECONDS, MAX_BATCH), "low-clock": (0.05, 128)}
"""That wait and the largest batch: large ones let a GPU whose clock or power is held low do the
same work in fewer launches."""


def open_model(
    model: LoadedModel,
    *,
    device: str,
    num_threads: int,
    precision: Precision | None = None,
    max_batch: int | None = None,
    budget_seconds: float | None = None,
    gpu_profile: str = "latency",
    max_gpu_mb: int = 0,
    frames_in_flight: int | None = None,
    is_strict: bool = False,
    requested: str = "torch",
    instead: str = "",
) -> TorchBackend | SpreadBackend:
    """Open a model; ``precision`` is FP32 on a CPU and FP16 on a GPU unless it is given.

    On several devices streams are spread over them; each may take ``max_gpu_mb`` (10 ** 6 bytes; 0:
    all there is). ``max_batch`` and ``budget_seconds`` are those of ``gpu_profile``, one of
    ``PROFILES``, unless they are given. ``frames_in_flight`` of one stream are 1 on a CPU and
    ``FRAMES_IN_FLIGHT`` on a GPU unless they are. Where it ``is_strict``, the loss of one of
    several devices is that of all. A backend that this one stands in for gives its name as
    ``requested`` and, ``instead``, why. Raises :class:`ModelError` where the file is no model of
    this project's, and its :class:`BackendUnavailable` where the device cannot be used.
    """
    _refuse_other_files(model)
    places, reason = devices_of(device)
    wait, most = gathering(gpu_profile, max_batch, budget_seconds)

    def on_one(where: torch.device) -> TorchBackend:
        chosen: Precision = precision or ("fp16" if where.type == "cuda" else "fp32")
        if where.type == "cpu":
            torch.set_num_threads(num_threads)
        active = f"torch:{where} {chosen}"
        status = BackendStatus(f"{requested}:{device}", active, instead or reason)
        engine, batch = _engine(model, where, chosen, most, max_gpu_mb * MEGABYTE)
        return TorchBackend(engine, model, status, batch, wait, frames_in_flight=frames_in_flight)

    return on_each(places, on_one, is_strict=is_strict)


def gathering(
    gpu_profile: str, max_batch: int | None, budget_seconds: float | None
) -> tuple[float, int]:
    """How long frames wait for a batch, and the largest one: of the profile, where not given.

    Raises :class:`ConfigError` for a profile that is none.
    """
    if gpu_profile not in PROFILES:
        raise ConfigError(f"unknown gpu_profile {gpu_profile!r}; known here: {', '.join(PROFILES)}")
    seconds, most = PROFILES[gpu_profile]
    return seconds if budget_seconds is None else budget_seconds, max_batch or most


def on_each(
    places: Sequence[torch.device],
    on_one: Callable[[torch.device], TorchBackend],
    *,
    is_strict: bool = False,
) -> TorchBackend | SpreadBackend:
    """A backend for each device that has scored a black frame there; where one cannot, none is left
    open and that is raised.
    """
    opened: list[TorchBackend] = []
    try:
        for where in places:
            opened.append(_checked(on_one(where)))
    except BaseException:
        for backend in opened:
            backend.close()
        raise
    return opened[0] if len(opened) == 1 else SpreadBackend(opened, is_strict=is_strict)


def _engine(
    model: LoadedModel,
    where: torch.device,
    precision: Precision,
    max_batch: int,
    max_bytes: int,
) -> tuple[Engine, int]:
    """The engine on one device, and its largest batch, which a budget may make smaller."""
    try:
        network = OnnxNetwork(model.path, dtype=_DTYPES[precision])
        views = model.manifest.preprocess.views
        shapes = {view.name: view.shape for view in views}
        _check_inputs(network, shapes, model)
        if max_bytes:
            limit_memory(where, max_bytes)
            max_batch = batch_within(
                max_bytes,
                network.on(where),
                views,
                where,
                weight_bytes=model.path.stat().st_size,
                most=max_batch,
                name=model.path.name,
            )
        return Engine(network, shapes, where, max_batch=max_batch), max_batch
    except ModelError:
        raise
    except torch.OutOfMemoryError as exc:
        raise ModelError(
            f"{model.path.name} with batches of up to {max_batch} frames does not fit into the "
            f"memory of {where}: open it with a smaller max_batch, name another --device, or end "
            "what else uses this one"
        ) from exc
    except Exception as exc:  # a file of another kind
        raise ModelError(
            f"{model.path.name} cannot be opened by torch {torch.__version__}: "
            f"{' '.join(str(exc).split())[:200]}. Export it again with `dgiqa-quant export`, or "
            "use --backend onnxruntime"
        ) from exc


def _checked(backend: TorchBackend) -> TorchBackend:
    """The same, once it has scored a black frame; where it cannot, it is closed and that raised."""
    try:
        backend.check()
    except BaseException:
        backend.close()
        raise
    return backend


def _refuse_other_files(model: LoadedModel) -> None:
    """Only ONNX of float32, or of INT8 between it, is read."""
    kind, precision = model.path.suffix, model.manifest.precision
    if kind in (".pt2", ".engine") or precision in ("fp16", "bf16"):
        raise ModelError(
            f"{model.path.name} is {precision} in a {kind} file, and --backend torch reads .onnx "
            "files of fp32 or int8: give the one it was made of, such as --model student-fp32, "
            "which a GPU runs in FP16 by itself"
        )


def _check_inputs(
    network: OnnxNetwork, shapes: Mapping[str, tuple[int, int, int]], model: LoadedModel
) -> None:
    if network.input_shapes != shapes:
        raise ModelError(
            f"{model.path.name} takes {network.input_shapes}, its manifest says {shapes}: "
            "they belong to different models; export both again with `dgiqa-quant export`"
        )


class TorchBackend:
    """An opened model; callers of several threads share batches.

    Frames of one thread are taken for one stream: turns go round between threads.
    """

    def __init__(
        self,
        engine: Engine,
        model: LoadedModel,
        status: BackendStatus,
        max_batch: int,
        budget_seconds: float,
        *,
        frames_in_flight: int | None = None,
    ) -> None:
        """Take an engine that nobody else uses; ``frames_in_flight`` are as in open_model."""
        self.frames_in_flight = frames_in_flight or (
            1 if engine.device.type == "cpu" else FRAMES_IN_FLIGHT
        )
        self._engine, self._model, self._status = engine, model, status
        self._specs = tuple(model.manifest.preprocess.views)
        self._fields = output_names(model.manifest)
        self._service: BatchService[Piece, dict[str, float]] = BatchService(
            self._run,
            Batcher(max_batch=max_batch, budget_seconds=budget_seconds),
            is_too_large=is_out_of_memory,
            is_fault=is_fault,
            on_lost=lambda reason: note_loss(engine.device, reason),
            num_threads=_NUM_THREADS,
            name=f"torch batches {engine.device}",
        )
        self._running = threading.Lock()  # the engine is for one thread at a time
        self._cutting = threading.local()  # each thread's own stream
        self._needs_pinning = not shares_memory(engine.device)
        self._watch = DeviceWatch(lambda: _told_of(engine.device))
        note_use(engine.device, +1)
        self._is_in_use = True

    @property
    def device(self) -> torch.device:
        """Where it scores."""
        return self._engine.device

    @property
    def status(self) -> BackendStatus:
        """What is really running."""
        return self._status

    def statistics(self) -> ServiceStatistics:
        """Batches, waiting times and failures so far."""
        return self._service.statistics()

    def devices(self) -> Sequence[DeviceStatus]:
        """See :class:`~dgiqa_stream.backends.TellingBackend`; the driver is asked once a second."""
        done, told = self._service.statistics(), self._watch.status()
        load, decoder = (told.get(key) for key in ("load_percent", "decoder_load_percent"))
        one = DeviceStatus(
            str(self.device),
            told.get("name"),
            None if load is None else load / 100,
            None if decoder is None else decoder / 100,
            told.get("used_bytes"),
            told.get("total_bytes"),
            told.get("temperature_celsius"),
            told.get("power_watts"),
            done.max_batch,
            done.batches.mean_batch,
            done.num_shrunk,
            done.num_retried,
        )
        return [one]

    def check(self) -> None:
        """Score a black frame; raises :class:`ModelError` where graph and manifest disagree."""
        views = {v.name: np.zeros((1, *v.shape), np.uint8) for v in self._specs}
        try:
            self.infer(FrameBatch(views))
        except (KeyError, ModelError) as exc:
            if isinstance(exc, ModelError) and not isinstance(exc.__cause__, KeyError | ValueError):
                raise
            raise ModelError(
                f"{self._model.path.name} does not take or give what its manifest says "
                f"({' '.join(str(exc).split())[:120]}): they belong to different models; export "
                "both again with `dgiqa-quant export`"
            ) from exc

    def cut(
        self, pictures: Sequence[Planes], views: Sequence[ViewSpec], *, crop: Crop | None
    ) -> FrameBatch:
        """See :class:`~dgiqa_stream.backends.CuttingBackend`: nothing is cut before ``infer``.

        Planes of the CPU are copied to page-locked memory here, in the caller's thread.
        """
        ready = twice(self.device, lambda: [self._ready(picture) for picture in pictures])
        return cast("FrameBatch", Pictures(ready, views, crop))

    def _ready(self, picture: Planes | TorchPlanes) -> TorchPlanes:
        planes = picture if isinstance(picture, TorchPlanes) else tensors_of(picture)
        is_pinned = self._needs_pinning and planes.device.type == "cpu"
        return planes.with_tensors(lambda t: t.contiguous().pin_memory()) if is_pinned else planes

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`~dgiqa_stream.backends.Backend`; waits for a batch that others share."""
        return self.start(batch, lambda: None)()

    def start(self, batch: FrameBatch, on_done: Callable[[], None]) -> Callable[[], Outputs]:
        """See :class:`~dgiqa_stream.backends.StartingBackend`."""
        futures = self._service.submit(threading.get_ident(), list(pieces_of(batch)))
        # a future keeps its callback: one that knew the futures would keep all until a collection
        num_left = itertools.count(len(futures) - 1, -1)

        def told(_: Future[dict[str, float]]) -> None:
            if next(num_left) == 0:  # one step: threads cannot see the same number
                on_done()

        for future in futures:
            future.add_done_callback(told)
        return lambda: self._outputs([future.result() for future in futures])

    def _outputs(self, found: Sequence[Mapping[str, float]]) -> Outputs:
        columns = {
            field: finite_numbers(name, np.array([one[name] for one in found], np.float32))
            for field, name in self._fields.items()
        }
        has_flat = self._model.manifest.domain is not None
        flat = np.array([one["flat"] for one in found], np.bool_) if has_flat else None
        return Outputs(**columns, flat=flat)

    def close(self) -> None:
        """End the thread and drop the engine; calling twice is fine."""
        if self._is_in_use:
            self._is_in_use = False
            note_use(self.device, -1)
        self._service.close()
        try:
            self._engine.close()
        except RuntimeError as exc:  # what a device that is lost holds cannot be given back
            if not is_fault(exc):
                raise

    # In the service's threads --------------------------------------------------------------------

    def _run(self, pieces: Sequence[Piece]) -> list[dict[str, float]]:
        """Score one batch; each frame's outputs by name, and whether it is flat.

        Uploads and views go in this thread's stream, the network in the engine's: one thread cuts
        the next batch while the other waits for the scores of this one.
        """
        with torch.inference_mode():
            cutting, running = self._cutting_stream(), self._engine.stream
            with torch.cuda.stream(cutting) if cutting else nullcontext():
                if cutting:  # where the decoder writes
                    cutting.wait_stream(torch.cuda.default_stream(self._engine.device))
                views = self._views_of(pieces)
            with self._running, torch.cuda.stream(running) if running else nullcontext():
                if running and cutting:
                    running.wait_stream(cutting)
                found: dict[str, Any] = dict(self._engine.run(views))
                if self._model.manifest.domain:
                    found["flat"] = self._flat(views)
        # All is done on the device by now: what was cut may go, whichever stream read it last.
        return [{k: float(v[n]) for k, v in found.items()} for n in range(len(pieces))]

    def _cutting_stream(self) -> torch.cuda.Stream | None:
        """The one that this thread cuts in; None on a CPU."""
        if self._engine.stream is None:
            return None
        if not hasattr(self._cutting, "stream"):
            self._cutting.stream = torch.cuda.Stream(self._engine.device)
        stream: torch.cuda.Stream = self._cutting.stream
        return stream

    def _views_of(self, pieces: Sequence[Piece]) -> Mapping[str, Tensor]:
        """All views on the device, cut where they have to be: (N, height, width, 3) each."""
        device, numbers = self._engine.device, range(len(pieces))
        uncut = [n for n in numbers if pieces[n].planes is not None]
        cut: Mapping[str, Tensor] = {}
        if uncut:
            planes = [cast("TorchPlanes", pieces[n].planes).to(device) for n in uncut]
            cut = cut_views(planes, self._specs, crops=[pieces[n].crop for n in uncut])
        if len(uncut) == len(pieces):
            return cut
        rows: list[dict[str, Tensor]] = [
            {name: view.to(device, non_blocking=True) for name, view in (p.views or {}).items()}
            for p in pieces
        ]
        for place, n in enumerate(uncut):
            rows[n] = {name: view[place] for name, view in cut.items()}
        return {spec.name: torch.stack([row[spec.name] for row in rows]) for spec in self._specs}

    def _flat(self, views: Mapping[str, Tensor]) -> list[bool]:
        """Whether every view of a frame is of one colour; see ``dgiqa_stream.scorer.is_flat``."""
        deviations = [v.float().std((1, 2), correction=0).amax(1) for v in views.values()]  # (N,)
        flat: list[bool] = (torch.stack(deviations).amax(0) <= FLAT_STEPS).tolist()
        return flat


def _told_of(device: torch.device) -> dict[str, Any]:
    """What the driver tells of a device; nothing of a CPU."""
    if device.type != "cuda":
        return {}
    return device_status(device.index or 0, uuid=uuid_of(device))
