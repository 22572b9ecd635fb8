"""Real servers and senders on loopback: each in a process and a folder of its own, ready when its
block begins and gone when it ends; on pytest's path.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

READY_SECONDS = 40.0
"""For a server to start on a busy machine; none needs more than two seconds on an idle one."""
DEBIAN_PYTHON = "/usr/bin/python3"  # python3-gi is for the system's interpreter only
FFMPEG = ("ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", "-y")
_NGINX_RTMP = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
_NGINX = """
load_module {module};
daemon off;
master_process off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ }}
rtmp {{
  access_log off;
  server {{
    listen 127.0.0.1:{port};
    application live {{ live on; }}
  }}
}}
"""


# What there is ------------------------------------------------------------------------------


def require_ffmpeg(missing: Callable[[str, str], None]) -> None:
    """Skip (or fail, where servers are promised) without FFmpeg's own programs."""
    for program in ("ffmpeg", "ffprobe"):
        if not shutil.which(program):
            missing(program, "ffmpeg")


def require_rtsp_server(missing: Callable[[str, str], None]) -> None:
    """Skip or fail without GStreamer's RTSP server and the two elements that it is given."""
    code = (
        "import gi\n"
        "gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0')\n"
        "from gi.repository import Gst, GstRtspServer\n"
        "Gst.init(None)\n"
        "assert Gst.ElementFactory.find('qtdemux') and Gst.ElementFactory.find('rtph264pay')\n"
    )
    asked = [DEBIAN_PYTHON, "-c", code]
    if not Path(DEBIAN_PYTHON).exists() or _fails(asked):
        missing(
            "GStreamer's RTSP server",
            "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good",
        )


def require_rtmp_server(missing: Callable[[str, str], None]) -> None:
    """Skip or fail without nginx and its RTMP module."""
    if not _nginx() or not _NGINX_RTMP.exists():
        missing("nginx with RTMP", "nginx libnginx-mod-rtmp")


def _fails(command: Sequence[str]) -> bool:
    quiet = subprocess.DEVNULL
    return subprocess.run(command, stdout=quiet, stderr=quiet, check=False).returncode != 0


def _nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


# Processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, *, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, all of which is killed at the end of the block.

    It is also killed when this process is. What it says is in ``said`` in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [*tied, *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=said if stdout is None else stdout,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_until(
    is_ready: Callable[[], object], what: str, *, process: subprocess.Popen[bytes], folder: Path
) -> None:
    """Return when it is; an AssertionError with what the process said when it ends before."""
    end = time.monotonic() + READY_SECONDS
    while not is_ready():
        said = (folder / "said").read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"{what} ended with {process.returncode}: {said}"
        assert time.monotonic() < end, f"{what} is not ready after {READY_SECONDS:g} s: {said}"
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# Servers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def rtsp_server(clip: Path, folder: Path, *, port: int = 0) -> Iterator[int]:
    """``rtsp_server.py`` with this clip; gives its port, on which it answers."""
    script = Path(__file__).with_name("rtsp_server.py")
    command = [DEBIAN_PYTHON, str(script), str(clip), str(port)]
    with running(command, folder, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = _first_line(process.stdout)
        said = (folder / "said").read_text(errors="replace")
        assert line, f"the RTSP server said no port: {said}"
        wait_until(
            lambda: _answers_rtsp(int(line)), "the RTSP server", process=process, folder=folder
        )
        yield int(line)


def _first_line(pipe: IO[bytes]) -> bytes:
    """A line, or nothing where the process ends; a process that hangs is killed by the caller."""
    timer = threading.Timer(READY_SECONDS, pipe.close)
    timer.start()
    try:
        return pipe.readline()
    except ValueError:  # closed by the timer
        return b""
    finally:
        timer.cancel()


def _answers_rtsp(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), 5) as connection,
    ):
        address = f"rtsp://127.0.0.1:{port}/open"
        connection.sendall(f"OPTIONS {address} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
        return connection.recv(4096).startswith(b"RTSP/1.0 200")
    return False


@contextlib.contextmanager
def rtmp_server(port: int, folder: Path) -> Iterator[str]:
    """nginx with its RTMP module; gives the address of the application that takes live streams."""
    folder.mkdir(parents=True, exist_ok=True)
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(module=_NGINX_RTMP, user=user, folder=folder, port=port))
    command = [_nginx() or "nginx", "-p", str(folder), "-c", str(config), "-e", "stderr"]
    with running(command, folder) as process:
        wait_until(lambda: accepts(port), "nginx", process=process, folder=folder)
        yield f"rtmp://127.0.0.1:{port}/live"


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    """Files over HTTP, without a line per request."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def http_files(folder: Path) -> Iterator[str]:
    """A folder over HTTP; gives the address."""
    handler = functools.partial(QuietFiles, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# Senders and references ---------------------------------------------------------------------


@contextlib.contextmanager
def sending(
    clip: Path, target: str, muxer: str, folder: Path, *options: str, pace: float = 1.0
) -> Iterator[subprocess.Popen[bytes]]:
    """FFmpeg's own program sends a clip's packets over and over, at ``pace`` times real time."""
    source = ["-readrate", str(pace), "-stream_loop", "-1", "-i", str(clip)]
    command = [*FFMPEG, *source, "-map", "0:v", "-c", "copy", *options, "-f", muxer, target]
    with running(command, folder) as process:
        yield process


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    """What FFmpeg's own program writes to its standard output."""
    command = [*(part for part in FFMPEG if part != "-nostdin"), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def frame_digests(clip: Path) -> list[str]:
    """MD5 of each frame's samples, as FFmpeg's own program decodes them."""
    lines = ffmpeg("-i", clip, "-map", "0:v", "-fps_mode", "passthrough", "-f", "framemd5", "-")
    rows = (line for line in lines.decode().splitlines() if not line.startswith("#"))
    return [row.rpartition(",")[2].strip() for row in rows]


def digest(samples: Sequence[object]) -> str:
    """MD5 of planes, one after the other, as FFmpeg's program counts it."""
    return hashlib.md5(b"".join(plane.tobytes() for plane in samples)).hexdigest()  # type: ignore[attr-defined]
