"""Part of ``gpu_check.py``: clips, and decoding them alone; needs PyAV and torch, nothing else."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from distill.process import ordinary_scheduling

os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 tells errors alone

CODECS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libx265": {"preset": "ultrafast", "crf": "26", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "12", "crf": "35"},
}
FPS = 30
COPIES = 15
"""How often the encoded pictures are stored in a row: decoders are seldom opened again."""
MOST_BY_SOFTWARE = 8
_READY_SECONDS = 60.0  # that the decoders of all streams may take to open, at most
_JOIN_SECONDS = 30.0  # that all streams together may take to end
_SLOW_SECONDS = 0.005  # between frames that no longer count


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


def clip(path: Path, codec: str, size: tuple[int, int], num_frames: int, copies: int) -> Path:
    """A moving picture with noise, encoded once and stored ``copies`` times in a row."""
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=OPTIONS[codec])
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", num_frames
        with ordinary_scheduling():
            container.start_encoding()
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


def decoded(path: Path, device: str, *, by_name: bool = True) -> Iterator[av.VideoFrame]:
    """Frames as PyAV alone decodes them, each released at once: what scoring is compared with.

    On ``cuda`` they stay on the device. ``by_name``: by the decoder that FFmpeg has to be asked for
    (AV1), where there is one.
    """
    decoder = _on_device() if device == "cuda" else None
    with av.open(str(path), hwaccel=decoder.hwaccel() if decoder else None) as container:
        track = container.streams.video[0]
        own = track.codec_context
        named = decoder.named(own.name) if decoder and by_name else None
        if named is not None:
            named.extradata = own.extradata
        context = named or own
        context.thread_type, context.thread_count = "AUTO", 1
        for packet in container.demux(track):
            try:
                yield from context.decode(packet)
            except av.error.EOFError:
                return


def _on_device() -> Any:
    from plugins.torch_gpu.decoding import CudaDecoder

    return CudaDecoder(0)


def decoder_of(path: Path, device: str) -> tuple[str, bool]:
    """What decodes a clip alone, and whether it has to be asked for by name."""
    for by_name in (True, False):
        try:
            first = next(decoded(path, device, by_name=by_name), None)
        except (av.error.FFmpegError, NotImplementedError, RuntimeError):
            continue
        if first is not None:
            return ("cuda:0" if first.format.name == "cuda" else "software"), by_name
    return "nothing", False


def rate(
    frames_of: Callable[[], Any],
    num: int,
    seconds: float,
    *,
    during: Callable[[], dict[str, Any]] = dict,
    seconds_left: float = math.inf,
) -> dict[str, Any]:
    """Frames a second of ``num`` threads that play the clip again and again.

    Counted once every thread has its first frame, for ``seconds``, where that leaves them time to
    open within ``seconds_left``; what ``during`` gives then, while all of them run, is told. Past
    that time the threads go slowly: threads that hold Python's lock most of the time can keep the
    one that is to stop them from it for minutes.
    """
    counts, errors, ends = [0] * num, [], [math.inf]
    stop, ready = threading.Event(), threading.Barrier(num + 1)
    open_seconds = max(1.0, min(_READY_SECONDS, seconds_left - seconds))
    due = time.monotonic() + open_seconds

    def work(n: int) -> None:
        has_begun = False
        try:
            while not stop.is_set():
                for _ in frames_of():
                    if not has_begun:
                        has_begun = True
                        ready.wait(_until(due))
                    if time.perf_counter() < ends[0]:
                        counts[n] += 1
                    else:
                        stop.wait(_SLOW_SECONDS)
                    if stop.is_set():
                        break
        except Exception as exc:  # noqa: BLE001 - a thread's end is told, whatever it was
            errors.append(f"{type(exc).__name__}: {exc}")
            ready.abort()

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(num)]
    for thread in threads:
        thread.start()
    try:
        ready.wait(_until(due))
    except threading.BrokenBarrierError:
        errors.append(f"not every stream gave a frame within {open_seconds:.3g} s")
    before, begin = sum(counts), time.perf_counter()
    ends[0] = begin + seconds
    stop.wait(0.0 if errors else seconds)
    took, after = min(seconds, time.perf_counter() - begin), sum(counts)
    told = during()
    stop.set()
    fps = 0.0 if errors else (after - before) / took
    if num_left := _num_left(threads, time.monotonic() + _JOIN_SECONDS):
        errors.insert(0, f"{num_left} of {num} streams did not end: what follows is slower for it")
    return {"fps": fps, "errors": errors[:3], "during": told}


def _until(due_seconds: float) -> float:
    """Seconds from now, none where it is past."""
    return max(0.0, due_seconds - time.monotonic())


def _num_left(threads: Sequence[threading.Thread], due_seconds: float) -> int:
    """How many threads have not ended by then: all of them share the time."""
    for thread in threads:
        thread.join(_until(due_seconds))
    return sum(thread.is_alive() for thread in threads)


class PcieMeter:
    """Bytes over PCIe by NVML's counters, which look at 20 ms at a time, while it is open."""

    def __init__(self, device: str, *, uuid: str = "") -> None:
        """``uuid`` is the device's, where torch tells it: NVML's numbers may be others."""
        self._device, self._uuid = device, uuid
        self._samples, self._reason = list[tuple[int, int]](), ""
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
            by_uuid = pynvml.nvmlDeviceGetHandleByUUID
            handle = by_uuid(self._uuid) if self._uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
            while not self._ends.wait(0.05):  # each counter takes 20 ms to read, in units of KB/s
                sent, received = (pynvml.nvmlDeviceGetPcieThroughput(handle, k) for k in kinds)
                self._samples.append((sent, received))
        except pynvml.NVMLError as exc:  # not every GPU has them
            self._reason = f"NVML: {exc}"
        finally:
            pynvml.nvmlShutdown()


def memory(device: str) -> dict[str, Any]:
    """Bytes of the device: torch's own, and all that is in use, decoders included."""
    if device != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"torch_bytes": torch.cuda.memory_reserved(), "used_bytes": total - free}


def uuid(device: str) -> str:
    """By which NVML knows the device that is checked; empty where torch does not tell."""
    if device != "cuda":
        return ""
    import torch

    from plugins.torch_gpu.devices import uuid_of

    return uuid_of(torch.device("cuda", 0))
