"""Which files a command means: folders walked, media known by their names."""

from __future__ import annotations

from pathlib import Path

from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.urls import scheme_of

STILL_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".dds",
        ".dpx",
        ".exr",
        ".heic",
        ".heif",
        ".j2k",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".jxl",
        ".pbm",
        ".pgm",
        ".png",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
VIDEO_SUFFIXES = frozenset(
    [
        ".264",
        ".265",
        ".3g2",
        ".3gp",
        ".asf",
        ".av1",
        ".avi",
        ".flv",
        ".gif",
        ".h264",
        ".h265",
        ".hevc",
        ".ivf",
        ".m2ts",
        ".m2v",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".nut",
        ".obu",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)


def is_still_path(path: str) -> bool:
    """Whether the name is that of a still picture."""
    return Path(path).suffix.lower() in STILL_SUFFIXES


def expand(paths: list[str]) -> list[str]:
    """Folders replaced by the media in them, recursively and sorted; the rest as given.

    Raises :class:`SourceUnsupported` where a folder holds no media.
    """
    found: list[str] = []
    for path in paths:
        if scheme_of(path) != "file" or not Path(path).is_dir():
            found.append(path)
            continue
        media = sorted(
            str(p)
            for p in Path(path).rglob("*")
            if p.suffix.lower() in STILL_SUFFIXES | VIDEO_SUFFIXES and p.is_file()
        )
        if not media:
            raise SourceUnsupported(
                f"{path}: no picture or video in this folder or below it; known suffixes: "
                f"{' '.join(sorted(STILL_SUFFIXES | VIDEO_SUFFIXES))}"
            )
        found += media
    return found
