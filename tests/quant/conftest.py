"""A student of plausible weights, its ONNX graph, and pictures to calibrate it on."""

from __future__ import annotations

import importlib.util
import warnings

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dgiqa_stream.preprocess import ViewSpec, make_batch
from dgiqa_stream.types import Planes

Views = dict[str, NDArray[np.uint8]]
SIDE = 64


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread for torch and OpenCV: the machine may be busy."""
    cv2.setNumThreads(1)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def specs() -> list[ViewSpec]:
    """The student's two views, of 64 pixels."""
    return [
        ViewSpec("whole", "whole", SIDE, SIDE),
        ViewSpec("fragments", "fragments", SIDE, SIDE, rows=2, columns=2),
    ]


def textured(seed: int) -> NDArray[np.uint8]:
    """Coloured structure at every scale; brightness, contrast and sharpness differ by the seed."""
    rng = np.random.default_rng(seed)
    total = np.zeros((120, 160, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        grid = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += cv2.resize(grid, (160, 120), interpolation=cv2.INTER_CUBIC) / cells**0.3
    total = cv2.GaussianBlur(total, (0, 0), 0.3 + 3 * rng.uniform())
    made = rng.uniform(70, 180) + rng.uniform(20, 70) * total
    return np.clip(made, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def batches(specs) -> list[Views]:
    """48 pictures as batches of one."""
    pictures = [Planes((textured(i),), full_range=True) for i in range(48)]
    return [dict(make_batch([p], specs).views) for p in pictures]


@pytest.fixture(scope="session")
def tiny():
    """The float model of ``tiny_onnx``; not to be changed."""
    pytest.importorskip("onnx")
    from tiny_onnx import tiny_graph

    return tiny_graph()


@pytest.fixture(scope="session")
def tiny_batches() -> list[Views]:
    """40 pictures for it, as batches of one."""
    pytest.importorskip("onnx")
    from tiny_onnx import pictures

    return pictures(40)


def join(parts: list[Views]) -> Views:
    """Batches of one to one batch."""
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@pytest.fixture(scope="session")
def tensors(batches):
    """The pictures as the arguments of a model."""
    torch = pytest.importorskip("torch")
    return [tuple(torch.from_numpy(b[name]) for name in ("whole", "fragments")) for b in batches]


def fill_(student, tensors, seed: int = 4) -> None:
    """Draw weights whose activations stay of one size, and a head whose logits spread over -2..2.

    Every convolution is scaled so that its output has a mean square of 1 on real pictures, times a
    factor for each channel, as folded BatchNorms leave them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normalise(module, _, output):
        gain = torch.exp(0.2 * torch.randn(output.shape[1], generator=generator))
        scale = gain / output.square().mean((0, 2, 3)).sqrt().clamp_min(1e-3)
        module.weight *= scale[:, None, None, None]
        module.bias *= scale
        return output * scale[:, None, None]

    with torch.no_grad():
        convs = [m for m in student.trunk.modules() if isinstance(m, torch.nn.Conv2d)]
        for conv in convs:
            fan_in = conv.weight[0].numel()
            conv.weight.normal_(0, fan_in**-0.5, generator=generator)
            conv.bias.normal_(0, 0.1, generator=generator)
        hooks = [conv.register_forward_hook(normalise) for conv in convs]
        together = [torch.cat(views) for views in zip(*tensors, strict=True)]
        features = student.features(*together)
        for hook in hooks:
            hook.remove()
        student.feature_mean.copy_(features.mean(0))
        student.feature_std.copy_(features.std(0).clamp_min(1e-2))
        # one direction in which pictures differ, as a fitted head reads: rounding averages out
        standard = (features - student.feature_mean) / student.feature_std
        _, _, directions = torch.linalg.svd(standard, full_matrices=False)
        gains = torch.randn(len(student.hidden.bias), generator=generator)
        student.hidden.weight.copy_(gains[:, None] * directions[0] / len(directions[0]) ** 0.5)
        student.hidden.bias.normal_(0, 0.1, generator=generator)
        student.quality.weight.normal_(0, 1, generator=generator)
        logits = student.logits(*together)
        student.quality.weight *= 1.0 / logits.std()
        student.quality.bias.sub_((student.logits(*together)).mean())


@pytest.fixture
def student(trained_student):
    """A copy of the student that a test may change."""
    import copy

    return copy.deepcopy(trained_student)


@pytest.fixture(scope="session")
def trained_student(tensors):
    """A student as if trained; not to be changed."""
    from distill.models.student import Student

    made = Student().eval()
    fill_(made, tensors)
    return made


@pytest.fixture(scope="session")
def quality(trained_student, batches):
    """The student's own quality of every picture, (N,)."""
    import torch

    views = join(batches)
    with torch.no_grad():
        found = trained_student(*(torch.from_numpy(views[n]) for n in ("whole", "fragments")))
    return found.numpy()


@pytest.fixture(scope="session")
def graph(trained_student, specs):
    """The float graph; not to be changed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from distill.models.student import Deployed
    from quant.export_onnx import export_graph

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        return export_graph(Deployed(trained_student), specs)


@pytest.fixture(scope="session")
def run_graph():
    """``run_graph(graph, views)``: the graph's output for a batch in ONNX Runtime, (N,)."""

    def run(graph, views):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, views)[0].reshape(-1)

    return run


@pytest.fixture(scope="session")
def all_views(batches) -> Views:
    """Every picture in one batch."""
    return join(batches)
