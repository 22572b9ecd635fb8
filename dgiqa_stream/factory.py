"""Makes the published messages from the runtime's own values: numbers, stamps and redacts them."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, Protocol

import msgspec

from dgiqa_stream import messages as msg
from dgiqa_stream.config import SamplerSettings, StreamConfig, StreamId
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import ModelManifest
from dgiqa_stream.redaction import redact_options
from dgiqa_stream.telemetry import Count, DeviceStatus, Stage, StageLatency, TelemetrySnapshot
from dgiqa_stream.types import FrameScore, StreamInfo, WindowScore
from dgiqa_stream.urls import redact, redact_text
from dgiqa_stream.versions import package_version

_ID_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID_CHARS = 26
_SCORING_TABLES = ("source", "sampler", "overload", "picture", "model", "pooling")
_EMPTY_SESSION = msg.WindowPart(kind="session", len_s=0.0, hop_s=0.0, t0=0.0, t1=0.0)


def new_id(time_ms: int | None = None) -> str:
    """A ULID: 48 bits of Unix time in milliseconds, 80 random bits; later ones sort later."""
    milliseconds = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    value = milliseconds << 80 | secrets.randbits(80)
    return "".join(_ID_ALPHABET[value >> 5 * n & 31] for n in reversed(range(_ID_CHARS)))


def error_part(error: BaseException) -> msg.ErrorPart:
    """The error's class in snake case, such as ``source_unavailable``, and its redacted text."""
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return msg.ErrorPart(code=code, detail=redact_text(str(error)))


class _BackendStatus(Protocol):
    """What :class:`dgiqa_stream.backends.BackendStatus` has."""

    @property
    def requested(self) -> str: ...
    @property
    def active(self) -> str: ...
    @property
    def reason(self) -> str: ...


class MessageFactory:
    """Makes the messages of one stream: numbers them per topic and stamps their time.

    Thread-safe. Messages of one topic should be sent in the order in which they were made: whoever
    subscribes takes an older one for a repetition.
    """

    def __init__(
        self,
        stream: str,
        *,
        model: ModelManifest,
        sampler: SamplerSettings | None = None,
        run: str | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """``run`` is shared by the streams of one run, made here if None; ``clock`` gives Unix ns.

        Raises :class:`ConfigError` where ``stream`` cannot be part of a topic.
        """
        try:
            self._stream = msgspec.convert(stream, StreamId)
        except msgspec.ValidationError as exc:
            raise ConfigError(
                f"stream id {stream!r} is not 1 to 64 of A-Z a-z 0-9 . _ -; name it so with id"
            ) from exc
        self._clock = clock
        self._lock = threading.Lock()
        self._sent: Counter[str] = Counter()
        self._session_ms = 0
        self._manifest, self._model = model, _model_part(model)
        self._sampling = _sampling_part(sampler or SamplerSettings())
        self._run = run or new_id(clock() // 1_000_000)
        self._session = self.new_session()

    @property
    def run(self) -> str:
        """The id of this run."""
        return self._run

    @property
    def session(self) -> str:
        """The id of the present session."""
        return self._session

    def new_session(self) -> str:
        """Begin a session, when the source has been opened again; its id sorts after the last."""
        with self._lock:
            self._session_ms = max(self._clock() // 1_000_000, self._session_ms + 1)
            self._session = new_id(self._session_ms)
            return self._session

    def frame(
        self, score: FrameScore, *, counts: Mapping[Count, int] | None = None
    ) -> msg.FrameMessage:
        """A scored frame; ``counts`` are the telemetry's at this moment."""
        return msg.FrameMessage(
            **self._envelope("frame"),
            frame=_frame_part(score),
            time=_time_part(score),
            quality=self._quality(score),
            sampling=self._sampling,
            drops=_drops_part(counts or {}),
            model=self._model,
        )

    def window(self, score: WindowScore) -> msg.WindowMessage:
        """A pooled stretch of time."""
        return msg.WindowMessage(**self._envelope("window"), **self._pooled(score))

    def status(
        self,
        state: msg.State,
        *,
        telemetry: TelemetrySnapshot | None = None,
        error: BaseException | None = None,
        lag_seconds: float | None = None,
        rss_bytes: int | None = None,
        backend: _BackendStatus | None = None,
        devices: Sequence[DeviceStatus] = (),
        decoder: str | None = None,
    ) -> msg.StatusMessage:
        """How the stream is doing now."""
        return msg.StatusMessage(
            **self._envelope("status"),
            state=state,
            error=None if error is None else error_part(error),
            fps_in=msg.finite(telemetry.fps_in) if telemetry else None,
            fps_scored=msg.finite(telemetry.fps_scored) if telemetry else None,
            lag_s=msg.finite(lag_seconds),
            rss_mb=None if rss_bytes is None else rss_bytes / 1e6,
            counts=_counts(telemetry.counts if telemetry else {}),
            stages=_stages(telemetry.stages if telemetry else {}),
            backend=None if backend is None else _backend_part(backend),
            devices=[_device_part(device) for device in devices],
            decoder=decoder,
        )

    def meta(
        self, url: str, info: StreamInfo, *, backend: _BackendStatus, config: StreamConfig
    ) -> msg.MetaMessage:
        """What is watched and how. Secrets of the URL and of the source's options are hidden."""
        views = [
            msg.ViewPart(v.name, v.kind, v.height, v.width, v.rows, v.columns)
            for v in self._manifest.preprocess.views
        ]
        return msg.MetaMessage(
            **self._envelope("meta"),
            url=redact(url),
            source=_source_part(info),
            model=msg.FullModelPart(
                **msgspec.structs.asdict(self._model),
                views=views,
                backend=_backend_part(backend),
            ),
            settings=_scoring_settings(config),
            versions=msg.VersionsPart(package=package_version(), schema=msg.MAJOR),
        )

    def final(
        self,
        session: WindowScore | None,
        *,
        counts: Mapping[Count, int],
        duration_seconds: float,
        reason: str,
        error: BaseException | None = None,
        worst: Sequence[FrameScore] = (),
    ) -> msg.FinalMessage:
        """The session's summary; ``session`` is None where no frame was scored.

        ``reason`` is ``end_of_stream``, ``interrupted``, ``duration_reached`` or ``failed``.
        """
        return msg.FinalMessage(
            **self._envelope("final"),
            **self._pooled(session),
            counts=_counts(counts),
            duration_seconds=duration_seconds,
            reason=reason,
            error=None if error is None else error_part(error),
            worst=[
                msg.WorstFrame(s.info.index, s.info.pts_seconds, s.score)
                for s in sorted(worst, key=lambda s: s.score)
            ],
        )

    def thumbnail(
        self, score: FrameScore, jpeg: bytes, *, width: int, height: int
    ) -> msg.ThumbnailMessage:
        """A small picture of a scored frame; ``width`` and ``height`` in pixels are the JPEG's."""
        return msg.ThumbnailMessage(
            **self._envelope("thumbnail"),
            index=score.info.index,
            pts_seconds=score.info.pts_seconds,
            score=score.score,
            jpeg=jpeg,
            width=width,
            height=height,
        )

    def _quality(self, score: FrameScore) -> msg.QualityPart:
        spec = self._manifest.interval if score.interval else None
        return msg.QualityPart(
            score=score.score,
            raw=msg.finite(score.raw),
            in_domain=score.in_domain,
            interval=score.interval,
            interval_coverage=spec.coverage if spec else None,
            out_of_domain=list(score.out_of_domain),
        )

    def _envelope(self, kind: str) -> dict[str, Any]:
        with self._lock:
            seq = self._sent[kind]
            self._sent[kind] += 1
            session = self._session
        sent_ns = self._clock()
        return {
            "stream": self._stream,
            "run": self._run,
            "session": session,
            "seq": seq,
            "sent_ns": sent_ns,
            "wall": rfc3339(sent_ns),
        }

    def _pooled(self, score: WindowScore | None) -> dict[str, Any]:
        if score is None:
            nothing = {"n": 0, "expected": None, "coverage": 0.0, "valid": False, "headline": ""}
            return {
                "window": _EMPTY_SESSION,
                "pool": {},
                "params": {},
                "model": self._model,
                **nothing,
            }
        return {
            "window": msg.WindowPart(
                score.kind,
                score.length_seconds,
                score.hop_seconds,
                score.begin_seconds,
                score.end_seconds,
            ),
            "n": score.num_frames,
            "expected": msg.finite(score.expected_frames),
            "coverage": score.coverage,
            "valid": score.valid,
            "pool": msg.finite(dict(score.pool)),
            "params": msg.finite(dict(score.params)),
            "headline": score.headline,
            "model": self._model,
            "in_domain_share": msg.finite(score.in_domain_share),
        }


def rfc3339(unix_ns: int) -> str:
    """Unix time in nanoseconds as RFC 3339 in UTC, to the microsecond."""
    seconds, nanoseconds = divmod(unix_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=nanoseconds // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _ratio(value: Fraction | None) -> tuple[int, int] | None:
    return None if value is None else (value.numerator, value.denominator)


def _counts(counts: Mapping[Count, int]) -> dict[str, int]:
    return {str(name): number for name, number in counts.items()}


def _stages(stages: Mapping[Stage, StageLatency]) -> dict[str, msg.StagePart]:
    return {
        str(stage): msg.StagePart(
            found.num_calls,
            found.sum_seconds,
            found.p50_seconds,
            found.p95_seconds,
            found.p99_seconds,
        )
        for stage, found in stages.items()
    }


def _backend_part(status: _BackendStatus) -> msg.BackendPart:
    return msg.BackendPart(status.requested, status.active, status.reason)


def _device_part(status: DeviceStatus) -> msg.DevicePart:
    used, total = status.used_bytes, status.total_bytes
    return msg.DevicePart(
        status.device,
        status.name,
        status.load,
        status.decoder_load,
        None if used is None else used / 1e6,
        None if total is None else total / 1e6,
        status.temperature_celsius,
        status.power_watts,
        status.max_batch,
        status.mean_batch,
        status.num_shrunk,
        status.num_retried,
    )


def _frame_part(score: FrameScore) -> msg.FramePart:
    info = score.info
    return msg.FramePart(
        index=info.index,
        pts=info.pts,
        time_base=_ratio(info.time_base),
        pts_seconds=info.pts_seconds,
        key=info.keyframe,
        corrupt=info.corrupt,
        width=info.width,
        height=info.height,
        pix_fmt=info.pix_fmt,
        rotation=info.rotation,
        interlaced=info.interlaced,
        dynamic_range=info.dynamic_range,
        discontinuity=info.discontinuity,
    )


def _time_part(score: FrameScore) -> msg.TimePart:
    received, scored = score.info.received_at_seconds, score.scored_at_seconds
    if not received:
        return msg.TimePart(wall_ns=None, latency_ms=None)
    latency = max(0.0, scored - received) * 1e3 if scored else None  # a clock can be set back
    return msg.TimePart(wall_ns=round(received * 1e6) * 1000, latency_ms=msg.finite(latency))


def _sampling_part(settings: SamplerSettings) -> msg.SamplingPart:
    is_timed = settings.mode == "time"
    takes_all = settings.mode == "every" and settings.every == 1
    jitter = is_timed and settings.jitter
    return msg.SamplingPart(
        mode=settings.mode,
        period_s=1.0 / settings.frames_per_second if is_timed else None,
        jitter=jitter,
        # A regular stride can meet only the better frames of a coding pyramid (Netflix/vmaf#1214).
        biased=not (jitter or takes_all),
    )


def _drops_part(counts: Mapping[Count, int]) -> msg.DropsPart:
    return msg.DropsPart(
        skipped=counts.get(Count.SKIPPED, 0),
        queue=counts.get(Count.DROPPED_QUEUE, 0),
        stale=counts.get(Count.DROPPED_STALE, 0),
        decode=counts.get(Count.DECODE_ERRORS, 0),
    )


def _model_part(manifest: ModelManifest) -> msg.ModelPart:
    return msg.ModelPart(
        id=manifest.id,
        version=manifest.version,
        precision=manifest.precision,
        sha256=manifest.sha256,
        calibration=manifest.calibration,
    )


def _source_part(info: StreamInfo) -> msg.SourcePart:
    return msg.SourcePart(
        width=info.width,
        height=info.height,
        codec=info.codec,
        pix_fmt=info.pix_fmt,
        average_fps=_ratio(info.average_fps),
        duration_seconds=msg.finite(info.duration_seconds),
        num_frames_from_header=info.num_frames_from_header,
        is_live=info.is_live,
        container=info.container,
        decoder=info.decoder,
    )


def _scoring_settings(config: StreamConfig) -> dict[str, Any]:
    """The tables that can change a score; neither other streams nor where messages go."""
    tables = {name: getattr(config, name) for name in _SCORING_TABLES}
    settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(tables))
    settings["source"]["options"] = redact_options(config.source.options)
    return settings
