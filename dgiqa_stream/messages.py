"""The published messages as typed values; :mod:`dgiqa_stream.wire` takes them to bytes and back.

A message is told apart by its ``schema``, such as ``dgiqa.frame/1``. Within a major number fields
are only ever added, each with a default, and whoever reads ignores keys that it does not know.
Names are those of the wire, which is why some lack the unit that other names here carry.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec

from dgiqa_stream.config import StreamId

MAJOR = 1

Ratio = tuple[int, int]
"""Numerator and denominator."""
Score = Annotated[float, msgspec.Meta(ge=0, le=100)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
State = Literal["connecting", "running", "stalled", "reconnecting", "ended", "failed"]
"""``reconnecting`` carries the fault as ``error``; a live source is being opened again."""


class FramePart(msgspec.Struct, frozen=True):
    """Which frame was scored and what is known of it."""

    index: NotNegative
    pts: int | None
    time_base: Ratio | None
    pts_seconds: float
    key: bool
    corrupt: bool
    width: int
    height: int
    pix_fmt: str
    rotation: int
    interlaced: bool
    dynamic_range: Literal["sdr", "pq", "hlg"]
    discontinuity: bool


class TimePart(msgspec.Struct, frozen=True):
    """When the frame left the decoder (Unix time), and how long until its score was known."""

    wall_ns: int | None
    latency_ms: float | None


class QualityPart(msgspec.Struct, frozen=True):
    """The prediction: 0 (worst) to 100 (best), and the network's own output before mapping."""

    score: Score
    raw: float | None
    in_domain: bool
    """Whether ``out_of_domain`` is empty."""
    interval: tuple[Score, Score] | None = None
    """Low and high; null where the model does not say how sure it is."""
    interval_coverage: Share | None = None
    """Share of pictures whose mean opinion lies in such an interval."""
    out_of_domain: list[str] = []
    """``hdr``, ``unfamiliar``, ``flat``; reasons may be added."""


class SamplingPart(msgspec.Struct, frozen=True):
    """How frames are chosen; ``biased`` where that can line up with the coding pattern."""

    mode: Literal["time", "every", "keyframes"]
    period_s: float | None
    jitter: bool
    biased: bool


class DropsPart(msgspec.Struct, frozen=True):
    """Decoded frames without a score so far, by cause; ``decode`` counts refused packets."""

    skipped: NotNegative = 0
    queue: NotNegative = 0
    stale: NotNegative = 0
    decode: NotNegative = 0


class ModelPart(msgspec.Struct, frozen=True):
    """What made the score."""

    id: str
    version: str
    precision: str
    sha256: str
    calibration: str


class WindowPart(msgspec.Struct, frozen=True):
    """A stretch of the stream's own time, in seconds; ``hop_s`` is 0 for a session."""

    kind: Literal["sliding", "session"]
    len_s: float
    hop_s: float
    t0: float
    t1: float


class ErrorPart(msgspec.Struct, frozen=True):
    """What went wrong: a word for programs and a line for people."""

    code: str
    detail: str


class SourcePart(msgspec.Struct, frozen=True):
    """The stream as it was opened."""

    width: int
    height: int
    codec: str
    pix_fmt: str
    average_fps: Ratio | None
    duration_seconds: float | None
    num_frames_from_header: int | None
    is_live: bool
    container: str
    decoder: str = "software"
    """What decodes it: ``software``, with the reason where a device was asked for, or a device."""


class ViewPart(msgspec.Struct, frozen=True):
    """One input of the model, in pixels, and its grid of fragments."""

    name: str
    kind: str
    height: int
    width: int
    rows: int
    columns: int


class BackendPart(msgspec.Struct, frozen=True):
    """The engine asked for and the one that runs."""

    requested: str
    active: str
    reason: str


class FullModelPart(ModelPart, frozen=True):
    """What makes the scores, with its inputs and its engine."""

    views: list[ViewPart]
    backend: BackendPart


class VersionsPart(msgspec.Struct, frozen=True):
    """The package that sends, and the major number of the messages."""

    package: str
    schema: int


class WorstFrame(msgspec.Struct, frozen=True):
    """One of the lowest scores."""

    index: NotNegative
    pts_seconds: float
    score: Score


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema"):
    kind: ClassVar[str]

    stream: StreamId
    run: str
    """New for each run of the sender."""
    session: str
    """New for each opening of the source; later ones sort later."""
    seq: NotNegative
    """One more for each message of this run and topic."""
    sent_ns: int
    """Unix time in nanoseconds."""
    wall: str
    """The same as RFC 3339 in UTC, for readers whose integers end at 2 ** 53."""

    @property
    def schema(self) -> str:
        """Kind and major number, such as ``dgiqa.frame/1``."""
        return f"dgiqa.{self.kind}/{MAJOR}"


class _Pooled(_Envelope, frozen=True, kw_only=True):
    window: WindowPart
    n: NotNegative
    expected: float | None
    coverage: Share
    valid: bool
    pool: dict[str, float | None]
    params: dict[str, float | None]
    headline: str
    """The name in ``pool`` to look at first; empty where nothing was pooled."""
    model: ModelPart
    in_domain_share: Share | None = None
    """Of the scored time; null where nothing was scored, or from a sender that does not tell."""

    @property
    def score(self) -> float | None:
        """The headline value."""
        return self.pool.get(self.headline)


class FrameMessage(_Envelope, frozen=True, kw_only=True, tag="dgiqa.frame/1"):
    """The quality of one frame."""

    kind: ClassVar[str] = "frame"

    frame: FramePart
    time: TimePart
    quality: QualityPart
    sampling: SamplingPart
    drops: DropsPart
    model: ModelPart


class WindowMessage(_Pooled, frozen=True, kw_only=True, tag="dgiqa.window/1"):
    """The quality of a stretch of time."""

    kind: ClassVar[str] = "window"


class StagePart(msgspec.Struct, frozen=True):
    """How long one stage of the pipeline took, over all its calls of this run, in seconds."""

    n: NotNegative
    sum_s: float
    p50_s: float | None
    """Within 4.5 %; null before the first call."""
    p95_s: float | None
    p99_s: float | None = None


class DevicePart(msgspec.Struct, frozen=True):
    """A device that scores; null is what it, or its driver, does not tell."""

    device: str
    """Such as ``cuda:0``."""
    name: str | None = None
    load: Share | None = None
    decoder_load: Share | None = None
    used_mb: float | None = None
    """Of its memory, by all programs, in 10 ** 6 bytes."""
    total_mb: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    max_batch: NotNegative | None = None
    """Frames scored at once, at most, now."""
    mean_batch: float | None = None
    num_shrunk: NotNegative | None = None
    """How often memory ran out and the largest batch was halved."""
    num_retried: NotNegative | None = None
    """Batches that ran again after a fault of the device."""


class StatusMessage(_Envelope, frozen=True, kw_only=True, tag="dgiqa.status/1"):
    """How the stream is doing; sent on change and every few seconds."""

    kind: ClassVar[str] = "status"

    state: State
    error: ErrorPart | None
    fps_in: float | None
    fps_scored: float | None
    lag_s: float | None
    """How far scoring is behind the decoder."""
    rss_mb: float | None
    """Resident memory of the sender, in 10 ** 6 bytes."""
    counts: dict[str, int]
    stages: dict[str, StagePart] = {}
    """``decode``, ``preprocess``, ``infer``, ``pool``, ``publish``, ``end_to_end`` (from decoded to
    published); empty from an older sender."""
    backend: BackendPart | None = None
    """The engine asked for and the one that runs now, which may follow a device that was lost."""
    devices: list[DevicePart] = []
    """Those that score, where they can be asked."""
    decoder: str | None = None
    """What decodes now, which may follow a device that was lost; null before the source is open."""


class MetaMessage(_Envelope, frozen=True, kw_only=True, tag="dgiqa.meta/1"):
    """What is watched, by what, and how; sent when the source has been opened."""

    kind: ClassVar[str] = "meta"

    url: str
    """Without user, password and query values."""
    source: SourcePart
    model: FullModelPart
    settings: dict[str, Any]
    versions: VersionsPart


class FinalMessage(_Pooled, frozen=True, kw_only=True, tag="dgiqa.final/1"):
    """The session's summary; ``window`` is the whole session."""

    kind: ClassVar[str] = "final"

    counts: dict[str, int]
    duration_seconds: float
    reason: str
    """Why it ended: ``end_of_stream``, ``interrupted``, ``duration_reached`` or ``failed``."""
    error: ErrorPart | None
    worst: list[WorstFrame]
    """Lowest scores first."""


class ThumbnailMessage(_Envelope, frozen=True, kw_only=True, tag="dgiqa.thumbnail/1"):
    """A small picture of a frame; in recordings, never published."""

    kind: ClassVar[str] = "thumbnail"

    index: NotNegative
    pts_seconds: float
    score: Score
    jpeg: bytes
    """Base64 in JSON."""
    width: int
    height: int


Message = (
    FrameMessage | WindowMessage | StatusMessage | MetaMessage | FinalMessage | ThumbnailMessage
)
KINDS: tuple[str, ...] = tuple(member.kind for member in get_args(Message))
"""Every kind, in the order of the documentation."""
PUBLISHED_KINDS = tuple(kind for kind in KINDS if kind != "thumbnail")
"""Those that are sent over a network."""

Slot = tuple[str, str, str, float]


def slot_of(message: Message) -> Slot:
    """Kind, stream, and for windows kind and length: a newer message of one slot replaces an older.

    A session's window grows, so its length is no part of the slot.
    """
    if not isinstance(message, WindowMessage):
        return message.kind, message.stream, "", 0.0
    window = message.window
    length = window.len_s if window.kind == "sliding" else 0.0
    return message.kind, message.stream, window.kind, length


def finite(value: Any) -> Any:
    """The value with every float in it that is NaN or infinite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
