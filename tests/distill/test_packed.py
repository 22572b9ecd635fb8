"""Packs: what goes in comes out, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import cv2
import msgspec
import numpy as np
import pytest

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import make_batch
from dgiqa_stream.sources import open_source
from dgiqa_stream.types import ColorMatrix, Planes
from distill.data.build import read_picture
from distill.data.packed import Pack, Record, as_planes_420, write_pack

ABOUT = {"made_by": "a test", "settings": {"seed": 1}}


def random_planes(seed: int, height: int, width: int) -> Planes:
    """Noise in the form that a pack stores."""
    rng = np.random.default_rng(seed)
    shapes = (height, width), *[(height // 2, width // 2)] * 2
    samples = tuple(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
    return Planes(samples, matrix=ColorMatrix.BT601, full_range=True)


def test_what_is_written_is_read_back(tmp_path):
    """Planes of several sizes, their records and the pack's origin return bit for bit."""
    sizes = [(64, 96), (32, 32), (50, 34)]
    pictures = [random_planes(i, *size) for i, size in enumerate(sizes)]
    records = [
        Record("a", "a", "train", mos=0.25),
        Record("b", "b", "validation", mos=1.0),
        Record("c/blur/2", "c", "train", degradation="blur", level=2),
    ]
    assert write_pack(tmp_path, zip(records, pictures, strict=True), **ABOUT) == 3
    pack = Pack(tmp_path)
    assert (pack.index.made_by, pack.index.settings) == ("a test", {"seed": 1})
    for record, stored, planes, size in zip(records, pack.records, pictures, sizes, strict=True):
        placed = {"height": size[0], "width": size[1], "offset": stored.offset}
        assert stored == msgspec.structs.replace(record, **placed)
        read = pack.planes(stored)
        assert (read.matrix, read.full_range, read.size) == (ColorMatrix.BT601, True, size)
        for mine, theirs in zip(read.samples, planes.samples, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("height", "width"), [(65, 97), (64, 97), (65, 96)])
def test_odd_sizes_are_cut_to_even(tmp_path, make_picture, height, width):
    """A side of odd length loses its last row or column and nothing else."""
    rgb = make_picture(1, height, width)
    write_pack(tmp_path, [(Record("a", "a", "train"), as_planes_420(rgb))], **ABOUT)
    pack = Pack(tmp_path)
    planes = pack.planes(pack.records[0])
    assert planes.size == (height & ~1, width & ~1)
    luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[: height & ~1, : width & ~1, 0]
    np.testing.assert_array_equal(planes.samples[0], luma)


@pytest.mark.parametrize("size", [(63, 95), (64, 96)])
def test_other_planes_are_converted(tmp_path, make_picture, size):
    """RGB of any size is stored as 4:2:0 that shows the same picture, to 4:2:0's loss of colour."""
    rgb = make_picture(2, *size)
    picture = Record("a", "a", "train"), Planes((rgb,), full_range=True)
    write_pack(tmp_path, [picture], **ABOUT)
    pack = Pack(tmp_path)
    stored = pack.planes(pack.records[0])
    luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[: stored.size[0], : stored.size[1], 0]
    assert np.abs(stored.samples[0].astype(int) - luma).max() <= 1


def jpeg_file(path, rgb, sampling):
    """A JPEG of a given chroma sampling."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)


def views_as_served(path, views):
    """The views that the runtime's own reader gives of a file."""
    source = open_source(str(path), SourceSettings(), stream="a")
    try:
        return make_batch([next(source.frames()).planes], views).views
    finally:
        source.close()


def views_as_trained(folder, path, views):
    """The views that a pack of the file gives."""
    write_pack(folder, [(Record("a", "a", "train"), read_picture(path))], **ABOUT)
    pack = Pack(folder)
    return make_batch([pack.planes(pack.records[0])], views).views


def test_training_sees_what_serving_sees(tmp_path, make_picture, small_views):
    """Views cut from the pack are bit for bit those that the runtime cuts from the same JPEG."""
    jpeg_file(tmp_path / "a.jpg", make_picture(3, 150, 200), cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)
    trained = views_as_trained(tmp_path / "pack", tmp_path / "a.jpg", small_views)
    for name, view in views_as_served(tmp_path / "a.jpg", small_views).items():
        np.testing.assert_array_equal(trained[name], view)


def test_other_jpegs_differ_by_their_colour_alone(tmp_path, make_picture, small_views):
    """A 4:4:4 JPEG loses colour resolution in the pack: its reduced view moves by 4 steps at most,
    half a step in the mean.
    """
    jpeg_file(tmp_path / "a.jpg", make_picture(4, 150, 200), cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    trained = views_as_trained(tmp_path / "pack", tmp_path / "a.jpg", small_views)
    served = views_as_served(tmp_path / "a.jpg", small_views)
    gap = np.abs(trained["whole"].astype(int) - served["whole"])
    assert gap.mean() < 0.5
    assert gap.max() <= 4


WRITE_THEN_DIE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from distill.data.packed import Record, as_planes_420, write_pack

def pictures():
    for i in range(3):
        yield Record(str(i), str(i), "train"), as_planes_420(np.full((32, 32, 3), i, np.uint8))
    os.kill(os.getpid(), signal.SIGKILL)

write_pack(Path(sys.argv[1]), pictures(), made_by="", settings={})
"""


def test_a_killed_write_leaves_no_pack(tmp_path):
    """After a SIGKILL among the pictures the folder is refused, with the command that makes it."""
    killed = subprocess.run(
        [sys.executable, "-c", WRITE_THEN_DIE, str(tmp_path)], check=False, env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "planes.u8").exists()
    with pytest.raises(SourceError, match="dgiqa-distill data"):
        Pack(tmp_path)


def test_a_new_write_never_meets_an_old_index(tmp_path, monkeypatch):
    """Between the new planes and the new index there is no index, so no mix is ever read."""
    picture = Record("a", "a", "train"), random_planes(1, 32, 32)
    write_pack(tmp_path, [picture], **ABOUT)

    def die(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(msgspec.json, "format", die)
    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path, [(picture[0], random_planes(2, 32, 32))], **ABOUT)
    with pytest.raises(SourceError, match="no whole pack"):
        Pack(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text.replace(b"dgiqa.pack/1", b"dgiqa.pack/9"), "dgiqa.pack/9"),
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: b"\xff\xfe" + text, "malformed"),
        (lambda text: b"[]", "object"),
        (lambda text: text.replace(b'"height": 32', b'"height": 34'), "1536 bytes"),
    ],
    ids=["schema", "cut", "not text", "list", "sizes"],
)
def test_a_damaged_index_is_one_error(tmp_path, damage, reason):
    """An index that is not this schema, not JSON or not of these planes is refused by name."""
    write_pack(tmp_path, [(Record("a", "a", "train"), random_planes(1, 32, 32))], **ABOUT)
    index = tmp_path / "index.json"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(SourceError, match=reason) as caught:
        Pack(tmp_path)
    assert "\n" not in str(caught.value)
    assert "dgiqa-distill data" in str(caught.value)
