"""Labels for pictures that nobody rated: a teacher's own scores, or ratings of similar content.

Both end in a CSV file of name, quality and weight, which ``dgiqa-distill teach --labels`` reads.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError, SourceError
from dgiqa_stream.inputs import is_still_path
from distill.data.content_similarity import transfer_labels
from distill.data.depth import DepthProvider, Rgb
from distill.data.loader import read_ahead
from distill.data.shards import sha256_of, whole_or_none, write_json
from distill.models.backbones import make_pyramid, pyramid_maps
from distill.models.official import open_teacher
from distill.models.qfm import pseudo_labels
from distill.models.teacher import CROP_PX
from distill.say import say, show_progress
from distill.teacher_score import (
    make_protocol,
    normalised,
    score_picture,
    tell_other_depth,
    torch_device,
)
from distill.teachers.pictures import PictureSet, read_labels, read_rgb
from distill.teachers.recipe import ExpansionConfig
from distill.teachers.training import load_pyramid_

_BATCH = 32


class LabelsAbout(msgspec.Struct, frozen=True):
    """What made a file of labels; one of another making is not gone on with."""

    kind: str
    source: str
    """Name of the teacher's file or of the backbone."""
    sha256: str
    depth: str = ""
    settings: dict[str, float] = {}


def still_pictures(folder: Path) -> list[Path]:
    """The still pictures of a folder; raises :class:`SourceError` where there is none."""
    found = [p for p in sorted(folder.glob("*")) if p.is_file() and is_still_path(str(p))]
    if not found:
        raise SourceError(f"no pictures in {folder}: give a folder of .jpg, .png or .webp files")
    return found


def label_by_teacher(
    folder: Path,
    teacher: Path,
    output: Path,
    *,
    depth: DepthProvider,
    config: ExpansionConfig,
    device: str = "auto",
) -> int:
    """A teacher's mean score of each picture's crops, at exp(-variance / temperature).

    What is already there, made by the same teacher in the same way, is kept. Returns the number of
    labels. Unreadable pictures are told and passed over. Raises :class:`ConfigError` where the
    file there was made otherwise.
    """
    opened = open_teacher(teacher)
    tell_other_depth(opened, depth)
    settings = {"num_crops": config.num_crops, "temperature": config.temperature}
    about = LabelsAbout("teacher", teacher.name, opened.sha256, depth.identity, settings)
    if _is_there(output, about):
        return len(read_labels(output))
    model = opened.model.to(torch_device(device))
    protocol = make_protocol("grid", num_crops=config.num_crops)
    names, scores = [], []
    for name, rgb in _readable(still_pictures(folder)):
        found = score_picture(model, rgb, depth(rgb, path=name), protocol=protocol)
        names.append(name)
        scores.append([s / 100 for s in found.crop_scores])
    if not names:
        raise SourceError(f"no picture in {folder} can be read")
    made = pseudo_labels(torch.tensor(scores).clamp(0, 1), temperature=config.temperature)
    rows = [
        {"name": n, "quality": round(q, 6), "weight": round(w, 6)}
        for n, q, w in zip(names, made.quality.tolist(), made.weights.tolist(), strict=True)
    ]
    _write(output, rows, about)
    return len(rows)


def label_by_content(
    folder: Path,
    rated: PictureSet,
    output: Path,
    *,
    extractor: str,
    weights: Path,
    num_neighbours: int = 1,
    device: str = "auto",
) -> int:
    """The rating of the training picture that shows the most similar content, at its similarity.

    Similarity is the cosine of the backbone's last means over the picture reduced to 224x224, which
    keeps what it shows rather than how sharp it is. Returns the number of labels.
    """
    known = [i for i, p in enumerate(rated.pictures) if p.split == "train"]
    if len(known) < num_neighbours:
        raise ConfigError(f"{len(known)} rated pictures have no {num_neighbours} neighbours")
    where = torch_device(device)
    net = make_pyramid(extractor)
    load_pyramid_(net, weights)
    net = net.to(where).eval()
    names, pictures = [], []
    for name, rgb in _readable(still_pictures(folder)):
        names.append(name)
        pictures.append(_content(rgb))
    if not names:
        raise SourceError(f"no picture in {folder} can be read")
    of_rated = _features(net, lambda i: _content(rated.rgb(known[i])), len(known), where)
    of_new = _features(net, pictures.__getitem__, len(pictures), where)
    mos = [rated.pictures[i].quality for i in known]
    made = transfer_labels(of_new, of_rated, mos, num_neighbours=num_neighbours)
    rows = [
        {
            "name": name,
            "quality": round(float(quality), 6),
            "weight": round(float(np.clip(similarity, 0, 1)), 6),
            "reference": rated.pictures[known[reference]].name,
        }
        for name, quality, similarity, reference in zip(
            names, made.labels, made.similarity, made.reference, strict=True
        )
    ]
    about = LabelsAbout("content", weights.name, sha256_of(weights))
    _write(output, rows, about)
    return len(rows)


def _readable(paths: Sequence[Path]) -> Iterator[tuple[str, Rgb]]:
    """Name and picture of each that can be read; the others are told."""
    for number, path in enumerate(paths, 1):
        try:
            rgb = read_rgb(path)
        except SourceError as exc:
            say(f"left out: {exc}")
            continue
        yield path.name, rgb
        if number % 50 == 0:
            show_progress(f"{number}/{len(paths)} pictures")
    show_progress(None)


def _content(rgb: Rgb) -> NDArray[np.uint8]:
    small = cv2.resize(rgb, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


@torch.no_grad()
def _features(
    net: nn.Module,
    picture: Callable[[int], NDArray[np.uint8]],
    number: int,
    device: torch.device,
) -> NDArray[np.float64]:
    """(number, C): means over space of the last map."""

    def batch(k: int) -> Tensor:
        part = range(k * _BATCH, min((k + 1) * _BATCH, number))
        return torch.stack([normalised(picture(i)) for i in part])

    found = [
        pyramid_maps(net, crops.to(device))[-1].mean((2, 3)).cpu()
        for crops in read_ahead(batch, 0, -(-number // _BATCH))
    ]
    return torch.cat(found).numpy().astype(np.float64)


def _is_there(output: Path, about: LabelsAbout) -> bool:
    """Whether this very file was finished; raises where another one lies there."""
    beside = output.with_suffix(".json")
    if not (output.is_file() and beside.is_file()):
        return False
    try:
        told = msgspec.json.decode(beside.read_bytes(), type=LabelsAbout)
    except msgspec.DecodeError:
        return False
    if told != about:
        raise ConfigError(
            f"{output} was made by {told.source} with other settings: give another --run folder"
        )
    return True


def _write(output: Path, rows: Sequence[dict[str, object]], about: LabelsAbout) -> None:
    """Labels, then what made them: the second says that the first is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_none(output) as partial, partial.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(output.with_suffix(".json"), about)
