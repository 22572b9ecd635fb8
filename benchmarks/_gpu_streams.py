"""Part of ``gpu_check.py``: many streams at once, decoded alone and decoded to scores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from dgiqa_stream.config import StreamConfig, parse_config
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.manifest import LoadedModel, load_model
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sources import open_source
from plugins.torch_gpu.backend import TorchBackend, open_model
from plugins.torch_gpu.batching import percentiles_of

os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 tells errors alone

MODEL = "student-fp32"
CODECS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libx265": {"preset": "ultrafast", "crf": "26", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "12", "crf": "35"},
}
LOAD = 0.8
FPS = 30
MOST_BY_SOFTWARE = 8
NO_TIME = "the time was over"


def measure(check: Any) -> dict[str, Any]:
    """Frames a second by codec and number of streams, latency at four fifths of that, memory."""
    numbers = (1, 2) if check.is_quick else (1, 8, 32, 128)
    size, seconds = ((180, 320), 0.5) if check.is_quick else ((1080, 1920), 4.0)
    backend = open_model(load_model(MODEL), device=check.place, num_threads=1)
    found: dict[str, Any] = {"size": list(size), "backend": backend.status.active, "codecs": {}}
    try:
        for name, codec in CODECS.items():
            found["codecs"][name] = _of_codec(check, name, codec, size, backend, numbers, seconds)
            if name == "h264":  # before the others: it has a goal
                found["at_load"] = _at_load(check, backend, found, seconds)
    finally:
        backend.close()
    return found


def _of_codec(
    check: Any,
    name: str,
    codec: str,
    size: tuple[int, int],
    backend: Any,
    numbers: tuple[int, ...],
    seconds: float,
) -> dict[str, Any]:
    if check.part_left < 8 * seconds:
        return {"left_out": NO_TIME}
    try:
        path = clip(check.folder / f"{name}.mp4", codec, size, 10 if check.is_quick else 60)
    except (av.error.FFmpegError, ValueError) as exc:
        return {"left_out": f"no {codec} here: {exc}"}
    return _by_streams(check, path, backend, numbers, seconds)


@lru_cache(maxsize=1)
def pictures(size: tuple[int, int], num_frames: int) -> list[Any]:
    """A moving picture with noise, as arrays of yuv420p."""
    rng = np.random.default_rng(0)
    height, width = size
    blots = rng.integers(30, 220, (height // 20 + num_frames, width // 20, 3))
    grain = rng.integers(-6, 7, (*size, 1))
    found = []
    for n in range(num_frames):
        rgb = np.kron(blots[n : n + height // 20], np.ones((20, 20, 1)))
        rgb = (rgb + np.roll(grain, n, 1)).clip(0, 255).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
        found.append(frame.to_ndarray())
    return found


def clip(path: Path, codec: str, size: tuple[int, int], num_frames: int, copies: int = 5) -> Path:
    """A moving picture with noise, encoded once and stored ``copies`` times in a row."""
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=OPTIONS[codec])
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", num_frames
        for picture in pictures(size, num_frames):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p"))
        packets += stream.encode()
        stamps = [(p.pts, p.dts, bytes(p), p.is_keyframe, p.time_base) for p in packets]
        for copy in range(copies):
            for pts, dts, content, is_key, base in stamps:
                packet = av.Packet(content)
                shift = round(copy * num_frames / FPS / base)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, base
                packet.stream, packet.is_keyframe = stream, is_key
                container.mux(packet)
    return path


def settings(check: Any, *, letterbox: bool = False, realtime: bool = False) -> StreamConfig:
    """Every frame, decoded on the device where there is one."""
    source = {"hardware": check.place if check.device == "cuda" else "none", "realtime": realtime}
    return parse_config(
        {
            "source": {**source, "decoder_threads": 1},
            "sampler": {"mode": "every"},
            "overload": {"policy": "wait"},
            "picture": {"letterbox": letterbox},
        }
    )


def _by_streams(
    check: Any, path: Path, backend: Any, numbers: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """Both rates for each number of streams, measured one after the other."""
    found: dict[str, Any] = {"decoder": decoder_of(path, settings(check))}
    is_software = check.device == "cuda" and "cuda" not in found["decoder"]
    for num in numbers:
        if is_software and num > MOST_BY_SOFTWARE:
            found[str(num)] = {"left_out": "software decodes: more streams measure the CPU"}
        elif check.part_left < 4 * seconds:
            found[str(num)] = {"left_out": NO_TIME}
        else:
            found[str(num)] = _at(check, path, backend, num, seconds)
    if not check.is_quick and check.part_left > 6 * seconds:
        found["with_letterbox_fps_of_8"] = rate(
            lambda: scored_frames(path, settings(check, letterbox=True), backend), 8, seconds
        )["fps"]
    return found


def _at(check: Any, path: Path, backend: Any, num: int, seconds: float) -> dict[str, Any]:
    """One number of streams: decoded alone, and decoded to scores."""
    alone = rate(lambda: decoded(path, settings(check)), num, seconds)
    with PcieMeter(check.device) as pcie:
        scored = rate(
            lambda: scored_frames(path, settings(check), backend), num, seconds,
            during=lambda: _memory(check),
        )  # fmt: skip
    return {
        "decode_alone_fps": alone["fps"],
        "decode_to_score_fps": scored["fps"],
        "share": scored["fps"] / alone["fps"] if alone["fps"] else None,
        "errors": [*alone["errors"], *scored["errors"]],
        "pcie": pcie.told(scored["fps"]),
        **scored["during"],
    }


class PcieMeter:
    """Bytes over PCIe by NVML's counters, which look at 20 ms at a time, while it is open."""

    def __init__(self, device: str) -> None:
        self._device, self._samples, self._reason = device, list[tuple[int, int]](), ""
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PcieMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(5)

    def told(self, fps: float) -> dict[str, Any]:
        """Mean bytes a second to and from the device, and those of a frame to it."""
        if not self._samples:
            return {"left_out": self._reason or "no sample was taken"}
        sent, received = (
            1000 * float(np.mean(column)) for column in zip(*self._samples, strict=True)
        )
        return {
            "to_device_bytes_per_second": received,
            "from_device_bytes_per_second": sent,
            "to_device_bytes_per_frame": received / fps if fps else None,
            "num_samples": len(self._samples),
        }

    def _sample(self) -> None:
        if self._device != "cuda":
            self._reason = "only a CUDA device has counters"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as exc:  # noqa: BLE001 - no package, or no driver for it
            self._reason = f"{type(exc).__name__}: {exc}"
            return
        kinds = pynvml.NVML_PCIE_UTIL_TX_BYTES, pynvml.NVML_PCIE_UTIL_RX_BYTES
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            while not self._ends.wait(0.05):  # each counter takes 20 ms to read, in units of KB/s
                sent, received = (pynvml.nvmlDeviceGetPcieThroughput(handle, k) for k in kinds)
                self._samples.append((sent, received))
        except pynvml.NVMLError as exc:  # not every GPU has them
            self._reason = f"NVML: {exc}"
        finally:
            pynvml.nvmlShutdown()


def decoder_of(path: Path, config: StreamConfig) -> str:
    """What really decodes the clip."""
    source = open_source(str(path), config.source, stream="s")
    source.close()
    return source.info.decoder


def decoded(path: Path, config: StreamConfig) -> Any:
    """Frames of the clip, each released at once."""
    source = open_source(str(path), config.source, stream="s")
    try:
        yield from source.frames()
    finally:
        source.close()


def scored_frames(path: Path, config: StreamConfig, backend: TorchBackend) -> Any:
    """Scores of the clip's frames, as the runtime makes them."""
    return score_frames(str(path), Scorer(loaded(), backend), config=config)


@lru_cache(maxsize=1)
def loaded() -> LoadedModel:
    """The model, read once: streams that start again and again are not to hash it each time."""
    return load_model(MODEL)


def rate(
    frames_of: Callable[[], Any],
    num: int,
    seconds: float,
    *,
    during: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Frames a second of ``num`` threads that play the clip again and again.

    Counted once every thread has its first frame, for ``seconds``; what ``during`` gives then,
    while all of them run, is told.
    """
    counts, errors = [0] * num, []
    stop, ready = threading.Event(), threading.Barrier(num + 1)

    def work(n: int) -> None:
        has_begun = False
        try:
            while not stop.is_set():
                for _ in frames_of():
                    if not has_begun:
                        has_begun = True
                        ready.wait(60)
                    counts[n] += 1
                    if stop.is_set():
                        break
        except (DgiqaError, threading.BrokenBarrierError, RuntimeError) as exc:
            errors.append(f"{type(exc).__name__}: {exc}")
            ready.abort()

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(num)]
    for thread in threads:
        thread.start()
    try:
        ready.wait(60)
    except threading.BrokenBarrierError:
        errors.append("not every stream gave a frame within 60 s")
    before, begin = sum(counts), time.perf_counter()
    stop.wait(seconds)
    took, after = time.perf_counter() - begin, sum(counts)
    told = during()
    stop.set()
    for thread in threads:
        thread.join(30)
    fps = 0.0 if errors else (after - before) / took
    return {"fps": fps, "errors": errors[:3], "during": told}


def _at_load(
    check: Any, backend: TorchBackend, found: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Latency from decoder to score of streams at their own pace, at four fifths of the rate."""
    of_h264 = found["codecs"].get("h264", {})
    rates = [v["decode_to_score_fps"] for v in of_h264.values() if isinstance(v, dict)
             and "decode_to_score_fps" in v]  # fmt: skip
    num = max(1, min(int(LOAD * max(rates, default=0.0) / FPS), 2 if check.is_quick else 256))
    if check.part_left < 3 * seconds:
        return {"left_out": NO_TIME}
    config, path = settings(check, realtime=True), check.folder / "h264.mp4"
    waits: list[float] = []
    begin = time.monotonic()

    def work() -> None:
        for score in scored_frames(path, config, backend):
            past = time.monotonic() - begin
            if past > seconds / 4:  # all have been opened, and what waited meanwhile is scored
                waits.append(score.scored_at_seconds - score.info.received_at_seconds)
            if past > 5 / 4 * seconds:
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 30)
    told = percentiles_of(waits)
    batches = backend.statistics()
    return {
        "num_streams": num,
        "num_frames": len(waits),
        "expected_frames": round(num * FPS * seconds),
        "p50_ms": None if told.p50_seconds is None else 1e3 * told.p50_seconds,
        "p99_ms": None if told.p99_seconds is None else 1e3 * told.p99_seconds,
        "mean_batch_over_all": batches.batches.mean_batch,
        "num_failed": batches.num_failed,
        "num_shrunk": batches.num_shrunk,
        **_memory(check),
    }


def _memory(check: Any) -> dict[str, Any]:
    """Bytes of the device: torch's own, and all that is in use, decoders included."""
    if check.device != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"torch_bytes": torch.cuda.memory_reserved(), "used_bytes": total - free}
