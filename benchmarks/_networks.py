"""One of the slow peers on a few frames of a clip, in a process of its own.

    python benchmarks/_networks.py {dgiqa,niqe,brisque} CLIP NUM_FRAMES

Prints ``{"cpu_ms_per_frame": ..., "num_frames": ..., "note": ...}``, decoding not counted. Weights
are random: time does not depend on them. Fails with ImportError where a package is missing.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
_APART_FRAMES = 15
_DEPTH_PX, _DEPTH_PATCH_PX = 518, 14  # of Depth Anything: the smaller side, and what divides both


def frames_of(clip: str, num: int) -> list[Rgb]:
    """RGB (H, W, 3) pictures, half a second apart."""
    with av.open(clip) as container:
        chosen = itertools.islice(container.decode(video=0), 0, num * _APART_FRAMES, _APART_FRAMES)
        return [frame.to_ndarray(format="rgb24") for frame in chosen]


def dgiqa() -> Callable[[Rgb], object]:
    """The published pipeline: Depth Anything of its large size, and 20 crops of 224 pixels."""
    from distill.models.teacher import Dgiqa
    from distill.teacher_score import OfficialProtocol, score_picture

    model, depth = Dgiqa().eval(), depth_network()
    return lambda rgb: score_picture(model, rgb, depth(rgb), protocol=OfficialProtocol())


def depth_network() -> Callable[[Rgb], NDArray[np.uint8]]:
    """Depth Anything's large network, by the shape that its publication gives, without weights."""
    import cv2
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from distill.data.depth import to_8_bits
    from distill.teacher_score import normalised

    trunk = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=_DEPTH_PX,
        patch_size=_DEPTH_PATCH_PX,
        out_indices=[21, 22, 23, 24],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=trunk,
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
    )
    network = DepthAnythingForDepthEstimation(config).eval()

    def map_of(rgb: Rgb) -> NDArray[np.uint8]:
        height, width = rgb.shape[:2]
        scale = _DEPTH_PX / min(height, width) / _DEPTH_PATCH_PX
        size = tuple(round(side * scale) * _DEPTH_PATCH_PX for side in (width, height))
        reduced = cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC)
        found = network(normalised(reduced)[None]).predicted_depth[0].numpy()
        return to_8_bits(cv2.resize(found, (width, height), interpolation=cv2.INTER_CUBIC))

    return map_of


def niqe() -> Callable[[Rgb], object]:
    """pyiqa's NIQE, with made-up statistics of clean pictures."""
    import scipy.io

    made_up = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "niqe.mat"
        model = {"mu_prisparam": made_up.random((1, 36)), "cov_prisparam": np.eye(36)}
        scipy.io.savemat(path, model)
        return _pyiqa("niqe", path)


def brisque() -> Callable[[Rgb], object]:
    """pyiqa's BRISQUE, with as many made-up support vectors as it has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "brisque.pth"
        torch.save((torch.rand(774, 1), torch.rand(774, 36)), path)
        return _pyiqa("brisque", path)


def _pyiqa(name: str, parameters: Path) -> Callable[[Rgb], object]:
    import pyiqa

    device = torch.device("cpu")
    metric = pyiqa.create_metric(name, device=device, pretrained_model_path=str(parameters))
    return lambda rgb: metric(torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255)


PEERS = {  # name: how it is made ready, and what is to be said of it
    "dgiqa": (dgiqa, "random weights; depth by Depth Anything large, 20 crops"),
    "niqe": (niqe, "pyiqa, random parameters"),
    "brisque": (brisque, "pyiqa, random parameters"),
}


def main(name: str, clip: str, num_frames: int) -> None:
    """Measure; the first frame is also scored once before, to warm up what is slow at first."""
    torch.manual_seed(1)
    make, note = PEERS[name]
    score, pictures = make(), frames_of(clip, num_frames)
    with torch.inference_mode():
        if len(pictures) > 1:
            score(pictures[0])
        begin = time.process_time()
        for picture in pictures:
            score(picture)
    spent = time.process_time() - begin
    told = {"cpu_ms_per_frame": 1e3 * spent / len(pictures), "num_frames": len(pictures)}
    print(json.dumps({**told, "note": note}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
