"""Which files a command means: folders, patterns and lists; media are known by their names."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Mapping
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
    """Lists (``@list.txt``), folders and patterns replaced by what they mean; the rest as given.

    Folders and patterns give media, recursively and with ``**``, sorted; a pattern that ends in a
    suffix of its own gives all files it matches. A file of that very name comes before a list or
    pattern. A folder or pattern without media stays, for :func:`refuse_folder` and
    :func:`refuse_pattern` to say so in its turn. Raises :class:`ConfigError` for a list that cannot
    be read or is empty.
    """
    found: list[str] = []
    for path in _with_lists_read(paths):
        if is_folder(path):
            found += _media_in(path_of(path)) or [path]
        else:
            found += (_matches_of(path) if _is_pattern(path) else []) or [path]
    return found


def lists_among(paths: Iterable[str]) -> list[str]:
    """The files named by ``@``."""
    return [path[1:] for path in paths if _is_list(path) and path != _LIST_FROM_STDIN]


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


def refuse_pattern(path: str) -> None:
    """Raise :class:`SourceUnsupported` for a pattern that :func:`expand` found no media for."""
    if _is_pattern(path):
        raise SourceUnsupported(
            f"{path}: there is no such file, and as a pattern it matches no picture or video; "
            "** stands for any folders"
        )


def _media_in(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*") if _is_media(p) and p.is_file())


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in STILL_SUFFIXES | VIDEO_SUFFIXES


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, say: opening it tells
        return False


def _is_pattern(path: str) -> bool:
    return scheme_of(path) == "file" and glob.has_magic(path) and not _exists(str(path_of(path)))


def _matches_of(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207, Path's takes no absolute pattern
    suffix = Path(pattern).suffix
    asked = suffix != "" and not glob.has_magic(suffix)
    return sorted({p for p in found if (asked or _is_media(Path(p))) and Path(p).is_file()})


_LIST_FROM_STDIN = "@-"


def _is_list(path: str) -> bool:
    return path.startswith("@") and len(path) > 1 and not _exists(path)


def _with_lists_read(paths: Iterable[str]) -> list[str]:
    found: list[str] = []
    for path in paths:
        found += _lines_of(path) if _is_list(path) else [path]
    return found


def _lines_of(path: str) -> list[str]:
    """A path or URL per line; empty lines and those that begin with ``#`` say nothing."""
    try:
        content = (
            sys.stdin.buffer.read() if path == _LIST_FROM_STDIN else Path(path[1:]).read_bytes()
        )
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"cannot read the list {path}: {why}") from exc
    text = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf"))  # as editors on Windows begin
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    found = [line for line in lines if line.strip() and not line.startswith("#")]
    if not found or "\0" in text:
        raise ConfigError(f"{path} lists no inputs: it wants a path on each line")
    return found


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
