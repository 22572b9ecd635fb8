"""OpenCV as the runtime wants it: ``from dgiqa_stream.opencv import cv2``, where it is needed.

OpenCV hands a picture to a pool of threads that spin on when their part is done. Beside a decoder
and an inference that have every core to do, that costs more than it saves; so where this package
is the first to import OpenCV, its calls stay in the caller's thread. A host that has imported it
before keeps the number of threads that it has chosen.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cv2

__all__ = ["cv2"]


def __getattr__(name: str) -> Any:
    """Import OpenCV when it is first asked for, which takes a tenth of a second."""
    if name != "cv2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    has_host_imported = "cv2" in sys.modules
    import cv2

    if not has_host_imported:
        cv2.setNumThreads(1)
    globals()["cv2"] = cv2
    return cv2
