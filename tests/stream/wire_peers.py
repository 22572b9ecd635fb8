"""Values for tests of messages, and the other end of a socket as a process of its own.

    python wire_peers.py publish ENDPOINT [SETTING=VALUE ...]
    python wire_peers.py subscribe ENDPOINT
    python wire_peers.py record FILE

The publisher ticks as the pipeline does and obeys lines on its standard input:

    frames STREAM COUNT | window STREAM KIND LENGTH | meta STREAM | status STREAM STATE
    final STREAM | end STREAM COUNT: frames, the summary, and at once the end

Each is answered with a line, ``done`` and the seconds it took. The end of the input ends it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import msgspec

from dgiqa_stream.backends import BackendStatus
from dgiqa_stream.config import PublishSettings, StreamConfig
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.manifest import (
    DomainSpec,
    HalfWidthMapping,
    IntervalSpec,
    ModelManifest,
    OutputSpec,
    PreprocessSpec,
    ScoreMapping,
)
from dgiqa_stream.preprocess import ViewSpec
from dgiqa_stream.sinks import zeromq
from dgiqa_stream.sinks.ndjson import NdjsonSink
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.types import FrameInfo, FrameScore, StreamInfo, WindowScore
from dgiqa_stream.wire import MessageFactory, MetaMessage, encode

MANIFEST = ModelManifest(
    schema="dgiqa.manifest/2",
    id="student",
    version="1.2.0",
    precision="int8",
    sha256="9f" * 32,
    size_bytes=1_000_000,
    licence="Apache-2.0",
    num_parameters=250_000,
    preprocess=PreprocessSpec(
        views=[
            ViewSpec(name="whole", kind="whole", height=224, width=224),
            ViewSpec(name="detail", kind="fragments", height=64, width=128, rows=1, columns=2),
        ],
        reduction="halved-bilinear",
    ),
    output=OutputSpec(name="raw", mapping=ScoreMapping(raw=[0.0, 1.0], score=[0.0, 100.0])),
    calibration="example-1",
    made_by="tests/stream/wire_peers.py",
)
SURE_MANIFEST = msgspec.structs.replace(
    MANIFEST,
    interval=IntervalSpec("spread", HalfWidthMapping([0.0, 1.0], [0.0, 40.0]), 0.9),
    domain=DomainSpec("unfamiliar", 0.5),
)
BACKEND = BackendStatus("onnxruntime:cuda", "onnxruntime:cpu", "no CUDA device")
STREAM_INFO = StreamInfo(
    width=1920,
    height=1080,
    codec="h264",
    pix_fmt="yuv420p",
    average_fps=Fraction(30000, 1001),
    duration_seconds=None,
    num_frames_from_header=None,
    is_live=True,
    container="rtsp",
)


def make_factory(stream: str = "cam1", **options: Any) -> MessageFactory:
    """Messages of a stream, by the manifest above."""
    return MessageFactory(stream, **{"model": MANIFEST, **options})


def make_score(index: int = 0, score: float = 71.25, **changes: Any) -> FrameScore:
    """A scored frame, 25 to the second."""
    info: dict[str, Any] = {
        "index": index,
        "pts_seconds": index / 25,
        "duration_seconds": 0.04,
        "pts": index * 3600,
        "time_base": Fraction(1, 90000),
        "width": 1920,
        "height": 1080,
        "pix_fmt": "yuv420p",
        "received_at_seconds": 1_767_225_600.25,
    }
    names = set(FrameInfo.__slots__)
    info.update({key: value for key, value in changes.items() if key in names})
    values = {"stream": "cam1", "raw": score / 100, "scored_at_seconds": 1_767_225_600.3125}
    values.update({key: value for key, value in changes.items() if key not in names})
    return FrameScore(info=FrameInfo(**info), score=score, **values)


def make_window(kind: str = "sliding", length: float = 10.0, **changes: Any) -> WindowScore:
    """A pooled window that ends at 60 s."""
    values: dict[str, Any] = {
        "stream": "cam1",
        "kind": kind,
        "length_seconds": length,
        "hop_seconds": 1.0 if kind == "sliding" else 0.0,
        "begin_seconds": 60.0 - length,
        "end_seconds": 60.0,
        "num_frames": 48,
        "expected_frames": 50.0,
        "coverage": 0.96,
        "valid": True,
        "pool": {"mean": 70.5, "low1": 41.0, "ewma": None},
        "headline": "mean",
        "params": {"ewma_seconds": 5.0},
        "in_domain_share": 0.875,
    }
    return WindowScore(**{**values, **changes})


def make_meta(
    factory: MessageFactory, url: str = "rtsp://cam.example/live", **tables: Any
) -> MetaMessage:
    """What is watched, with the given tables of settings."""
    return factory.meta(url, STREAM_INFO, backend=BACKEND, config=StreamConfig(**tables))


class _Publisher:
    def __init__(self, sink: ZeromqSink) -> None:
        self.sink = sink
        self.factories: dict[str, MessageFactory] = {}

    def obey(self, line: str) -> None:
        verb, *words = line.split()
        factory = self.factories.setdefault(words[0], make_factory(words[0]))
        command: Callable[..., None] = getattr(self, verb)
        command(factory, *words[1:])

    def frames(self, factory: MessageFactory, count: str) -> None:
        for index in range(int(count)):
            self.sink.send(factory.frame(make_score(index)))

    def window(self, factory: MessageFactory, kind: str, length: str) -> None:
        self.sink.send(factory.window(make_window(kind, float(length))))

    def meta(self, factory: MessageFactory) -> None:
        self.sink.send(make_meta(factory))

    def status(self, factory: MessageFactory, state: Any) -> None:
        self.sink.send(factory.status(state))

    def final(self, factory: MessageFactory) -> None:
        self.sink.send(factory.final(None, counts={}, duration_seconds=1.0, reason="end_of_stream"))

    def end(self, factory: MessageFactory, count: str) -> None:
        zeromq._FINAL_LINGER_MS = 30_000  # a second is short for a reader on a busy machine
        self.frames(factory, count)
        self.final(factory)
        tell("closing")
        self.sink.close()


def publish(endpoint: str, *settings: str) -> None:
    """Publish what the standard input asks for."""
    pairs = dict(setting.split("=", 1) for setting in settings)
    values = {**pairs, "endpoint": endpoint}
    publisher = _Publisher(ZeromqSink(msgspec.convert(values, PublishSettings, strict=False)))
    tell(f"ready {publisher.sink.endpoint}")
    while True:
        if not select.select([sys.stdin], [], [], 0.02)[0]:
            publisher.sink.tick()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        begin = time.perf_counter()
        publisher.obey(line)
        tell(f"done {time.perf_counter() - begin}")


def subscribe(endpoint: str) -> None:
    """Wait for messages until interrupted, and say so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Subscriber(endpoint) as messages:
        try:
            tell("ready")
            for message in messages:
                tell(encode(message).decode())
        except KeyboardInterrupt:
            tell("interrupted")


def record(path: str) -> None:
    """Write frames without end, telling how many are written unless they go to the output."""
    sink, factory = NdjsonSink(path), make_factory()
    for index in range(10**9):
        sink.send(factory.frame(make_score(index)))
        if path != "-":
            os.write(1, f"{index + 1}\n".encode())


def tell(line: str) -> None:
    """Answer at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        {"publish": publish, "subscribe": subscribe, "record": record}[sys.argv[1]](*sys.argv[2:])
    except DgiqaError as error:
        with contextlib.suppress(BrokenPipeError):
            tell(f"{type(error).__name__} {error}")
        os._exit(1)  # nothing is left to flush, and the output may be gone
