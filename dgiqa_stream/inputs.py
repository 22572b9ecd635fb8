"""Which files a command means: folders walked, media known by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dgiqa_stream.errors import ConfigError, SourceUnsupported
from dgiqa_stream.urls import path_of, scheme_of

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

    A folder without media stays, for :func:`refuse_folder` to say so in its turn.
    """
    found: list[str] = []
    for path in paths:
        found += (_media_in(path_of(path)) or [path]) if is_folder(path) else [path]
    return found


def refuse_empty(path: str) -> None:
    """Raise :class:`ConfigError` for a path or URL without a name, as an unset variable gives."""
    if path.strip() == "" or path.lower() in ("file:", "file://"):
        raise ConfigError(f"{path!r} names nothing: is a variable unset? The current folder is '.'")


def is_folder(path: str) -> bool:
    """Whether it names a folder of this machine."""
    try:
        return scheme_of(path) == "file" and path_of(path).is_dir()
    except (OSError, ValueError):  # too long for a name, say: opening it tells
        return False


def refuse_folder(path: str) -> None:
    """Raise :class:`SourceUnsupported` for a folder that :func:`expand` found no media in."""
    if is_folder(path):
        raise SourceUnsupported(
            f"{path}: no picture or video in this folder or below it; known suffixes: "
            f"{' '.join(sorted(STILL_SUFFIXES | VIDEO_SUFFIXES))}"
        )


def _media_in(folder: Path) -> list[str]:
    return sorted(
        str(p)
        for p in folder.rglob("*")
        if p.suffix.lower() in STILL_SUFFIXES | VIDEO_SUFFIXES and p.is_file()
    )


_NO_FILES = ("", "-")


def refuse_overwriting(output: str, inputs: list[str]) -> None:
    """Raise :class:`ConfigError` where the output is one of the inputs: writing would destroy it.

    ``inputs`` may be URLs; ``-`` and an empty output write no file.
    """
    if output in _NO_FILES:
        return
    target = Path(output).resolve()
    for path in inputs:
        if scheme_of(path) == "file" and path_of(path).resolve() == target:
            raise ConfigError(f"output {output} is the input {path}: choose another name")


def refuse_same_file(outputs: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` where two outputs, by their settings' names, are one file."""
    taken: dict[Path, str] = {}
    for name, output in outputs.items():
        target = Path(output).resolve()
        if output in _NO_FILES or not (target.is_file() or not target.exists()):  # a device, say
            continue
        if target in taken:
            raise ConfigError(
                f"{taken[target]} and {name} = {output} would be the same file: name another"
            )
        taken[target] = name
