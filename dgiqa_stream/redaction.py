"""Source options without what should stay secret; URLs are redacted in ``urls``."""

from __future__ import annotations

from collections.abc import Mapping

HIDDEN = "***"
_OPEN_OPTIONS = frozenset(
    {
        "analyzeduration",
        "buffer_size",
        "fflags",
        "fifo_size",
        "flags",
        "framerate",
        "input_format",
        "latency",
        "listen_timeout",
        "max_delay",
        "mode",
        "overrun_nonfatal",
        "pixel_format",
        "pkt_size",
        "probesize",
        "reconnect",
        "reconnect_streamed",
        "rtsp_flags",
        "rtsp_transport",
        "rw_timeout",
        "stimeout",
        "thread_queue_size",
        "timeout",
        "transtype",
        "video_size",
    }
)


def redact_options(options: Mapping[str, str]) -> dict[str, str]:
    """FFmpeg options, with the value hidden of each that is not known to hold no secret."""
    return {key: value if key in _OPEN_OPTIONS else HIDDEN for key, value in options.items()}
