"""Readers of rated video sets in the layouts they are published in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from distill.data.label_files import (
    Label,
    find_file,
    mat_numbers,
    mat_texts,
    number,
    read_csv,
    read_sheet,
)

_TRANSCODE = re.compile(r"_crf_\d+_ss_\d+_t_[\d.]+$")
"""What YouTube-UGC's H.264 copies have after the clip's id."""


def _by_stem(root: Path, media: Mapping[str, Path], ending: re.Pattern[str]) -> dict[str, str]:
    """A clip's id in lower case to its path; ``ending`` is no part of the id."""
    stems = {path: ending.sub("", Path(path).stem) for path in media}
    return {stem: path for path, stem in stems.items()}


def konvid1k(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``KoNViD_1k_mos.csv``, beside the clips or in ``KoNViD_1k_metadata``."""
    found = _by_stem(root, media, re.compile(r"_original_centercrop_960x540_8s$"))
    table = find_file(root, "KoNViD_1k_metadata/KoNViD_1k_mos.csv", "KoNViD_1k_mos.csv")
    for where, row in read_csv(table, "flickr_id", "mos"):
        clip = row["flickr_id"].removesuffix(".0")
        path = found.get(clip.lower(), f"KoNViD_1k_videos/{clip}.mp4")
        yield Label(path, clip, number(row["mos"], where), where)


def live_vqc(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``data.mat`` with ``video_list`` and ``mos``; the clips lie in ``Video``."""
    names, mos = mat_texts(root / "data.mat", "video_list"), mat_numbers(root / "data.mat", "mos")
    if len(names) != len(mos):
        raise ValueError(f"data.mat names {len(names)} clips and has {len(mos)} MOS")
    for i, name in enumerate(names):
        yield Label(f"Video/{name}", name, float(mos[i]), f"data.mat, entry {i + 1}")


def youtube_ugc(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """The MOS workbook's sheet ``MOS`` (or its export as .csv), column ``MOS full``.

    The clips are the originals (``original_videos/<category>/<height>P/<vid>.mkv``) or the
    published H.264 copies (``original_videos_h264/<vid>_crf_10_ss_00_t_20.0.mp4``). A row without
    a MOS was not rated as a whole and is passed over.
    """
    names = (
        "original_videos_MOS_for_YouTube_UGC_dataset",
        "MOS_for_YouTube_UGC_dataset",
    )
    endings = (".csv", ".xlsx")
    table = find_file(root, *(name + ending for name in names for ending in endings))
    found = _by_stem(root, media, _TRANSCODE)
    for where, row in read_sheet(table.with_suffix(".xlsx"), "MOS", "vid", "MOS full"):
        clip, text = row["vid"], row["mos full"]
        if text.lower() not in ("", "nan"):
            path = found.get(clip.lower(), f"original_videos_h264/{clip}.mp4")
            yield Label(path, clip, number(text, where), where)


def lsvq(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``labels_train_test.csv`` (column ``is_test``) and ``labels_test_1080p.csv``."""
    tables = {
        "labels_train_test.csv": ("name", "mos", "is_test"),
        "labels_test_1080p.csv": ("name", "mos"),
    }
    for table, columns in tables.items():
        for where, row in read_csv(find_file(root, table), *columns):
            clip = row["name"].removesuffix(".mp4")
            part = "test_1080p"
            if "is_test" in columns:
                part = "test" if row["is_test"].lower() in ("true", "1", "1.0") else "train"
            value = number(row["mos"], where)
            yield Label(f"{clip}.mp4", clip, value, where, split=part)
