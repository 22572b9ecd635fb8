"""What this machine can do, found by trying: versions, engines, decoders, speed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import DgiqaError

_PACKAGES = (
    "dgiqa-stream",
    "av",
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "onnxruntime-gpu",
    "pyzmq",
    "msgspec",
    "matplotlib",
)
_HELPERS = {"ffmpeg": "for srt:// and DASH", "srt-live-transmit": "for srt://"}
_BENCHMARK_SECONDS = 2.0


def examine(model: str) -> dict[str, dict[str, Any]]:
    """Facts by topic; a topic that fails says why instead."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "decoding": _decoding(),
        "engines": _engines(model),
        "publishing": _publishing(),
        "benchmark": _benchmark(model),
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(), "processors": usable}


def _decoding() -> dict[str, Any]:
    import av
    from av.codec.hwaccel import hwdevices_available

    wanted = ("h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg")
    return {
        "FFmpeg": ", ".join(
            f"{name} {'.'.join(map(str, number))}" for name, number in av.library_versions.items()
        ),
        "decoders": ", ".join(c for c in wanted if c in av.codecs_available),
        "hardware decoding built in": ", ".join(hwdevices_available()) or "none",
        "hardware decoding used": "none: software decoding in this version",
        **{
            f"{name} ({use})": shutil.which(name) or "not installed"
            for name, use in _HELPERS.items()
        },
    }


def _engines(model: str) -> dict[str, Any]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see backends/_onnxruntime.py
    import onnxruntime

    from dgiqa_stream.scorer import load_scorer

    found: dict[str, Any] = {"providers": ", ".join(onnxruntime.get_available_providers())}
    for device in ("cpu", "cuda"):
        try:
            with load_scorer(model, device=device) as scorer:
                found[device] = f"usable ({scorer.status.active})"
        except DgiqaError as exc:
            found[device] = f"not usable: {exc}"
    return found


def _publishing() -> dict[str, Any]:
    import zmq

    return {
        "libzmq": zmq.zmq_version(),
        "CURVE encryption": "yes" if zmq.has("curve") else "no",
        "ipc": "yes" if zmq.has("ipc") else "no",
    }


def _benchmark(model: str) -> dict[str, Any]:
    """Score a moving 720p pattern for two seconds on one thread."""
    from dgiqa_stream.scorer import load_scorer
    from dgiqa_stream.sources import open_source

    try:
        scorer = load_scorer(model)
    except DgiqaError as exc:
        return {"failed": str(exc)}
    source = open_source(
        "pattern:clean?size=1280x720&fps=25&seconds=1", SourceSettings(), stream="doctor"
    )
    frames = [frame.planes for frame in source.frames()]
    scorer.predict(frames[:1])
    begin, num_scored = time.perf_counter(), 0
    while time.perf_counter() - begin < _BENCHMARK_SECONDS:
        scorer.predict([frames[num_scored % len(frames)]])
        num_scored += 1
    elapsed = time.perf_counter() - begin
    scorer.close()
    return {
        "model": f"{scorer.manifest.id} {scorer.manifest.version} {scorer.manifest.precision}",
        "ms per 1280x720 frame, without decoding": round(1000 * elapsed / num_scored, 2),
        "live streams at 5 scored frames a second": int(num_scored / elapsed / 5),
        "interpreter": sys.version.split()[0],
    }
