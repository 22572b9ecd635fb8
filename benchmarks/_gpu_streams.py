"""Part of ``gpu_check.py``: many streams at once, decoded alone and decoded to scores."""

from __future__ import annotations

import importlib.util
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import _gpu_decoding as decoding
import av

LOAD = 0.8
MODEL = "student-fp32"
NO_TIME = "the time was over"
_SETTLE_SECONDS = 1.0  # once all streams play, before latencies count
_OPEN_SECONDS = 45.0  # that the streams of that measurement may take to open


def measure(check: Any) -> dict[str, Any]:
    """Frames a second by codec and number of streams, latency at four fifths of that, memory.

    Without what the model needs, decoding alone.
    """
    numbers = (1, 2) if check.is_quick else (1, 8, 32, 128)
    size, seconds = ((180, 320), 0.5) if check.is_quick else ((1080, 1920), 4.0)
    missing = [n for n in ("msgspec", "onnx") if importlib.util.find_spec(n) is None]
    backend = None if missing else _opened(check)
    found: dict[str, Any] = {"size": list(size), "codecs": {}}
    if backend:
        found["backend"] = backend.status.active
    else:
        found["left_out"] = f"scoring, for want of {' and '.join(missing)}: decoding alone"
    try:
        for name, codec in decoding.CODECS.items():
            found["codecs"][name] = _of_codec(check, name, codec, size, backend, numbers, seconds)
            if name == "h264" and backend:  # before the others: it has a goal
                found["at_load"] = _at_load(check, backend, found["codecs"]["h264"], seconds)
    finally:
        if backend:
            backend.close()
    return found


def _opened(check: Any) -> Any:
    from plugins.torch_gpu.backend import open_model

    return open_model(loaded(), device=check.place, num_threads=1)


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
    num_frames, copies = (10, 5) if check.is_quick else (60, decoding.COPIES)
    try:
        path = decoding.clip(check.folder / f"{name}.mp4", codec, size, num_frames, copies)
    except (av.error.FFmpegError, ValueError) as exc:
        return {"left_out": f"no {codec} here: {exc}"}
    return _by_streams(check, path, backend, numbers, seconds)


def _by_streams(
    check: Any, path: Path, backend: Any, numbers: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """Both rates for each number of streams, measured one after the other."""
    decoder, by_name = decoding.decoder_of(path, check.device)
    found: dict[str, Any] = {"decoder": decoder}
    if backend:
        found["decoder_of_scored_streams"] = source_decoder(path, settings(check))
    is_software = check.device == "cuda" and "cuda" not in decoder
    for num in numbers:
        if is_software and num > decoding.MOST_BY_SOFTWARE:
            found[str(num)] = {"left_out": "software decodes: more streams measure the CPU"}
        elif check.part_left < 4 * seconds:
            found[str(num)] = {"left_out": NO_TIME}
        else:
            found[str(num)] = _at(check, path, backend, num, seconds, by_name=by_name)
    if backend and not check.is_quick and check.part_left > 6 * seconds:
        with_letterbox = settings(check, picture={"letterbox": True})
        found["with_letterbox_fps_of_8"] = decoding.rate(
            lambda: scored_frames(path, with_letterbox, backend), 8, seconds,
            seconds_left=check.part_left,
        )["fps"]  # fmt: skip
    return found


def _at(
    check: Any, path: Path, backend: Any, num: int, seconds: float, *, by_name: bool
) -> dict[str, Any]:
    """One number of streams: decoded alone, and decoded to scores."""

    def in_use() -> dict[str, Any]:
        return decoding.memory(check.device)

    idle = in_use()
    alone = decoding.rate(
        lambda: decoding.decoded(path, check.device, by_name=by_name), num, seconds, during=in_use,
        seconds_left=check.part_left / 2,
    )  # fmt: skip
    told = {"decode_alone_fps": alone["fps"], "errors": alone["errors"]}
    if not backend:
        return {**told, **alone["during"]}
    config = settings(check)
    with decoding.PcieMeter(check.device, uuid=decoding.uuid(check.device)) as pcie:
        scored = decoding.rate(
            lambda: scored_frames(path, config, backend), num, seconds, during=in_use,
            seconds_left=check.part_left,
        )  # fmt: skip
    return {
        **told,
        "decode_to_score_fps": scored["fps"],
        "share": scored["fps"] / alone["fps"] if alone["fps"] else None,
        "errors": [*alone["errors"], *scored["errors"]],
        "pcie": pcie.told(scored["fps"]),
        **scored["during"],
        **beside_decoder(idle, alone["during"], scored["during"]),
    }


def beside_decoder(
    idle: dict[str, Any], alone: dict[str, Any], scored: dict[str, Any]
) -> dict[str, Any]:
    """What is in use while streams are scored, less what decoding them alone takes.

    The driver's context, weights, graphs, batches, surfaces that wait to be scored and whatever
    other programs hold are all in it.
    """
    if not scored:
        return {}
    of_decoder = max(0, alone["used_bytes"] - idle["used_bytes"])
    return {"decoder_bytes": of_decoder, "beside_decoder_bytes": scored["used_bytes"] - of_decoder}


def settings(check: Any, **more: Any) -> Any:
    """Every frame, decoded on the device where there is one."""
    from dgiqa_stream.config import parse_config

    on_device = {"hardware": check.place if check.device == "cuda" else "none"}
    source = {**on_device, "decoder_threads": 1, **more.pop("source", {})}
    return parse_config(
        {
            "source": source,
            "sampler": {"mode": "every"},
            "overload": {"policy": "wait"},
            "picture": {"letterbox": False},
            **more,
        }
    )


def source_decoder(path: Path, config: Any) -> str:
    """What really decodes the clip for the runtime."""
    from dgiqa_stream.sources import open_source

    source = open_source(str(path), config.source, stream="s")
    source.close()
    return source.info.decoder


def scored_frames(path: Path, config: Any, backend: Any) -> Any:
    """Scores of the clip's frames, as the runtime makes them."""
    from dgiqa_stream.pipeline import score_frames
    from dgiqa_stream.scorer import Scorer

    return score_frames(str(path), Scorer(loaded(), backend), config=config)


@lru_cache(maxsize=1)
def loaded() -> Any:
    """The model, read once: streams that start again and again are not to hash it each time."""
    from dgiqa_stream.manifest import load_model

    return load_model(MODEL)


# Latency ----------------------------------------------------------------------------------------


class Published:
    """A sink that encodes each message, as one that publishes does, and notes how old frames are.

    The age of a frame's score counts from its decoder.
    """

    def __init__(self, waits: list[float], is_measuring: threading.Event) -> None:
        from dgiqa_stream.messages import FrameMessage
        from dgiqa_stream.wire import encode

        self._kind, self._encode = FrameMessage, encode
        self._waits, self._is_measuring = waits, is_measuring
        self.is_open = False

    def send(self, message: Any) -> None:
        """Encode it."""
        self._encode(message)
        if isinstance(message, self._kind):
            self.is_open = True
            if self._is_measuring.is_set() and message.time.wall_ns:
                self._waits.append(time.time() - message.time.wall_ns / 1e9)

    def tick(self) -> None:
        """Nothing is due."""

    def close(self) -> None:
        """Nothing is open."""


def _at_load(check: Any, backend: Any, of_h264: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Latency from decoded to published, of streams at their own pace: four fifths of the rate."""
    rates = [v["decode_to_score_fps"] for v in of_h264.values() if isinstance(v, dict)
             and "decode_to_score_fps" in v]  # fmt: skip
    most = 2 if check.is_quick else 256
    num = max(1, min(int(LOAD * max(rates, default=0.0) / decoding.FPS), most))
    if check.part_left < 5 * seconds:
        return {"left_out": NO_TIME}
    return at_pace(check, backend, check.folder / "h264.mp4", num, seconds)


def at_pace(check: Any, backend: Any, path: Path, num: int, seconds: float) -> dict[str, Any]:
    """Latency of ``num`` streams that are watched as live ones are, once all of them play."""
    from dgiqa_stream.pipeline import Monitor
    from dgiqa_stream.scorer import Scorer

    has_pictures = importlib.util.find_spec("cv2") is not None
    output = {} if has_pictures else {"output": {"thumbnails": 0}}
    config = settings(check, source={"realtime": True}, **output)
    waits: list[float] = []
    errors: list[str] = []
    stop, is_measuring = threading.Event(), threading.Event()
    sinks = [Published(waits, is_measuring) for _ in range(num)]
    monitors: list[Monitor | None] = [None] * num

    def work(n: int) -> None:
        while not stop.is_set():
            monitors[n] = one = Monitor(
                str(path), stream=f"s{n}", config=config, scorer=Scorer(loaded(), backend),
                sinks=[sinks[n]],
            )  # fmt: skip
            if error := one.run().error:
                errors.append(f"{type(error).__name__}: {error}")
                return

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(num)]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + min(_OPEN_SECONDS, max(1.0, check.part_left - 3 * seconds))
    while time.monotonic() < ends and not errors and not all(sink.is_open for sink in sinks):
        time.sleep(0.02)
    time.sleep(_SETTLE_SECONDS)
    is_measuring.set()
    time.sleep(seconds)
    is_measuring.clear()
    in_use = decoding.memory(check.device)
    stop.set()
    for monitor in filter(None, monitors):
        monitor.stop()
    for thread in threads:
        thread.join(10)
    return {
        "num_streams": num,
        "num_playing": sum(sink.is_open for sink in sinks),
        "num_frames": len(waits),
        "expected_frames": round(num * decoding.FPS * seconds),
        "errors": errors[:3],
        **_told(waits, backend),
        **in_use,
    }


def _told(waits: list[float], backend: Any) -> dict[str, Any]:
    from plugins.torch_gpu.batching import percentiles_of

    found, done = percentiles_of(waits), backend.statistics()
    return {
        "p50_ms": None if found.p50_seconds is None else 1e3 * found.p50_seconds,
        "p99_ms": None if found.p99_seconds is None else 1e3 * found.p99_seconds,
        "mean_batch_over_all": done.batches.mean_batch,
        "num_failed": done.num_failed,
        "num_shrunk": done.num_shrunk,
    }
