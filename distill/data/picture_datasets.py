"""Readers of rated picture sets in the layouts they are published in.

Each takes the folder of a set and the media found in it, and gives the rows of its label file;
:mod:`distill.data.datasets` has the table of sets and brings the rows to one form.
"""

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

OFFICIAL_PARTS = {"training": "train", "validation": "validation", "test": "test"}

KADID_DEGRADATIONS = [
    "gaussian_blur",
    "lens_blur",
    "motion_blur",
    "colour_diffusion",
    "colour_shift",
    "colour_quantisation",
    "colour_saturation_hsv",
    "colour_saturation_lab",
    "jpeg2000",
    "jpeg",
    "white_noise",
    "white_noise_ycbcr",
    "impulse_noise",
    "multiplicative_noise",
    "denoise",
    "brighten",
    "darken",
    "mean_shift",
    "jitter",
    "non_eccentricity_patch",
    "pixelate",
    "quantisation",
    "colour_block",
    "high_sharpen",
    "contrast_change",
]

TID_DEGRADATIONS = [
    "gaussian_noise",
    "colour_noise",
    "spatially_correlated_noise",
    "masked_noise",
    "high_frequency_noise",
    "impulse_noise",
    "quantisation_noise",
    "gaussian_blur",
    "denoise",
    "jpeg",
    "jpeg2000",
    "jpeg_transmission_errors",
    "jpeg2000_transmission_errors",
    "non_eccentricity_pattern_noise",
    "local_blocks",
    "mean_shift",
    "contrast_change",
    "colour_saturation",
    "multiplicative_noise",
    "comfort_noise",
    "lossy_noisy_compression",
    "colour_quantisation_dither",
    "chromatic_aberration",
    "sparse_sampling",
]

LIVE_FOLDERS = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}
"""Release 2: folders in the order of ``dmos_new``, with their pictures ``img1.bmp ...``."""

CSIQ_FILES = {
    "noise": ("awgn", "AWGN"),
    "blur": ("blur", "BLUR"),
    "contrast": ("contrast", "contrast"),
    "fnoise": ("fnoise", "fnoise"),
    "jpeg": ("jpeg", "JPEG"),
    "jpeg 2000": ("jpeg2000", "jpeg2000"),
}
"""``dst_type`` of the table: folder below ``dst_imgs`` and word in the file's name."""

_THREE_PARTS = re.compile(r"^(?P<content>i\d+)_(?P<type>\d+)_(?P<level>\d+)\.\w+$", re.IGNORECASE)


def _official_part(row: Mapping[str, str], where: str) -> str:
    part = OFFICIAL_PARTS.get(row["set"].lower())
    if part is None:
        raise ValueError(f"{where}: set {row['set']!r} is none of {', '.join(OFFICIAL_PARTS)}")
    return part


def koniq10k(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``koniq10k_distributions_sets.csv``; the MOS is on 1..100, its SD on the raters' 1..5."""
    folder = "1024x768" if any(name.startswith("1024x768/") for name in media) else "512x384"
    table = find_file(root, "koniq10k_distributions_sets.csv")
    for where, row in read_csv(table, "image_name", "MOS", "SD", "set"):
        name = row["image_name"]
        spread = number(row["sd"], where) * 99 / 4
        value = number(row["mos"], where)
        part = _official_part(row, where)
        yield Label(f"{folder}/{name}", name, value, where, std=spread, split=part)


def _named_by_type(name: str, where: str, types: list[str]) -> tuple[str, str, int]:
    """Content, degradation and level of a name such as ``I01_05_3.bmp``."""
    match = _THREE_PARTS.match(name)
    if match is None or not 1 <= int(match["type"]) <= len(types):
        raise ValueError(f"{where}: {name!r} is not named content_type_level")
    return match["content"].lower(), types[int(match["type"]) - 1], int(match["level"])


def kadid10k(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``dmos.csv``: called DMOS, but 1..5 with 5 best; ``var`` is the variance of the ratings."""
    for where, row in read_csv(find_file(root, "dmos.csv"), "dist_img", "ref_img", "dmos", "var"):
        name = row["dist_img"]
        _, kind, level = _named_by_type(name, where, KADID_DEGRADATIONS)
        content, value = Path(row["ref_img"]).stem.lower(), number(row["dmos"], where)
        spread = number(row["var"], where) ** 0.5
        yield Label(f"images/{name}", content, value, where, spread, None, kind, level)


def tid2013(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``mos_with_names.txt`` and, line by line, ``mos_std.txt``."""
    table = find_file(root, "mos_with_names.txt")
    lines = [line.split() for line in table.read_text().splitlines() if line.strip()]
    spreads = (root / "mos_std.txt").read_text().split() if (root / "mos_std.txt").is_file() else []
    if spreads and len(spreads) != len(lines):
        raise ValueError(f"mos_std.txt has {len(spreads)} lines, {table.name} {len(lines)}")
    for i, words in enumerate(lines):
        where = f"{table.name}, line {i + 1}"
        if len(words) != 2:
            raise ValueError(f"{where}: {' '.join(words)!r} is not a MOS and a name")
        content, kind, level = _named_by_type(words[1], where, TID_DEGRADATIONS)
        spread = number(spreads[i], f"mos_std.txt, line {i + 1}") if spreads else None
        value, path = number(words[0], where), f"distorted_images/{words[1]}"
        yield Label(path, content, value, where, spread, None, kind, level)


def live(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``dmos_realigned.mat`` and ``refnames_all.mat``; the hidden references are left out."""
    table = root / "dmos_realigned.mat"
    dmos, originals = mat_numbers(table, "dmos_new"), mat_numbers(table, "orgs")
    spreads = mat_numbers(table, "dmos_std")
    references = mat_texts(find_file(root, "refnames_all.mat"), "refnames_all")
    names = [f"{kind}/img{i}.bmp" for kind, n in LIVE_FOLDERS.items() for i in range(1, n + 1)]
    lengths = {len(dmos), len(originals), len(spreads), len(references)}
    if lengths != {len(names)}:
        raise ValueError(
            f"{table.name} and refnames_all.mat have {sorted(lengths)} entries, release 2 has "
            f"{len(names)}"
        )
    for i, name in enumerate(names):
        if not originals[i]:
            kind, content = name.split("/")[0], Path(references[i]).stem.lower()
            where = f"{table.name}, entry {i + 1}"
            yield Label(name, content, float(dmos[i]), where, float(spreads[i]), None, kind)


def csiq(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``csiq.DMOS.xlsx``, sheet ``all_by_image`` (or its export ``csiq.DMOS.csv``)."""
    columns = ("image", "dst_type", "dst_lev", "dmos_std", "dmos")
    for where, row in read_sheet(root / "csiq.DMOS.xlsx", "all_by_image", *columns):
        kind = row["dst_type"].lower()
        if kind not in CSIQ_FILES:
            raise ValueError(f"{where}: dst_type {kind!r} is none of {', '.join(CSIQ_FILES)}")
        folder, word = CSIQ_FILES[kind]
        content = row["image"].removesuffix(".0")
        level = round(number(row["dst_lev"], where))
        path = f"dst_imgs/{folder}/{content}.{word}.{level}.png"
        value, spread = number(row["dmos"], where), number(row["dmos_std"], where)
        yield Label(path, content.lower(), value, where, spread, None, folder, level)


def live_challenge(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``Data/All*_release.mat``; the seven pictures raters were trained on are left out."""
    names = mat_texts(root / "Data" / "AllImages_release.mat", "AllImages_release")
    mos = mat_numbers(root / "Data" / "AllMOS_release.mat", "AllMOS_release")
    spreads = mat_numbers(root / "Data" / "AllStdDev_release.mat", "AllStdDev_release")
    if not len(names) == len(mos) == len(spreads):
        raise ValueError(
            f"AllImages_release.mat names {len(names)} pictures, the MOS are {len(mos)} and their "
            f"deviations {len(spreads)}"
        )
    for i, name in enumerate(names):
        if f"images/trainingimages/{name}".lower() in media or re.fullmatch(r"t\d\.bmp", name):
            continue
        where = f"AllMOS_release.mat, entry {i + 1}"
        yield Label(f"Images/{name}", name, float(mos[i]), where, float(spreads[i]))


def spaq(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``Annotations/MOS and Image attribute scores.xlsx`` (or its export as .csv)."""
    table = root / "Annotations" / "MOS and Image attribute scores.xlsx"
    for where, row in read_sheet(table, None, "Image name", "MOS"):
        name = row["image name"]
        yield Label(f"TestImage/{name}", name, number(row["mos"], where), where)


def flive(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``labels_image.csv`` with the parts of ``labels=640_padded.csv`` and ``labels>640.csv``."""
    larger = find_file(root, "labels>640.csv", "labels640.csv")
    padded = find_file(root, "labels=640_padded.csv")
    test = {row["name_image"] for _, row in read_csv(larger, "name_image")}
    validation = {
        row["name_image"]
        for _, row in read_csv(padded, "name_image", "is_valid")
        if row["is_valid"].lower() in ("true", "1")
    }
    for where, row in read_csv(find_file(root, "labels_image.csv"), "name", "mos"):
        name = row["name"]
        part = "test" if name in test else "validation" if name in validation else "train"
        yield Label(f"database/{name}", name, number(row["mos"], where), where, split=part)


def uhd_iqa(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """``uhd-iqa-metadata.csv``; the pictures lie in ``training``, ``validation`` and ``test``."""
    table = find_file(root, "uhd-iqa-metadata.csv")
    for where, row in read_csv(table, "image_name", "quality_mos", "set"):
        name, part = row["image_name"], _official_part(row, where)
        value = number(row["quality_mos"], where)
        yield Label(f"{row['set'].lower()}/{name}", name, value, where, split=part)


def biq2021(root: Path, media: Mapping[str, Path]) -> Iterator[Label]:
    """Both official tables; what the loader of the packs reads, row by row.

    Near-duplicate photographs have names and thus contents of their own, so a drawn validation part
    shares some with training, and SRCC on it is flattered: see :mod:`distill.data.biq2021`.
    """
    from distill.data.biq2021 import TABLES

    for part, table in TABLES.items():
        for where, row in read_csv(find_file(root, table), "Image Name", "MOS"):
            name = row["image name"]
            yield Label(f"Images/{name}", name, number(row["mos"], where), where, split=part)
