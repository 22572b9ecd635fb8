"""The board as Prometheus metrics, made anew for each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from dgiqa_stream.messages import State
from plugins.prometheus.board import Board, StreamView

_RESULTS = {  # of `dgiqa_frames_total`: the counts of a status message that it adds up
    "scored": ("scored",),
    "skipped": ("skipped",),
    "dropped": ("dropped_queue", "dropped_stale"),
    "failed": ("failed",),
    "corrupt": ("corrupt",),
}
_EVENTS = ("decode_errors", "discontinuities", "sink_errors", "device_losses")
"""The counts of a status message that are no frames."""
_DEVICE_GAUGES = {  # metric: what it is, the field of a device, and what one of its units is here
    "load": ("Share of the last moments in which the device computed.", "load", 1.0),
    "decoder_load": ("The same of its video decoder.", "decoder_load", 1.0),
    "memory_used_bytes": ("Its memory that is in use, by all programs.", "used_mb", 1e6),
    "memory_total_bytes": ("Its memory.", "total_mb", 1e6),
    "temperature_celsius": ("Its temperature.", "temperature_c", 1.0),
    "power_watts": ("What it draws.", "power_w", 1.0),
    "batch_frames": ("Frames scored at once, in the mean since it was opened.", "mean_batch", 1.0),
    "batch_frames_limit": ("Frames scored at once, at most, now.", "max_batch", 1.0),
}
_DEVICE_COUNTERS = {
    "batches_shrunk": ("Times memory ran out and the largest batch was halved.", "num_shrunk"),
    "batches_retried": ("Batches that ran again after a fault of the device.", "num_retried"),
}


class BoardCollector(Collector):  # type: ignore[misc, unused-ignore]  # Any without the extra
    """Reads the board when it is scraped, so that nothing outlives what it stands for."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        """Every metric of every stream and publisher."""
        streams = self._board.streams()
        yield from _health(streams)
        yield from _quality(streams)
        yield from _counts(streams)
        yield from _stages(streams)
        yield from _devices(streams)
        yield _model_info(streams)
        yield from self._own()

    def _own(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "dgiqa_publisher_up", "1 while a publisher is heard.", labels=["publisher"]
        )
        missed = CounterMetricFamily(
            "dgiqa_messages_missed",
            "Messages of a publisher that did not arrive here.",
            labels=["publisher"],
        )
        for publisher, (is_heard, num_missed) in self._board.publishers().items():
            up.add_metric([publisher], float(is_heard))
            missed.add_metric([publisher], num_missed)
        yield up
        yield missed
        yield CounterMetricFamily(
            "dgiqa_messages_ignored",
            "Messages of streams beyond the limit, or that two publishers have.",
            value=self._board.num_ignored,
        )


def _health(streams: Sequence[StreamView]) -> Iterable[Metric]:
    up = GaugeMetricFamily(
        "dgiqa_stream_up", "1 while a stream is running and heard of.", labels=["stream"]
    )
    state = GaugeMetricFamily(
        "dgiqa_stream_state", "1 for the state last told.", labels=["stream", "state"]
    )
    lag = GaugeMetricFamily(
        "dgiqa_lag_seconds", "How far scoring is behind the decoder.", labels=["stream"]
    )
    last = GaugeMetricFamily(
        "dgiqa_last_frame_timestamp_seconds",
        "Unix time at which the newest scored frame left the decoder.",
        labels=["stream"],
    )
    for view in streams:
        up.add_metric([view.stream], float(view.is_up))
        for name in get_args(State):
            state.add_metric([view.stream, name], float(name == view.state))
        if view.lag_seconds is not None:
            lag.add_metric([view.stream], view.lag_seconds)
        if view.last_frame_at_seconds is not None:
            last.add_metric([view.stream], view.last_frame_at_seconds)
    return up, state, lag, last


def _quality(streams: Sequence[StreamView]) -> Iterable[Metric]:
    score = GaugeMetricFamily(
        "dgiqa_quality_score",
        "Predicted quality, 0 (bad) to 100 (excellent), pooled over a sliding window.",
        labels=["stream", "pool", "window"],
    )
    coverage = GaugeMetricFamily(
        "dgiqa_window_coverage",
        "Share of a window, 0 to 1, that scored frames account for; under 0.5 it has no score.",
        labels=["stream", "window"],
    )
    for view in streams:
        for label, window in view.windows.items():
            coverage.add_metric([view.stream, label], window.coverage)
            for pool, value in window.pool.items():
                score.add_metric([view.stream, pool, label], value)
    return score, coverage


def _counts(streams: Sequence[StreamView]) -> Iterable[Metric]:
    frames = CounterMetricFamily(
        "dgiqa_frames",
        "Decoded frames by what became of them; corrupt ones are among the others, too.",
        labels=["stream", "result"],
    )
    reconnects = CounterMetricFamily(
        "dgiqa_reconnects", "Times a source was opened again.", labels=["stream"]
    )
    events = CounterMetricFamily(
        "dgiqa_events",
        "Refused packets, jumps of the clock, refusals of sinks, devices that were lost.",
        labels=["stream", "event"],
    )
    for view in streams:
        if not view.counts:
            continue
        for event in _EVENTS:
            events.add_metric([view.stream, event], view.counts.get(event, 0))
        for result, names in _RESULTS.items():
            number = sum(view.counts.get(name, 0) for name in names)
            frames.add_metric([view.stream, result], number)
        reconnects.add_metric([view.stream], view.counts.get("reconnects", 0))
    return frames, reconnects, events


def _stages(streams: Sequence[StreamView]) -> Iterable[Metric]:
    spent = SummaryMetricFamily(
        "dgiqa_stage_seconds",
        "Time that the calls of a stage of the pipeline took.",
        labels=["stream", "stage"],
    )
    p95 = GaugeMetricFamily(
        "dgiqa_stage_p95_seconds",
        "Under which 95 % of a stage's calls stayed, since the sender began.",
        labels=["stream", "stage"],
    )
    p99 = GaugeMetricFamily(
        "dgiqa_stage_p99_seconds",
        "Under which 99 % of a stage's calls stayed, since the sender began.",
        labels=["stream", "stage"],
    )
    for view in streams:
        for name, part in view.stages.items():
            spent.add_metric([view.stream, name], count_value=part.n, sum_value=part.sum_s)
            for family, value in ((p95, part.p95_s), (p99, part.p99_s)):
                if value is not None:
                    family.add_metric([view.stream, name], value)
    return spent, p95, p99


def _devices(streams: Sequence[StreamView]) -> Iterable[Metric]:
    """Of each publisher's devices, which all its streams tell of: what was heard last."""
    labels = ["publisher", "device"]
    newest = {
        (view.publisher, part.device): part
        for view in sorted(streams, key=lambda view: view.heard_at)
        for part in view.devices
    }
    for metric, (told, field, unit) in _DEVICE_GAUGES.items():
        gauge = GaugeMetricFamily(f"dgiqa_device_{metric}", told, labels=labels)
        for place, part in newest.items():
            if (value := getattr(part, field)) is not None:
                gauge.add_metric(place, value * unit)
        yield gauge
    for metric, (told, field) in _DEVICE_COUNTERS.items():
        counter = CounterMetricFamily(f"dgiqa_device_{metric}", told, labels=labels)
        for place, part in newest.items():
            if (value := getattr(part, field)) is not None:
                counter.add_metric(place, value)
        yield counter


def _model_info(streams: Sequence[StreamView]) -> Metric:
    labels = ["stream", "model", "version", "precision", "calibration", "sha256"]
    info = GaugeMetricFamily("dgiqa_model_info", "What makes the scores; always 1.", labels=labels)
    for view in streams:
        if (model := view.model) is not None:
            told = model.id, model.version, model.precision, model.calibration, model.sha256
            info.add_metric([view.stream, *told], 1.0)
    return info
