"""plugins.torch_gpu: frames on a device, as far as a machine without one can show it.

What NVDEC would give, NV12 and P010 planes behind DLPack, a twin of its decoder gives from memory:
all that follows is the same code.
"""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
av = pytest.importorskip("av")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.config import StreamConfig, parse_config
from dgiqa_stream.errors import ConfigError, SourceUnsupported
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.scorer import load_scorer
from dgiqa_stream.sources import open_source
from dgiqa_stream.sources._hardware import decoder_of
from dgiqa_stream.sources._track_decoder import TrackDecoder
from dgiqa_stream.types import ColorMatrix, Planes
from plugins.torch_gpu.decoding import CudaDecoder, planes_of_frame
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.views import cut_views

WHOLE = ViewSpec("whole", "whole", 64, 96)
HAS_CUDA = CudaDecoder(0).why_not() == ""


class TwinDecoder(CudaDecoder):
    """Takes NV12 and P010 frames in memory for frames on a device."""

    def why_not(self):
        """Memory is always there."""
        return ""

    def hwaccel(self):
        """FFmpeg decodes as ever."""
        return

    def has(self, frame):
        """What NVDEC could have given."""
        return frame.format.name in ("nv12", "p010le")


@pytest.fixture
def twin(decoded_by):
    """Every source that asks for ``cuda`` gets the twin."""
    decoded_by(TwinDecoder)


def clip(path, *, layout="nv12", size=(180, 320), num_frames=6, codec="rawvideo"):
    """A moving picture of smooth noise, stored in a layout."""
    rng = np.random.default_rng(0)
    height, width = size
    blots = rng.integers(20, 235, (height // 20 + num_frames, width // 20, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        stream.gop_size, stream.max_b_frames = 12, 0
        for n in range(num_frames):
            rgb = np.kron(blots[n : n + height // 20], np.ones((20, 20, 1))).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=layout)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def settings(**source):
    """Every frame of a source, letterbox off."""
    return parse_config(
        {"source": source, "sampler": {"mode": "every"}, "picture": {"letterbox": False}}
    )


def opened(path, **source):
    """Its frames and what is known of it."""
    found = open_source(str(path), settings(**source).source, stream="s")
    try:
        return found.info, list(found.frames())
    finally:
        found.close()


def test_frames_stay_where_they_were_decoded(twin, tmp_path):
    """Planes are tensors with the views, the times and the layout of the frame in software."""
    path = clip(tmp_path / "a.nut")
    info, frames = opened(path, hardware="cuda")
    plain, wanted = opened(path)
    assert (info.decoder, plain.decoder) == ("cuda:0", "software")
    assert info.pix_fmt == frames[0].info.pix_fmt == "nv12"
    assert len(frames) == len(wanted) == 6
    for one, other in zip(frames, wanted, strict=True):
        assert isinstance(one.planes, TorchPlanes)
        assert one.info.pts_seconds == other.info.pts_seconds
        found = cut_views([one.planes], [WHOLE])["whole"][0].numpy().astype(int)
        assert np.abs(found - cut_view(other.planes, WHOLE)).max() <= 1


def test_p010_is_its_planar_twin():
    """Ten bits at the top of a word give the views of FFmpeg's planar ten bits."""
    rgb = np.kron(np.random.default_rng(0).integers(0, 256, (9, 16, 3)), np.ones((20, 20, 1)))
    source = av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")
    planar = source.reformat(format="yuv420p10le")
    tags = {"rotation": 0, "matrix": ColorMatrix.BT709, "full_range": False}
    packed = planes_of_frame(planar.reformat(format="p010le"), is_mirrored=False, **tags)
    rows = [np.frombuffer(p, "<u2").reshape(p.height, -1)[:, : p.width] for p in planar.planes]
    wanted = cut_view(Planes(tuple(rows), bit_depth=10), WHOLE)
    found = cut_views([packed], [WHOLE])["whole"][0].numpy()
    assert packed.bit_depth == 16
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_a_tensor_is_the_decoders_memory(tmp_path):
    """DLPack copies nothing, and the memory outlives the frame that it came from."""
    with av.open(str(clip(tmp_path / "a.nut"))) as container:
        frame = next(container.decode(video=0))
        tags = {"rotation": 0, "matrix": ColorMatrix.BT709, "full_range": False}
        planes = planes_of_frame(frame, is_mirrored=False, **tags)
        assert planes.tensors[0].data_ptr() == frame.planes[0].buffer_ptr
        before = planes.tensors[0].clone()
        del frame
    assert torch.equal(planes.tensors[0], before)


def test_a_mirrored_frame_has_its_rows_turned(tmp_path):
    """Mirroring reads the rows from the bottom up, as the runtime's own planes do."""
    with av.open(str(clip(tmp_path / "a.nut"))) as container:
        frame = next(container.decode(video=0))
    tags = {"rotation": 90, "matrix": ColorMatrix.BT601, "full_range": True}
    plain, turned = (planes_of_frame(frame, is_mirrored=m, **tags) for m in (False, True))
    assert torch.equal(turned.tensors[1], plain.tensors[1].flip(0))
    assert (turned.rotation, turned.matrix, turned.full_range) == (90, "bt601", True)


def test_odd_sides_lose_the_line_that_has_no_chroma():
    """DLPack's chroma of 5x7 pixels is 2x3: luma is cut to 4x6, and the picture can be scored."""
    frame = av.VideoFrame(7, 5, "nv12")
    tags = {"rotation": 0, "matrix": ColorMatrix.BT709, "full_range": False}
    planes = planes_of_frame(frame, is_mirrored=False, **tags)
    assert planes.size == (4, 6)
    assert cut_views([planes], [WHOLE])["whole"].shape == (1, 64, 96, 3)


def test_a_stream_is_scored_from_the_device(twin, tmp_path):
    """Frames that stay on the device get the scores of frames in memory, with letterbox and all."""
    path = clip(tmp_path / "a.nut", size=(240, 320), num_frames=3)
    config = settings(hardware="cuda", strict=True)
    with load_scorer("student-fp32", device="cpu") as scorer:
        wanted = [s.score for s in score_frames(str(path), scorer, config=settings())]
    with load_scorer("student-fp32", backend="torch", device="cpu") as scorer:
        found = [s.score for s in score_frames(str(path), scorer, config=config)]
        boxed = parse_config({"source": {"hardware": "cuda"}, "sampler": {"mode": "every"}})
        again = [s.score for s in score_frames(str(path), scorer, config=boxed)]
    assert found == pytest.approx(wanted, abs=0.01)
    assert again == pytest.approx(wanted, abs=0.01)


def test_what_the_device_cannot_decode_software_does(twin, tmp_path, caplog):
    """A stream of another layout plays in software, says why, and strict refuses it."""
    path = clip(tmp_path / "a.mkv", layout="yuv444p", codec="ffv1")
    with caplog.at_level(logging.WARNING, "dgiqa_stream.sources"):
        info, frames = opened(path, hardware="cuda")
    assert info.decoder == "software (it cannot decode ffv1 of yuv444p)"
    assert "is not decoded on cuda: it cannot decode ffv1" in caplog.text
    assert len(frames) == 6
    assert all(isinstance(frame.planes, Planes) for frame in frames)
    with pytest.raises(SourceUnsupported, match=r"not decoded on cuda.*leave --strict out"):
        opened(path, hardware="cuda", strict=True)


@pytest.mark.parametrize(
    ("layout", "is_read"), [("nv12", True), ("p010le", True), ("p016le", True), ("yuv444p", False)]
)
def test_only_layouts_that_can_be_read_are_the_devices(layout, is_read):
    """Of CUDA frames, 4:4:4 is none that the decoder has: it is refused with its name."""
    frame = SimpleNamespace(format=SimpleNamespace(name="cuda"), sw_format=av.VideoFormat(layout))
    assert CudaDecoder(0).has(frame) == is_read
    if not is_read:
        config = settings(hardware="cuda").source
        with pytest.raises(SourceUnsupported, match=r"layout yuv444p.*leave --hardware out"):
            decoder_of(config, CudaDecoder(0), frame, why="", shown="a.mkv")


class UnreadContext:
    """A decoder whose first frames, or those after some, lie on a device in 4:4:4."""

    is_hwaccel = True

    def __init__(self, real, *, num_read):
        self._real, self._num_read = real, num_read
        self.codec, self.extradata, self.name = real.codec, real.extradata, real.name

    def decode(self, packet):
        """Frames in memory first, then frames that PyAV does not hand over."""
        frames = self._real.decode(packet)
        self._num_read -= len(frames)
        unread = SimpleNamespace(
            format=SimpleNamespace(name="cuda"), sw_format=av.VideoFormat("yuv444p")
        )
        return frames if self._num_read >= 0 else [unread] * len(frames)


@pytest.mark.parametrize(("num_read", "num_lost"), [(0, 0), (5, 7)])
def test_layouts_that_cannot_be_handed_over_are_decoded_in_software(tmp_path, num_read, num_lost):
    """A stream of 4:4:4 loses no frame to the device, and says why software decodes it; one that
    turns into it later goes on in software from the next keyframe, here frame 12.
    """
    path = clip(tmp_path / "a.mkv", layout="yuv444p", num_frames=24, codec="libx264")
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        fake = SimpleNamespace(codec_context=UnreadContext(track.codec_context, num_read=num_read))
        decoder = TrackDecoder(
            fake, CudaDecoder(0), has_side_data=False, threads=1, is_strict=False, shown="a.mkv"
        )
        frames = [f for packet in container.demux(track) for f in decoder.decode(packet)]
    assert len(frames) == 24 - num_lost
    assert [f.pts for f in frames] == sorted(f.pts for f in frames)
    assert {f.format.name for f in frames} == {"yuv444p"}
    assert decoder.reason == "frames of layout yuv444p cannot be read there"
    assert decoder.why_left == (decoder.reason if num_read else "")
    assert decoder.num_lost == num_lost
    assert not decoder.is_on_device


def test_deinterlacing_needs_frames_in_memory(twin, tmp_path):
    """With ``bob`` software decodes, and the stream says so."""
    info, _ = opened(clip(tmp_path / "a.nut"), hardware="cuda", deinterlace="bob")
    assert info.decoder == "software (deinterlacing needs frames in memory)"


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_without_a_driver_software_decodes(tmp_path):
    """No driver: the stream plays in software with the reason; strict refuses it."""
    path = clip(tmp_path / "a.nut")
    info, frames = opened(path, hardware="cuda:1")
    assert info.decoder.startswith("software (FFmpeg cannot use CUDA device 1")
    assert len(frames) == 6
    with pytest.raises(SourceUnsupported, match="is there a driver"):
        opened(path, hardware="cuda", strict=True)


def test_without_torch_software_decodes(tmp_path, monkeypatch):
    """Without the extra, the stream plays in software and names the line to install it."""
    for name in [n for n in sys.modules if n.startswith("plugins.torch_gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    info, _ = opened(clip(tmp_path / "a.nut"), hardware="cuda")
    assert info.decoder == "software (it needs 'torch': pip install 'dgiqa-stream[gpu]')"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", ""])
def test_unknown_hardware_is_refused(name):
    """What is neither none, cuda nor cuda:N is a ConfigError that names the setting."""
    with pytest.raises(ConfigError, match=r"source\.hardware"):
        parse_config({"source": {"hardware": name}})


def test_hardware_is_left_alone_unless_it_is_asked_for(tmp_path, monkeypatch):
    """By default no plugin is even looked for."""
    monkeypatch.setattr("dgiqa_stream.sources._hardware.DECODERS", {})
    info, _ = opened(clip(tmp_path / "a.nut"))
    assert info.decoder == "software"
    assert StreamConfig().source.hardware == "none"
