"""Plays a clip again and again, as live MPEG-TS streams over UDP, each on its own clock.

    python benchmarks/_sender.py CLIP udp://127.0.0.1:5001 udp://127.0.0.1:5002 ...

Nothing is encoded: packets are copied, and sent when they are due. Streams begin a third of a
second apart, so that their key frames do not meet. The first line of its output is the Unix time at
which each stream's clock stands at 0, ``{"begins": [...]}``; it goes on until it is killed.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av

APART_SECONDS = 1 / 3
_LEAD_SECONDS = (
    1.0  # before the first packet; and what its stamps are raised by, as B-frames' are < 0
)
_CLOCK = Fraction(1, 90_000)


class Coded(NamedTuple):
    """A coded picture of the clip; stamps in seconds from its begin."""

    data: bytes
    pts_seconds: float
    dts_seconds: float
    is_key: bool


class Due(NamedTuple):
    """When a picture of a stream is to be sent, by Unix time."""

    at_seconds: float
    stream: int
    lap_seconds: float
    coded: Coded


def pictures_of(container: av.container.InputContainer) -> list[Coded]:
    """The clip, in decoding order."""
    (track,) = container.streams.video
    return [
        Coded(
            bytes(packet),
            float(packet.pts * track.time_base),
            float(packet.dts * track.time_base),
            packet.is_keyframe,
        )
        for packet in container.demux(track)
        if packet.size
    ]


def schedule(pictures: list[Coded], stream: int, begin_seconds: float) -> Iterator[Due]:
    """One stream, without end."""
    stamps = [coded.pts_seconds for coded in pictures]
    frame_seconds = (max(stamps) - min(stamps)) / (len(stamps) - 1)
    for lap in itertools.count():
        lap_seconds = _LEAD_SECONDS + lap * frame_seconds * len(stamps)
        for coded in pictures:
            yield Due(begin_seconds + lap_seconds + coded.dts_seconds, stream, lap_seconds, coded)


def send(clip: str, addresses: list[str]) -> None:
    """Send until killed."""
    outputs = []
    with av.open(clip) as container:
        pictures = pictures_of(container)
        for address in addresses:
            options = {"mpegts_copyts": "1", "flush_packets": "1"}
            output = av.open(f"{address}?pkt_size=1316", "w", format="mpegts", options=options)
            output.add_stream_from_template(container.streams.video[0])
            outputs.append(output)
    now = time.time()
    begins = [now + number * APART_SECONDS for number in range(len(addresses))]
    print(json.dumps({"begins": begins}), flush=True)
    for due in heapq.merge(*(schedule(pictures, n, begin) for n, begin in enumerate(begins))):
        time.sleep(max(0.0, due.at_seconds - time.time()))
        packet = av.Packet(due.coded.data)
        packet.stream = outputs[due.stream].streams.video[0]
        packet.time_base = _CLOCK
        packet.pts = round((due.lap_seconds + due.coded.pts_seconds) / _CLOCK)
        packet.dts = round((due.lap_seconds + due.coded.dts_seconds) / _CLOCK)
        packet.is_keyframe = due.coded.is_key
        outputs[due.stream].mux_one(packet)


if __name__ == "__main__":
    send(sys.argv[1], sys.argv[2:])
