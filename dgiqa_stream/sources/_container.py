"""Opening an FFmpeg container: options by protocol, and which video track is taken."""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from dgiqa_stream.errors import SourceUnavailable, SourceUnsupported
from dgiqa_stream.sources._pipe import open_named_pipe, open_stdin
from dgiqa_stream.urls import path_of, redact, scheme_of

if TYPE_CHECKING:
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.sources._pacing import Patience

_UDP = {"buffer_size": "4194304", "fifo_size": "50000", "overrun_nonfatal": "1"}
_RTSP = {"rtsp_transport": "tcp", "allowed_media_types": "video"}
# A server may announce sound that never comes (nginx does): FFmpeg would wait 5 s for it.
_RTMP = {"analyzeduration": "2000000"}
OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {  # scheme: FFmpeg's options; the user's win
        # A pattern in the name of a file is its name; stamps missing in AVI are made up.
        "file": {"pattern_type": "none", "fflags": "+genpts"},
        "sdp": {"protocol_whitelist": "file,rtp,udp,crypto,data", "buffer_size": "4194304"},
        "rtmp": _RTMP,
        "rtmps": _RTMP,
        "rtsp": _RTSP,
        "rtsps": _RTSP,
        "udp": _UDP,
        "rtp": _UDP,
    }
)
_TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")  # FFmpeg draws text files as video
_OF_RATES = ("cpb",)  # side data that says nothing of pictures
_log_level_lock = threading.Lock()
_logger = logging.getLogger("dgiqa_stream.sources")


def open_container(
    url: str,
    settings: SourceSettings,
    patience: Patience,
    *,
    pipe: Any = None,
    hwaccel: HWAccel | None = None,
) -> InputContainer:
    """Open with one deadline for all of it; raises what PyAV raises, or a SourceError."""
    import av

    scheme = scheme_of(url)
    target = pipe or _target(url, scheme, patience)
    options = {**OPTIONS.get(scheme, {}), **settings.options}
    with ExitStack() as on_error:
        if not isinstance(target, str):
            on_error.callback(target.close)
        container: InputContainer = av.open(
            target,
            "r",
            format="sdp" if scheme == "sdp" else None,
            container_options=options,
            metadata_errors="replace",
            hwaccel=hwaccel,
            timeout=cast("tuple[float, float]", (patience, patience)),  # all it needs is float()
        )
        if container.format.name in _TEXT_FORMATS:
            container.close()
            raise SourceUnsupported(f"{redact(url)}: is a text file, not a video")
        on_error.pop_all()
    return container


def _target(url: str, scheme: str, patience: Patience) -> Any:
    """What to give to ``av.open``; local trouble is told at once."""
    if scheme == "stdin":
        return open_stdin(patience)
    if scheme not in ("file", "sdp"):
        return url
    path = path_of(url)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise SourceUnavailable(f"{path}: does not exist; check the name") from None
    except (OSError, ValueError) as exc:
        raise SourceUnavailable(f"{str(path)!r}: cannot be opened: {exc}") from None
    if stat.S_ISFIFO(found.st_mode):
        return open_named_pipe(path, patience)
    if stat.S_ISREG(found.st_mode):
        if found.st_size == 0:
            raise SourceUnsupported(f"{path}: is an empty file")
        if not os.access(path, os.R_OK):
            raise SourceUnavailable(f"{path}: may not be read by this user; check its permissions")
    return f"file:{path}"  # so that a colon in a name is no protocol


def choose_track(container: InputContainer, settings: SourceSettings, *, shown: str) -> VideoStream:
    """The video track that the settings ask for; the best one where they leave it open.

    Raises :class:`SourceUnsupported`, naming what there is.
    """
    tracks = [s for s in container.streams.video if not _is_picture_of_audio(s)]
    if settings.programme is not None:
        indices = _programme(container, settings.programme, shown)
        tracks = [s for s in tracks if s.index in indices]
    if not tracks:
        others = sorted({s.type for s in container.streams})
        where = "" if settings.programme is None else f"programme {settings.programme} of "
        raise SourceUnsupported(
            f"{where}{shown}: has no video track, only {', '.join(others) or 'nothing'}"
        )
    if settings.track is None:
        best = container.streams.best("video")
        chosen = next((s for s in tracks if best is not None and s.index == best.index), tracks[0])
    elif settings.track < len(tracks):
        chosen = tracks[settings.track]
    else:
        raise SourceUnsupported(
            f"{shown}: has no video track {settings.track} (source.track); there are "
            f"{len(tracks)}, numbered from 0 to {len(tracks) - 1}"
        )
    if chosen.codec_context is None:
        raise SourceUnsupported(
            f"{shown}: this FFmpeg has no decoder for its video track; convert it to H.264, HEVC, "
            "AV1 or VP9"
        )
    return chosen


def is_ipt(container: InputContainer, track: VideoStream, *, shown: str) -> bool:
    """Whether a track is Dolby Vision that only its own decoders can show; warns of it.

    Its colours are IPT (profiles 5, 10.0 and 20.0); other profiles have a base layer of PQ, HLG or
    SDR.
    """
    described = dict(_described_streams(container)).get(track.index, "")
    found = re.search(
        r"DOVI configuration record: .*profile: (5|10|20),.*compatibility id: 0\b", described
    )
    if found:
        _logger.warning(
            "%s: is Dolby Vision profile %s, which only its own decoders can show: it is scored "
            "with the wrong colours, and marked as out of domain",
            *(shown, found[1] if found[1] == "5" else f"{found[1]}.0"),
        )
    return found is not None


def has_side_data(container: InputContainer, track: VideoStream) -> bool:
    """Whether the container tells of a track what its packets do not, such as how it is turned."""
    described = dict(_described_streams(container)).get(track.index, "")
    _, _, told = described.partition("Side data:\n")
    kinds = re.findall(r"^ {6}(\w[^:\n]*)", told, flags=re.MULTILINE)
    return any(kind.strip() not in _OF_RATES for kind in kinds)


def _is_picture_of_audio(track: VideoStream) -> bool:
    from av.stream import Disposition

    return bool(track.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))


def _programme(container: InputContainer, number: int, shown: str) -> tuple[int, ...]:
    """Indices of a programme's streams."""
    programmes = _programmes(container)
    if number not in programmes:
        there = ", ".join(map(str, sorted(programmes))) or "none"
        raise SourceUnsupported(
            f"{shown}: has no programme {number} (source.programme); there is {there}"
        )
    return programmes[number]


def _programmes(container: InputContainer) -> dict[int, tuple[int, ...]]:
    """Programme number to stream indices."""
    found: dict[int, tuple[int, ...]] = {}
    number: int | None = None
    for line in _description(container).splitlines():
        heading = re.match(r"^  (?:Program (\d+)|No Program)", line)
        stream = re.match(r"^\s+Stream #\d+:(\d+)", line)
        if heading:
            number = int(heading.group(1)) if heading.group(1) else None
        elif stream and number is not None:
            found[number] = (*found.get(number, ()), int(stream.group(1)))
    return found


def _described_streams(container: InputContainer) -> list[tuple[int, str]]:
    """Each stream's index and what is said of it."""
    _, *parts = re.split(r"^ +Stream #\d+:(\d+)", _description(container), flags=re.MULTILINE)
    return [(int(index), text) for index, text in zip(parts[::2], parts[1::2], strict=True)]


def _description(container: InputContainer) -> str:
    """FFmpeg's own words on a container, with what PyAV does not show: programmes, side data.

    They are written through the log, which is off otherwise.
    """
    import av

    with _log_level_lock:
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        try:
            return str(container.dumps_format())  # type: ignore[attr-defined]  # its stub lacks it
        finally:
            av.logging.set_level(level)
