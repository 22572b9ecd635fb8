"""OpenCV's calls stay in the caller's thread, unless the host says otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CUT = """
import numpy as np
from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.scorer import planes_of_rgb
picture = planes_of_rgb(np.zeros((720, 1280, 3), np.uint8))
cut_view(picture, ViewSpec("whole", "whole", 224, 224, reduction="halved-smoothed"))
import cv2
print(cv2.getNumThreads())
"""


@pytest.mark.parametrize(
    ("host", "expected"),
    [("", "1"), ("import cv2; cv2.setNumThreads(3)\n", "3")],
    ids=["ours alone", "a host's"],
)
def test_opencv_threads(host: str, expected: str) -> None:
    """Cutting a view in a fresh process, with and without a host that has OpenCV already."""
    done = subprocess.run(
        [sys.executable, "-c", host + _CUT], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
