"""Depth Anything (arXiv 2401.10891) and its second version (arXiv 2406.09414), by transformers.

Any checkpoint that ``AutoModelForDepthEstimation`` opens and that gives relative depth, from a
folder or from the hub, such as ``LiheYoung/depth-anything-large-hf`` (what the published teacher
is run with) or ``depth-anything/Depth-Anything-V2-Small-hf``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from dgiqa_stream.errors import BackendUnavailable, ModelError
from distill.data.depth import Map, Rgb, to_8_bits

_FILES = ["*.json", "*.safetensors"]
_PROBE_SECONDS = 5.0


class DepthAnything:
    """A depth network ready to use. Not thread-safe."""

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        """``name`` is a folder or a hub id; what an earlier download kept is not fetched again.

        Raises :class:`ModelError` where it cannot be had or is no relative depth network, and
        :class:`BackendUnavailable` without transformers.
        """
        auto = _transformers()
        folder = Path(name) if Path(name).is_dir() else _downloaded(name)
        try:
            self._net: Any = auto.AutoModelForDepthEstimation.from_pretrained(
                folder, local_files_only=True
            )
            settings = auto.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except ImportError as exc:
            raise BackendUnavailable(f"{name} needs more: {' '.join(str(exc).split())}") from exc
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelError(
                f"{name} is no depth network of transformers: {' '.join(str(exc).split())}"
            ) from exc
        if getattr(self._net.config, "depth_estimation_type", "relative") != "relative":
            raise ModelError(f"{name} gives metres, and the teacher needs relative depth")
        self._net.eval().to(device)
        self._device = device
        told = settings.to_dict()
        self._size = _size_of(told["size"])
        self._multiple = int(told.get("ensure_multiple_of") or self._patch_px())
        self._mean, self._std = (
            np.array(told[key], np.float32) for key in ("image_mean", "image_std")
        )
        self._identity = f"depth-anything/1:{self._fingerprint()}"

    @property
    def identity(self) -> str:
        """The weights' checksum and the size they look at, wherever they were loaded from."""
        return self._identity

    def __call__(self, picture: Rgb, *, path: str = "") -> Map:
        """See :class:`~distill.data.depth.DepthProvider`."""
        height, width = picture.shape[:2]
        try:
            return to_8_bits(self.predict(picture))
        except ValueError as exc:
            raise ModelError(f"{path or 'a picture'} of {width}x{height}: {exc}") from exc

    def predict(self, picture: Rgb) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The network's own map at the picture's size: float32 (H, W), larger nearer."""
        height, width = picture.shape[:2]
        target = self.input_size(height, width)
        small = cv2.resize(
            picture.astype(np.float32) / 255, target[::-1], interpolation=cv2.INTER_CUBIC
        )
        x = torch.from_numpy((small - self._mean) / self._std).permute(2, 0, 1)[None]
        with torch.inference_mode():
            depth = self._net(pixel_values=x.to(self._device)).predicted_depth  # (1, h, w)
            depth = F.interpolate(
                depth[:, None].float(), (height, width), mode="bilinear", align_corners=False
            )  # (1, 1, H, W)
        return np.asarray(depth[0, 0].cpu().numpy(), np.float32)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the network sees: both sides at least its own, aspect kept.

        Each is the nearest multiple of its patch that is not below that bound.
        """
        scale = max(self._size[0] / height, self._size[1] / width)

        def fitted(side: int, least: int) -> int:
            patches = side * scale / self._multiple
            nearest = round(patches) * self._multiple
            return nearest if nearest >= least else math.ceil(patches) * self._multiple

        return fitted(height, self._size[0]), fitted(width, self._size[1])

    def _patch_px(self) -> int:
        config = self._net.config
        return int(getattr(getattr(config, "backbone_config", config), "patch_size", 14))

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._size}{self._multiple}{self._mean}{self._std}".encode())
        for name, tensor in sorted(self._net.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


def _size_of(size: dict[str, int]) -> tuple[int, int]:
    """Height and width of what a processor calls its size."""
    least = size.get("shortest_edge") or 0
    return int(size.get("height") or least), int(size.get("width") or least)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as exc:
        raise BackendUnavailable(
            f"depth networks need {exc.name!r}: pip install 'dgiqa-stream[teacher]'"
        ) from exc
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _downloaded(name: str) -> Path:
    """The folder of a hub id, from an earlier download or from the hub now.

    The hub is asked once whether it is there: its library would try for two minutes.
    """
    from huggingface_hub import constants, errors, snapshot_download

    def fetch(*, is_local: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=is_local))

    refused = (OSError, ValueError, errors.HfHubHTTPError)
    with contextlib.suppress(*refused):
        return fetch(is_local=True)
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(name, "HF_HUB_OFFLINE is set, and no earlier download is here")
    if not _answers(constants.ENDPOINT):
        raise _unavailable(name, f"{constants.ENDPOINT} does not answer")
    try:
        return fetch(is_local=False)
    except refused as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise _unavailable(name, f"{constants.ENDPOINT}: {reason}") from exc


def _unavailable(name: str, reason: str) -> ModelError:
    return ModelError(
        f"depth network {name!r} is no folder here and cannot be downloaded ({reason}). "
        "Download it where there is a network (`hf download`) and give hf:FOLDER; or give a "
        "folder of depth maps, or --depth classical"
    )


def _answers(url: str) -> bool:
    """Whether anything speaks HTTP there within a few seconds."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS
        ):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as exc:
        return isinstance(exc.reason, ssl.SSLError)  # certificates are the library's business
    except OSError:
        return False
