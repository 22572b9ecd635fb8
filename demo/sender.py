"""Plays the clip as a live stream, MPEG-TS over UDP, and damages it on the way.

    python demo/sender.py udp://127.0.0.1:5004

Prints a JSON line when the damage changes: ``{"seconds": 8.0, "damage": "heavy compression"}``.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from numpy.typing import NDArray

CLIP = Path(__file__).parent / "room.mp4"
Rgb = NDArray[np.uint8]


class Phase(NamedTuple):
    """A stretch of the broadcast."""

    seconds: float
    damage: str


PHASES = (
    Phase(8.0, "none"),
    Phase(6.0, "heavy compression"),
    Phase(5.0, "none"),
    Phase(5.0, "out of focus"),
    Phase(4.0, "none"),
    Phase(4.0, "packet loss"),
    Phase(4.0, "none"),
)


def frames_of_clip() -> list[Rgb]:
    """The clip's pictures, RGB (H, W, 3)."""
    with av.open(str(CLIP)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def rate_of_clip() -> Fraction:
    """The clip's frames per second."""
    with av.open(str(CLIP)) as container:
        return container.streams.video[0].average_rate or Fraction(25)


def compressed(frames: list[Rgb]) -> list[Rgb]:
    """The frames after a trip through x264 at CRF 46."""
    coded = io.BytesIO()
    with av.open(coded, "w", format="mp4") as container:
        stream = _add_video(container, frames[0], Fraction(25), {"crf": "46", "preset": "veryfast"})
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    coded.seek(0)
    with av.open(coded) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _add_video(container, like: Rgb, rate: Fraction, options: dict[str, str]):
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = like.shape[:2]
    stream.pix_fmt = "yuv420p"
    return stream


def cut_short(packet: av.Packet) -> av.Packet:
    """The first third of a coded picture: what arrives when the network drops the rest."""
    rest = av.Packet(bytes(packet)[: max(64, packet.size // 3)])
    rest.pts, rest.dts, rest.time_base = packet.pts, packet.dts, packet.time_base
    rest.stream = packet.stream
    return rest


def broadcast(rate: Fraction) -> Iterator[tuple[Rgb, str]]:
    """Every picture that is sent, with the damage it is sent under."""
    clip = frames_of_clip()
    number = 0
    for phase in PHASES:
        count = round(phase.seconds * rate)
        pictures = [clip[(number + i) % len(clip)] for i in range(count)]
        number += count
        if phase.damage == "heavy compression":
            pictures = compressed(pictures)
        for picture in pictures:
            if phase.damage == "out of focus":
                yield cv2.GaussianBlur(picture, (0, 0), 3.0), phase.damage
            else:
                yield picture, phase.damage


def send(url: str) -> None:
    """Send the broadcast at its own pace."""
    rate = rate_of_clip()
    options = {"crf": "17", "preset": "veryfast", "tune": "zerolatency", "g": str(round(2 * rate))}
    pictures = broadcast(rate)
    first, _ = next(pictures)
    lossy = np.random.default_rng(7)
    told = ""
    with av.open(f"{url}?pkt_size=1316", "w", format="mpegts") as container:
        stream = _add_video(container, first, rate, options)
        began = time.monotonic()
        for number, (picture, damage) in enumerate([(first, "none"), *pictures]):
            seconds = float(number / rate)
            if damage != told:
                told = damage
                sys.stdout.write(json.dumps({"seconds": seconds, "damage": damage}) + "\n")
                sys.stdout.flush()
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                if damage == "packet loss" and lossy.random() < 0.5:
                    packet = cut_short(packet)
                container.mux(packet)
            time.sleep(max(0.0, began + seconds - time.monotonic()))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    send(sys.argv[1])
