"""Makes the 1080p30 reference clips of the benchmarks: real clips side by side, x264 medium CRF 23.

    python benchmarks/make_clip.py CLIP... -o reference_1080p30.mp4 --seconds 20
    python benchmarks/make_clip.py CLIP... -o moving_1080p30.mp4 --megabits-per-second 6

With a rate it is coded as a live encoder does: at most that, over each second. Each clip fills a
quarter of the picture at its own resolution, repeated or cut where it does not fit, so that no
scaling softens what the encoder sees. One clip fills all four quarters.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, FPS = 1920, 1080, 30


def endless(path: Path) -> Iterator[NDArray[np.uint8]]:
    """A clip's frames as RGB quarters (540, 960, 3), again and again."""
    while True:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                rgb = frame.to_ndarray(format="rgb24")
                down, across = -(-540 // rgb.shape[0]), -(-960 // rgb.shape[1])
                yield np.tile(rgb, (down, across, 1))[:540, :960]


def write(
    clips: list[Path],
    output: Path,
    seconds: float,
    keyframe_seconds: float,
    megabits_per_second: float | None = None,
) -> None:
    """Encode the mosaic; the encoder places the key frames where ``keyframe_seconds`` is 0."""
    options = {"preset": "medium", "crf": "23"}
    if megabits_per_second:
        rate = f"{megabits_per_second}M"
        options = {"preset": "medium", "b": rate, "maxrate": rate, "bufsize": rate}
    if keyframe_seconds:
        options["g"] = str(round(keyframe_seconds * FPS))
    quarters = [endless(path) for path, _ in zip(itertools.cycle(clips), range(4), strict=False)]
    with av.open(str(output), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.colorspace = 1
        stream.codec_context.color_range = 1
        for _ in range(round(seconds * FPS)):
            a, b, c, d = (next(q) for q in quarters)
            picture = np.vstack([np.hstack([a, b]), np.hstack([c, d])])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--keyframe-seconds", type=float, default=0.0, help="At most so far apart.")
    parser.add_argument("--megabits-per-second", type=float, help="In place of CRF 23.")
    arguments = parser.parse_args()
    write(
        arguments.clips,
        arguments.output,
        arguments.seconds,
        arguments.keyframe_seconds,
        arguments.megabits_per_second,
    )


if __name__ == "__main__":
    main()
