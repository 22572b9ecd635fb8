"""Frozen settings and the strict TOML they are read from: an unknown key is an error.

``configs/stream.toml`` documents every key and states the defaults; a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import inspect

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.types import Crop
from dgiqa_stream.urls import redact_text

# Every bound is finite: infinity would pass `> 0` and break arithmetic far from the setting.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=256)]  # each is really started
ThreadsOrAuto = Annotated[int, msgspec.Meta(ge=0, le=256)]
_HARDWARE = r"^(none|cuda(:\d{1,3})?|qsv|amf)$"
StreamId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every table: immutable, and strict about its keys."""


class SourceSettings(_Settings, frozen=True):
    """How a stream or file is opened and decoded."""

    open_timeout_seconds: Positive = 10.0
    read_timeout_seconds: Positive = 10.0
    decoder_threads: ThreadsOrAuto = 0
    """For each stream or file; 0: two, or one for live H.264 and MPEG-2 of up to 1080p30, and where
    as many as the cores are decoded at once."""
    options: dict[str, str] = {}
    """Options for FFmpeg's demuxer and protocol, as ``rtsp_transport = "tcp"``."""
    programme: int | None = None
    """Programme number (MPEG-TS service) whose video is taken; None takes the best."""
    track: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Which video track, from 0; None takes the best."""
    realtime: bool = False
    """Play a file at its own pace, as a live stream."""
    start_seconds: NotNegative = 0.0
    """Files: skip what comes before, counted from the first frame."""
    duration_seconds: Positive | None = None
    """Stop after this much presentation time."""
    deinterlace: Literal["none", "bob"] = "none"
    """``bob``: two progressive pictures of each frame that is flagged as interlaced."""
    hardware: Annotated[str, msgspec.Meta(pattern=_HARDWARE)] = "none"
    """``cuda``, ``cuda:N``, ``qsv`` or ``amf`` decodes there, where it can: software takes what is
    left."""
    strict: bool = False
    """Refuse a stream that ``hardware`` cannot decode."""


class ReconnectSettings(_Settings, frozen=True):
    """Opening a live source again that has gone away after it had played."""

    enabled: bool = False
    first_wait_seconds: Positive = 0.5
    """Doubled after each attempt; a random half of every wait is left out."""
    longest_wait_seconds: Positive = 30.0
    healthy_seconds: Positive = 60.0
    """After this long without a break, waiting begins at the first wait again."""


class SamplerSettings(_Settings, frozen=True):
    """Which decoded frames are scored."""

    mode: Literal["time", "every", "keyframes"] = "time"
    frames_per_second: Positive = 5.0
    """For ``time``: one frame per period of stream time."""
    jitter: bool = True
    """For ``time``: a seeded random place within each period, so that the coding pattern of the
    stream cannot line up with the sampling (Netflix/vmaf#1214)."""
    every: Count = 1
    """For ``every``: each Nth decoded frame; 1 scores all."""
    seed: int = 1


class OverloadSettings(_Settings, frozen=True):
    """What happens when scoring is slower than the stream."""

    policy: Literal["auto", "wait", "drop_oldest"] = "auto"
    """``auto``: live streams drop the oldest waiting frame, files wait."""
    queue_frames: Count = 8
    """Frames that wait at most; of a source that waits never more than 3, which is enough."""
    staleness_seconds: Positive = 2.0
    """Live: a frame that waited longer is dropped unscored."""


class PictureSettings(_Settings, frozen=True):
    """Which part of the picture is scored."""

    crop: tuple[int, ...] = ()
    """``[left, top, width, height]`` in upright pixels; empty for the whole picture."""
    letterbox: bool = True
    """Leave detected black bars out."""

    def __post_init__(self) -> None:
        """Refuse a crop that is not a rectangle."""
        if self.crop and len(self.crop) != 4:
            raise ValueError(f"crop {list(self.crop)} must be [left, top, width, height]")
        if self.crop:
            Crop(*self.crop)

    @property
    def rectangle(self) -> Crop | None:
        """The crop as a value, or None."""
        return Crop(*self.crop) if self.crop else None


class ModelSettings(_Settings, frozen=True):
    """Which model scores, and on what."""

    name: str = "student"
    """A shipped model's name or the path of a ``.onnx`` file with its manifest beside it."""
    backend: str = "onnxruntime"
    """``onnxruntime``, ``torch``, or with TensorRT ``torch-tensorrt``, ``onnxruntime-tensorrt``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``, or several as ``cuda:0,cuda:1``."""
    strict: bool = False
    """Refuse to run where ``auto`` finds no GPU, or after the device is lost."""
    on_device_loss: Literal["fallback", "end"] = "fallback"
    """``fallback``: score on by ONNX Runtime on the CPU; ``end``: end all streams with an error."""
    gpu_profile: Literal["latency", "low-clock"] = "latency"
    """``low-clock``: larger batches that wait longer, for a GPU with little power."""
    max_gpu_mb: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """Memory of each device, in 10 ** 6 bytes, that torch may take; 0 for all there is."""
    threads: Threads = 1
    """CPU threads of one inference."""


POOLER_NAMES = (
    "mean", "median", "min", "max", "stdev", "harmonic_mean", "p1", "p5", "p10", "low1", "low5",
    "minkowski", "vqpool", "ewma", "hysteresis", "hysteresis_exact", "primacy", "recency",
    "p1203_style",
)  # fmt: skip
"""What scores can be pooled to; the formulas are in :mod:`dgiqa_stream.pooling`."""


class PoolingSettings(_Settings, frozen=True):
    """How frame scores become one number over time."""

    poolers: tuple[str, ...] = ()
    """Names of ``POOLER_NAMES``; empty for all. Mean, low5, ewma and hysteresis always come."""
    windows_seconds: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=8)] = (1.0, 10.0, 60.0)
    hop_seconds: Positive = 1.0
    max_hold_seconds: Positive = 2.0
    """A score stands for the time until the next one, at most this long."""
    ewma_seconds: Positive = 5.0
    """``ewma``: time constant of the moving average."""
    hysteresis_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 2.0
    """``hysteresis``: how long a bad moment is remembered; tau of the paper."""
    hysteresis_alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    """``hysteresis``: weight of the present against the worst of the memory; alpha of the paper."""
    minkowski_p: Annotated[float, msgspec.Meta(ge=1, le=32)] = 2.0
    """``minkowski``: exponent of the impairment; 1 is the mean, a large one close to ``min``."""
    vqpool_exponent: Annotated[float, msgspec.Meta(ge=0, le=16)] = 2.0
    """``vqpool``: exponent of the good group's weight; 2 in the paper, 0 is the mean."""
    primacy_seconds: Positive = 30.0
    """``primacy``: time constant with which what came later counts less."""
    recency_seconds: Positive = 30.0
    """``recency``: time constant with which what came earlier counts less."""
    p1203_seconds: Annotated[int, msgspec.Meta(ge=10, le=3600)] = 300
    """``p1203_style``: how much of the end is rated; the Recommendation knows 60 to 300 s."""

    def __post_init__(self) -> None:
        """Refuse names that no pooler has."""
        for name in self.poolers:
            if name not in POOLER_NAMES:
                near = difflib.get_close_matches(name.lower(), POOLER_NAMES, 1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(POOLER_NAMES)}"
                raise ValueError(f"poolers = {name!r} is unknown; {hint}")


class PublishSettings(_Settings, frozen=True):
    """The ZeroMQ publisher."""

    endpoint: str = "tcp://127.0.0.1:5556"
    """``tcp://HOST:PORT``, ``tcp://HOST:*`` or ``ipc://PATH``; empty publishes nothing."""
    encoding: Literal["json", "msgpack"] = "json"
    framing: Literal["multipart", "single"] = "multipart"
    """``single`` joins topic and payload with a space, for CONFLATE subscribers."""
    high_water_mark: Count = 200
    """Messages kept for a slow subscriber before new ones are dropped for it."""
    status_seconds: Positive = 5.0
    """A status message at least this often, so that silence and death differ."""
    curve_dir: str = ""
    """Folder with ``server.key_secret`` and the allowed clients' ``*.key``: CURVE encryption."""
    insecure: bool = False
    """Allow an endpoint other machines can reach without CURVE."""


class OutputSettings(_Settings, frozen=True):
    """Files written beside the publisher; empty writes none."""

    ndjson: str = ""
    csv: str = ""
    report: str = ""
    """HTML report written when the session ends; needs the ``report`` extra."""
    thumbnails: Annotated[int, msgspec.Meta(ge=0, le=100)] = 6
    """How many of the worst frames are kept as pictures in the NDJSON recording and report."""


class StreamEntry(_Settings, frozen=True):
    """One stream to watch; ``[[stream]]`` in the file."""

    url: str
    id: StreamId | None = None
    """The name in topics and files; derived from the URL where absent."""
    options: dict[str, str] = {}
    """Added to ``source.options`` for this stream."""


class StreamConfig(_Settings, frozen=True):
    """Everything ``dgiqa-stream watch`` can be told."""

    stream: tuple[StreamEntry, ...] = ()
    source: SourceSettings = SourceSettings()
    reconnect: ReconnectSettings = ReconnectSettings()
    sampler: SamplerSettings = SamplerSettings()
    overload: OverloadSettings = OverloadSettings()
    picture: PictureSettings = PictureSettings()
    model: ModelSettings = ModelSettings()
    pooling: PoolingSettings = PoolingSettings()
    publish: PublishSettings = PublishSettings()
    output: OutputSettings = OutputSettings()


_GIVE = "give a TOML file as `dgiqa-stream config` prints it"


def load_config(path: Path) -> StreamConfig:
    """Read a configuration file; raises :class:`ConfigError` naming the key and the rule."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"cannot read the configuration {path}: it is no UTF-8; {_GIVE}") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration {path}: {exc.strerror}; {_GIVE}") from exc
    try:
        return parse_config(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def default_file() -> str:
    """The documented configuration with every default: ``configs/stream.toml`` of the project."""
    return (Path(__file__).with_name("assets") / "stream.toml").read_text(encoding="utf-8")


def parse_config(values: dict[str, Any]) -> StreamConfig:
    """Settings from nested tables; raises :class:`ConfigError` naming the key and the rule."""
    _refuse_unknown(values, StreamConfig, "")
    try:
        return msgspec.convert(values, StreamConfig)
    except msgspec.ValidationError as exc:
        raise ConfigError(_refusal(exc, values)) from exc


def _refuse_unknown(values: Any, struct: type[msgspec.Struct], prefix: str) -> None:
    if not isinstance(values, dict):
        return  # a wrong type: msgspec names it
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(struct)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = (
                f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(fields)}"
            )
            raise ConfigError(f"unknown setting {prefix}{key}; {hint}")
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, f"{prefix}{key}.")
        elif key == "stream" and isinstance(value, list):
            for number, entry in enumerate(value):
                _refuse_unknown(entry, StreamEntry, f"{prefix}stream[{number}].")


def _refusal(exc: msgspec.ValidationError, values: dict[str, Any]) -> str:
    """Key, value and rule, from msgspec's reason and the place that it names."""
    reason, _, place = str(exc).partition(" - at `$.")
    key = place.rstrip("`")
    if isinstance(exc.__cause__, ValueError):  # of a __post_init__, which begins with the field
        return f"{key}.{exc.__cause__}"
    if missing := re.search("missing required field `(.*)`", reason):
        return f"{key} has no {missing[1]}: give it one"
    if key.endswith("[...]"):
        return f"{key.removesuffix('[...]')} holds a value that is no text: put it in quotes"
    value: Any = values
    kind: inspect.Type = inspect.type_info(StreamConfig)
    for step in re.findall(r"[^.\[\]]+", key):  # of `stream[0].id`: stream, 0, id
        value = value[int(step) if isinstance(value, list | tuple) else step]
        kind = _inner(kind, step)
    rule = _rule(kind)
    shown = f"{value:g}" if isinstance(value, float) else redact_text(str(value))
    told = "" if rule.endswith("table") else f" = {shown}"  # which may hold secrets
    return f"{key}{told} is refused: give {rule}"


def _inner(kind: inspect.Type, step: str) -> inspect.Type:
    """The type of a field, or of the items of a list."""
    if isinstance(kind, inspect.StructType):
        return next(field.type for field in kind.fields if field.encode_name == step)
    return kind.item_type if isinstance(kind, inspect.VarTupleType) else kind


def _rule(kind: inspect.Type) -> str:
    """What a setting of this type may be, in words."""
    match kind:
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.IntType():
            return f"a whole number{_bounds(kind)}"
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
        case inspect.StrType():
            if kind.pattern == _HARDWARE:
                return "one of none, cuda, cuda:N, qsv, amf"
            return "text" + (f" that matches {kind.pattern}" if kind.pattern else "")
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType():
            most = f" of at most {kind.max_length}" if kind.max_length else ""
            return f"a list{most}, each {_rule(kind.item_type)}"
        case inspect.UnionType():  # with None, which no file can say
            return _rule(kind.types[0])
    return "a table"


def _bounds(kind: inspect.FloatType | inspect.IntType) -> str:
    words = (("above", kind.gt), ("at least", kind.ge), ("at most", kind.le))
    found = " and ".join(f"{word} {bound:,.12g}" for word, bound in words if bound is not None)
    return f" {found}" if found else ""
