"""sources against real servers and senders on loopback: what arrives are the clip's own frames.

FFmpeg's own program (another version than the library's) made the digests that frames are known by.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import media_servers as servers
import numpy as np
import pytest

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.sources import open_source

pytestmark = pytest.mark.servers

FPS = 25
SECONDS = 4
REORDERED = 4
"""Of the last frames before a break some may be missing: others were sent before them."""
PATIENCE_SECONDS = 30.0
VIDEO_DEVICES = Path("/sys/devices/virtual/video4linux")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four seconds of H.264 with B-frames, a key frame each second, no two frames alike."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    pattern = f"testsrc2=size=320x180:rate={FPS}:duration={SECONDS}"
    x264 = ("-c:v", "libx264", "-preset", "ultrafast", "-bf", "2", "-g", "25", "-sc_threshold", "0")
    servers.ffmpeg("-f", "lavfi", "-i", pattern, *x264, "-pix_fmt", "yuv420p", path)
    return path


@pytest.fixture(scope="module")
def numbers(clip):
    """Digest of a frame to its number in the clip."""
    digests = servers.frame_digests(clip)
    assert len(set(digests)) == FPS * SECONDS
    return {digest: number for number, digest in enumerate(digests)}


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """Every test here makes its clip with FFmpeg's own program."""
    servers.require_ffmpeg(missing_server)


def receive(url, limit, **settings):
    """Open patiently; the stream's info and its first frames."""
    patient = dict.fromkeys(("open_timeout_seconds", "read_timeout_seconds"), PATIENCE_SECONDS)
    source = open_source(str(url), SourceSettings(**(patient | settings)), stream="s")
    try:
        return source.info, list(itertools.islice(source.frames(), limit))
    finally:
        source.close()


def numbered(frames, numbers):
    """Which frames of the clip these are; None for one that is not intact."""
    return [numbers.get(servers.digest(f.planes.samples)) for f in frames]


def check_every_frame(frames, numbers, *, period=FPS * SECONDS):
    """Intact, none missing between the first and the last, and 1/25 s apart."""
    found = numbered(frames, numbers)
    assert None not in found
    begin = found[0]
    assert found == [(begin + i) % period for i in range(len(frames))]
    steps = np.diff([f.info.pts_seconds for f in frames])
    # FLV counts milliseconds; a loop's seam may differ by the frames that were reordered
    assert np.median(steps) == pytest.approx(1 / FPS, abs=1.5e-3)
    assert steps.min() > 0
    assert steps.max() < 0.25


# RTSP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtsp_port(clip, tmp_path_factory):
    """An RTSP server for the tests of this module."""
    with servers.rtsp_server(clip, tmp_path_factory.mktemp("rtsp")) as port:
        yield port


@pytest.fixture
def rtsp(missing_server, request):
    """The port of GStreamer's RTSP server."""
    servers.require_rtsp_server(missing_server)
    return request.getfixturevalue("rtsp_port")


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_rtsp(rtsp, numbers, transport):
    """GStreamer's RTSP server is read over TCP, our default, and over UDP where asked."""
    options = {} if transport == "tcp" else {"rtsp_transport": "udp"}
    info, frames = receive(f"rtsp://127.0.0.1:{rtsp}/open", 40, options=options)
    assert info.is_live
    assert (info.container, info.codec, info.width, info.height) == ("rtsp", "h264", 320, 180)
    if transport == "udp":
        check_most_frames(frames, numbers)
        return
    check_every_frame(frames, numbers)
    assert numbered(frames[:1], numbers) == [0]  # nothing is lost while the stream is probed


def test_rtsp_to_its_end(rtsp, numbers):
    """Where the server says that the stream is over, all frames have come and it just ends."""
    _, frames = receive(f"rtsp://127.0.0.1:{rtsp}/open", None)
    check_every_frame(frames, numbers)
    assert len(frames) == FPS * SECONDS


def test_rtsp_with_a_login(rtsp, numbers):
    """Digest authentication: the right password gives the stream, a wrong one or none says 401."""
    _, frames = receive(f"rtsp://bob:hunter2@127.0.0.1:{rtsp}/locked", 5)
    assert numbered(frames, numbers) == [0, 1, 2, 3, 4]
    for account in ("", "bob:wrong@"):
        with pytest.raises(SourceUnavailable, match=r"wants a login \(401\)") as caught:
            receive(f"rtsp://{account}127.0.0.1:{rtsp}/locked", 1)
        assert "wrong" not in str(caught.value)


def test_rtsp_without_that_stream(rtsp):
    """A path that the server does not have is told as such."""
    with pytest.raises(SourceUnavailable, match="no such stream"):
        receive(f"rtsp://127.0.0.1:{rtsp}/nothing", 1)


def test_rtsp_server_that_dies(missing_server, clip, numbers, tmp_path):
    """When the server is killed in mid-stream, frames end too, at the latest after the timeout.

    Without an error: FFmpeg does not tell a connection that broke from a stream that is over.
    """
    servers.require_rtsp_server(missing_server)
    settings = SourceSettings(open_timeout_seconds=PATIENCE_SECONDS, read_timeout_seconds=5.0)
    with servers.rtsp_server(clip, tmp_path / "server") as port:
        source = open_source(f"rtsp://127.0.0.1:{port}/open", settings, stream="s")
        frames = source.frames()
        seen = list(itertools.islice(frames, 10))
    begin = time.monotonic()
    with contextlib.suppress(SourceUnavailable):
        seen.extend(frames)
    assert time.monotonic() - begin < 5.0 + 10.0
    assert len(seen) < FPS * SECONDS
    source.close()
    check_every_frame(seen[:-REORDERED], numbers)


# RTMP -----------------------------------------------------------------------------------------


@pytest.fixture
def rtmp(missing_server, tmp_path, free_port):
    """The address of nginx's live application."""
    servers.require_rtmp_server(missing_server)
    with servers.rtmp_server(free_port(), tmp_path / "nginx") as address:
        yield address


def test_rtmp(rtmp, clip, numbers, tmp_path):
    """A stream published to nginx is played from it, live."""
    with servers.sending(clip, f"{rtmp}/cam", "flv", tmp_path / "publisher", pace=2.0):
        info, frames = receive(f"{rtmp}/cam", 60)
    assert info.is_live
    assert (info.container, info.codec, info.width, info.height) == ("flv", "h264", 320, 180)
    check_every_frame(frames, numbers)


def test_rtmp_publisher_that_leaves(rtmp, clip, numbers, tmp_path):
    """When the publisher is killed, frames end in an error, at the latest after the timeout."""
    settings = SourceSettings(open_timeout_seconds=PATIENCE_SECONDS, read_timeout_seconds=3.0)
    with servers.sending(clip, f"{rtmp}/cam", "flv", tmp_path / "publisher", pace=2.0):
        source = open_source(f"{rtmp}/cam", settings, stream="s")
        frames = source.frames()
        seen = list(itertools.islice(frames, 10))
    begin = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"no data within 3 s|broke"):
        seen.extend(frames)
    assert time.monotonic() - begin < 3.0 + 10.0
    source.close()
    check_every_frame(seen[:-REORDERED], numbers)


# HLS and DASH over HTTP -------------------------------------------------------------------------

PACKAGERS = {  # name: (muxer, manifest, FFmpeg's options)
    "hls": ("hls", "live.m3u8", "-hls_time 1 -hls_playlist_type vod"),
    "hls-fmp4": (
        "hls",
        "live.m3u8",
        "-hls_time 1 -hls_playlist_type vod -hls_segment_type fmp4",
    ),
    "dash": ("dash", "live.mpd", "-seg_duration 1 -use_template 1 -use_timeline 1"),
    "dash-numbers": ("dash", "live.mpd", "-seg_duration 1 -use_template 1 -use_timeline 0"),
}


@pytest.mark.parametrize("kind", PACKAGERS)
def test_adaptive_files(clip, numbers, tmp_path, kind):
    """A whole recording as HLS or DASH gives all frames of all its segments, and is not live."""
    muxer, manifest, options = PACKAGERS[kind]
    servers.ffmpeg(*("-i", clip, "-c", "copy", *options.split(), "-f", muxer, tmp_path / manifest))
    assert len(list(tmp_path.iterdir())) > SECONDS  # a segment for each second
    with servers.http_files(tmp_path) as address:
        info, frames = receive(f"{address}/{manifest}", None)
    assert not info.is_live
    assert info.duration_seconds == pytest.approx(SECONDS, abs=0.2)
    check_every_frame(frames, numbers)
    assert len(frames) == FPS * SECONDS


LIVE_PACKAGERS = {  # they keep all segments: a busy machine reads late
    "hls": ("hls", "live.m3u8", "-hls_time 1 -hls_list_size 0"),
    "dash": ("dash", "live.mpd", "-seg_duration 1 -window_size 0 -use_timeline 1 -streaming 0"),
}


@pytest.mark.parametrize("kind", LIVE_PACKAGERS)
def test_adaptive_live(clip, numbers, tmp_path, kind):
    """A playlist that grows while it is read is live, and frames come across its segments."""
    muxer, manifest, options = LIVE_PACKAGERS[kind]
    folder = tmp_path / "packager"
    sending = servers.sending(clip, manifest, muxer, folder, *options.split(), pace=4.0)
    with sending as packager, servers.http_files(folder) as address:
        servers.wait_until(
            lambda: len(list(folder.glob("*.ts")) + list(folder.glob("chunk*.m4s"))) > 4,
            "the packager",
            process=packager,
            folder=folder,
        )
        info, frames = receive(f"{address}/{manifest}", 60)
    assert info.is_live
    assert info.width == 320
    check_every_frame(frames, numbers)
    assert len(frames) == 60


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "404"), ("<html>no</html>", "Invalid data"), ("<MPD></MPD>", "Invalid data")],
)
def test_a_manifest_that_is_none(tmp_path, content, words):
    """Where the program that reads DASH fails, its reason is told, in one line."""
    if content:
        (tmp_path / "live.mpd").write_text(content)
    with (
        servers.http_files(tmp_path) as address,
        pytest.raises(SourceUnavailable, match=words) as caught,
    ):
        receive(f"{address}/live.mpd?token=hunter2", 1)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_manifest_names_no_local_file_over_http(clip, tmp_path):
    """A manifest from the network that points to files of this machine is not followed; the same
    manifest as a local file is.
    """
    (tmp_path / "there").mkdir()
    servers.ffmpeg("-i", clip, "-c", "copy", "-f", "dash", tmp_path / "live.mpd")
    manifest = (tmp_path / "live.mpd").read_text()
    template = "<SegmentTemplate "
    assert manifest.count(template) == 1
    pointing = manifest.replace(template, f"<BaseURL>file://{tmp_path}/</BaseURL>{template}")
    (tmp_path / "there" / "live.mpd").write_text(pointing)
    assert len(receive(tmp_path / "there" / "live.mpd", None)[1]) == FPS * SECONDS
    with (
        servers.http_files(tmp_path / "there") as address,
        pytest.raises(SourceUnavailable, match="check the address"),
    ):
        receive(f"{address}/live.mpd", 1)


def test_dash_without_its_helper(clip, tmp_path, monkeypatch):
    """Without an ``ffmpeg`` program the error names the package; a missing file is told first."""
    servers.ffmpeg("-i", clip, "-c", "copy", "-f", "dash", tmp_path / "live.mpd")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceUnavailable, match="apt install ffmpeg"):
        receive(tmp_path / "live.mpd", 1)
    monkeypatch.undo()
    with pytest.raises(SourceUnavailable, match=r"gone\.mpd: does not exist"):
        receive(tmp_path / "gone.mpd", 1)


# UDP, RTP and SRT -----------------------------------------------------------------------------


def check_most_frames(frames, numbers):
    """Nearly all intact and in order: UDP may lose some where a machine is busy."""
    found = [n for n in numbered(frames, numbers) if n is not None]
    assert len(found) >= 0.5 * len(frames)
    rising = sum(b == (a + 1) % (FPS * SECONDS) for a, b in itertools.pairwise(found))
    assert rising >= 0.8 * (len(found) - 1)
    stamps = [f.info.pts_seconds for f in frames]
    assert all(b > a for a, b in itertools.pairwise(stamps))


@pytest.mark.parametrize(
    ("scheme", "muxer"), [("udp", "mpegts"), ("rtp", "rtp_mpegts")], ids=["udp", "rtp"]
)
def test_transport_stream(clip, numbers, tmp_path, free_port, scheme, muxer):
    """MPEG-TS over UDP and over RTP, sent by FFmpeg's own program."""
    address = f"{scheme}://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    with servers.sending(clip, f"{address}?pkt_size=1316", muxer, tmp_path / "sender", pace=2.0):
        info, frames = receive(address, 40)
    assert info.is_live
    assert len(frames) == 40
    check_most_frames(frames, numbers)


def test_rtp_session(clip, numbers, tmp_path, free_port):
    """H.264 over RTP by the description that FFmpeg's own program writes of it."""
    folder, port = tmp_path / "sender", free_port(socket.SOCK_DGRAM)
    described = folder / "session.sdp"
    sending = servers.sending(
        clip, f"rtp://127.0.0.1:{port}", "rtp", folder, "-sdp_file", str(described), pace=2.0
    )
    with sending as process:
        servers.wait_until(
            lambda: described.exists() and "m=video" in described.read_text(),
            "the sender",
            process=process,
            folder=folder,
        )
        info, frames = receive(described, 40)
    assert info.is_live
    assert info.codec == "h264"
    check_most_frames(frames, numbers)


def test_srt(clip, numbers, tmp_path, free_port):
    """SRT from FFmpeg's own program as the listener, encrypted, loses nothing."""
    address = f"srt://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    # A second, in microseconds: after that, SRT gives up on what a busy machine holds back.
    secret = "passphrase=hunter2hunter2&latency=1000000"
    listener = f"{address}?mode=listener&{secret}"
    with servers.sending(clip, listener, "mpegts", tmp_path / "sender", pace=2.0):
        info, frames = receive(f"{address}?mode=caller&{secret}", 40)
    assert info.is_live
    check_every_frame(frames, numbers)


# Pipes and cameras ----------------------------------------------------------------------------

PIPED = {  # name: how FFmpeg's own program writes it
    "nut": "-c:v rawvideo -f nut",
    "y4m": "-f yuv4mpegpipe",
    "matroska": "-c:v copy -f matroska",
    "mpegts": "-c:v copy -f mpegts",
}
READ_STDIN = """
import sys
sys.path.insert(0, sys.argv[1])
import media_servers
from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source
source = open_source("-", SourceSettings(open_timeout_seconds=30.0), stream="s")
for frame in source.frames():
    print(media_servers.digest(frame.planes.samples), frame.info.pts_seconds)
"""


@pytest.mark.parametrize("kind", PIPED)
def test_piped(clip, numbers, tmp_path, kind):
    """``ffmpeg ... - | dgiqa-stream score -``: raw and coded pipes give every frame in its time."""
    script = tmp_path / "read.py"
    script.write_text(READ_STDIN)
    write = [*servers.FFMPEG, "-i", str(clip), *PIPED[kind].split(), "pipe:1"]
    helpers = str(Path(servers.__file__).parent)
    with subprocess.Popen(write, stdout=subprocess.PIPE) as writer:
        done = subprocess.run(
            [sys.executable, str(script), helpers],
            stdin=writer.stdout,
            capture_output=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stderr.decode()
    rows = [line.split() for line in done.stdout.decode().splitlines()]
    assert [numbers.get(digest) for digest, _ in rows] == list(range(FPS * SECONDS))
    stamps = np.array([float(seconds) for _, seconds in rows])
    assert np.diff(stamps) == pytest.approx(1 / FPS, abs=1e-3)


def test_a_camera_by_its_class(clip):
    """OpenCV reading a file behind the camera's class gives all pictures in their time."""
    info, frames = receive(f"camera:{clip}", None)
    assert (info.width, info.height, info.average_fps) == (320, 180, FPS)
    assert len(frames) == FPS * SECONDS
    rgb = np.frombuffer(
        servers.ffmpeg("-i", clip, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
        np.uint8,
    ).reshape(180, 320, 3)
    off = np.abs(frames[0].planes.samples[0].astype(int) - rgb)
    assert np.median(off) <= 2  # OpenCV and FFmpeg's program upsample chroma in different ways


def loopback_camera():
    """A v4l2 device that takes pictures from a program, where this machine has one."""
    found = sorted(VIDEO_DEVICES.glob("video*")) if VIDEO_DEVICES.is_dir() else []
    return next((Path("/dev") / p.name for p in found if (Path("/dev") / p.name).exists()), None)


@pytest.mark.skipif(loopback_camera() is None, reason="no v4l2loopback device here")
def test_a_loopback_camera(clip, tmp_path):
    """A real video device: pictures that a program writes into it come out, live."""
    device = loopback_camera()
    write = [*servers.FFMPEG, "-re", "-stream_loop", "-1", "-i", str(clip)]
    command = [*write, "-f", "v4l2", "-pix_fmt", "yuv420p", str(device)]
    with servers.running(command, tmp_path / "writer"):
        time.sleep(2.0)  # the device tells nobody when it has its first picture
        info, frames = receive(f"camera:{device}", 25)
    assert info.is_live
    assert (info.width, info.height, len(frames)) == (320, 180, 25)


# The command line -----------------------------------------------------------------------------


def test_a_server_by_the_command_line(run_cli, rtsp):
    """``dgiqa-stream score rtsp://…`` scores a second of a real server's stream."""
    url = f"rtsp://127.0.0.1:{rtsp}/open"
    done = run_cli("score", url, "--duration", "1", "--every", "5", "--open-timeout", "30", "-q")
    assert done.code == 0, done
    rows = list(csv.DictReader(done.out.splitlines()))
    assert len(rows) == 5
    assert all(0 <= float(row["score"]) <= 100 for row in rows)


def test_no_server_is_left(tmp_path):
    """A test that fails in the midst of a block leaves no process behind."""
    if not shutil.which("sleep"):
        pytest.skip("needs `sleep`")
    with pytest.raises(KeyError), servers.running(["sleep", "60"], tmp_path) as process:
        raise KeyError
    assert process.returncode == -9
