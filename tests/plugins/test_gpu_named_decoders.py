"""Decoders that are asked for by name, and software that follows a device: real ones of FFmpeg.

No device is here: a twin names decoders that run on the CPU, and the device's own ``av1``, which
then refuses every packet, as it does on a GPU that has no AV1.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
av = pytest.importorskip("av")
from av.codec.hwaccel import HWAccel

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.config import parse_config
from dgiqa_stream.errors import DeviceLost, SourceUnavailable, SourceUnsupported
from dgiqa_stream.messages import MetaMessage, StatusMessage
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.sources import _pyav, open_source
from dgiqa_stream.sources._media_engines import MediaEngine
from dgiqa_stream.sources._track_decoder import NeedsReopening, TrackDecoder
from distill.process import ordinary_scheduling
from plugins.torch_gpu import decoding, devices
from plugins.torch_gpu.decoding import CudaDecoder, open_decoder

HAS_CUDA = CudaDecoder(0).why_not() == ""
AV1 = {"preset": "12", "svtav1-params": "keyint=8"}
H264 = {"preset": "ultrafast", "g": "8"}


class TwinDecoder(CudaDecoder):
    """Decodes by what ``names`` says in place of what FFmpeg chose, without a device."""

    names: dict[str, str] = {}
    lost = ""

    def why_not(self):
        """Nothing is in the way."""
        return ""

    def why_lost(self):
        """What the test says."""
        return type(self).lost

    def hwaccel(self):
        """None is needed."""
        return

    def named(self, codec):
        """A decoder that is not open yet."""
        name = self.names.get(codec)
        return None if name is None else av.CodecContext.create(av.Codec(name, "r"))

    def has(self, frame):
        """Frames stay in memory."""
        return False


@pytest.fixture
def twin(decoded_by, monkeypatch):
    """Every source that asks for ``cuda`` gets the twin, whose names the test sets."""
    decoded_by(TwinDecoder)
    monkeypatch.setattr(TwinDecoder, "names", {})
    monkeypatch.setattr(TwinDecoder, "lost", "")
    return TwinDecoder


def clip(path, codec="libx264", options=None, *, num_frames=24, rotation=0):
    """A moving picture with a keyframe every eight frames."""
    blots = np.random.default_rng(0).integers(20, 235, (24 + num_frames, 20, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or H264)
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        with ordinary_scheduling():
            container.start_encoding()
        for n in range(num_frames):
            rgb = np.kron(blots[n : n + 12], np.ones((16, 16, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def settings(**source):
    """Of one source."""
    return parse_config({"source": source}).source


def opened(path, **source):
    """What is known of a source, and its frames."""
    found = open_source(path, settings(**source), stream="s")
    try:
        return found.info, list(found.frames())
    finally:
        found.close()


def same(frames, wanted):
    """Whether frames have the times, turns and samples of others."""
    assert len(frames) == len(wanted)
    for one, other in zip(frames, wanted, strict=True):
        assert (one.info.pts_seconds, one.info.rotation) == (
            other.info.pts_seconds,
            other.info.rotation,
        )
        assert one.info.keyframe == other.info.keyframe
        for a, b in zip(one.planes.samples, other.planes.samples, strict=True):
            assert np.array_equal(a, b)
    return True


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_decoder_by_name_gives_the_containers_frames(twin, tmp_path, suffix, start):
    """Times, keyframes and samples are those of the container's own decoder, after a seek, too."""
    twin.names = {"libdav1d": "libdav1d"}
    path = clip(tmp_path / f"a.{suffix}", "libsvtav1", AV1)
    info, frames = opened(path, hardware="cuda", strict=True, start_seconds=start)
    assert info.decoder == "cuda:0 (libdav1d)"
    assert same(frames, opened(path, start_seconds=start)[1])


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_av1_that_the_device_refuses_is_decoded_in_software(twin, tmp_path, caplog):
    """FFmpeg's ``av1`` refuses every packet without a device: none is lost, and it is told."""
    twin.names = decoding.NATIVE
    path = clip(tmp_path / "a.mkv", "libsvtav1", AV1)
    with caplog.at_level(logging.WARNING, "dgiqa_stream.sources"):
        info, frames = opened(path, hardware="cuda")
    assert info.decoder.startswith("software (av1 does not decode it (")
    assert same(frames, opened(path)[1])
    assert "av1 does not decode it" in caplog.text
    with pytest.raises(SourceUnsupported, match=r"av1 does not decode it.*leave --strict out"):
        opened(path, hardware="cuda", strict=True)


def test_a_turned_picture_stays_with_the_containers_decoder(twin, tmp_path):
    """A decoder by name would not know of the turn: software takes the stream, and says so."""
    twin.names = {"libdav1d": "libdav1d"}
    path = clip(tmp_path / "a.mp4", "libsvtav1", AV1, rotation=-90)
    info, frames = opened(path, hardware="cuda")
    assert info.decoder == (
        "software (libdav1d is not told what the container says of its pictures)"
    )
    assert {frame.info.rotation for frame in frames} == {90}


def test_a_device_that_is_lost_is_followed_by_software(twin, tmp_path, caplog):
    """From the next keyframe on, frames are those of software, at their own times; one warning."""
    twin.names = {"h264": "h264"}
    path = clip(tmp_path / "a.mp4")
    source, frames = open_source(path, settings(hardware="cuda"), stream="s"), []
    assert source.info.decoder == "cuda:0 (h264)"
    with caplog.at_level(logging.WARNING, "dgiqa_stream.sources"):
        for frame in source.frames():
            frames.append(frame)
            if len(frames) == 5:
                twin.lost = "cuda:0 was lost while running"
    source.close()
    assert source.info.decoder == "software (cuda:0 was lost while running)"
    wanted = opened(path)[1]
    times = [frame.info.pts_seconds for frame in frames]
    assert times == sorted(times)
    late = [f for f in frames if f.info.pts_seconds >= 0.64]  # the third group of pictures
    assert same(late, [f for f in wanted if f.info.pts_seconds >= 0.64])
    assert len(late) == 8
    assert len(caplog.messages) == 1
    assert "is no longer decoded on cuda:0: cuda:0 was lost while running" in caplog.text


def test_the_status_follows_the_decoder(twin, tmp_path):
    """A session's messages tell the device first and, once it is lost, software with the reason, in
    a status that is sent at once; the stream goes on to its end.
    """
    twin.names = {"h264": "h264"}
    path, memory = clip(tmp_path / "a.mp4"), MemorySink()
    config = parse_config(
        {"source": {"hardware": "cuda"}, "sampler": {"mode": "every"}, "model": {"device": "cpu"}}
    )

    def lose(score):
        if score.info.index == 4:
            twin.lost = "cuda:0 was lost while running"

    result = Monitor(path, config=config, sinks=[memory], on_score=lose).run()
    assert result.error is None
    told = [m.decoder for m in memory.of(StatusMessage)]
    assert [d for n, d in enumerate(told) if n == 0 or d != told[n - 1]] == [
        None, "cuda:0 (h264)", "software (cuda:0 was lost while running)",
    ]  # fmt: skip
    assert memory.of(MetaMessage)[0].source.decoder == "cuda:0 (h264)"


def tracked(path, **more):
    """A decoder of the clip's track whose device is there, with its packets."""
    container = av.open(path)
    track = container.streams.video[0]
    choices = {"has_side_data": False, "threads": 1, "is_strict": False, "shown": "clip"}
    decoder = TrackDecoder(track, TwinDecoder(0), **{**choices, **more})
    decoder.is_on_device = True  # as FFmpeg's own decoder of H.264 is with a device
    return decoder, list(container.demux(track))


def test_the_containers_own_decoder_is_replaced(twin, tmp_path):
    """Where FFmpeg's chosen decoder is the one on the device, a new one follows it: it begins with
    a keyframe and gives what is left.
    """
    decoder, packets = tracked(clip(tmp_path / "a.mp4"))
    frames = [f for p in packets[:5] for f in decoder.decode(p)]
    twin.lost = "gone"
    after = [f for p in packets[5:] for f in decoder.decode(p)]
    assert not decoder.is_on_device
    assert len(frames) <= 5
    assert after[0].key_frame
    assert len(after) == 16
    assert not any(f.is_corrupt for f in after)


class FaultyContext:
    """Gives one frame after 15 errors, and errors from then on."""

    def __init__(self, real):
        self._real, self._num = real, 0

    def decode(self, packet):
        """The sixteenth time, of another decoder."""
        self._num += 1
        if self._num == 16:
            return [av.VideoFrame(64, 48, "yuv420p")]
        raise av.error.InvalidDataError(1, "damaged")


def test_errors_are_counted_in_a_row(twin, tmp_path):
    """Errors before the first frame are not added to those after it: the device is left with the
    sixteenth in a row, and not with the first.
    """
    decoder, packets = tracked(clip(tmp_path / "a.mp4"))
    decoder._context, decoder._kept = FaultyContext(decoder._context), []

    def fail(num):
        for _ in range(num):
            with pytest.raises(av.error.InvalidDataError):
                decoder.decode(packets[0])

    fail(15)
    assert len(decoder.decode(packets[0])) == 1
    fail(15)
    assert decoder.is_on_device
    fail(1)
    assert not decoder.is_on_device
    assert decoder.why_left.startswith("16 errors in a row")


def test_strict_ends_where_the_device_is_lost(twin, tmp_path):
    """Strict raises SourceUnsupported; where the container's word is needed, the decoder asks for
    the source to be opened again, or else for SourceUnavailable.
    """
    path = clip(tmp_path / "a.mp4")
    for more, error in (
        ({"is_strict": True}, SourceUnsupported),
        ({"has_side_data": True}, NeedsReopening),
    ):
        twin.lost = ""
        decoder, packets = tracked(path, **more)
        decoder.decode(packets[0])
        twin.lost = "gone"
        with pytest.raises(error) as told:
            decoder.decode(packets[1])
        said = getattr(told.value, "otherwise", told.value)
        assert "no longer decoded on cuda:0: gone; " in str(said)
        assert isinstance(said, SourceUnsupported if "is_strict" in more else SourceUnavailable)


def test_a_device_that_refuses_all_is_given_up(twin, tmp_path):
    """Sixteen errors in a row on the device are enough: software goes on from the next keyframe."""
    decoder, packets = tracked(clip(tmp_path / "a.mp4", num_frames=48))

    class Refusing:
        is_open = True

        def decode(self, packet):
            raise av.error.ExternalError(1, "generic error in an external library")

    decoder._context, num_errors, frames = Refusing(), 0, []
    for packet in packets:
        try:
            frames += decoder.decode(packet)
        except av.error.ExternalError:
            num_errors += 1
    assert num_errors == 16
    assert len(frames) == 32


def test_frames_that_cannot_be_read_where_they_lie_end_nothing(twin, tmp_path, monkeypatch):
    """A frame that the device no longer gives is a decode error; those after it are software's."""
    twin.names = {"h264": "h264"}
    num_read = []

    def has(self, frame):
        return not twin.lost

    def planes_of(self, frame, **tags):
        num_read.append(frame.pts)
        twin.lost = "gone"
        raise DeviceLost("cuda:0: CUDA error: unspecified launch failure")

    monkeypatch.setattr(TwinDecoder, "has", has)
    monkeypatch.setattr(TwinDecoder, "planes_of", planes_of)
    source = open_source(clip(tmp_path / "a.mp4"), settings(hardware="cuda"), stream="s")
    frames = list(source.frames())
    source.close()
    assert len(num_read) == 1
    assert source.num_decode_errors >= 1
    assert [f.info.pts_seconds for f in frames][-1] == pytest.approx(0.92)


def test_a_cuda_fault_is_told_as_a_lost_device(monkeypatch):
    """What DLPack raises for a device that is gone is DeviceLost; another error stays itself."""
    tags = {"rotation": 0, "is_mirrored": False, "matrix": "bt709", "full_range": False}
    for told, error in (
        ("CUDA error: device is gone", DeviceLost),
        ("no such dtype", RuntimeError),
    ):

        def fail(*_, told=told, **__):
            raise RuntimeError(told)

        monkeypatch.setattr(decoding, "planes_of_frame", fail)
        with pytest.raises(error, match=told):
            CudaDecoder(9).planes_of(av.VideoFrame(64, 64, "nv12"), **tags)
    try:
        assert "device is gone" in CudaDecoder(9).why_not()
    finally:
        devices._lost.clear()


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_av1_is_asked_of_the_device_itself(tmp_path, monkeypatch):
    """The real decoder of ``cuda`` asks FFmpeg's ``av1`` for a device; without a driver the reason
    is FFmpeg's, and libdav1d decodes.
    """
    monkeypatch.setattr(CudaDecoder, "why_not", lambda self: "")
    monkeypatch.setattr(CudaDecoder, "hwaccel", lambda self: HWAccel("cuda", is_hw_owned=True))
    container = av.open(clip(tmp_path / "a.mkv", "libsvtav1", AV1))
    track, hardware = container.streams.video[0], CudaDecoder(0)
    choices = {"has_side_data": False, "threads": 1, "is_strict": False, "shown": "clip"}
    decoder = TrackDecoder(track, hardware, **choices)
    assert decoder.reason.startswith("its decoder there cannot be opened (")
    assert not decoder.is_on_device
    assert sum(len(decoder.decode(packet)) for packet in container.demux(track)) == 24
    assert hardware.named("h264") is None


# Which device decodes --------------------------------------------------------------------------


def test_streams_are_decoded_where_they_are_scored():
    """``cuda`` takes turns among the devices that score; a decoder that has gone makes room; ``N``
    is taken as it is.
    """
    for number in (1, 3):
        devices.note_use(torch.device("cuda", number), +1)
    try:
        kept = [open_decoder("cuda") for _ in range(4)]
        assert [d.number for d in kept] == [1, 3, 1, 3]
        del kept[1], kept[2]
        assert open_decoder("cuda").number == 3
        assert open_decoder("cuda:7").number == 7
    finally:
        devices._in_use.clear()
    assert open_decoder("cuda").number == 0


# Quick Sync and AMF ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qsv", "amf"])
def test_engines_that_are_absent_leave_it_to_software(tmp_path, kind):
    """Without the driver, the stream plays in software with the reason; strict refuses it."""
    if not MediaEngine(kind).why_not():
        pytest.skip(f"this machine has {kind}")
    path = clip(tmp_path / "a.mp4", num_frames=8)
    info, frames = opened(path, hardware=kind)
    assert info.decoder.startswith("software (")
    assert kind in info.decoder
    assert len(frames) == 8
    with pytest.raises(SourceUnsupported, match=rf"not decoded on {kind}: .*leave --strict out"):
        opened(path, hardware=kind, strict=True)


@pytest.mark.parametrize("kind", ["qsv", "amf"])
def test_an_engine_that_refuses_leaves_it_to_software(tmp_path, monkeypatch, kind):
    """Its real decoder is asked, refuses, and nothing of the stream is lost."""
    if not MediaEngine(kind).why_not():
        pytest.skip(f"this machine has {kind}")
    monkeypatch.setattr(MediaEngine, "why_not", lambda self: "")
    path = clip(tmp_path / "a.mp4", num_frames=8)
    info, frames = opened(path, hardware=kind)
    assert info.decoder.startswith("software (")
    assert same(frames, opened(path)[1])


class UnreadDecoder(TrackDecoder):
    """Where there is a device, its frames are of a layout that cannot be read."""

    def __init__(self, track, hardware, **known):
        super().__init__(track, hardware, **known)
        if hardware is not None:
            self.is_on_device, self._kept = True, []

    def _why_unread(self, frames):
        return "frames of layout yuv444p cannot be read there" if self.is_on_device else ""


def test_a_turned_clip_of_such_a_layout_is_opened_again(twin, tmp_path, monkeypatch):
    """A clip with a rotation, which a spare decoder would not be told: it is opened once more
    without the device, loses no frame and says why; what can be read once is refused.
    """
    path = clip(tmp_path / "a.mp4", rotation=-90)
    _, wanted = opened(path)
    monkeypatch.setattr(_pyav, "TrackDecoder", UnreadDecoder)
    info, frames = opened(path, hardware="cuda")
    assert info.decoder == "software (frames of layout yuv444p cannot be read there)"
    assert {frame.info.rotation for frame in frames} == {90}
    assert same(frames, wanted)
    with (
        Path(path).open("rb") as once,
        pytest.raises(SourceUnsupported, match=r"layout yuv444p.*leave --hardware out"),
    ):
        _pyav.PyavSource(path, settings(hardware="cuda"), stream="s", pipe=once)


class TriedDecoder(TrackDecoder):
    """Where there is a device, it is said to decode."""

    def __init__(self, track, hardware, **known):
        super().__init__(track, hardware, **known)
        self.is_on_device = hardware is not None


def read_and_lose(source, device, num_read):
    """Frames of a source whose device is lost after some of them."""
    frames = []
    for frame in source.frames():
        frames.append(frame)
        if len(frames) == num_read:
            device.lost = "it fell off the bus"
    return frames


def test_a_turned_file_goes_on_where_its_device_was_lost(twin, tmp_path, monkeypatch):
    """A file with a rotation, its device lost after ten frames: it is opened again in software, and
    no frame is missing or given twice; what is read once, or is a live stream, ends as unavailable.
    """
    path = clip(tmp_path / "a.mp4", rotation=-90)
    _, wanted = opened(path)
    monkeypatch.setattr(_pyav, "TrackDecoder", TriedDecoder)
    source = open_source(path, settings(hardware="cuda"), stream="s")
    frames = read_and_lose(source, twin, 10)
    assert source.info.decoder == "software (it fell off the bus)"
    assert source.num_decode_errors == 0
    source.close()
    assert same(frames, wanted)
    assert [frame.info.index for frame in frames] == list(range(24))
    twin.lost = ""
    with Path(path).open("rb") as once:
        source = _pyav.PyavSource(path, settings(hardware="cuda"), stream="s", pipe=once)
        with pytest.raises(SourceUnavailable, match="open it again to decode in software"):
            read_and_lose(source, twin, 10)
        source.close()


def test_a_lost_device_gets_no_stream(monkeypatch):
    """Of two devices that score, streams go to the one that is not lost; where none is left, to a
    lost one, which says so.
    """
    monkeypatch.setattr(devices, "_in_use", Counter({0: 1, 1: 1}))
    monkeypatch.setattr(devices, "_lost", {})
    monkeypatch.setattr(decoding, "_decoders", weakref.WeakSet())
    assert open_decoder("cuda").number == 0
    devices.note_loss(torch.device("cuda", 0), "gone")
    kept = [open_decoder("cuda") for _ in range(3)]
    assert [decoder.number for decoder in kept] == [1, 1, 1]
    devices.note_loss(torch.device("cuda", 1), "gone too")
    assert "was lost while running (gone" in open_decoder("cuda").why_not()
