"""OpenCV as the runtime wants it: ``from dgiqa_stream.opencv import cv2``, where it is needed.

OpenCV hands a picture to a pool of threads that spin on when their part is done. Beside a decoder
and an inference that have every core to do, that costs more than it saves; so where this package
is the first to import OpenCV, its calls stay in the caller's thread. A host that has imported it
before keeps the number of threads that it has chosen.
"""

from __future__ import annotations

import sys

_has_host_imported = "cv2" in sys.modules

import cv2  # noqa: E402, TID253

if not _has_host_imported:
    cv2.setNumThreads(1)

__all__ = ["cv2"]
