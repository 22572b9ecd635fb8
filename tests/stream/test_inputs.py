"""inputs: which files a command means."""

from __future__ import annotations

import pytest

from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.inputs import (
    STILL_SUFFIXES,
    VIDEO_SUFFIXES,
    expand,
    is_folder,
    is_still_path,
    refuse_folder,
)


@pytest.fixture
def folder(tmp_path):
    """Media two levels deep, in upper and lower case, among other files."""
    for name in ("b.png", "a.MP4", "sub/deep/c.jpg", "notes.txt", "sub/x.json", "z.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "trap.mp4").mkdir()
    return tmp_path


def test_a_folder_is_its_media_sorted(folder):
    """Pictures and videos at any depth are found by suffix in any case, sorted, and nothing else:
    no text, and no folder that is named like a video.
    """
    names = ["a.MP4", "b.png", "sub/deep/c.jpg", "z.mkv"]
    assert expand([str(folder)]) == [str(folder / name) for name in names]
    assert expand([f"file://{folder}"]) == [str(folder / name) for name in names]


def test_the_order_of_inputs_is_kept(folder):
    """Files, URLs and folders stay in the order given; what is given twice is there twice."""
    first = str(folder / "z.mkv")
    urls = ["rtsp://cam/live", "-", "camera:0", "missing.mp4"]
    assert expand([first, *urls, str(folder / "sub"), first]) == [
        first,
        *urls,
        str(folder / "sub/deep/c.jpg"),
        first,
    ]


def test_an_empty_folder_is_refused_in_its_turn(folder):
    """A folder without media stays in the list, and scoring it is an error that names it."""
    empty = str(folder / "trap.mp4")
    assert expand([empty]) == [empty]
    with pytest.raises(SourceUnsupported, match=r"trap\.mp4: no picture or video in this folder"):
        refuse_folder(empty)


def test_what_is_no_folder_passes(folder):
    """Files, URLs and names too long to exist are not taken for folders."""
    for path in (str(folder / "b.png"), "rtsp://cam/live", "a" * 5000, "x\0y", "missing"):
        assert not is_folder(path)
        refuse_folder(path)


def test_suffixes_are_told_apart():
    """No suffix is both a still's and a video's, and case does not matter."""
    assert not STILL_SUFFIXES & VIDEO_SUFFIXES
    assert all(s == s.lower() and s.startswith(".") for s in STILL_SUFFIXES | VIDEO_SUFFIXES)
    assert is_still_path("/a/B.PNG")
    assert not is_still_path("/a.png/b.mp4")
    assert not is_still_path("-")
