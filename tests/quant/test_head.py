"""One head for both precisions, and weights on INT8's grid."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402

from dgiqa_stream.correlation import srcc  # noqa: E402
from dgiqa_stream.errors import ConfigError  # noqa: E402
from dgiqa_stream.preprocess import ViewSpec  # noqa: E402
from quant.correction import head_nodes  # noqa: E402
from quant.head import (  # noqa: E402
    HeadConfig,
    Labels,
    _anchored,
    distil_head,
    distil_heads,
    features_of,
    head_size,
    load_features,
    origin_of,
    refit_,
    save_features,
)
from quant.kernel_ridge import KernelRidge  # noqa: E402
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


def rated_only(mos: np.ndarray) -> Labels:
    """Labels of pictures that are in no ladder."""
    nothing = np.zeros(len(mos), np.int64)
    return Labels(mos.astype(np.float32), nothing - 1, nothing, unknown(len(mos)), wholly(len(mos)))


def wholly(number: int, share: float = 1.0) -> np.ndarray:
    """How much pseudo-MOS says, the same for all."""
    return np.full(number, share, np.float32)


def unknown(number: int) -> np.ndarray:
    """No pseudo-MOS."""
    return np.full(number, np.nan, np.float32)


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
    logits = np.log(mos[:400] / (1 - mos[:400])).astype(float)
    head = distil_head(of_float[:400], of_float[:400], logits, rated_only(mos[:400]), QUICK)
    assert srcc(head(of_float[400:]), mos[400:]) >= 0.9


def test_joined_heads_answer_by_their_mean(features):
    """Two heads in one answer the mean of both, to float64's rounding, and they do differ."""
    of_float, of_int8, mos = features
    given = of_float[:200], of_int8[:200], mos[:200].astype(float), rated_only(mos[:200])
    quick = msgspec.structs.replace(QUICK, num_steps=40, num_heads=2)
    each = [
        distil_head(*given, msgspec.structs.replace(quick, seed=quick.seed + i))(of_float)
        for i in range(2)
    ]
    assert not np.allclose(*each, atol=1e-3)
    joined = distil_heads(*given, quick)(of_float)
    np.testing.assert_allclose(joined, np.mean(each, 0), rtol=0, atol=1e-12)


def test_the_head_looks_away_from_disturbed_features(features):
    """Taught by both precisions it differs between them, on new pictures, by a quarter less than
    a head taught by the float ones alone does.
    """
    of_float, of_int8, mos = features
    quality = np.log(mos[:400] / (1 - mos[:400])).astype(float)
    labels = rated_only(mos[:400])

    def gap(head):
        return np.abs(head(of_float[400:]) - head(of_int8[400:])).mean()

    both = distil_head(of_float[:400], of_int8[:400], quality, labels, QUICK)
    alone = distil_head(of_float[:400], of_float[:400], quality, labels, QUICK)
    assert gap(both) < 0.75 * gap(alone)


def test_the_head_keeps_ladders_in_order(features):
    """Where the teacher says that worse is better, the hinge turns new ladders round: at most 20 %
    of their steps fall without it, at least 80 % with it.
    """
    of_float, _, mos = features
    rng = np.random.default_rng(1)
    damage = np.zeros(NUM_FEATURES, np.float32)
    damage[-3:] = 1.0
    clean = rng.standard_normal((120, NUM_FEATURES)).astype(np.float32)
    ladders = (clean[:, None] + np.arange(4)[:, None] * damage).reshape(-1, NUM_FEATURES)
    level = np.tile(np.arange(4), 120)
    x = np.concatenate([of_float[:200], ladders[:320]]).astype(np.float32)
    quality = np.concatenate([mos[:200], 0.4 + 0.1 * level[:320]]).astype(float)
    number = np.concatenate([np.full(200, -1), np.repeat(np.arange(80), 4)])
    labels = Labels(
        quality.astype(np.float32),
        number,
        np.concatenate([np.zeros(200, int), level[:320]]),
        unknown(520),
        wholly(520),
    )
    shares = []
    for weight in (0.0, 20.0):
        config = msgspec.structs.replace(QUICK, ladder_weight=weight)
        logits = distil_head(x, x, quality, labels, config)(
            ladders[320:].astype(np.float32)
        ).reshape(40, 4)
        shares.append(float((np.diff(logits, axis=1) < 0).mean()))
    assert shares[0] <= 0.2
    assert shares[1] >= 0.8


def test_a_ladder_falls_from_the_teachers_level_as_the_former_head_fell():
    """On a ladder the wanted logits are the teacher's of its clean picture less the former falls;
    elsewhere they are the teacher's.
    """
    taught = np.array([0.3, 1.0, 0.9, 0.8])
    former = np.array([9.0, 5.0, 3.5, 1.0])
    labels = Labels(
        np.array([0.6, np.nan, np.nan, np.nan], np.float32),
        np.array([-1, 0, 0, 0]),
        np.array([0, 0, 1, 2]),
        unknown(4),
        wholly(4),
    )
    np.testing.assert_allclose(_anchored(taught, former, labels), [0.3, 1.0, -0.5, -3.0])


def test_a_ladder_with_pseudo_mos_falls_by_it():
    """Where pseudo-MOS is known, the wanted quality is that of the clean picture times it, whatever
    the former head said; a ladder where one picture lacks it falls as the former head fell, and a
    share between the two lies between them.
    """
    taught = np.log([0.8 / 0.2, 9.0, 9.0, 0.6 / 0.4, 9.0])
    former = np.array([5.0, 1.0, 1.0, 4.0, 3.0])
    labels = Labels(
        unknown(5),
        np.array([0, 0, 0, 1, 1]),
        np.array([0, 1, 2, 0, 1]),
        np.array([1.0, 0.5, 0.25, np.nan, np.nan], np.float32),
        wholly(5),
    )
    wanted = _anchored(taught, former, labels)
    np.testing.assert_allclose(1 / (1 + np.exp(-wanted[:4])), [0.8, 0.4, 0.2, 0.6], rtol=1e-6)
    assert wanted[4] == pytest.approx(taught[3] - 1.0)
    mixed, by_head = (
        _anchored(taught, former, replace(labels, share=wholly(5, share))) for share in (0.25, 0.0)
    )
    np.testing.assert_allclose(by_head, taught[[0, 0, 0, 3, 3]] + [0, -4, -4, 0, -1])
    np.testing.assert_allclose(mixed, 0.25 * wanted + 0.75 * by_head)


def test_features_survive_their_file(features, tmp_path):
    """What is kept for another try is what was measured."""
    from quant.head import Features

    of_float, of_int8, mos = features
    kept = Features(of_float, of_int8, rated_only(mos))
    path = tmp_path / "features.npz"
    save_features(kept, path, origin="abc")
    found = load_features(path, origin="abc")
    np.testing.assert_array_equal(found.of_float, of_float)
    np.testing.assert_array_equal(found.of_int8, of_int8)
    np.testing.assert_array_equal(found.labels.mos, kept.labels.mos)
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]
    with pytest.raises(ConfigError, match="other models or views"):
        load_features(path, origin="xyz")
    np.savez(path, of_float=of_float)  # as a version before kept them
    with pytest.raises(ConfigError, match="another --cache"):
        load_features(path, origin="abc")
    path.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="another --cache"):
        load_features(path, origin="abc")


def test_features_have_their_origin_from_trunk_and_views(graph):
    """Another head leaves the origin as it is; another trunk or another reduction changes it."""
    views = [ViewSpec("whole", "whole", 32, 32)]
    smoothed = [msgspec.structs.replace(views[0], reduction="halved-smoothed")]
    first = origin_of(graph, graph, views)

    def changed(name):
        other = onnx.ModelProto()
        other.CopyFrom(graph)
        stored = next(t for t in other.graph.initializer if t.name == name)
        values = numpy_helper.to_array(stored) + 1
        stored.CopyFrom(numpy_helper.from_array(values, name))
        return origin_of(graph, other, views)

    (hidden, _), conv = head_nodes(graph), next(n for n in graph.graph.node if n.op_type == "Conv")
    assert changed(hidden.input[1]) == first
    assert changed(conv.input[1]) != first
    assert origin_of(graph, graph, smoothed) != first


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
    config = HeadConfig(
        num_looks=1, num_heads=2, width=16, ridge=0.01, num_steps=800, batch=48, dropout=0.0
    )
    features = features_of(reference, quantised, iter(batches), rated_only(mos))
    size = refit_(reference, quantised, features, config)
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
