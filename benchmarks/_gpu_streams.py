"""Part of ``gpu_check.py``: many streams at once, decoded alone and decoded to scores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from dgiqa_stream.config import StreamConfig, parse_config
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.manifest import load_model
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sources import open_source
from plugins.torch_gpu.backend import TorchBackend, open_model
from plugins.torch_gpu.batching import percentiles_of

MODEL = "student-fp32"
CODECS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libx265": {"preset": "ultrafast", "crf": "26", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "12", "crf": "35"},
}
LOAD = 0.8
FPS = 30


def measure(check: Any) -> dict[str, Any]:
    """Frames a second by codec and number of streams, latency at four fifths of that, memory."""
    sizes = (1, 2) if check.is_quick else (1, 8, 32, 128)
    size, seconds = ((180, 320), 1.0) if check.is_quick else ((1080, 1920), 6.0)
    backend = open_model(load_model(MODEL), device=check.device, num_threads=1)
    found: dict[str, Any] = {"size": list(size), "backend": backend.status.active, "codecs": {}}
    try:
        for name, codec in CODECS.items():
            if check.seconds_left < 60 and found["codecs"]:
                found["codecs"][name] = {"left_out": "the time was over"}
                continue
            try:
                path = clip(check.folder / f"{name}.mp4", codec, size, 10 if check.is_quick else 60)
            except (av.error.FFmpegError, ValueError) as exc:
                found["codecs"][name] = {"left_out": f"no {codec} here: {exc}"}
                continue
            chosen = sizes if name == "h264" else sizes[-2:-1]
            found["codecs"][name] = _by_streams(check, path, backend, chosen, seconds)
        found["at_load"] = _at_load(check, backend, found, seconds)
    finally:
        backend.close()
    return found


def clip(path: Path, codec: str, size: tuple[int, int], num_frames: int, copies: int = 5) -> Path:
    """A moving picture with noise, encoded once and stored ``copies`` times in a row."""
    rng = np.random.default_rng(0)
    height, width = size
    blots = rng.integers(30, 220, (height // 20 + num_frames, width // 20, 3))
    grain = rng.integers(-6, 7, (*size, 1))
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=OPTIONS[codec])
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", num_frames
        for n in range(num_frames):
            rgb = np.kron(blots[n : n + height // 20], np.ones((20, 20, 1)))
            rgb = (rgb + np.roll(grain, n, 1)).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
            packets += stream.encode(frame)
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
    source = {"hardware": "cuda" if check.device == "cuda" else "none", "realtime": realtime}
    return parse_config(
        {
            "source": {**source, "decoder_threads": 1},
            "sampler": {"mode": "every"},
            "overload": {"policy": "wait"},
            "picture": {"letterbox": letterbox},
        }
    )


def _by_streams(
    check: Any, path: Path, backend: TorchBackend, sizes: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """Both rates for each number of streams, measured one after the other."""
    found = {"decoder": decoder_of(path, settings(check))}
    for num in sizes:
        if check.seconds_left < 4 * seconds:
            found[str(num)] = {"left_out": "the time was over"}
            continue
        alone = rate(lambda: decoded(path, settings(check)), num, seconds)
        scored = rate(lambda: scored_frames(path, settings(check), backend), num, seconds)
        found[str(num)] = {
            "decode_alone_fps": alone["fps"],
            "decode_to_score_fps": scored["fps"],
            "share": scored["fps"] / alone["fps"] if alone["fps"] else None,
            "errors": [*alone["errors"], *scored["errors"]],
            **_memory(check),
        }
        if num == 8:
            found[str(num)]["with_letterbox_fps"] = rate(
                lambda: scored_frames(path, settings(check, letterbox=True), backend), num, seconds
            )["fps"]
    return found


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
    return score_frames(str(path), Scorer(load_model(MODEL), backend), config=config)


def rate(frames_of: Callable[[], Any], num: int, seconds: float) -> dict[str, Any]:
    """Frames a second of ``num`` threads that play the clip again and again.

    Counted once every thread has its first frame, for ``seconds``.
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
    stop.set()
    for thread in threads:
        thread.join(30)
    return {"fps": 0.0 if errors else (after - before) / took, "errors": errors[:3]}


def _at_load(
    check: Any, backend: TorchBackend, found: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Latency from decoder to score of streams at their own pace, at four fifths of the rate."""
    of_h264 = found["codecs"].get("h264", {})
    rates = [v["decode_to_score_fps"] for v in of_h264.values() if isinstance(v, dict)
             and "decode_to_score_fps" in v]  # fmt: skip
    num = max(1, min(int(LOAD * max(rates, default=0.0) / FPS), 2 if check.is_quick else 256))
    if check.seconds_left < 2 * seconds + 30:
        return {"left_out": "the time was over"}
    config, path = settings(check, realtime=True), check.folder / "h264.mp4"
    waits: list[float] = []
    ends = time.monotonic() + seconds

    def work() -> None:
        for score in scored_frames(path, config, backend):
            waits.append(score.scored_at_seconds - score.info.received_at_seconds)
            if time.monotonic() > ends:
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
