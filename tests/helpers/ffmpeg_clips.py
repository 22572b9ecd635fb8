"""Clips made and decoded by FFmpeg's own program, decoding's outside truth; on pytest's path."""

from __future__ import annotations

import json
import subprocess

import media_servers as servers
import numpy as np

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source

X264 = "-c:v libx264 -preset ultrafast"
X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=none:pools=none:frame-threads=1"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8"
RAW = ("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt")


def make(folder, clips, *, seconds=0.4, rate=25):
    """Clips of a moving, noisy pattern, all by one run of FFmpeg's program; name to path.

    ``clips`` has name to (encoding, suffix, size, filters).
    """
    pattern = f"testsrc2=size=320x240:rate={rate}:duration={seconds}"
    noise = "noise=all_strength=20:all_flags=t,format=rgb24"
    command = ["-f", "lavfi", "-i", f"{pattern},{noise}"]
    paths = {}
    for name, (encoding, suffix, (width, height), filters) in clips.items():
        paths[name] = folder / f"{name}.{suffix}"
        sized = f"scale={width}:{height}:flags=neighbor,{filters}"
        command += ["-map", "0:v", "-vf", sized, *encoding.split(), paths[name]]
    servers.ffmpeg(*command)
    return paths


def make_one(path, encoding, *, size=(320, 180), seconds=0.4, filters="null", rate=25):
    """One such clip."""
    clip = {path.stem: (encoding, path.suffix[1:], size, filters)}
    return make(path.parent, clip, seconds=seconds, rate=rate)[path.stem]


def raw_all(folder, wanted):
    """Path to pixel format: the packed frames of each, all by one run of FFmpeg's program."""
    inputs = [part for path in wanted for part in ("-i", path)]
    outputs = [
        part
        for number, (path, pix_fmt) in enumerate(wanted.items())
        for part in ("-map", f"{number}:v:0", *RAW, pix_fmt, folder / f"{path.name}.raw")
    ]
    servers.ffmpeg(*inputs, *outputs)
    return {path: (folder / f"{path.name}.raw").read_bytes() for path in wanted}


def raw(path, pix_fmt):
    """The packed frames of one."""
    return servers.ffmpeg("-i", path, "-map", "0:v:0", *RAW, pix_fmt, "-")


def read(path, **settings):
    """The stream's info and all its frames."""
    source = open_source(str(path), SourceSettings(**settings), stream="s")
    try:
        return source.info, list(source.frames())
    finally:
        source.close()


def packed(frames):
    """Our planes, packed."""
    return b"".join(plane.tobytes() for f in frames for plane in f.planes.samples)


def probed(path, *, filters=None):
    """What ffprobe tells of each frame in the order of presentation, perhaps after filters."""
    shown = [str(path)] if filters is None else ["-f", "lavfi", f"movie={path},{filters}"]
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_frames", "-of", "json"]
    done = subprocess.run([*command, *shown], capture_output=True, check=True)
    return json.loads(done.stdout)["frames"]


def difference(ours, theirs, bit_depth):
    """Of packed samples, one by one."""
    assert len(ours) == len(theirs)
    kind = np.uint8 if bit_depth == 8 else np.dtype("<u2")
    return np.abs(np.frombuffer(ours, kind).astype(int) - np.frombuffer(theirs, kind))
