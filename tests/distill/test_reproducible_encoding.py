"""libx264 gives one stream for one input, whatever the memory held before."""

from __future__ import annotations

import gc
import io
from itertools import chain

import av
import numpy as np
import pytest

from distill.data import codecs, damage, degrade
from distill.data.degradations import degradation

CRF = 35


def packets(coded: bytes) -> list[bytes]:
    """What was coded: the container's own fields may hold random numbers."""
    with av.open(io.BytesIO(coded)) as container:
        return [bytes(packet) for packet in container.demux(video=0)]


def by_ladder(frames):
    """As shards are made."""
    return packets(codecs.encode(frames, "h264", CRF))


def by_pack(frames):
    """As packs are made."""
    return packets(degrade.encode(frames, "libx264", CRF))


def by_transmission(frames):
    """What packets are lost from."""
    return damage._slices(frames)


def disturb(rng: np.random.Generator) -> None:
    """Leave freed blocks of many sizes with random bytes in them."""
    held = [rng.bytes(int(n)) for n in chain(rng.integers(1_000, 90_000, 60), (900_000, 3_000_000))]
    for i in rng.permutation(len(held)):
        held[i] = b""
    gc.collect()


@pytest.mark.parametrize("size_px", [240, 576])
@pytest.mark.parametrize("encode", [by_ladder, by_pack, by_transmission])
def test_one_input_gives_one_stream(make_picture, encode, size_px):
    """Eight encodings of a square among those that varied are the same bytes."""
    step_px = degradation("h264").step_px
    frames = damage.moving(make_picture(4, size_px, size_px), num_frames=5, step_px=step_px)
    rng = np.random.default_rng(size_px)
    streams = []
    for _ in range(8):
        disturb(rng)
        streams.append(encode(frames))
    assert streams[0]
    assert all(stream == streams[0] for stream in streams)
