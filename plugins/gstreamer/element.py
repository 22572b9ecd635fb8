"""The element ``dgiqaquality``: raw video passes through untouched, its quality goes on the bus.

Imported by GStreamer's own Python; ``python/dgiqa_element.py`` is what GStreamer finds.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import gi

for _namespace in ("Gst", "GstBase", "GstVideo"):
    gi.require_version(_namespace, "1.0")
from gi.repository import GLib, GObject, Gst, GstBase, GstVideo  # noqa: E402

from dgiqa_stream.config import StreamConfig, parse_config  # noqa: E402
from dgiqa_stream.errors import ConfigError, DgiqaError  # noqa: E402
from dgiqa_stream.scorer import Scorer, scorer_of  # noqa: E402
from dgiqa_stream.types import FrameInfo, StreamInfo  # noqa: E402
from plugins.gstreamer import video as gst_video  # noqa: E402
from plugins.gstreamer.bus import BusSink  # noqa: E402
from plugins.gstreamer.clock import StreamClock  # noqa: E402
from plugins.gstreamer.pictures import FORMATS, Layout  # noqa: E402
from plugins.gstreamer.worker import Picture, Worker  # noqa: E402

if TYPE_CHECKING:
    from dgiqa_stream.session import Ended

_CAPS = Gst.Caps.from_string(
    f"video/x-raw, format=(string){{ {', '.join(FORMATS)} }}, "
    "width=(int)[ 8, 32767 ], height=(int)[ 8, 32767 ], framerate=(fraction)[ 0/1, 2147483647/1 ]"
)
_NANOSECONDS = Fraction(1, 1_000_000_000)
_PROPERTY_OF = {  # what an error names, to what the user has set
    "model.name": "model",
    "pooling.poolers": "pool",
    "pooling.windows_seconds": "window",
    "sampler.frames_per_second": "fps",
    "stream[0].id": "stream",
}
_WARNING_SECONDS = 10.0  # between two, so that broken video does not flood the bus
_READ = GObject.ParamFlags.READABLE
_READY = GObject.ParamFlags.READWRITE | Gst.PARAM_MUTABLE_READY


def _property(kind: Any, default: Any, blurb: str, **limits: Any) -> Any:
    return GObject.Property(type=kind, default=default, blurb=blurb, flags=_READY, **limits)


class DgiqaQuality(GstBase.BaseTransform):  # type: ignore[misc]
    """Passes raw video through and scores some of its frames in a thread of its own."""

    __gtype_name__ = "DgiqaQuality"
    __gstmetadata__ = (
        "No-reference video quality",
        "Filter/Analyzer/Video",
        "Scores frames from 0 (bad) to 100 (excellent) and posts the scores on the bus",
        "dgiqa-stream",
    )
    __gsttemplates__ = (
        Gst.PadTemplate.new("sink", Gst.PadDirection.SINK, Gst.PadPresence.ALWAYS, _CAPS),
        Gst.PadTemplate.new("src", Gst.PadDirection.SRC, Gst.PadPresence.ALWAYS, _CAPS),
    )

    model = _property(str, "student", "A shipped model's name, or the path of a .onnx file")
    device = _property(str, "auto", "auto, cpu, cuda or cuda:N")
    threads = _property(int, 1, "CPU threads of one inference", minimum=1, maximum=256)
    fps = _property(
        float, 5.0, "Scored frames per second; 0 scores every frame", minimum=0.0, maximum=1000.0
    )
    window = _property(str, "1,10,60", "Lengths of the sliding windows, in seconds; may be empty")
    pool = _property(str, "", "Pooled values to post, such as mean,low5; empty for all")
    stream = _property(str, "", "The stream's id in messages; empty for the element's name")
    overload = _property(
        str, "drop_oldest", "Where the model is too slow: drop_oldest or wait, which stalls"
    )

    def __init__(self) -> None:
        super().__init__()
        self.set_in_place(True)
        self.set_passthrough(True)
        self._scorer: Scorer | None = None
        self._worker: Worker | None = None
        self._config = StreamConfig()
        self._layout: Layout | None = None
        self._video: Any = None  # GstVideo.VideoInfo
        self._rotation = 0
        self._clock = StreamClock()
        self._num_frames = self._num_scored = self._num_dropped = 0
        self._num_untold, self._told_at = 0, -_WARNING_SECONDS

    @GObject.Property(type=GObject.TYPE_UINT64, flags=_READ)  # type: ignore[untyped-decorator]
    def num_scored(self) -> int:
        """Frames scored since the element left READY."""
        worker = self._worker
        return self._num_scored + (worker.num_scored if worker else 0)

    @GObject.Property(type=GObject.TYPE_UINT64, flags=_READ)  # type: ignore[untyped-decorator]
    def num_dropped(self) -> int:
        """Frames that were to be scored and came too fast, since the element left READY."""
        worker = self._worker
        return self._num_dropped + (worker.num_dropped if worker else 0)

    def do_start(self) -> bool:
        """READY to PAUSED: check the properties and load the model."""
        try:
            self._config = self._settings()
            self._scorer = scorer_of(self._config.model)
        except (DgiqaError, ImportError, OSError) as exc:
            self._post_error(str(exc))
            return False
        self._num_scored = self._num_dropped = 0
        self._rotation = 0
        return True

    def do_stop(self) -> bool:
        """PAUSED to READY: end the session and release the model."""
        self._end_session("interrupted")
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = self._layout = self._video = None
        return True

    def do_set_caps(self, caps: Gst.Caps, _: Gst.Caps) -> bool:
        """Another size or format: the session goes on, and each message tells its frame's size."""
        self._video = GstVideo.VideoInfo.new_from_caps(caps)
        self._layout = gst_video.layout_of(caps, rotation=self._rotation)
        return True

    def do_sink_event(self, event: Gst.Event) -> bool:
        """Follow flushes, and send the summary before the end of the stream goes on."""
        if event.type == Gst.EventType.EOS:
            self._end_session("end_of_stream")
        elif event.type in (Gst.EventType.FLUSH_START, Gst.EventType.FLUSH_STOP):
            worker = self._worker  # a flush comes from another thread than the video
            if worker is not None:
                worker.discard()
            self._clock.interrupt()
        elif event.type == Gst.EventType.TAG:
            self._note_orientation(event.parse_tag())
        return bool(GstBase.BaseTransform.do_sink_event(self, event))

    def do_transform_ip(self, buffer: Gst.Buffer) -> Gst.FlowReturn:
        """Offer one frame; nothing that goes wrong here stops the video."""
        try:
            if self._layout is not None and self._scorer is not None:
                self._offer(buffer, self._layout, self._scorer)
        except Exception as exc:  # noqa: BLE001 - PyGObject would print it and go on
            self._post_problem(exc)
        return Gst.FlowReturn.OK

    def _offer(self, buffer: Gst.Buffer, layout: Layout, scorer: Scorer) -> None:
        if self._worker is None:
            self._clock, self._num_frames = StreamClock(), 0
            self._worker = Worker(
                scorer,
                self._config,
                stream=self._stream_id(),
                source=self._source_info(layout),
                sink=BusSink(self),
                on_problem=self._post_problem,
            )
        layout = gst_video.layout_in(buffer, layout)
        info = self._frame_info(buffer, layout)
        self._num_frames += 1
        # Held until it is scored, and not copied: whoever writes downstream makes a copy meanwhile.
        self._worker.offer(Picture(info, lambda: gst_video.mapped(buffer, layout)))

    def _end_session(self, ended: Ended) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end(ended)
            self._num_scored += worker.num_scored
            self._num_dropped += worker.num_dropped

    def _settings(self) -> StreamConfig:
        every_frame = self.fps == 0
        return parse_config(
            {
                "model": {"name": self.model, "device": self.device, "threads": self.threads},
                "sampler": {"mode": "every"}
                if every_frame
                else {"mode": "time", "frames_per_second": self.fps},
                "pooling": {"windows_seconds": _numbers(self.window), "poolers": _words(self.pool)},
                "overload": {"policy": _policy(self.overload)},
                "output": {"thumbnails": 0},  # nobody is there to take pictures
                "stream": [{"url": "gstreamer:", "id": self._stream_id()}],
            }
        )

    def _stream_id(self) -> str:
        """The property, else the element's name, which Python's loader begins with its module."""
        return self.stream or re.sub(r"[^A-Za-z0-9._-]", "-", self.name.rpartition("+")[2])[:64]

    def _source_info(self, layout: Layout) -> StreamInfo:
        video = self._video
        width, height = _upright(layout)
        return StreamInfo(
            width=width,
            height=height,
            codec="rawvideo",
            pix_fmt=FORMATS[layout.format].pix_fmt,
            average_fps=Fraction(video.fps_n, video.fps_d) if video.fps_n else None,
            duration_seconds=None,
            num_frames_from_header=None,
            is_live=True,
            container="gstreamer",
        )

    def _frame_info(self, buffer: Gst.Buffer, layout: Layout) -> FrameInfo:
        video = self._video
        has_pts = buffer.pts != Gst.CLOCK_TIME_NONE
        stream_ns = self.segment.to_stream_time(Gst.Format.TIME, buffer.pts) if has_pts else None
        if stream_ns == Gst.CLOCK_TIME_NONE:  # outside the segment: shown by nobody
            stream_ns = None
        shown = _seconds(buffer.duration)
        if shown is None and video.fps_n:
            shown = video.fps_d / video.fps_n
        seconds, jumped = self._clock.place(_seconds(stream_ns), shown)
        width, height = _upright(layout)
        return FrameInfo(
            index=self._num_frames,
            pts_seconds=seconds,
            duration_seconds=shown or 0.0,
            pts=buffer.pts if has_pts else None,
            time_base=_NANOSECONDS if has_pts else None,
            width=width,
            height=height,
            pix_fmt=FORMATS[layout.format].pix_fmt,
            corrupt=buffer.has_flags(Gst.BufferFlags.CORRUPTED),
            interlaced=gst_video.is_interlaced(video),
            rotation=layout.rotation,
            dynamic_range=layout.hdr.transfer if layout.hdr else "sdr",
            discontinuity=jumped,
            received_at_seconds=time.time(),
        )

    def _note_orientation(self, tags: Gst.TagList) -> None:
        rotation = gst_video.rotation_of(tags)
        if rotation is not None:
            self._rotation = rotation
            if self._layout is not None:
                self._layout = replace(self._layout, rotation=rotation)

    def _post_error(self, text: str) -> None:
        for setting, name in _PROPERTY_OF.items():
            text = text.replace(setting, name)
        told = GLib.Error.new_literal(Gst.LibraryError.quark(), text, Gst.LibraryError.INIT)
        self.post_message(Gst.Message.new_error(self, told, ""))

    def _post_problem(self, error: Exception) -> None:
        """A warning on the bus; the video goes on."""
        self._num_untold += 1
        now = time.monotonic()
        if now - self._told_at < _WARNING_SECONDS:
            return
        text = f"{self._num_untold} frames got no score, the last one: {error}"
        told = GLib.Error.new_literal(Gst.StreamError.quark(), text, Gst.StreamError.FAILED)
        self.post_message(Gst.Message.new_warning(self, told, ""))
        self._num_untold, self._told_at = 0, now


def _upright(layout: Layout) -> tuple[int, int]:
    """Width and height as shown."""
    turned = layout.rotation in (90, 270)
    return (layout.height, layout.width) if turned else (layout.width, layout.height)


def _seconds(nanoseconds: int | None) -> float | None:
    known = nanoseconds is not None and nanoseconds != Gst.CLOCK_TIME_NONE
    return nanoseconds / 1e9 if known and nanoseconds is not None else None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as exc:
        raise ConfigError(
            f"window {text!r} is not a list of seconds: write numbers, as in 1,10"
        ) from exc


def _policy(text: str) -> str:
    if text not in ("drop_oldest", "wait"):
        raise ConfigError(f"overload {text!r} is unknown: it is drop_oldest or wait")
    return text
