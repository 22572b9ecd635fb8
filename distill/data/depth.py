"""Depth maps for the teacher: from Depth Anything, from files, or from classical cues.

A map is uint8 (H, W) of the picture's size, 255 nearest, 0 farthest, stretched over the whole
range as the teacher was trained on (:func:`to_8_bits`). Whatever gives maps is a
:class:`DepthProvider`; anything with its two members can be handed to a teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError, ModelError, SourceUnsupported
from dgiqa_stream.inputs import is_still_path
from distill.say import say

Rgb = NDArray[np.uint8]
Map = NDArray[np.uint8]
MAP_SUFFIXES = (".npy", ".png")
"""Of depth maps in files, in the order they are looked for."""
PUBLISHED_DEPTH = "hf:LiheYoung/depth-anything-large-hf"
"""What the published scores were made with."""
_CACHE_SCHEMA = 1
_DIGEST_BYTES = 32


class DepthProvider(Protocol):
    """Gives the depth map of a picture."""

    @property
    def identity(self) -> str:
        """What made the maps, with every setting that changes one: caches and results carry it."""

    def __call__(self, picture: Rgb, *, path: str = "") -> Map:
        """uint8 RGB (H, W, 3) to uint8 (H, W), 255 nearest; ``path`` is where it came from.

        Raises :class:`SourceUnsupported` for a picture that it has no map for.
        """


def to_8_bits(depth: NDArray[Any]) -> Map:
    """The published step: smallest to 0, largest to 255, cut to whole numbers.

    ``depth`` is any real (H, W), larger nearer; a constant map becomes 0. Raises ``ValueError``
    for values that are not finite.
    """
    values = np.asarray(depth, np.float32)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"a depth map reaches from {low} to {high}: it must be finite")
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return ((values - low) / (high - low) * 255).astype(np.uint8)


def three_channels(depth: Map) -> NDArray[np.uint8]:
    """(H, W) to (H, W, 3): the network takes a map as it takes a picture."""
    return np.repeat(depth[..., None], 3, axis=2)


class ClassicalDepth:
    """A stand-in where no depth network can be had: three cues of a single picture.

    Nearer is what lies lower in the picture (0.5), what shows more local contrast (0.25) and what
    has the darker dark channel, so less haze (0.25; He, Sun, Tang, CVPR 2009, section 3). It knows
    no objects and is often wrong: scores that it helped to make are not the published method's.
    """

    WEIGHTS: Mapping[str, float] = {"height": 0.5, "contrast": 0.25, "haze": 0.25}
    WORKING_PX = 256
    PATCH_PX = 15

    @property
    def identity(self) -> str:
        """The cues, their weights and the working size."""
        cues = ",".join(f"{name}={weight:g}" for name, weight in self.WEIGHTS.items())
        return f"classical/1:{cues}:{self.WORKING_PX}:{self.PATCH_PX}"

    def __call__(self, picture: Rgb, *, path: str = "") -> Map:
        """See :class:`DepthProvider`."""
        height, width = picture.shape[:2]
        scale = self.WORKING_PX / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        reduced = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        small = np.asarray(reduced, np.float32) / np.float32(255)
        cues = {
            "height": np.linspace(0, 1, small.shape[0], dtype=np.float32)[:, None],
            "contrast": self._contrast(small),
            "haze": 1 - cv2.erode(small.min(2), np.ones((self.PATCH_PX, self.PATCH_PX))),
        }
        near = np.zeros(small.shape[:2], np.float32)
        for name, cue in cues.items():
            near += np.float32(self.WEIGHTS[name]) * np.asarray(cue, np.float32)
        smooth = cv2.GaussianBlur(near, (0, 0), self.PATCH_PX / 3)
        return to_8_bits(cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR))

    def _contrast(self, small: NDArray[np.float32]) -> NDArray[np.float32]:
        """Local energy of edges, 0..1 of the picture's own largest."""
        edges = cv2.Laplacian(small.mean(2), cv2.CV_32F)
        energy = np.sqrt(cv2.GaussianBlur(edges * edges, (0, 0), self.PATCH_PX / 2))
        return np.asarray(energy / max(float(energy.max()), 1e-6), np.float32)


class DepthFromFiles:
    """Maps that somebody made before: for ``street.jpg`` the folder's ``street.npy`` or ``.png``.

    ``.npy`` is any real (H, W), ``.png`` 8 or 16 bits; larger is nearer, and the size is that of
    the upright picture. Pictures that share a stem share a map. Videos have none.
    """

    def __init__(self, folder: Path) -> None:
        """Raises :class:`ConfigError` where there is no such folder, or it holds a network."""
        if not folder.is_dir():
            raise ConfigError(
                f"no folder of depth maps at {folder}: give one, `classical`, or `hf:` before the "
                "name of a depth network"
            )
        if (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds a network, not maps: give hf:{folder}")
        self._folder = folder

    @property
    def identity(self) -> str:
        """That maps came from files; their content is not known before they are read."""
        return "files"

    def __call__(self, picture: Rgb, *, path: str = "") -> Map:
        """See :class:`DepthProvider`."""
        if not is_still_path(path):
            raise SourceUnsupported(
                f"{path or 'a picture without a name'}: depth maps in files are for pictures; "
                "use --depth classical or hf:NAME"
            )
        wanted = [self._folder / f"{Path(path).stem}{suffix}" for suffix in MAP_SUFFIXES]
        found = next((p for p in wanted if p.is_file()), None)
        if found is None:
            names = " or ".join(p.name for p in wanted)
            raise SourceUnsupported(f"{path}: no depth map {names} in {self._folder}")
        depth = _read_map(found)
        if depth.shape != picture.shape[:2]:
            raise SourceUnsupported(
                f"{path}: its depth map {found.name} is {depth.shape[1]}x{depth.shape[0]}, the "
                f"picture {picture.shape[1]}x{picture.shape[0]}: make the map at the picture's size"
            )
        try:
            return to_8_bits(depth)
        except ValueError as exc:
            raise SourceUnsupported(f"{found}: {exc}") from exc


def _read_map(path: Path) -> NDArray[Any]:
    """Real (H, W) of a file; raises :class:`SourceUnsupported` for anything else."""
    try:
        if path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            coded = np.frombuffer(path.read_bytes(), np.uint8)
            depth = cv2.imdecode(coded, cv2.IMREAD_UNCHANGED) if coded.size else None
    except (OSError, ValueError, EOFError, cv2.error) as exc:
        raise SourceUnsupported(f"depth map {path} cannot be read: {exc}") from exc
    if depth is not None and depth.ndim == 3 and (depth == depth[..., :1]).all():
        depth = depth[..., 0]  # a grey map that was saved as a picture
    if depth is None or depth.ndim != 2 or depth.dtype.kind not in "uif" or not depth.size:
        shape = "no picture" if depth is None else f"{depth.dtype} {depth.shape}"
        raise SourceUnsupported(f"depth map {path} is {shape}: it must be grey, (H, W)")
    return np.asarray(depth)


class CachedDepth:
    """Maps of another provider, kept on disk under the picture's content and what made the map.

    Entries are PNG files with a checksum behind the picture; one that is damaged is made again.
    Several processes may share a folder.
    """

    def __init__(self, provider: DepthProvider, folder: Path) -> None:
        """The folder is made where it is missing."""
        self._provider, self._folder = provider, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"no depth maps can be kept in {folder}: {exc.strerror}") from exc

    @property
    def identity(self) -> str:
        """The provider's."""
        return self._provider.identity

    def __call__(self, picture: Rgb, *, path: str = "") -> Map:
        """See :class:`DepthProvider`."""
        entry = self._entry(picture)
        kept = _read_entry(entry, picture.shape[:2])
        if kept is None:
            kept = self._provider(picture, path=path)
            _write_entry(entry, kept)
        return kept

    def _entry(self, picture: Rgb) -> Path:
        about = json.dumps([_CACHE_SCHEMA, self.identity, picture.shape, str(picture.dtype)])
        key = hashlib.sha256(about.encode())
        key.update(picture.tobytes())
        name = key.hexdigest()
        return self._folder / name[:2] / f"{name}.png"


def _read_entry(entry: Path, size: tuple[int, ...]) -> Map | None:
    """The map of a cache entry; None where there is none that is whole and of this size."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    png, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(png).digest() != digest:
        say(f"depth cache: {entry.name} is damaged, and made again")
        return None
    depth = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    whole = depth is not None and depth.dtype == np.uint8 and depth.shape == size
    return np.asarray(depth, np.uint8) if whole else None


def _write_entry(entry: Path, depth: Map) -> None:
    """Whole or not at all; a full disk costs the entry, not the score."""
    ok, png = cv2.imencode(".png", depth)
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a PNG of shape {depth.shape}")
    content = png.tobytes()
    beside = entry.with_name(f".{entry.name}.{os.getpid()}.part")
    try:
        entry.parent.mkdir(exist_ok=True)
        beside.write_bytes(content + hashlib.sha256(content).digest())
        beside.replace(entry)
    except OSError as exc:
        say(f"depth cache: {entry.name} cannot be written: {exc.strerror}")
        beside.unlink(missing_ok=True)


def open_depth(choice: str, *, device: str = "cpu", cache: Path | None = None) -> DepthProvider:
    """A provider by the words of the command line.

    ``classical``, ``hf:`` before a hub id or a folder with a depth network, or a folder of maps.
    ``cache`` keeps a network's maps. Raises :class:`ConfigError` or :class:`ModelError`.
    """
    if choice == "classical":
        return ClassicalDepth()
    if not choice.startswith("hf:"):
        return DepthFromFiles(Path(choice))
    from distill.data.depth_anything import DepthAnything

    name = choice.removeprefix("hf:")
    if not name:
        raise ModelError("hf: needs the id or folder of a depth network after it")
    network = DepthAnything(name, device=device)
    return network if cache is None else CachedDepth(network, cache)
