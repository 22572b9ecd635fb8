"""sources on loopback: each protocol for real, and each way a server can fail."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest
from media_servers import http_files

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceUnavailable, SourceUnsupported
from dgiqa_stream.sources import open_source

PATIENCE_SECONDS = 30.0
SHORT_SECONDS = 0.7
SLACK_SECONDS = 6.0
"""A busy machine may be that late; what ignores a short deadline waits for the default of 10 s."""


def open_patiently(url, **settings):
    """Open what is there: no pause of a busy machine is taken for silence."""
    patient = dict.fromkeys(("open_timeout_seconds", "read_timeout_seconds"), PATIENCE_SECONDS)
    return open_source(url, SourceSettings(**(patient | settings)), stream="s")


def open_in_vain(url, seconds=SHORT_SECONDS):
    """Open what is silent, with a short deadline, and check that it is kept."""
    begin = time.monotonic()
    try:
        return open_patiently(url, open_timeout_seconds=seconds)
    finally:
        assert time.monotonic() - begin < seconds + SLACK_SECONDS


@contextlib.contextmanager
def sending(path, url, muxer, options=None):
    """A thread that sends a file's video over and over, at twice its pace, until the block ends."""
    stop = threading.Event()

    def send():
        with av.open(path) as file, av.open(url, "w", format=muxer, options=options or {}) as out:
            stream = out.add_stream_from_template(file.streams.video[0])
            packets = [p for p in file.demux(video=0) if p.size]
            length = (packets[-1].pts or 0) + 1 - (packets[0].pts or 0) + 3600
            for number in itertools.count():
                for packet in packets:
                    copy = av.Packet(bytes(packet))
                    copy.time_base, copy.stream = packet.time_base, stream
                    copy.pts = packet.pts + number * length
                    copy.dts = packet.dts + number * length
                    copy.is_keyframe = packet.is_keyframe
                    out.mux(copy)
                    if stop.wait(0.02):
                        return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def tcp_server(answer):
    """A server that hands each connection to ``answer``; gives its port."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve():
            held = []
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    held.append(connection)
                    with contextlib.suppress(OSError):
                        answer(connection)
            for connection in held:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def test_udp_transport_stream(media, free_port):
    """MPEG-TS over UDP is live, and its frames keep coming in order."""
    port = free_port(socket.SOCK_DGRAM)
    with sending(media["late_start"], f"udp://127.0.0.1:{port}?pkt_size=1316", "mpegts"):
        source = open_patiently(f"udp://127.0.0.1:{port}")
        frames = list(itertools.islice(source.frames(), 40))
        source.close()
    assert source.info.is_live
    assert (source.info.width, source.info.container) == (320, "mpegts")
    stamps = [f.info.pts_seconds for f in frames]
    assert len(frames) == 40
    assert all(b > a for a, b in itertools.pairwise(stamps))


def test_rtp_by_its_description(media, tmp_path, free_port):
    """H.264 over RTP, described by an .sdp file, is received."""
    port = free_port(socket.SOCK_DGRAM)
    sdp = tmp_path / "session.sdp"
    sdp.write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=test\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\na=fmtp:96 packetization-mode=1\n"
    )
    with sending(media["late_start"], f"rtp://127.0.0.1:{port}", "rtp"):
        source = open_patiently(str(sdp))
        frames = list(itertools.islice(source.frames(), 15))
        source.close()
    assert source.info.is_live
    assert len(frames) == 15
    assert frames[0].info.width == 320


def test_rtp_transport_stream(media, free_port):
    """MPEG-TS over RTP needs no description."""
    port = free_port(socket.SOCK_DGRAM)
    with sending(media["late_start"], f"rtp://127.0.0.1:{port}", "rtp_mpegts"):
        source = open_patiently(f"rtp://127.0.0.1:{port}")
        assert len(list(itertools.islice(source.frames(), 15))) == 15
        source.close()


@contextlib.contextmanager
def rtsp_server(path, udp):
    """An RTSP server for one client, RTP interleaved on its TCP connection; gives port and log.

    ``udp`` is a free port, for its own use.
    """
    heard: list[str] = []
    sdp = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
        "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track0\r\n"
    )
    answers = {
        "OPTIONS": ["Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"],
        "DESCRIBE": ["Content-Type: application/sdp", f"Content-Length: {len(sdp)}"],
        "SETUP": ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"],
        "PLAY": ["Session: 1"],
    }

    def forward(connection):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rtp:
            rtp.bind(("127.0.0.1", udp))
            rtp.settimeout(PATIENCE_SECONDS / 2)
            with sending(path, f"rtp://127.0.0.1:{udp}", "rtp"), contextlib.suppress(OSError):
                while True:
                    packet = rtp.recv(65536)
                    connection.sendall(b"$\x00" + len(packet).to_bytes(2, "big") + packet)

    def talk(connection):
        connection.settimeout(PATIENCE_SECONDS)
        while request := connection.recv(4096).decode("latin-1"):
            heard.append(request)
            method = request.split()[0]
            sequence = next(x for x in request.splitlines() if x.startswith("CSeq"))
            lines = ["RTSP/1.0 200 OK", sequence, *answers.get(method, []), "", ""]
            body = sdp if method == "DESCRIBE" else ""
            connection.sendall(("\r\n".join(lines) + body).encode())
            if method == "PLAY":
                forward(connection)
                return

    with tcp_server(talk) as port:
        yield port, heard


def test_rtsp_over_tcp(media, free_port):
    """An RTSP camera is read over its one TCP connection, live, until it is closed."""
    with rtsp_server(media["late_start"], free_port(socket.SOCK_DGRAM)) as (port, heard):
        source = open_patiently(f"rtsp://127.0.0.1:{port}/cam")
        frames = list(itertools.islice(source.frames(), 15))
        source.close()
    assert source.info.is_live
    assert (source.info.container, source.info.width) == ("rtsp", 320)
    assert len(frames) == 15
    assert "RTP/AVP/TCP" in next(r for r in heard if r.startswith("SETUP"))


def test_http_files_are_files(media):
    """A file over HTTP has a length, gives all its frames and is not live; nor is a picture."""
    with http_files(media["plain"].parent) as address:
        source = open_patiently(f"{address}/plain.mp4")
        assert len(list(source.frames())) == 24
        assert not source.info.is_live
        source.close()
        picture = open_patiently(f"{address}/picture_png.png")
        assert not picture.info.is_live
        assert len(list(picture.frames())) == 1
        picture.close()


@pytest.mark.parametrize("ends_well", [True, False])
def test_http_without_length_is_live(media, ends_well):
    """An endless transport stream over HTTP is live; where it breaks off, that is told last."""
    content = media["late_start"].read_bytes()
    head, tail = b"HTTP/1.1 200 OK\r\n", b""
    if ends_well:
        head += b"Transfer-Encoding: chunked\r\n\r\n" + f"{len(content):x}\r\n".encode()
        tail = b"\r\n0\r\n\r\n"
    else:
        head += b"\r\n"

    def stream(connection):
        connection.recv(4096)
        connection.sendall(head + content + tail)
        connection.shutdown(socket.SHUT_WR)

    with tcp_server(stream) as port:
        source = open_patiently(f"http://127.0.0.1:{port}/live")
        assert source.info.is_live
        seen = []
        fault = contextlib.nullcontext() if ends_well else pytest.raises(SourceUnavailable)
        with fault:
            seen.extend(source.frames())
        assert len(seen) == 24
        source.close()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("401 Unauthorized", "login"),
        ("403 Forbidden", "forbids"),
        ("404 Not Found", "no such stream"),
        ("503 Busy", "server failed"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_refusals_say_what_to_do(scheme, status, words):
    """401, 403, 404 and 5xx are told apart, without the password that was given."""

    def refuse(connection):
        request = connection.recv(4096).decode("latin-1")
        sequence = [line for line in request.splitlines() if line.startswith("CSeq")]
        version = "RTSP/1.0" if scheme == "rtsp" else "HTTP/1.1"
        lines = [f"{version} {status}", *sequence, "Content-Length: 0", "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode())

    with tcp_server(refuse) as port:
        url = f"{scheme}://admin:hunter2@127.0.0.1:{port}/live"
        with pytest.raises(SourceUnavailable, match=words) as caught:
            open_patiently(url)
    assert "hunter2" not in str(caught.value)
    assert f"127.0.0.1:{port}/live" in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "rtsp", "rtmp", "tcp"])
def test_a_server_that_never_answers_meets_the_deadline(scheme):
    """A connection that is accepted and then silent ends opening in time."""
    late = pytest.raises(SourceUnavailable, match=r"no data within 0\.7 s")
    with tcp_server(lambda connection: None) as port, late:
        open_in_vain(f"{scheme}://127.0.0.1:{port}/live")


@pytest.mark.parametrize("scheme", ["udp", "rtp"])
def test_silence_meets_the_deadline(scheme, free_port):
    """A port to which nobody sends ends opening in time."""
    port = free_port(socket.SOCK_DGRAM)
    with pytest.raises(SourceUnavailable, match=r"no data within 0\.7 s"):
        open_in_vain(f"{scheme}://127.0.0.1:{port}")


def test_a_silent_rtp_session_meets_the_deadline(tmp_path, free_port):
    """A session description without a sender ends opening in time."""
    sdp = tmp_path / "silent.sdp"
    port = free_port(socket.SOCK_DGRAM)
    sdp.write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )
    with pytest.raises(SourceUnavailable, match=r"within 0\.7 s"):
        open_in_vain(str(sdp))


@pytest.mark.parametrize("scheme", ["http", "https", "rtsp", "rtmp", "tcp"])
def test_a_refused_connection_says_so(scheme, refused):
    """A port without a server is told as refused, long before the deadline."""
    begin = time.monotonic()
    with pytest.raises(SourceUnavailable, match="refused"):
        open_patiently(f"{scheme}://127.0.0.1:{refused}/live")
    assert time.monotonic() - begin < SLACK_SECONDS


def test_no_tls_says_so():
    """https to a server that speaks no TLS hints at TLS."""
    plain = tcp_server(lambda c: c.sendall(b"HTTP/1.0 400 no\r\n\r\n"))
    with plain as port, pytest.raises(SourceUnavailable, match="TLS"):
        open_patiently(f"https://127.0.0.1:{port}/live")


def test_a_web_page_is_no_stream(tmp_path):
    """An HTML page where a stream was expected is not a video."""
    (tmp_path / "page.mp4").write_text("<html>" + "<p>hello</p>" * 500)
    with http_files(tmp_path) as address, pytest.raises(SourceUnsupported, match="no video"):
        open_patiently(f"{address}/page.mp4")


def test_a_stream_that_falls_silent_ends_in_an_error(media):
    """When data stops, frames() raises after the read timeout, having given what it had."""
    content = media["late_start"].read_bytes()

    def stall(connection):
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + content)

    with tcp_server(stall) as port:
        source = open_patiently(
            f"http://127.0.0.1:{port}/live",
            read_timeout_seconds=SHORT_SECONDS,
            options={"probesize": "20000", "analyzeduration": "100000"},
        )
        seen = []
        begin = time.monotonic()
        with pytest.raises(SourceUnavailable, match=r"no data within 0\.7 s"):
            seen.extend(f.info.index for f in source.frames())
        assert time.monotonic() - begin < SHORT_SECONDS + SLACK_SECONDS
        source.close()


def test_close_ends_a_blocked_read(media):
    """Closing from another thread ends frames() no later than the read timeout."""
    content = media["late_start"].read_bytes()

    def stall(connection):
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + content)

    with tcp_server(stall) as port:
        source = open_patiently(
            f"http://127.0.0.1:{port}/live",
            read_timeout_seconds=1.5,
            options={"probesize": "20000", "analyzeduration": "100000"},
        )
        threading.Timer(0.3, source.close).start()
        begin = time.monotonic()
        with contextlib.suppress(SourceUnavailable):
            list(source.frames())
        assert time.monotonic() - begin < 1.5 + SLACK_SECONDS
        source.close()


# SRT through a helper -------------------------------------------------------------------------


@pytest.fixture
def fake_helper(tmp_path, monkeypatch, media):
    """An srt-live-transmit that is a shell script: what it does is the test's to say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    real = shutil.which
    monkeypatch.setattr(
        "dgiqa_stream.sources._helper.shutil.which",
        lambda name: None if name == "ffmpeg" else real(name, path=str(folder)),
    )

    def install(script):
        path = folder / "srt-live-transmit"
        path.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
        path.chmod(0o755)
        return tmp_path / "pid"

    return install


def is_alive(pid_file):
    """Whether the helper's process is still there."""
    pid = int(pid_file.read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


posix = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


@posix
def test_srt_reads_its_helper(fake_helper, media):
    """What the helper writes is decoded as a live stream."""
    fake_helper(f"exec cat {media['late_start']}")
    source = open_patiently("srt://127.0.0.1:9000")
    assert source.info.is_live
    assert len(list(source.frames())) == 24
    source.close()


@posix
def test_srt_helper_ends_with_its_source(fake_helper, media):
    """A helper that would run forever is gone after close()."""
    pid = fake_helper(f"while :; do cat {media['late_start']} || exit; sleep 0.2; done")
    source = open_patiently("srt://127.0.0.1:9000")
    next(source.frames())
    source.close()
    assert not is_alive(pid)


@posix
def test_srt_helper_does_not_outlive_a_killed_process(fake_helper, media):
    """When our process is killed outright, the helper ends too."""
    pid = fake_helper(f"cat {media['late_start']}; exec sleep 60")
    code = (
        "import os, signal\n"
        "from dgiqa_stream.sources._helper import HelperSource\n"
        "from dgiqa_stream.config import SourceSettings\n"
        "s = HelperSource('srt://h:1', ['srt-live-transmit'], SourceSettings(), stream='s')\n"
        "next(s.frames())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == -9, ended.stderr
    assert not is_alive(pid)


@posix
def test_srt_silence_meets_the_deadline(fake_helper):
    """A helper that never writes ends opening in time, and is gone."""
    pid = fake_helper("exec sleep 60")
    with pytest.raises(SourceUnavailable, match=r"no data within 3 s"):
        open_in_vain("srt://127.0.0.1:9000", seconds=3.0)  # time to start, on a busy machine
    assert not is_alive(pid)


@posix
def test_srt_complaint_is_told_without_its_secret(fake_helper):
    """What the helper complains of is in the error, its passphrase is not."""
    url = "srt://127.0.0.1:9000?passphrase=hunter2hunter2"
    fake_helper('echo "cannot reach $4$3: connection refused" >&2; exit 1')
    with pytest.raises(SourceUnavailable, match="connection refused") as caught:
        open_patiently(url)
    assert "hunter2" not in str(caught.value)


def test_srt_complaint_has_the_address_once(fake_helper):
    """FFmpeg, too, begins with the address."""
    url = "srt://127.0.0.1:9000"
    fake_helper(f'echo "{url}: Input/output error" >&2; exit 1')
    with pytest.raises(SourceUnavailable, match="Input/output error") as caught:
        open_patiently(url)
    assert str(caught.value).count(url) == 1


@posix
def test_srt_deadline_is_not_told_as_the_helpers_fault(fake_helper):
    """A helper that we end says so ("Immediate exit requested"), which helps nobody."""
    said = 'echo "srt://x: Immediate exit requested" >&2'
    fake_helper(f"trap '{said}; exit 255' TERM; {said}; sleep 60 & wait")
    with pytest.raises(SourceUnavailable, match=r"no data within 3 s"):
        open_in_vain("srt://127.0.0.1:9000", seconds=3.0)


@posix
def test_srt_without_helper_names_the_packages(monkeypatch):
    """Without a helper the error names what to install."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceUnavailable, match="srt-tools"):
        open_patiently("srt://127.0.0.1:9000?passphrase=x")


@pytest.mark.servers
@pytest.mark.parametrize("receiver", ["srt-live-transmit", "ffmpeg"])
def test_srt_for_real(media, monkeypatch, missing_server, free_port, receiver):
    """An encrypted SRT stream sent by srt-live-transmit is received by either helper."""
    from dgiqa_stream.sources import _helper

    if not shutil.which("srt-live-transmit"):
        missing_server("srt-live-transmit", "srt-tools")
    if receiver == "ffmpeg" and _helper._ffmpeg_with_srt() is None:
        missing_server("ffmpeg with SRT", "ffmpeg")
    if receiver == "srt-live-transmit":
        monkeypatch.setattr(_helper, "_ffmpeg_with_srt", lambda: None)
    port, udp = free_port(), free_port(socket.SOCK_DGRAM)
    secret = "passphrase=hunter2hunter2"
    transmit = subprocess.Popen(
        ["srt-live-transmit", "-q", f"udp://:{udp}", f"srt://:{port}?mode=listener&{secret}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with sending(media["late_start"], f"udp://127.0.0.1:{udp}?pkt_size=1316", "mpegts"):
            source = open_patiently(f"srt://127.0.0.1:{port}?mode=caller&{secret}")
            frames = list(itertools.islice(source.frames(), 20))
            source.close()
    finally:
        transmit.kill()
        transmit.wait()
    assert len(frames) == 20
    assert frames[0].info.width == 320


# Cameras and third parties --------------------------------------------------------------------


def test_camera_reads_through_opencv(media):
    """The camera source, given a file, decodes it by OpenCV: right size, colours and times."""
    source = open_source(f"camera:{media['plain']}", SourceSettings(), stream="s")
    frames = list(source.frames())
    source.close()
    assert (source.info.width, source.info.height) == (320, 180)
    assert len(frames) == 24
    stamps = [f.info.pts_seconds for f in frames]
    assert stamps == pytest.approx([i / 25 for i in range(24)], abs=1e-3)
    red = frames[0].planes.samples[0][10:30, 10:60].astype(int).mean(axis=(0, 1))
    assert red == pytest.approx((200, 30, 30), abs=12)


def test_camera_that_is_not_there_says_so(capfd):
    """A missing camera is one line to the user, and none from OpenCV."""
    with pytest.raises(SourceUnavailable, match="camera:97: cannot be opened"):
        open_source("camera:97", SourceSettings(), stream="s")
    assert capfd.readouterr().err == ""


def test_other_packages_can_add_schemes(monkeypatch):
    """A scheme that is not ours is looked up among entry points, ours are not."""
    asked = []

    class Entry:
        def load(self):
            return lambda url, settings, *, stream: (url, stream)

    def fake(group, name):
        asked.append((group, name))
        return [Entry()]

    monkeypatch.setattr("dgiqa_stream.sources.entry_points_for", fake)
    assert open_source("ndi://studio", SourceSettings(), stream="a") == ("ndi://studio", "a")
    assert asked == [("dgiqa_stream.sources", "ndi")]
    open_source("pattern:clean", SourceSettings(), stream="a").close()
    assert len(asked) == 1


def test_nothing_is_left_open(media, free_port):
    """Opening, failing and closing leave no file descriptor and no thread behind."""

    def count():
        return len(list(Path("/proc/self/fd").iterdir())) if os.name == "posix" else 0

    open_source(str(media["plain"]), SourceSettings(), stream="s").close()
    before, threads = count(), set(threading.enumerate())
    for _ in range(5):
        open_source(str(media["plain"]), SourceSettings(), stream="s").close()
        with pytest.raises(SourceUnsupported):
            open_source(str(media["audio_only"]), SourceSettings(), stream="s")
        with pytest.raises(SourceUnavailable):
            open_in_vain(f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}", seconds=0.1)
    assert count() <= before  # what earlier tests left to the garbage collector may go meanwhile
    assert set(threading.enumerate()) <= threads
