"""One head for both precisions, and weights on INT8's grid."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from dgiqa_stream.correlation import srcc  # noqa: E402
from quant.head import (  # noqa: E402
    HeadConfig,
    KernelRidge,
    distil_head,
    head_size,
    refit_graphs_,
)
from quant.qat import on_grid, snap_weights_  # noqa: E402

NUM_FEATURES = 40
QUICK = HeadConfig(width=64, num_steps=600, batch=64, rate=3e-3, dropout=0.1)


@pytest.fixture
def features():
    """Float features whose first half is informative, INT8 ones whose second half is disturbed."""
    rng = np.random.default_rng(3)
    of_float = rng.standard_normal((600, NUM_FEATURES)).astype(np.float32)
    noise = rng.standard_normal(of_float.shape).astype(np.float32) * 0.5
    noise[:, : NUM_FEATURES // 2] *= 0.02
    direction = rng.standard_normal(NUM_FEATURES // 2)
    mos = 1 / (1 + np.exp(-of_float[:, : NUM_FEATURES // 2] @ direction / 3))
    return of_float, of_float + noise, mos.astype(np.float32)


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_the_teacher_is_kernel_ridge_regression(ridge):
    """On standard normal features, which clipping hardly touches, predictions are those of the
    textbook's formula solved another way (eigenvectors of the kernel), to 1e-6.
    """
    rng = np.random.default_rng(7)
    x = np.clip(rng.standard_normal((80, 6)), -3, 3).astype(np.float32)
    mos = rng.uniform(size=80).astype(np.float32)
    new = np.clip(rng.standard_normal((20, 6)), -2, 2).astype(np.float32)
    mean, std = x.mean(0), x.std(0)
    a, b = (np.clip((v - mean) / std, -4, 4).astype(float) for v in (x, new))
    between = ((a[:, None] - a[None]) ** 2).sum(2)
    scale = 1.5 / np.median(between)
    values, vectors = np.linalg.eigh(np.exp(-scale * between))
    dual = vectors @ ((vectors.T @ (mos - mos.mean())) / (values + ridge))
    wanted = np.exp(-scale * ((b[:, None] - a[None]) ** 2).sum(2)) @ dual + mos.mean()
    found = KernelRidge(x, mos, width=1.5, ridge=ridge)(new)
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # distances in float32


def test_far_away_pictures_get_the_mean_rating():
    """Where nothing is known the teacher says the mean, not an extrapolated line."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((50, 12)).astype(np.float32)
    mos = rng.uniform(size=50).astype(np.float32)
    teacher = KernelRidge(x, mos, width=50.0, ridge=0.1)
    far = np.where(rng.uniform(size=(5, 12)) < 0.5, -100, 100).astype(np.float32)
    np.testing.assert_allclose(teacher(far), mos.mean(), atol=1e-3)


def test_the_head_learns_what_the_teacher_says(features):
    """On pictures it was not fitted to, the head's order is the teacher's: SRCC 0.9 or more."""
    of_float, _, mos = features
    head = distil_head(of_float[:400], of_float[:400], mos[:400].astype(float), QUICK)
    assert srcc(head(of_float[400:]), mos[400:]) >= 0.9


def test_the_head_looks_away_from_disturbed_features(features):
    """Taught by both precisions it differs between them, on new pictures, by a quarter less than
    a head taught by the float ones alone does.
    """
    of_float, of_int8, mos = features
    quality = mos.astype(float)

    def gap(head):
        return np.abs(head(of_float[400:]) - head(of_int8[400:])).mean()

    both = distil_head(of_float[:400], of_int8[:400], quality[:400], QUICK)
    alone = distil_head(of_float[:400], of_float[:400], quality[:400], QUICK)
    assert gap(both) < 0.75 * gap(alone)


def test_a_graph_takes_a_wider_head(graph, batches, run_graph):
    """A float graph and its INT8 graph get one head of another width: its size is told, both run,
    and on the pictures they were fitted to both follow the ratings.
    """
    from quant.ptq import Int8StaticConfig, quantize_onnx

    reference = onnx.ModelProto()
    reference.CopyFrom(graph)
    quantised = quantize_onnx(reference, Int8StaticConfig(), batches[:8])
    before = head_size(reference)
    rng = np.random.default_rng(0)
    mos = rng.uniform(0.2, 0.8, len(batches)).astype(np.float32)
    config = HeadConfig(num_looks=1, width=32, ridge=0.01, num_steps=800, batch=48, dropout=0.0)
    size = refit_graphs_(reference, quantised, iter(batches), mos, config)
    num_features = (before - 2 * 64 - 1) // 64
    assert size == 32 * num_features + 32 + 32 + 1 == head_size(reference) == head_size(quantised)
    views = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
    for made in (reference, quantised):
        assert srcc(run_graph(made, views), mos) >= 0.9


def test_weights_on_the_grid_stay_there():
    """Snapping twice is snapping once, and moves no weight by more than half a step."""
    conv = torch.nn.Conv2d(8, 4, 3)
    before = conv.weight.detach().clone()
    snap_weights_(conv)
    step = before.abs().amax((1, 2, 3), keepdim=True) / 127
    assert torch.equal(on_grid(conv.weight.detach()), conv.weight.detach())
    assert float(((conv.weight.detach() - before).abs() / step).max()) <= 0.5 + 1e-4
