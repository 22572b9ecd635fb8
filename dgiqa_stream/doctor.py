"""What this machine can do, found by trying: versions, engines, decoders, speed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dgiqa_stream.config import ModelSettings, SourceSettings, StreamConfig
from dgiqa_stream.errors import ConfigError, DgiqaError
from dgiqa_stream.versions import package_version

if TYPE_CHECKING:
    from dgiqa_stream.scorer import Scorer

_PACKAGES = (
    "av",
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "onnxruntime-gpu",
    "pyzmq",
    "msgspec",
    "matplotlib",
    "torch",
    "nvidia-ml-py",
)
_HELPERS = {"ffmpeg": "for srt:// and DASH", "srt-live-transmit": "for srt://"}
_BENCHMARK_SECONDS = 2.0
_ENGINES = ("qsv", "amf")  # asking for cuda loads torch: only where it is wanted
_NOT_TRIED = {"cuda": "not tried, because it loads torch: ask by --hardware cuda"}
_TORCH_NOT_TRIED = {"torch": "not tried: ask by --backend torch, and --device cuda for the GPU"}
_FAILED = "not usable"


def examine(settings: StreamConfig) -> dict[str, dict[str, Any]]:
    """Facts by topic; a topic that fails says why instead.

    Raises :class:`ConfigError` for a backend or device that is no name of one.
    """
    scorer, refusal = _scorer_asked_for(settings.model)
    try:
        return {
            "versions": _versions(),
            "machine": _machine(),
            "decoding": _decoding(settings.source),
            "engines": _engines(settings.model, scorer, refusal),
            "publishing": _publishing(),
            "benchmark": _benchmark(scorer) if scorer else {"failed": "no engine: see above"},
        }
    finally:
        if scorer:
            scorer.close()


def shortfalls(found: dict[str, dict[str, Any]]) -> list[str]:
    """What was asked for and would not run, one line each, of what :func:`examine` found."""
    told = [found["decoding"]["asked for"], found["engines"]["asked for"]]
    return [line for line in told if _FAILED in line]


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "dgiqa-stream": package_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(), "processors": usable}


def _decoding(source: SourceSettings) -> dict[str, Any]:
    import av
    from av.codec.hwaccel import hwdevices_available

    wanted = ("h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg")
    return {
        "FFmpeg": ", ".join(
            f"{name} {'.'.join(map(str, number))}" for name, number in av.library_versions.items()
        ),
        "decoders": ", ".join(c for c in wanted if c in av.codecs_available),
        "hardware decoding built in": ", ".join(hwdevices_available()) or "none",
        **{name: _why_hardware(name) for name in _ENGINES},
        **({} if source.hardware.startswith("cuda") else _NOT_TRIED),
        "asked for": _hardware_asked_for(source.hardware),
        **{
            f"{name} ({use})": shutil.which(name) or "not installed"
            for name, use in _HELPERS.items()
        },
    }


def _hardware_asked_for(wanted: str) -> str:
    return "software" if wanted == "none" else f"{wanted}: {_why_hardware(wanted)}"


def _why_hardware(name: str) -> str:
    """Whether streams can be decoded there."""
    from dgiqa_stream.sources import why_no_hardware

    reason = why_no_hardware(SourceSettings(hardware=name))
    return f"{_FAILED}: {reason}" if reason else "usable"


def _scorer_asked_for(wanted: ModelSettings) -> tuple[Scorer | None, str]:
    """The backend and device asked for, opened, or why they are not usable."""
    from dgiqa_stream.scorer import scorer_of

    try:
        return scorer_of(wanted), ""
    except ConfigError:
        raise
    except DgiqaError as exc:
        return None, str(exc)


def _engines(wanted: ModelSettings, scorer: Scorer | None, refusal: str) -> dict[str, Any]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see backends/_onnxruntime.py
    import onnxruntime

    from dgiqa_stream.scorer import load_scorer

    found: dict[str, Any] = {"providers": ", ".join(onnxruntime.get_available_providers())}
    for device in ("cpu", "cuda"):
        try:
            with load_scorer(wanted.name, device=device) as opened:
                found[device] = f"usable ({opened.status.active})"
        except DgiqaError as exc:
            found[device] = f"{_FAILED}: {exc}"
    found |= {} if wanted.backend.startswith("torch") else _TORCH_NOT_TRIED
    comes_to = _what_runs(scorer) if scorer else f"{_FAILED}: {refusal}"
    found["asked for"] = f"{wanted.backend} on {wanted.device}: {comes_to}"
    return found


def _what_runs(scorer: Scorer) -> str:
    """What the backend and device come to, and how each device is doing."""
    status = scorer.status
    told = [f" ({status.reason})"] if status.reason else []
    for one in scorer.devices():
        facts = (
            (one.name, "{}"),
            (one.total_bytes and one.total_bytes / 1e6, "{:.0f} MB"),
            (one.temperature_celsius, "{:.0f} °C"),
            (one.max_batch, "batches of up to {}"),
        )
        known = ", ".join(form.format(fact) for fact, form in facts if fact is not None)
        told.append(f"; {one.device}: {known}")
    return status.active + "".join(told)


def _publishing() -> dict[str, Any]:
    import zmq

    return {
        "libzmq": zmq.zmq_version(),
        "CURVE encryption": "yes" if zmq.has("curve") else "no",
        "ipc": "yes" if zmq.has("ipc") else "no",
    }


def _benchmark(scorer: Scorer) -> dict[str, Any]:
    """Score a moving 720p pattern for two seconds on one thread."""
    from dgiqa_stream.sources import open_source

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
    return {
        "model": f"{scorer.manifest.id} {scorer.manifest.version} {scorer.manifest.precision}",
        "ms per 1280x720 frame, without decoding": round(1000 * elapsed / num_scored, 2),
        "live streams at 5 scored frames a second": int(num_scored / elapsed / 5),
        "interpreter": sys.version.split()[0],
    }
