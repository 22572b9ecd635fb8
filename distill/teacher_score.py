"""What a teacher says of pictures and videos: crops, their mean, and how far they disagree.

Two protocols choose the crops. :class:`OfficialProtocol` is how the published scores were made:
random places, so a score carries their luck. :class:`GridProtocol` puts them on a fixed grid over
the whole picture, and is the default. Both bring the smaller side to 384 pixels first.

:class:`TeacherScorer` has the interface of the runtime's scorer, so that whatever reads, samples
and writes for ``dgiqa-stream score`` does so for a teacher, too. It is slow: for audits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.backends import BackendStatus, Outputs
from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError
from dgiqa_stream.manifest import (
    LoadedModel,
    ModelManifest,
    OutputSpec,
    PreprocessSpec,
    ScoreMapping,
)
from dgiqa_stream.preprocess import reduced_rgb, stored_region
from dgiqa_stream.scorer import Prediction, Scorer
from dgiqa_stream.types import Crop, FrameBatch, Planes
from distill.data.depth import DepthProvider, Map, Rgb, three_channels
from distill.models.teacher import CROP_PX
from distill.models.teacher_file import LoadedTeacher, Teacher
from distill.models.trunks import IMAGENET_MEAN, IMAGENET_STD
from distill.say import say

if TYPE_CHECKING:
    from dgiqa_stream.backends import Backend

SMALLEST_SIDE_PX = 384
OFFICIAL_CROPS, OFFICIAL_SEED = 20, 42
_MOST_AT_ONCE = 8  # crops; more gain nothing on a CPU and cost memory
_RAW_TO_SCORE = ScoreMapping(raw=[0.0, 1.0], score=[0.0, 100.0])


class CropProtocol(Protocol):
    """Chooses the crops of a picture."""

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of each crop of 224 pixels in a picture of at least that size."""

    @property
    def identity(self) -> str:
        """Its name and settings; results carry it."""


@dataclass(frozen=True, slots=True)
class OfficialProtocol:
    """Random places from Python's own generator, the same for every picture of one size.

    ``seed`` starts each picture anew, as the published script does for its one picture.
    """

    num_crops: int = OFFICIAL_CROPS
    seed: int = OFFICIAL_SEED

    def __post_init__(self) -> None:
        """Refuse no crops."""
        if self.num_crops < 1:
            raise ConfigError(f"{self.num_crops} crops cannot be scored: give 1 or more")

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """See :class:`CropProtocol`."""
        drawn = random.Random(self.seed)
        lefts_and_tops = [
            (drawn.randint(0, width - CROP_PX), drawn.randint(0, height - CROP_PX))
            for _ in range(self.num_crops)
        ]
        return [(top, left) for left, top in lefts_and_tops]

    @property
    def identity(self) -> str:
        """See :class:`CropProtocol`."""
        return f"official: {self.num_crops} random crops, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class GridProtocol:
    """Evenly spread from border to border; one row or column lies in the middle."""

    rows: int = 3
    columns: int = 3

    def __post_init__(self) -> None:
        """Refuse an empty grid."""
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(f"a grid of {self.rows}x{self.columns} crops has none")

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """See :class:`CropProtocol`."""
        return [
            (top, left)
            for top in _spread(height - CROP_PX, self.rows)
            for left in _spread(width - CROP_PX, self.columns)
        ]

    @property
    def identity(self) -> str:
        """See :class:`CropProtocol`."""
        return f"grid: {self.rows}x{self.columns} crops"


def _spread(free: int, count: int) -> list[int]:
    """Begins of ``count`` crops along one axis, where ``free`` is the last possible one."""
    if count == 1:
        return [free // 2]
    return [round(free * i / (count - 1)) for i in range(count)]


def make_protocol(name: str, *, num_crops: int | None = None, seed: int = 42) -> CropProtocol:
    """A protocol by the words of the command line; raises :class:`ConfigError`.

    ``num_crops`` of a grid must be a square number; None takes 9 of a grid and 20 official ones.
    """
    if name == "official":
        return OfficialProtocol(OFFICIAL_CROPS if num_crops is None else num_crops, seed)
    side = 3 if num_crops is None else max(0, round(max(0, num_crops) ** 0.5))
    if num_crops is not None and side * side != num_crops:
        raise ConfigError(f"{num_crops} crops are no square grid: give 1, 4, 9, 16, 25 …")
    return GridProtocol(side, side)


@dataclass(frozen=True, slots=True)
class TeacherPrediction:
    """What the crops of one picture came to."""

    score: float
    """0 (worst) to 100 (best): the mean over crops."""
    spread: float
    """Standard deviation over crops, in points."""
    crop_scores: tuple[float, ...]
    """0 to 100 each, in the protocol's order."""


def with_smallest_side(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3), enlarged or reduced bilinearly until the smaller side is 384; aspect kept."""
    height, width = picture.shape[:2]
    scale = SMALLEST_SIDE_PX / min(height, width)
    if scale == 1:
        return picture
    # halves away from zero, as the published pipeline rounds
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def normalised(picture: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) to ImageNet-normalised float32 (3, H, W)."""
    mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((torch.from_numpy(picture).float() / 255 - mean) / std).permute(2, 0, 1)


def score_picture(
    model: Teacher, picture: Rgb, depth: Map, *, protocol: CropProtocol
) -> TeacherPrediction:
    """Score one picture, uint8 RGB (H, W, 3), with its depth map, uint8 (H, W)."""
    device = next(model.parameters()).device
    seen, near = (
        normalised(with_smallest_side(np.ascontiguousarray(p)))
        for p in (picture, three_channels(depth))
    )  # (3, h, w) each
    places = protocol.places(*seen.shape[1:])
    found: list[float] = []
    for first in range(0, len(places), _MOST_AT_ONCE):
        pair = (_cut(x, places[first : first + _MOST_AT_ONCE]).to(device) for x in (seen, near))
        with torch.inference_mode():
            found += model(*pair).float().tolist()  # (crops,)
    scores = 100 * np.array(found, np.float64)
    return TeacherPrediction(float(scores.mean()), float(scores.std()), tuple(scores.tolist()))


def _cut(x: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """(3, h, w) to crops (N, 3, 224, 224)."""
    return torch.stack([x[:, t : t + CROP_PX, left : left + CROP_PX] for t, left in places])


class TeacherBackend:
    """A teacher where the runtime expects an engine: (N,) means over crops, 0..1."""

    def __init__(
        self,
        teacher: LoadedTeacher,
        *,
        protocol: CropProtocol,
        device: str = "auto",
        on_prediction: Callable[[TeacherPrediction], None] = lambda prediction: None,
    ) -> None:
        """Moves the model; raises :class:`BackendUnavailable` without that device."""
        chosen = torch_device(device)
        self._model = teacher.model.to(chosen).eval()
        self._protocol, self._on_prediction = protocol, on_prediction
        self.status = BackendStatus(f"torch:{device}", f"torch:{chosen}")

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`dgiqa_stream.backends.Backend`; views are ``picture`` and ``depth``."""
        found = []
        pairs = zip(batch.views["picture"], batch.views["depth"], strict=True)
        for picture, depth in pairs:
            predicted = score_picture(self._model, picture, depth[..., 0], protocol=self._protocol)
            self._on_prediction(predicted)
            found.append(predicted.score / 100)
        return Outputs(np.array(found, np.float32))

    def close(self) -> None:
        """Nothing to release."""


class TeacherScorer(Scorer):
    """A teacher behind the runtime's door: whole pictures with their depth, no reduced views."""

    def __init__(self, model: LoadedModel, backend: Backend, depth: DepthProvider) -> None:
        """Take a backend of :class:`TeacherBackend`'s views; :func:`teacher_scorer` makes all."""
        super().__init__(model, backend)
        self._depth, self._path = depth, ""

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Tell the depth provider where the pictures scored meanwhile come from."""
        self._path = path
        try:
            yield
        finally:
            self._path = ""

    def cut(self, pictures: Sequence[Planes], *, crop: Crop | None = None) -> FrameBatch:
        """Full-size ``picture`` and ``depth``, uint8 (1, H, W, 3) each: of one picture."""
        (planes,) = pictures
        rgb = _cropped_rgb(planes, crop)
        depth = three_channels(self._depth(rgb, path=self._path))
        return FrameBatch({"picture": rgb[None], "depth": depth[None]})

    def predict(self, pictures: Sequence[Planes], *, crop: Crop | None = None) -> list[Prediction]:
        """Score decoded planes one after the other: their sizes may differ."""
        return [p for planes in pictures for p in self.infer(self.cut([planes], crop=crop))]

    def infer(self, batch: FrameBatch) -> list[Prediction]:
        """As its base; raises :class:`ModelError` where the network gives no number."""
        found = super().infer(batch)
        if not np.isfinite([prediction.raw for prediction in found]).all():
            raise ModelError(
                f"{self._model.path.name} gives no number for {self._path or 'a picture'}: its "
                "weights overflow; give another teacher"
            )
        return found


def _cropped_rgb(planes: Planes, crop: Crop | None) -> Rgb:
    """Upright uint8 RGB of what is inside the crop."""
    rgb = reduced_rgb(planes, longest_px=max(planes.size))
    if crop is None:
        return rgb
    stored_region(planes, crop)  # refuses a crop that leaves nothing
    return np.ascontiguousarray(
        rgb[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    )


def teacher_scorer(
    teacher: LoadedTeacher,
    depth: DepthProvider,
    *,
    path: Path,
    protocol: CropProtocol | None = None,
    device: str = "auto",
    on_prediction: Callable[[TeacherPrediction], None] = lambda prediction: None,
) -> TeacherScorer:
    """A scorer of an opened teacher; ``path`` is its file, ``on_prediction`` hears of spreads."""
    backend = TeacherBackend(
        teacher, protocol=protocol or GridProtocol(), device=device, on_prediction=on_prediction
    )
    return TeacherScorer(LoadedModel(path, manifest_of(teacher)), backend, depth)


def manifest_of(teacher: LoadedTeacher) -> ModelManifest:
    """What the runtime says of a model, for a teacher: no fixed views, scores as they come."""
    return ModelManifest(
        schema="dgiqa.manifest/2",
        id=f"dgiqa-teacher-{teacher.backbone}",
        version=teacher.version,
        precision="fp32",
        sha256=teacher.sha256,
        size_bytes=teacher.size_bytes,
        licence="that of the weights",
        num_parameters=sum(p.numel() for p in teacher.model.parameters()),
        preprocess=PreprocessSpec(views=[], reduction="halved-bilinear"),
        output=OutputSpec(name="score", mapping=_RAW_TO_SCORE),
        calibration="none: 100 times the network's output",
        made_by="dgiqa-distill convert",
    )


def tell_other_depth(teacher: LoadedTeacher, depth: DepthProvider) -> None:
    """Say so where a teacher learned with other depth maps than it is to be asked with."""
    if teacher.depth and teacher.depth != depth.identity:
        say(
            f"this teacher learned with depth maps of {teacher.depth}, and gets those of "
            f"{depth.identity}: its scores will not be what they were judged to be; see --depth"
        )


def torch_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; raises :class:`BackendUnavailable`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device {name!r} is not auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"no device {name}: torch sees {torch.cuda.device_count()} CUDA devices; "
            "give --device cpu"
        )
    return device
